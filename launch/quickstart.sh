#!/usr/bin/env bash
# Sets everything up in .venv, then pre-trains a small model twice on the source code of Python's standard library, on
# two CPU processes: with stochastic KV routing, and dense. Ends with the loss of both by cache size, and sampled text.
# GPUs are hidden from it, so that it shows the same everywhere.
# Results: runs/quickstart. Arguments go to both runs, e.g. train.steps=50.
set -euo pipefail
export DS_ACCELERATOR=cpu
. "$(dirname "$0")/common.sh"
out=runs/quickstart
rm -rf "$out"/r_cla "$out"/dense
began=$SECONDS

stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
if [ ! -d "$out/stdlib" ]; then
    echo "== preparing the source code under $stdlib"
    skv-data prepare "$stdlib/**/*.py" --exclude '*/site-packages/*' --exclude '*/test/*' --exclude '*/tests/*' \
        --out "$out/stdlib"
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one core for each process
for run in r_cla:r_cla dense:none; do
    echo "== training ${run%:*}"
    torchrun --standalone --nproc-per-node 2 --no-python skv-train configs/tiny.yaml \
        routing.policy="${run#*:}" train.output_dir="$out/${run%:*}" "$@"
done

echo "== loss by cache size"
skv-eval compare "$out/r_cla" "$out/dense" --out "$out"
echo "== text sampled from the routed model with half of its cache"
skv-eval "$out"/r_cla/checkpoints/step_* --retention 0.5 --prompt 'def read_file(path):' --new-tokens 200 --temperature 0.7
echo "== done: $((SECONDS - began)) s after installation"
