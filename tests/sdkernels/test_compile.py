"""The kernels compile for GPUs that are not there, and the check that says so can fail.

The whole table is the job of `python -m sdkernels.compile_check` in CI; here one architecture goes through the command,
and the check is shown what it has to refuse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sdkernels import compile_check

COMPILES = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
pytestmark = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")


def the_case(kernel: str, variant: str) -> compile_check.Case:
    (case,) = (case for case in compile_check.cases("sm_90") if (case.kernel, case.variant) == (kernel, variant))
    return case


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_without_stack_or_spills(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "sdkernels.compile_check", "--arch", "sm_90", "--json", str(report)],
        env=COMPILES | {"PYTHONPATH": str(root / "kernels")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    results = json.loads(report.read_text())["results"]
    assert len(results) == len(compile_check.cases("sm_90"))
    assert all(result["registers"] > 0 and result["stack"] == result["spills"] == 0 for result in results)
    assert all(result["kernel"].removesuffix("_kernel") in run.stdout for result in results)


def test_a_block_that_does_not_fit_the_registers_is_refused() -> None:
    case = the_case("row_statistics_kernel", "both sides")
    case = replace(case, block=8192, warps=4, constants=case.constants | {"BV": 8192})
    result = compile_check.check("sm_90", case)
    assert result.spills > 0
    assert any("spills" in problem for problem in result.problems)
    assert "FAIL" in compile_check.table_line(result)


def test_a_kernel_that_does_not_compile_is_refused() -> None:
    case = the_case("candidates_kernel", "groups of 4")
    result = compile_check.check("sm_90", replace(case, constants=case.constants | {"BC": 1000}))
    assert any("does not compile" in problem for problem in result.problems)


def test_more_shared_memory_than_a_block_can_have_is_a_problem() -> None:
    _, most = compile_check.CHIPS["sm_80"]
    numbers = {"registers": 64, "stack": 0, "spills": 0, "shared": most}
    assert compile_check.problems_of(numbers, most) == []
    (problem,) = compile_check.problems_of(numbers | {"shared": most + 1}, most)
    assert "shared memory" in problem


def test_the_assemblers_report_is_read() -> None:
    log = (
        "ptxas info    : Function properties for k\n"
        "    24 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads\n"
        "ptxas info    : Used 96 registers, used 1 barriers, 24 bytes cumulative stack size\n"
    )
    assert compile_check.parse_assembler_log(log) == {"registers": 96, "stack": 24, "spills": 48}
    with pytest.raises(ValueError, match="must hold ptxas' resource report"):
        compile_check.parse_assembler_log("")


def test_every_kernel_of_the_backend_is_checked_on_every_chip() -> None:
    from sdkernels.tile.triton_backend import buckets, divergence, softmax_gradient, statistics, topk

    modules = (buckets, divergence, softmax_gradient, statistics, topk)
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    for arch in compile_check.CHIPS:
        assert {case.kernel for case in compile_check.cases(arch)} == kernels
