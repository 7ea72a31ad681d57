#!/usr/bin/env bash
# With DeepSpeed's launcher: launch/deepspeed.sh CONFIG.yaml [section.key=value ...]
# HOSTFILE: DeepSpeed's list of hosts (default: this one). DeepSpeed's own settings follow from CONFIG.yaml.
# On a machine without GPUs: DS_ACCELERATOR=cpu LAUNCHER_ARGS='--num_gpus 2' launch/deepspeed.sh ...
set -euo pipefail
# shellcheck disable=SC2086
exec deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${LAUNCHER_ARGS:-} --no_python skv-train "$@"
