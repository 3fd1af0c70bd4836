#!/usr/bin/env bash
# v3 on several machines. Run it on each machine with the same values except NODE_RANK. Flags are passed to the script.
#
#   NNODES=2 NODE_RANK=0 HEAD_NODE=host0 scripts/train_multinode.sh      on host0
#   NNODES=2 NODE_RANK=1 HEAD_NODE=host0 scripts/train_multinode.sh      on the other machine
set -euo pipefail

NNODES="${NNODES:-2}"                           # machines
NODE_RANK="${NODE_RANK:-0}"                     # of this machine; 0 on HEAD_NODE
HEAD_NODE="${HEAD_NODE:-localhost}"             # name or address of the first machine, reachable from all
PORT="${PORT:-29400}"                           # on HEAD_NODE; different for simultaneous runs
MAX_RESTARTS="${MAX_RESTARTS:-3}"               # restarts of all processes after one has failed
NUM_GPUS="${NUM_GPUS:-8}"                       # per machine
BATCH_SIZE_PER_GPU="${BATCH_SIZE_PER_GPU:-32}"  # sequences per step
MAX_SAMPLES="${MAX_SAMPLES:-5M}"                # documents
EPOCHS="${EPOCHS:-5}"
LEARNING_RATE="${LEARNING_RATE:-3e-5}"
DATASET="${DATASET:-hf}"                        # "hf", "imdb", a Hub id, or files
DEVICE="${DEVICE:-cuda}"                        # "cpu" for the CPU, with gloo

# shellcheck source=scripts/launch.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh"
IS_HOST=0
if [[ "$NODE_RANK" == 0 ]]; then
  IS_HOST=1
fi
launch "train_multinode-$NODE_RANK" "$PYTHON" -m microbert.torchrun --nnodes="$NNODES" --nproc-per-node="$NUM_GPUS" --max-restarts="$MAX_RESTARTS" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:$PORT" --rdzv-id="microbert-$PORT" --rdzv-conf="is_host=$IS_HOST" mlm_pretrain_v3.py \
  --device="$DEVICE" --dataset="$DATASET" --max-samples="$MAX_SAMPLES" --batch-size="$BATCH_SIZE_PER_GPU" --epochs="$EPOCHS" \
  --learning-rate="$LEARNING_RATE" "$@"
