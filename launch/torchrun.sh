#!/usr/bin/env bash
# One node with torchrun:   launch/torchrun.sh CONFIG.yaml [section.key=value ...]
# More nodes, on each:      NNODES=4 NODE_RANK=0..3 MASTER_ADDR=host0 launch/torchrun.sh CONFIG.yaml ...
# GPUS: processes per node (default: all GPUs, else 2).
set -euo pipefail
if [ -z "${GPUS:-}" ]; then
    GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
    [ "$GPUS" -gt 0 ] || GPUS=2
fi
# Seconds from SIGTERM or Ctrl-C until torchrun kills its processes: the step, an evaluation and the save must fit.
# Heeded from torch 2.13 on (by its sources); before, it was always 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# torchrun, without the traceback of its own that would push the error of the run out of sight.
torchrun='import sys; sys.tracebacklimit = 0; from torch.distributed.run import main; main()'
exec python -c "$torchrun" --nproc-per-node "$GPUS" --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" --no-python skv-train "$@"
