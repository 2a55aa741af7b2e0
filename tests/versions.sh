#!/usr/bin/env bash
# Runs a part of the tests on the oldest torch, triton and transformers that pyproject.toml admits, and on the newest of
# everything: `make test-versions`, or tests/versions.sh newest for one of them. Not in CI, which has constraints.txt.
#
# Each has an environment of its own in build/versions, made at the first run and kept; remove it to get what is newest
# by then. On Linux, torch from PyPI is the build for CUDA, 6 GB an environment; pip's own settings
# (PIP_EXTRA_INDEX_URL, a constraint in PIP_CONSTRAINT) choose another.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
# What touches other packages most: models, caches, masks, warnings, torch's operators, Triton, the trainer, TRL's.
TESTS=(
    'tests/test_docs.py::test_python_blocks_run_when_pasted[README.md]' tests/test_warnings.py tests/test_public_api.py
    tests/sdkernels/test_operators.py tests/sdkernels/test_divergence.py tests/sdkernels/test_triton_interpret.py
    tests/sdkernels/test_compile.py
    tests/sdcore/prefix/test_models.py tests/sdcore/prefix/test_traps.py tests/sdcore/prefix/test_sampling.py
    tests/sdcore/prefix/test_families.py tests/sdcore/prefix/test_attention.py tests/sdcore/prefix/test_peft.py
    tests/sdcore/integrations/test_transformers.py tests/sdcore/integrations/test_trl_patch.py
    tests/sdcore/bench/test_prefix.py tests/sdcore/bench/test_trainer.py
    tests/sdcore/test_memory_timeline.py tests/sdcore/test_options.py tests/sdcore/test_trainer.py
)

constraints() {  # of oldest: the least version of each, from pyproject.toml; of newest: none
    "$PYTHON" - "$1" <<'EOF'
import re, sys, tomllib
with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for line in dependencies if sys.argv[1] == "oldest" else ():
    if least := re.match(r"(torch|triton|transformers)>=([\d.]+)", line):
        print(f"{least[1]}=={least[2]}.*")
EOF
}

install() {  # which, environment
    rm -rf "$2"
    "$PYTHON" -m venv "$2"
    constraints "$1" >"$2/constraints.txt"
    "$2/bin/python" -m pip install --quiet --constraint "$2/constraints.txt" --editable ".[dev,bench]"
    touch "$2/installed"
}

failed=()
[ $# -gt 0 ] || set -- oldest newest
for which in "$@"; do
    [[ $which == oldest || $which == newest ]] || { echo "expected oldest or newest, got $which" >&2; exit 2; }
    environment=build/versions/$which
    [ -e "$environment/installed" ] || install "$which" "$environment"
    echo "== $which: $("$environment/bin/python" -VV)"
    "$environment/bin/python" -m pip list --format freeze | grep -iE '^(torch|triton|transformers|peft|trl|datasets|numpy)='
    OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest "${TESTS[@]}" ${PYTEST_ARGS:-} || failed+=("$which")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed on: ${failed[*]}" >&2; exit 1; }
