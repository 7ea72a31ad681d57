# Sourced by the launch scripts: a virtual environment in .venv with the tested set of packages.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
if [ ! -x .venv/bin/python ]; then
    "$python" -m venv .venv
fi
. .venv/bin/activate
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
if [ "$DS_ACCELERATOR" = cpu ]; then
    # torch would take the GPUs of this machine, and DeepSpeed the CPU.
    export CUDA_VISIBLE_DEVICES=
fi
if [ ! -e .venv/installed ] || [ constraints.txt -nt .venv/installed ] || [ pyproject.toml -nt .venv/installed ]; then
    # torch first: DeepSpeed's build looks for it, and the pinned version decides which build is fetched.
    pip install -q --disable-pip-version-check -c constraints.txt torch
    pip install -q --disable-pip-version-check -c constraints.txt -e '.[plot,test]'
    touch .venv/installed
fi
