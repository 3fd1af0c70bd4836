#!/usr/bin/env bash
# v4 on the GPUs of one machine, each using less than 24 GB. Flags are passed to the script.
set -euo pipefail

NUM_GPUS="${NUM_GPUS:-8}"                       # processes, one per GPU
PRESET="${PRESET:-large}"                       # "auto" chooses model and batch by the GPU's memory
BATCH_SIZE_PER_GPU="${BATCH_SIZE_PER_GPU:-96}"  # sequences per step; only with PRESET="large"
MAX_SAMPLES="${MAX_SAMPLES:-10M}"               # documents
EPOCHS="${EPOCHS:-5}"
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
DATASET="${DATASET:-hf}"                        # "hf", "imdb", a Hub id, or files
DEVICE="${DEVICE:-cuda}"                        # "cpu" for the CPU, with gloo

# shellcheck source=scripts/launch.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
if [[ "$PRESET" != auto ]]; then
  set -- --batch-size="$BATCH_SIZE_PER_GPU" "$@"
fi
launch train_h200_8gpu_v4 "$PYTHON" -m microbert.torchrun --standalone --nproc-per-node="$NUM_GPUS" mlm_pretrain_v4.py \
  --device="$DEVICE" --dataset="$DATASET" --max-samples="$MAX_SAMPLES" --preset="$PRESET" --epochs="$EPOCHS" --learning-rate="$LEARNING_RATE" "$@"
