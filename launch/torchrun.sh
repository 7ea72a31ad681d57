#!/usr/bin/env bash
# One node with torchrun:   launch/torchrun.sh CONFIG.yaml [section.key=value ...]
# More nodes, on each:      NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host0 launch/torchrun.sh CONFIG.yaml ...
# GPUS: processes per node (default: all GPUs, else 2).
set -euo pipefail
if [ -z "${GPUS:-}" ]; then
    GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [ "$GPUS" -gt 0 ] || GPUS=2
fi
exec torchrun --nproc-per-node "$GPUS" --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --no-python skv-train "$@"
