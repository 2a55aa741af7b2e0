#!/usr/bin/env bash
# Half an hour on a CUDA device, from the root of a checkout: tests, tunes and measures, in steps. README.md beside it.
#
#   bash benchmarks/gpu_run.sh [--list] [STEP ...]      --cpu: the same with tiny sizes and without a GPU
#
# PYTHON           with torch and triton, rich, pytest and hypothesis; sdcore itself need not be installed (python3)
# GPU_RUN_SECONDS  after which nothing more runs (the sum of the steps' limits)
# GPU_RUN_FOLDER   what is done, and where a second start goes on (build/gpu-run, build/gpu-run-cpu)
# GPU_RUN_MODE     cpu is --cpu
# OUT              a folder for gpu-run.tar.gz, the whole of GPU_RUN_FOLDER, written after every step
set -u
root="$(cd "$(dirname "$0")/.." && pwd)" || exit 2
cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m sdcore.bench.gpu "$@"
