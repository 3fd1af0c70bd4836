#!/usr/bin/env bash
# v4's large preset on one GPU of 24 GB. Flags are passed to the script: scripts/train_24gb.sh --output-dir runs/mine
set -euo pipefail

PRESET="${PRESET:-large}"                       # "auto" chooses model and batch by the GPU's memory
BATCH_SIZE_PER_GPU="${BATCH_SIZE_PER_GPU:-96}"  # sequences per step; only with PRESET="large"
MAX_SAMPLES="${MAX_SAMPLES:-10M}"               # documents
EPOCHS="${EPOCHS:-5}"
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
DATASET="${DATASET:-hf}"                        # "hf", "imdb", a Hub id, or files
DEVICE="${DEVICE:-cuda}"                        # "cpu" without a GPU

# shellcheck source=scripts/launch.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
if [[ "$PRESET" != auto ]]; then
  set -- --batch-size="$BATCH_SIZE_PER_GPU" "$@"
fi
launch train_24gb "$PYTHON" mlm_pretrain_v4.py \
  --device="$DEVICE" --dataset="$DATASET" --max-samples="$MAX_SAMPLES" --preset="$PRESET" --epochs="$EPOCHS" --learning-rate="$LEARNING_RATE" "$@"
