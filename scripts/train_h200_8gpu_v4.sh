#!/usr/bin/env bash
# v4 on the GPUs of one machine, each held under 24 GB. Flags behind it are the script's own.
set -euo pipefail

NUM_GPUS="${NUM_GPUS:-8}"                       # processes, one for each GPU
PRESET="${PRESET:-large}"                       # "auto" takes model and batch by the GPU's memory
BATCH_SIZE_PER_GPU="${BATCH_SIZE_PER_GPU:-96}"  # sequences a step; counts only with PRESET="large"
MAX_SAMPLES="${MAX_SAMPLES:-10M}"               # documents to read
EPOCHS="${EPOCHS:-5}"
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
DATASET="${DATASET:-hf}"                        # "hf", "imdb", a Hub id, or files
DEVICE="${DEVICE:-cuda}"                        # "cpu" trains on the CPU, with gloo

# shellcheck source=scripts/launch.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
if [[ "$PRESET" != auto ]]; then
  set -- --batch-size="$BATCH_SIZE_PER_GPU" "$@"
fi
launch train_h200_8gpu_v4 "$PYTHON" -m microbert.torchrun --standalone --nproc-per-node="$NUM_GPUS" mlm_pretrain_v4.py \
  --device="$DEVICE" --dataset="$DATASET" --max-samples="$MAX_SAMPLES" --preset="$PRESET" --epochs="$EPOCHS" --learning-rate="$LEARNING_RATE" "$@"
