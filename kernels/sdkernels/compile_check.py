"""Compiles every Triton kernel for every architecture, without a GPU, and refuses what would run badly.

`python -m sdkernels.compile_check [--arch sm_90 ...] [--json FILE] [--jobs 2]` compiles each kernel, in the
variants that differ in code, with the block sizes of `triton_backend/configs.py` and of `tables/`, down to machine code
with what ships in Triton's wheel, and prints registers per thread, stack, spills and shared memory. It exits
with 1 when a kernel does not compile, uses stack or spills, or wants more shared memory than a block of the chip can
have.

What it says nothing about is speed and correctness: `bytes` is what the kernel's algorithm moves per entry of the
tile, counted by hand, and the results are compared in tests/sdkernels/test_triton_interpret.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .tile.triton_backend import buckets, divergence, scale, softmax_gradient, statistics, topk
from .tile.triton_backend.configs import FUSED_MULTIPLY_ADD, MOST_BUCKETS, TABLE, Config, bucket_config
from .tile.triton_backend.topk import CANDIDATE_WARPS, CANDIDATES_PER_PROGRAM, LEAST_GROUP, MOST_GROUP
from .tile.tuned import table_of


class Chip(NamedTuple):
    """Says what is compiled for: Triton's target, whose launches, and the most shared memory of a block in bytes."""

    target: GPUTarget
    table: str  # what `tuned.architecture` says of it
    shared: int


def _nvidia(capability: int, table: str, kibibytes: int) -> Chip:
    return Chip(GPUTarget("cuda", capability, 32), table, kibibytes << 10)


CHIPS = {
    "sm_75": _nvidia(75, "sm_80", 64),
    "sm_80": _nvidia(80, "sm_80", 163),
    "sm_86": _nvidia(86, "sm_80", 99),
    "sm_89": _nvidia(89, "sm_80", 99),
    "sm_90": _nvidia(90, "sm_90", 227),
    "sm_100": _nvidia(100, "sm_100", 227),
    "sm_103": _nvidia(103, "sm_100", 227),
    "sm_120": _nvidia(120, "sm_100", 99),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), "rocm", 64 << 10),
    "gfx950": Chip(GPUTarget("hip", "gfx950", 64), "rocm", 160 << 10),
    "gfx1100": Chip(GPUTarget("hip", "gfx1100", 32), "rocm", 64 << 10),
    "gfx1201": Chip(GPUTarget("hip", "gfx1201", 32), "rocm", 64 << 10),
}


@dataclass(frozen=True)
class Case:
    """Names a kernel, how it is launched, and the arguments that select code."""

    kernel: str  # name of the function in triton_backend
    variant: str
    block: int
    warps: int
    bytes_per_entry: int  # moved per entry of the tile, once through
    constants: dict[str, Any] = field(default_factory=dict)  # tl.constexpr arguments, and None for absent ones
    gradient: str = "*bf16"
    entry: str = ""  # in the tables of launches; empty where the launch is fixed
    aligned: bool = True  # V is a multiple of 16; where it is not, the rows are padded to one
    bias: str = "*fp32"


@dataclass(frozen=True)
class Result:
    """What became of a case on one architecture; `problems` is empty where all is well."""

    arch: str
    kernel: str
    variant: str
    block: int
    warps: int
    bytes_per_entry: int
    registers: int
    stack: int
    spills: int
    shared: int
    seconds: float
    problems: tuple[str, ...]


def cases(arch: str) -> list[Case]:
    """Returns every kernel in every variant that `arch` launches: untuned, and as its measured table has it."""
    untuned = TABLE[CHIPS[arch].table]
    launched = launched_by(untuned)
    measured = table_of(arch)
    for entry, rows in {} if measured is None else measured.kernels.items():
        for config in dict.fromkeys(Config(row.block, row.warps, row.stages) for row in rows):
            if config != untuned[entry]:
                launched += [case for case in launched_by(untuned | {entry: config}) if case.entry == entry]
    return launched


def launched_by(table: Mapping[str, Any]) -> list[Case]:
    """Returns every kernel in every variant, with the launches of `table`, a Config by kernel."""
    launched = []

    def add(
        entry: str,
        variant: str,
        size: int,
        constants: dict[str, Any],
        gradient: str = "*bf16",
        aligned: bool = True,
        bias: str = "*fp32",
    ) -> None:
        config = table[entry]
        constants = {"BV": config.block, "STAGES": config.stages, "PADDED": not aligned} | constants
        kernel = entry.removesuffix("_clipped") + "_kernel"
        block = constants["BV"]
        launched.append(Case(kernel, variant, block, config.warps, size, constants, gradient, entry, aligned, bias))

    no_bias: dict[str, Any] = {"p_student_bias": None, "p_teacher_bias": None}
    plain = no_bias | {"STUDENT_SOFTCAP": False, "TEACHER_SOFTCAP": False}
    capped: dict[str, Any] = {"STUDENT_SOFTCAP": True, "TEACHER_SOFTCAP": True}
    no_groups: dict[str, Any] = {"p_groups": None, "GROUP": 1, "GROUPS_OF_TEACHER": False, "EXCLUDE": False}
    no_targets = {"p_target_ids": None}
    add("row_statistics", "both sides", 8, plain | no_groups | no_targets)
    add("row_statistics", "both sides, odd V", 8, plain | no_groups | no_targets, aligned=False)
    add("row_statistics", "both sides, targets, bias, soft-cap", 8, capped | no_groups)
    add("row_statistics", "both sides without ids", 8, capped | no_groups | no_targets | {"EXCLUDE": True})
    add("row_statistics", "one side, targets", 4, plain | no_groups | {"p_teacher": None})
    for group, of in ((LEAST_GROUP, "student"), (MOST_GROUP, "teacher")):
        groups = {"GROUP": group, "GROUPS_OF_TEACHER": of == "teacher", "EXCLUDE": False}
        add("row_statistics", f"both sides, maxima of {group} of the {of}", 8, capped | no_targets | groups)
    for number, family in enumerate(("forward KL", "reverse KL", "JSD")):
        unclipped = plain | {"FAMILY": number, "entry_clip": None}
        one_pass = family != "JSD"
        add("divergence", f"{family}, loss", 8, unclipped | {"ACCUMULATE": True, "p_gradient": None})
        add("divergence", f"{family}, gradient bf16", 10, unclipped | {"ACCUMULATE": one_pass})
        add("divergence", f"{family}, gradient bf16, odd V", 10, unclipped | {"ACCUMULATE": one_pass}, aligned=False)
        add("divergence", f"{family}, gradient fp32", 12, unclipped | {"ACCUMULATE": one_pass}, "*fp32")
        clipped = capped | {"FAMILY": number}
        add(
            "divergence_clipped",
            f"{family}, soft-cap, clip, loss",
            8,
            clipped | {"ACCUMULATE": True, "p_gradient": None},
        )
        add("divergence_clipped", f"{family}, soft-cap, clip, gradient", 10, clipped | {"ACCUMULATE": False})
    # A V of 1 is a constant of its program. A C of 1 is none: kernels are not specialised by the number of rows.
    one = {"V": 1, "BV": 1}
    add("row_statistics", "both sides, V=1", 8, plain | no_groups | no_targets | one, aligned=False)
    both = {"STUDENT_SOFTCAP": False, "TEACHER_SOFTCAP": False, "FAMILY": 2, "entry_clip": None, "ACCUMULATE": False}
    add("divergence", "JSD, gradient fp16, bias bf16", 10, both, "*fp16", bias="*bf16")
    add("divergence", "JSD, gradient fp16, V=1", 10, plain | both | one, "*fp16", aligned=False)
    no_peak: dict[str, Any] = {"p_peak": None, "p_target_ids": None}
    no_level: dict[str, Any] = {"p_level": None, "p_tilt": None}
    add("softmax_gradient", "tail", 6, no_peak | {"SOFTCAP": False, "p_bias": None, "p_tilt": None})
    add("softmax_gradient", "sampled", 6, no_level | {"SOFTCAP": False, "p_bias": None})
    add("softmax_gradient", "sampled, odd V", 6, no_level | {"SOFTCAP": False, "p_bias": None}, aligned=False)
    add("softmax_gradient", "log-probability, entropy, soft-cap", 6, {"SOFTCAP": True})
    add("softmax_gradient", "log-probability, entropy, fp16, bias bf16", 6, {"SOFTCAP": True}, "*fp16", bias="*bf16")
    add("softmax_gradient", "log-probability, entropy, fp32", 8, {"SOFTCAP": True}, "*fp32")
    supports: tuple[tuple[str, dict[str, Any]], ...] = (
        ("two sides, tail", {"p_teacher_logprobs": None}),
        ("two sides, no tail", {"p_teacher_logprobs": None, "p_tail_statistics": None}),
        ("cached teacher, tail", {"p_teacher": None, "p_teacher_bias": None}),
    )
    for k in (20, 100, MOST_BUCKETS - 1):
        launch = bucket_config(k + 1)
        for variant, absent in supports:
            constants = absent | capped | {"FAMILY": 2, "BK": launch.block}
            launched.append(Case("bucket_kernel", f"k={k}, {variant}", launch.block, launch.warps, 0, constants))
    for group in (LEAST_GROUP, MOST_GROUP):
        constants = {"SOFTCAP": True, "GROUP": group, "BC": CANDIDATES_PER_PROGRAM}
        launched.append(
            Case("candidates_kernel", f"groups of {group}", CANDIDATES_PER_PROGRAM, CANDIDATE_WARPS, 0, constants)
        )
    for dtype in ("*bf16", "*fp32"):
        variant, constants = f"a gradient in {dtype[1:]}", {"BLOCK": scale.BLOCK}
        launched.append(Case("scale_kernel", variant, scale.BLOCK, scale.WARPS, 0, constants, dtype))
    return launched


def kernel_named(name: str) -> Any:
    """Returns the Triton function of that name."""
    for module in (statistics, divergence, softmax_gradient, buckets, topk, scale):
        if hasattr(module, name):
            return getattr(module, name)
    raise ValueError(f"kernel must be a function in sdkernels.tile.triton_backend, got {name!r}")


def check(arch: str, case: Case) -> Result:
    """Compiles a case for one architecture."""
    chip = CHIPS[arch]
    started = time.perf_counter()
    numbers = {"registers": 0, "stack": 0, "spills": 0, "shared": 0}
    try:
        compiled, log = compile_case(arch, case)
    except Exception as error:
        problems = [f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"]
    else:
        parsed = parse_assembler_log(log) if chip.target.backend == "cuda" else parse_amd(compiled.asm["amdgcn"])
        numbers = parsed | {"shared": compiled.metadata.shared}
        problems = problems_of(numbers, chip.shared)
    return Result(
        arch=arch,
        kernel=case.kernel,
        variant=case.variant,
        block=case.block,
        warps=case.warps,
        bytes_per_entry=case.bytes_per_entry,
        seconds=round(time.perf_counter() - started, 2),
        problems=tuple(problems),
        **numbers,
    )


def compile_case(arch: str, case: Case) -> tuple[Any, str]:
    """Returns Triton's compiled kernel and the assembler's report; never from a cache, which has no report."""
    kernel = kernel_named(case.kernel)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
        elif name == "p_gradient":
            signature[name] = case.gradient
        elif name.endswith("_bias"):
            signature[name] = case.bias
        elif name.startswith("p_"):
            signature[name] = "*i64" if name.endswith("_ids") else "*fp32"
        else:
            # Sizes in capitals, strides and counts; the others are what the host passes as Python floats.
            is_integer = name.isupper() or name == "n" or name.startswith(("stride_", "n_"))
            signature[name] = "i32" if is_integer else "fp32"
        # Strides are multiples of 16, and so is the vocabulary of most models: that lets loads be 16 bytes wide.
        is_aligned = name in ("n", "V" if case.aligned else "") or name.startswith(("p_", "stride_"))
        if is_aligned and not kernel.params[index].do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            ASTSource(kernel, signature, case.constants, attributes),
            target=CHIPS[arch].target,
            options={"num_warps": case.warps, "enable_fp_fusion": FUSED_MULTIPLY_ADD},
        )
    return compiled, log.getvalue()


def parse_assembler_log(log: str) -> dict[str, int]:
    """Reads registers per thread, and bytes of stack and of spills (stores and loads), off `ptxas -v`."""
    registers = re.search(r"Used (\d+) registers", log)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if registers is None or frame is None:
        raise ValueError(f"the log must hold ptxas' resource report, got {log[:200]!r}")
    stack, stores, loads = (int(number) for number in frame.groups())
    return {"registers": int(registers.group(1)), "stack": stack, "spills": stores + loads}


def parse_amd(assembly: str) -> dict[str, int]:
    """Reads the same off what AMD's compiler writes beside a kernel: spills in registers, not in bytes."""
    fields = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "spills": "vgpr_spill_count"}
    found = {name: re.search(rf"\.{field}:\s+(\d+)", assembly) for name, field in fields.items()}
    if None in found.values():
        raise ValueError(f"the assembly must hold {', '.join(fields.values())}, got {assembly[-200:]!r}")
    return {name: int(match.group(1)) for name, match in found.items() if match is not None}


def problems_of(numbers: dict[str, int], most_shared: int) -> list[str]:
    problems = [f"{numbers[name]} bytes of {name}" for name in ("spills", "stack") if numbers[name]]
    if numbers["shared"] > most_shared:
        problems.append(f"{numbers['shared']} bytes of shared memory, the chip has {most_shared}")
    return problems


def run(archs: Sequence[str], jobs: int) -> Iterator[Result]:
    """Yields results in order, compiled in `jobs` processes."""
    work = [(arch, case) for arch in archs for case in cases(arch)]
    if jobs == 1:
        yield from (check(*item) for item in work)
        return
    # Not forked: the parent may hold threads of torch.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(check, *zip(*work, strict=True), chunksize=4)


def row(*columns: object) -> str:
    """Formats a line in fixed widths, so that lines can be printed as they come."""
    widths = ("<8", "<17", "<50", ">6", ">6", ">5", ">6", ">7", ">7", ">6", "")
    return "".join(f"{column:{width}}" for column, width in zip(columns, widths, strict=True))


def table_line(result: Result) -> str:
    return row(
        result.arch,
        result.kernel.removesuffix("_kernel"),
        result.variant,
        result.block,
        result.warps,
        result.registers,
        result.stack,
        result.spills,
        result.shared,
        result.bytes_per_entry or "-",
        "  FAIL: " + "; ".join(result.problems) if result.problems else "  ok",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sdkernels.compile_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", action="append", choices=list(CHIPS), help="default: all; may be repeated")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, under which nothing is compiled; unset it")
    started = time.perf_counter()
    print(f"triton {triton.__version__}; per thread: registers, bytes of stack and of spills; per block: shared bytes")
    print(row("arch", "kernel", "variant", "block", "warps", "regs", "stack", "spills", "shared", "bytes", ""))
    results = []
    for result in run(options.arch or list(CHIPS), options.jobs):
        results.append(result)
        print(table_line(result), flush=True)
    failed = sum(bool(result.problems) for result in results)
    print(f"{len(results)} kernels, {failed} failed, {time.perf_counter() - started:.0f} s")
    if options.json is not None:
        report = {"triton": triton.__version__, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
