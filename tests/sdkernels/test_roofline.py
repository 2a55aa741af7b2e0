"""The page of estimates is what its program says, its bytes are what the backend launches, its counts are the code's.

Compiling every kernel takes a minute, so the page's compiled part is taken as it is, but for one kernel.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sdkernels import compile_check, gpu_estimates, machine_code, roofline, triton_backend
from sdkernels.gpu_estimates import GPUS, KERNELS_OF, Assumed, estimate, programs_of, step
from sdkernels.machine_code import Compiled, Counts, Instruction, counts_of, parse
from sdkernels.triton_backend import buckets, divergence, softmax_gradient, statistics, topk
from sdkernels.types import Objective, TileRows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "roofline.md"
A100, H200, B200 = GPUS
ROW = Compiled("divergence", "any", 2048, 8, 40, 0, 8.0, 2.0, Counts(40.0, 2.0, 28.0, 10.0))


def the_page() -> str:
    return PAGE.read_text(encoding="utf-8")


def compiled_of_the_page() -> tuple[dict[str, list[Compiled]], str]:
    return roofline.read_compiled(roofline.between(the_page(), "compiled"))


def test_the_pages_arithmetic_is_that_of_the_program() -> None:
    rows, version = compiled_of_the_page()
    page = the_page()
    assert roofline.compiled_tables(rows, version) == roofline.between(page, "compiled")
    assert roofline.estimate_tables(rows) == roofline.between(page, "estimates"), (
        "run: python -m sdkernels.roofline --write docs/roofline.md --keep-compiled"
    )


def test_the_page_has_every_kernel_with_the_launches_of_now() -> None:
    from sdkernels.triton_backend.configs import TABLE

    rows, _ = compiled_of_the_page()
    assert rows.keys() == compile_check.CHIPS.keys()
    for arch, found in rows.items():
        wanted = [
            (case.kernel.removesuffix("_kernel"), case.variant, case.block, case.warps, *machine_code.traffic(case))
            for case in compile_check.launched_by(TABLE[arch])
        ]
        of_page = [(row.kernel, row.variant, row.block, row.warps, row.read, row.written) for row in found]
        assert of_page == wanted, "run: python -m sdkernels.roofline --write docs/roofline.md"


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
def test_a_kernel_of_the_page_compiles_to_what_it_says() -> None:
    import triton

    rows, version = compiled_of_the_page()
    if version != triton.__version__:
        pytest.skip(f"the page was compiled with Triton {version}, this is {triton.__version__}")
    from sdkernels.triton_backend.configs import TABLE

    (case,) = (
        case
        for case in compile_check.launched_by(TABLE["sm_90"])
        if (case.kernel, case.variant) == ("divergence_kernel", "reverse KL, gradient bf16")
    )
    measured = machine_code.measure("sm_90", case)
    assert measured in rows["sm_90"], "run: python -m sdkernels.roofline --write docs/roofline.md"


class Launches:
    """Stands for a kernel: notes what it is called with, and does nothing."""

    def __init__(self, kernel: Any, noted: list[tuple[str, dict[str, Any]]]) -> None:
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.noted.append((self.kernel.__name__, dict(zip(self.kernel.arg_names, args, strict=False)) | options))

        return launch


ROWS, V = 5, 300


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    noted: list[tuple[str, dict[str, Any]]] = []
    for module in (statistics, divergence, softmax_gradient, buckets, topk):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Launches(getattr(module, name), noted))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return noted


def bytes_per_entry(launch: tuple[str, dict[str, Any]]) -> tuple[float, float]:
    """Of blocks of (ROWS, V): read, and written. The candidates of a top-k are a few entries of each row."""
    kernel, arguments = launch
    if kernel == "candidates_kernel":
        return 0.0, 0.0
    read = [name for name in ("p_student", "p_teacher", "p_logits") if _is_block(arguments.get(name))]
    gradient = arguments.get("p_gradient")
    return 4.0 * len(read), float(gradient.element_size()) if _is_block(gradient) else 0.0


def _is_block(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == (ROWS, V)


@pytest.mark.parametrize("kind", KERNELS_OF)
def test_a_divergence_launches_the_kernels_that_are_estimated(
    kind: str, launches: list[tuple[str, dict[str, Any]]]
) -> None:
    objective = Objective(alpha={"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}[kind])
    student, teacher = torch.zeros(2, ROWS, V).unbind()
    triton_backend.divergence_tile(
        student, teacher, TileRows(), objective, want_gradient=True, gradient_dtype=torch.bfloat16
    )
    estimated = {(row.kernel, row.variant): row for row in compiled_of_the_page()[0]["sm_90"]}
    rows = [estimated[name] for name in KERNELS_OF[kind]]
    assert [name for name, _ in launches] == [f"{row.kernel}_kernel" for row in rows]
    assert [bytes_per_entry(launch) for launch in launches] == [(row.read, row.written) for row in rows]


# Bytes per entry of all launches, in float32 and with a 16-bit gradient: what the kernels' headers promise.
PROMISED = {
    "forward KL": (Objective(alpha=0.0), 18),
    "reverse KL": (Objective(alpha=1.0), 18),
    "JSD": (Objective(alpha=0.5), 26),
    "reverse KL, entry clip": (Objective(alpha=1.0, entry_clip=0.1), 26),
    "JSD, student top-k": (Objective(alpha=0.5, support="topk", topk=5), 8 + 8 + 6),
    "JSD, student top-k without tail": (Objective(alpha=0.5, support="topk", topk=5, tail=False), 8),
    "sampled": (Objective(support="sampled"), 8 + 6),
}


@pytest.mark.parametrize("name", PROMISED)
def test_the_kernels_pass_over_the_logits_as_often_as_their_headers_say(
    name: str, launches: list[tuple[str, dict[str, Any]]]
) -> None:
    objective, promised = PROMISED[name]
    student, teacher = torch.randn(2, ROWS, V).unbind()
    triton_backend.divergence_tile(
        student,
        teacher,
        TileRows(target_ids=torch.zeros(ROWS, dtype=torch.int64)),
        objective,
        want_gradient=True,
        gradient_dtype=torch.bfloat16,
    )
    assert sum(sum(bytes_per_entry(launch)) for launch in launches) == promised


def test_the_loop_is_counted_without_what_a_branch_in_it_jumps_over() -> None:
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a00ff017624 */
                                                                     /* 0x000fe400078e00ff */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;           /* 0x0 */
        /*0020*/                   MUFU.EX2 R5, R4 ;                 /* 0x0 */
        /*0030*/              @!P5 BRA 0x60 ;                        /* 0x0 */
        /*0040*/                   FMUL R6, R6, R5 ;                 /* 0x0 */
        /*0050*/                   FMUL R7, R6, R5 ;                 /* 0x0 */
        /*0060*/                   FFMA R4, R5, R4, R6 ;             /* 0x0 */
        /*0070*/                   FSETP.GT.AND P0, PT, R4, R5, PT ; /* 0x0 */
        /*0080*/               @P0 BRA 0x10 ;                        /* 0x0 */
        /*0090*/                   EXIT ;                            /* 0x0 */
        /*00a0*/                   BRA 0xa0;                         /* 0x0 */
    """
    code = parse(sass)
    assert [i.name for i in code[:4]] == ["MOV", "LDG", "MUFU", "BRA"]
    assert code[3] == Instruction(0x30, "BRA", 0x60)
    assert counts_of(code, 2.0) == Counts(instructions=3.0, special=0.5, multiply_add=0.5, alu=0.5)
    straight = [instruction for instruction in code if instruction.target is None]
    assert counts_of(straight, 1.0).instructions == 8.0
    with pytest.raises(ValueError, match="must hold instructions"):
        counts_of([], 1.0)


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 6),  # 40 registers: 1280 a warp, 10,240 a program of 65,536
        ({"registers": 101}, 2),  # rounded up to 104
        ({"registers": 32, "warps": 16}, 4),  # 64 warps
        ({"registers": 32, "warps": 1}, 32),  # and no more programs than that
        ({"shared": 64 << 10}, 3),  # 228 KiB
    ],
)
def test_programs_are_bounded_by_registers_warps_and_shared_memory(changes: dict[str, int], programs: int) -> None:
    assert programs_of(ROW._replace(**changes), H200) == programs


def test_a_kernel_is_bound_by_its_slowest_part() -> None:
    assert estimate(ROW, H200, 1024).bound == "memory"
    assert estimate(ROW._replace(counts=Counts(90.0, 3.0, 57.0, 28.0)), H200, 1024).bound == "instructions"
    assert estimate(ROW._replace(counts=Counts(40.0, 20.0, 10.0, 10.0)), H200, 1024).bound == "special functions"
    assert estimate(ROW._replace(counts=Counts(40.0, 2.0, 10.0, 40.0)), H200, 1024).bound == "ALU"
    # An A100 has half of the lanes for multiplications and additions.
    wide = ROW._replace(counts=Counts(40.0, 2.0, 40.0, 0.0))
    clocks = [estimate(wide, gpu, gpu.multiprocessors).issue * gpu.clock for gpu in (A100, H200)]
    assert clocks[0] == pytest.approx(2 * clocks[1])


def test_few_rows_do_not_reach_the_bandwidth() -> None:
    many, few = estimate(ROW, H200, 1320), estimate(ROW, H200, 60)
    assert many.memory == pytest.approx(1320 * 151_936 * 10 / (0.9 * 4.8e12))
    assert few.memory == pytest.approx(60 * 151_936 * 10 / (60 * 2048 * 8 / 700e-9))


def test_the_byte_budget_of_the_design_comes_out() -> None:
    """4 matmuls: 12.9, 32 and 52 ms; 7.8 ms for the tiles of a KL; the head's gradient 165/C of the products."""
    ideal = Assumed(products=790 / 989, bandwidth=1.0, issue=1e3, latency=1e-12, product_rows=1)
    free = Counts(0.0, 0.0, 0.0, 0.0)
    rows = {
        name: ROW._replace(written=0.0 if name[0] == "row_statistics" else 2.0, counts=free)
        for kernels in KERNELS_OF.values()
        for name in kernels
    }
    for hidden, milliseconds in ((1024, 12.9), (2560, 32.2), (4096, 51.6)):
        found = step(H200, rows, "reverse KL", hidden, 2048, frozen=False, assumed=ideal)
        assert 1e3 * found.limit == pytest.approx(milliseconds, abs=0.1)
        head = 151_936 * hidden / 4.8e12
        # Beside the tiles: the head, read by three products of a chunk, and hidden states.
        small = -(-8192 // found.chunk) * 6 * head + 10 * 8192 * hidden / 4.8e12
        assert 1e3 * (found.tiles + found.kernels - small) == pytest.approx(7.8, abs=0.05)
        of_limit = (found.accumulated - 6 * head) / found.limit
        assert of_limit == pytest.approx(165 / found.chunk, rel=0.15)


def test_a_larger_workspace_never_makes_a_step_slower() -> None:
    for gpu in GPUS:
        named = {(row.kernel, row.variant): row for row in compiled_of_the_page()[0][gpu.arch]}
        for hidden in gpu_estimates.HIDDEN:
            times = [
                step(gpu, named, "reverse KL", hidden, workspace, frozen=False).slowest
                for workspace in gpu_estimates.WORKSPACES
            ]
            assert all(later <= 1.02 * sooner for sooner, later in pairwise(times))


def test_a_frozen_head_has_no_gradient_to_add_up() -> None:
    named = {(row.kernel, row.variant): row for row in compiled_of_the_page()[0]["sm_90"]}
    frozen, trained = (step(H200, named, "JSD", 1024, 256, frozen=frozen) for frozen in (True, False))
    assert frozen.accumulated == 0 < trained.accumulated
    assert frozen.limit * 4 == pytest.approx(trained.limit * 3)


def test_a_page_without_markers_or_compiled_part_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# nothing\n")
    with pytest.raises(ValueError, match="must have the markers <!-- estimates -->"):
        roofline.main(["--write", str(page), "--keep-compiled"])
    with pytest.raises(ValueError, match="must say with which Triton"):
        roofline.read_compiled("| a | b |")
    with pytest.raises(SystemExit):
        roofline.main(["--keep-compiled"])


def test_writing_the_page_again_changes_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(the_page(), encoding="utf-8")
    assert roofline.main(["--write", str(page), "--keep-compiled"]) == 0
    assert page.read_text(encoding="utf-8") == the_page()
