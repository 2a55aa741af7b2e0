#!/usr/bin/env bash
# On a machine with a CUDA device, from the root of a checkout: the kernel tests compiled, then the benchmark.
#
#   bash benchmarks/gpu_run.sh [python]      results go to $OUT, or to benchmarks/results/<device>/
#
# It installs nothing into the Python it is given, which needs torch with CUDA, triton, rich, pytest and hypothesis, and
# not sdcore itself; peers that are missing get a row that says so. Both parts run whatever becomes of the other, and a failure of either is the
# exit status. GPU_RUN_TEST_SECONDS (default 240) bounds the tests.
set -u
python="${1:-python3}"
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
out="${OUT:-}"
log_dir="${out:-$(mktemp -d)}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_run.sh needs a Python whose torch sees a CUDA device, got $python" >&2
    exit 2
fi
"$python" - <<'PY' | tee "$log_dir/device.txt"
import platform, torch, triton
print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability())
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
PY

timeout "${GPU_RUN_TEST_SECONDS:-240}" "$python" -m pytest tests/sdkernels -q --maxfail=20 -p no:cacheprovider \
    2>&1 | tee "$log_dir/tests.log" | tail -40
tests=${PIPESTATUS[0]}

# `sdcore bench --device cuda --seconds 1`, without the command line's own requirement, typer.
"$python" - "$out" 2>&1 <<'PY' | tee "$log_dir/benchmark.log" | tail -80
import sys
from pathlib import Path
from sdcore.bench.divergence import run
from sdcore.bench.options import Options
run(Options(suite="divergence", device="cuda", seconds=1, output=Path(sys.argv[1]) if sys.argv[1] else None))
PY
benchmark=${PIPESTATUS[0]}

echo "kernel tests: exit $tests; benchmark: exit $benchmark; logs in $log_dir"
[ "$tests" -eq 0 ] && [ "$benchmark" -eq 0 ]
