#!/usr/bin/env bash
# v2 on one GPU. Flags are passed to the script: scripts/train_1gpu.sh --dataset imdb --output-dir runs/mine
set -euo pipefail

BATCH_SIZE_PER_GPU="${BATCH_SIZE_PER_GPU:-32}"  # sequences per step
MAX_SAMPLES="${MAX_SAMPLES:-500K}"              # documents
EPOCHS="${EPOCHS:-5}"
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
DATASET="${DATASET:-hf}"                        # "hf", "imdb", a Hub id, or files
DEVICE="${DEVICE:-cuda}"                        # "cpu" without a GPU

# shellcheck source=scripts/launch.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
launch train_1gpu "$PYTHON" mlm_pretrain_v2.py \
  --device="$DEVICE" --dataset="$DATASET" --max-samples="$MAX_SAMPLES" --batch-size="$BATCH_SIZE_PER_GPU" --epochs="$EPOCHS" \
  --learning-rate="$LEARNING_RATE" "$@"
