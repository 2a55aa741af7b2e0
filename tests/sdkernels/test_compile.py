"""The kernels compile for GPUs that are not there, and the check that says so can fail.

The whole table is the job of `python -m sdkernels.compile_check` in CI; here one architecture goes through the command,
and the check is shown what it has to refuse.
"""

from __future__ import annotations

import json
import os
import re
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


def machine_code(kernel: str, variant: str) -> list[str]:
    """The accesses to memory and the barriers of a kernel in its order, as `LDG.E.128`; SASS of sm_90."""
    compiled, _ = compile_check.compile_case("sm_90", the_case(kernel, variant))
    return re.findall(r"\b((?:LDG|STG|LDGSTS|BAR)\.[A-Z0-9.]+)", compiled.asm["sass"])


@pytest.mark.parametrize("odd", ["", ", odd V"])
def test_rows_are_read_and_written_sixteen_bytes_at_a_time_whatever_v_is(odd: str) -> None:
    """Triton splits an access whose mask may end anywhere: into 4 bytes of float32, 2 of a 16-bit gradient."""
    case = the_case("row_statistics_kernel", f"both sides{odd}")
    loads = [code for code in machine_code(case.kernel, case.variant) if code.startswith("LDG")]
    assert loads == ["LDGSTS.E.BYPASS.128"] * len(loads)
    # Two blocks of both sides are on their way, each lane's part of them in pieces of four entries.
    assert len(loads) == 2 * 2 * case.block // (32 * case.warps) // 4
    case = the_case("divergence_kernel", f"reverse KL, gradient bf16{odd}")
    codes = machine_code(case.kernel, case.variant)
    entries = case.block // (32 * case.warps)
    assert codes.count("LDG.E.128") == 2 * entries // 4
    assert codes.count("STG.E.128") == entries // 8
    assert not any(code.startswith("STG.E.U16") for code in codes)
    # What else there is of 4 bytes are a row's statistics and sums, not its entries.
    assert codes.count("LDG.E") == codes.count("STG.E") == 4


@pytest.mark.parametrize("odd", ["", ", odd V"])
def test_a_barrier_stands_between_a_blocks_loads_and_its_stores(odd: str) -> None:
    """The 16-bit gradient lies over what is read."""
    codes = machine_code("divergence_kernel", f"reverse KL, gradient bf16{odd}")
    store = codes.index("STG.E.128")
    last_load = max(i for i, code in enumerate(codes) if code == "LDG.E.128")
    assert last_load < store
    assert any(code.startswith("BAR.SYNC") for code in codes[last_load:store])


def test_a_factor_of_one_ends_the_program_before_it_touches_the_gradient() -> None:
    compiled, _ = compile_check.compile_case("sm_90", the_case("scale_kernel", "a gradient in bf16"))
    codes = re.findall(r"\b(EXIT|LDG\.[A-Z0-9.]+|STG\.[A-Z0-9.]+)", compiled.asm["sass"])
    assert codes.index("EXIT") < min(i for i, code in enumerate(codes) if code.endswith(".128"))
    assert codes[: codes.index("EXIT")] == ["LDG.E"]


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
    most = compile_check.CHIPS["sm_80"].shared
    numbers = {"registers": 64, "stack": 0, "spills": 0, "shared": most}
    assert compile_check.problems_of(numbers, most) == []
    (problem,) = compile_check.problems_of(numbers | {"shared": most + 1}, most)
    assert "shared memory" in problem


@pytest.mark.parametrize("arch", ["sm_75", "sm_120", "gfx942", "gfx1201"])
def test_kernels_compile_for_chips_of_every_kind(arch: str) -> None:
    tried = ("both sides, V=1", "JSD, gradient fp16, bias bf16", "reverse KL, gradient bf16, odd V", "groups of 64")
    results = [compile_check.check(arch, case) for case in compile_check.cases(arch) if case.variant in tried]
    assert len(results) == len(tried)
    assert all(result.registers > 0 and not result.problems for result in results), results


def test_amds_report_is_read() -> None:
    report = "    .private_segment_fixed_size: 12\n    .vgpr_count:     96\n    .vgpr_spill_count: 3\n"
    assert compile_check.parse_amd(report) == {"registers": 96, "stack": 12, "spills": 3}
    with pytest.raises(ValueError, match="must hold vgpr_count"):
        compile_check.parse_amd("")


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
    from sdkernels.tile.triton_backend import buckets, divergence, scale, softmax_gradient, statistics, topk

    modules = (buckets, divergence, scale, softmax_gradient, statistics, topk)
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    for arch in compile_check.CHIPS:
        assert {case.kernel for case in compile_check.cases(arch)} == kernels
