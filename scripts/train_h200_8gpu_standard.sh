#!/usr/bin/env bash
# v3 on the GPUs of one machine. Flags are passed to the script:
#
#   scripts/train_h200_8gpu_standard.sh --output-dir runs/mine
set -euo pipefail

NUM_GPUS="${NUM_GPUS:-8}"                       # processes, one per GPU
BATCH_SIZE_PER_GPU="${BATCH_SIZE_PER_GPU:-32}"  # sequences per step
MAX_SAMPLES="${MAX_SAMPLES:-5M}"                # documents
EPOCHS="${EPOCHS:-5}"
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
DATASET="${DATASET:-hf}"                        # "hf", "imdb", a Hub id, or files
DEVICE="${DEVICE:-cuda}"                        # "cpu" for the CPU, with gloo

# shellcheck source=scripts/launch.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
launch train_h200_8gpu_standard "$PYTHON" -m microbert.torchrun --standalone --nproc-per-node="$NUM_GPUS" mlm_pretrain_v3.py \
  --device="$DEVICE" --dataset="$DATASET" --max-samples="$MAX_SAMPLES" --batch-size="$BATCH_SIZE_PER_GPU" --epochs="$EPOCHS" \
  --learning-rate="$LEARNING_RATE" "$@"
