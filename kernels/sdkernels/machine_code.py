"""What the compiled kernels consist of: registers, shared memory, and instructions per entry of the row.

The machine code is read with the cuobjdump that ships in Triton's wheel. Counted is the loop over the vocabulary: from
the target of the longest branch backwards to that branch, without what a branch inside jumps over, which is the change
of a running maximum and rare. A kernel without a loop, which holds a row's few entries at once, is counted as a whole.

What differs from a measurement: every instruction counts as one, whatever it waits for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from .compile_check import Case, compile_case, cuobjdump, parse_assembler_log

LANES = 32  # of a warp
# What a first word of an instruction says of the unit that does it; what is not listed costs its place in the queue.
SPECIAL = ("MUFU",)
MULTIPLY_ADD = ("FFMA", "FADD", "FMUL", "IMAD", "FSWZADD")
ALU: tuple[str, ...] = (
    "FSETP",
    "FSEL",
    "FMNMX",
    "FSET",
    "FCHK",
    "F2FP",
    "ISETP",
    "IADD",
    "IMNMX",
    "VIMNMX",
    "VIADD",
    "LOP",
    "PLOP",
    "SEL",
)
ALU += ("SHF", "LEA", "PRMT", "MOV", "IABS", "POPC")

LINE = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[^;/]+);")
BRANCH = re.compile(r"BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(?P<target>0x[0-9a-f]+)")


class Instruction(NamedTuple):
    address: int
    name: str  # without modifiers
    target: int | None  # address that it branches to


class Counts(NamedTuple):
    """Of a kernel, per lane and entry (of both sides' logits where there are two)."""

    instructions: float
    special: float  # exponentials, logarithms, reciprocals
    multiply_add: float
    alu: float  # comparisons, selections, integers, conversions


class Compiled(NamedTuple):
    """A kernel in one of its variants, on one architecture."""

    kernel: str  # without "_kernel"
    variant: str
    block: int
    warps: int
    registers: int  # per thread
    shared: int  # bytes per program
    read: float  # bytes per entry
    written: float  # bytes per entry
    counts: Counts


def measure(arch: str, case: Case) -> Compiled:
    """Compile one case for one architecture and count. Raises RuntimeError where cuobjdump fails."""
    compiled, log = compile_case(arch, case)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([cuobjdump(), "-sass", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuobjdump must read the kernel's machine code, got: {done.stderr.strip()}")
    read, written = traffic(case)
    return Compiled(
        case.kernel.removesuffix("_kernel"),
        case.variant,
        case.block,
        case.warps,
        parse_assembler_log(log)["registers"],
        compiled.metadata.shared,
        read,
        written,
        counts_of(parse(done.stdout), case.block / (LANES * case.warps)),
    )


def measure_all(arch: str, cases: Sequence[Case], jobs: int) -> Iterator[Compiled]:
    """In order, compiled in `jobs` processes."""
    # Not forked: the parent may hold threads of torch.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, [arch] * len(cases), cases, chunksize=4)


def traffic(case: Case) -> tuple[float, float]:
    """Bytes read and written per entry of the row: logits and gradient, and maxima of groups."""
    if case.kernel == "bucket_kernel":
        # An id, and of either side a projection or a log-probability; the gradient. Per listed entry.
        return 16.0, 4.0
    if case.kernel == "candidates_kernel":
        return 4.0 + 8.0 / case.constants["GROUP"], 4.0
    written: float = 0.0
    if "p_gradient" not in case.constants and case.kernel != "row_statistics_kernel":
        written = {"*bf16": 2.0, "*fp32": 4.0}[case.gradient]
    read = case.bytes_per_entry - written
    if case.kernel == "row_statistics_kernel" and "p_groups" not in case.constants:
        written = 4.0 / case.constants["GROUP"]
    return read, written


def parse(sass: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`, in order."""
    found = []
    for match in LINE.finditer(sass):
        text = match["text"].strip()
        branch = BRANCH.match(text)
        name = re.split(r"[.\s]", text, maxsplit=1)[0]
        found.append(Instruction(int(match["address"], 16), name, int(branch["target"], 16) if branch else None))
    return found


def counts_of(code: Sequence[Instruction], entries_per_lane: float) -> Counts:
    """Instructions of the loop, of which one turn does `entries_per_lane` entries. Raises ValueError without code."""
    if not code:
        raise ValueError("the machine code must hold instructions, got none")
    hot = _without_rare(_loop_of(code))

    def per_entry(names: tuple[str, ...]) -> float:
        return round(sum(instruction.name.startswith(names) for instruction in hot) / entries_per_lane, 1)

    return Counts(round(len(hot) / entries_per_lane, 1), per_entry(SPECIAL), per_entry(MULTIPLY_ADD), per_entry(ALU))


def _loop_of(code: Sequence[Instruction]) -> list[Instruction]:
    """The longest loop; without one, what comes before the end."""
    backwards = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    if backwards:
        first, last = max(backwards, key=lambda span: span[1] - span[0])
        return [i for i in code if first <= i.address <= last]
    end = max((i.address for i in code if i.name == "EXIT"), default=code[-1].address)
    return [i for i in code if i.address <= end]


def _without_rare(loop: Sequence[Instruction]) -> list[Instruction]:
    """Without what the branches forward, inside of the loop, jump over."""
    last = loop[-1].address
    skipped = [(i.address, i.target) for i in loop if i.target is not None and i.address < i.target <= last]
    return [i for i in loop if not any(start < i.address < end for start, end in skipped)]


def as_columns(row: Compiled) -> list[str]:
    """As the cells of a table, from which `from_columns` makes it again."""
    *plain, counts = row
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in (*plain, *counts)]


def from_columns(cells: Sequence[str]) -> Compiled:
    """Of `as_columns`. Raises ValueError for cells that are none."""
    kernel, variant, *numbers = cells
    if len(numbers) != 10:
        raise ValueError(f"a row must have 12 cells, got {len(cells)}")
    block, warps, registers, shared = (int(cell) for cell in numbers[:4])
    read, written, *counts = (float(cell) for cell in numbers[4:])
    return Compiled(kernel, variant, block, warps, registers, shared, read, written, Counts(*counts))
