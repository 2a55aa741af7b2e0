"""How long the kernels and a whole step should take on a GPU, by arithmetic: every number is an estimate.

A kernel takes as long as the slowest of four things: moving its bytes, issuing its instructions, its special functions
(exponentials, logarithms), or the unit that compares and selects. A step takes its matrix products, the kernels, and
what the products themselves move: logits written, the gradient tile read, the head's gradient added to once per chunk.
How much of that traffic hides behind the products nobody knows before a run, so a step is given as a range: nothing
hides, all of it does.

What it leaves out: the host (each chunk issues a few dozen small operators), rows of unequal work, other tenants of the
cache, and clocks below the data sheet's.

N rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from .machine_code import LANES, Compiled
from .tiling import MIB, plan_tiling

ROWS: Final = 8192  # N
VOCAB: Final = 151_936  # V
CHUNK: Final = 1024
HIDDEN: Final = (1024, 2560, 4096)  # H
WORKSPACES: Final = (128, 256, 512, 1024, 1536, 2048)  # MB
# Fractions of the bare products to reach, by H: in 1536 MB with a head that is trained, in 256 MB with a frozen one.
GOALS: Final = {1024: 0.70, 2560: 0.80, 4096: 0.85}
GOAL_WORKSPACES: Final = {"trained": 1536, "frozen": 256}
KERNELS_OF: Final = {
    "forward KL": (("row_statistics", "both sides"), ("divergence", "forward KL, gradient bf16")),
    "reverse KL": (("row_statistics", "both sides"), ("divergence", "reverse KL, gradient bf16")),
    "JSD": (
        ("row_statistics", "both sides"),
        ("divergence", "JSD, loss"),
        ("divergence", "JSD, gradient bf16"),
    ),
}


@dataclass(frozen=True)
class Gpu:
    """As its maker's data sheet has it."""

    name: str
    arch: str
    multiprocessors: int
    float32: float  # FLOP/s, from which the clock follows
    float32_lanes: int  # per clock and multiprocessor
    bf16: float  # FLOP/s of dense products with float32 sums
    bandwidth: float  # bytes/s
    shared: int  # bytes of a multiprocessor
    source: str

    @property
    def clock(self) -> float:
        return self.float32 / (2 * self.float32_lanes * self.multiprocessors)


GPUS: Final = (
    Gpu(
        *("A100 SXM 80 GB", "sm_80", 108, 19.5e12, 64, 312e12, 2.039e12, 164 << 10),
        "NVIDIA A100 data sheet (80 GB SXM) and A100 architecture white paper",
    ),
    Gpu(
        *("H200 SXM", "sm_90", 132, 67e12, 128, 989e12, 4.8e12, 228 << 10),
        "NVIDIA H200 data sheet (SXM; half of the rate with sparsity) and H100 architecture white paper",
    ),
    Gpu(
        *("B200 SXM", "sm_100", 148, 75e12, 128, 2250e12, 8.0e12, 228 << 10),
        "NVIDIA HGX B200 data sheet, an eighth of the board (half of the rate with sparsity)",
    ),
)
# Of a multiprocessor of all three, from the tables of the CUDA C++ programming guide.
REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32
SHARED_OF_A_PROGRAM = 1024  # what the system takes
REGISTER_UNIT = 256  # registers of a warp are given out in such pieces
ISSUED, SPECIAL_LANES, ALU_LANES = 128, 16, 64  # lanes per clock


@dataclass(frozen=True)
class Assumed:
    """Shares of the data sheet's rates that a good program gets. Guesses, to be replaced by measurements."""

    products: float = 0.8
    bandwidth: float = 0.9
    issue: float = 0.8
    latency: float = 700e-9  # s from request to data, under load
    product_rows: int = 128  # of a tile of a product: a chunk's rows count up to the next multiple


ASSUMED: Final = Assumed()


class Estimate(NamedTuple):
    """Of one kernel over a chunk of rows, in seconds."""

    programs: int  # per multiprocessor
    in_flight: int  # bytes that a full multiprocessor has asked for at a time
    memory: float
    issue: float
    special: float
    alu: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.issue, self.special, self.alu)

    @property
    def bound(self) -> str:
        names = {"memory": self.memory, "instructions": self.issue, "special functions": self.special, "ALU": self.alu}
        return max(names, key=lambda name: names[name])


def programs_of(row: Compiled, gpu: Gpu) -> int:
    """How many programs a multiprocessor holds at a time."""
    of_warp = -(-row.registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        REGISTERS // (of_warp * row.warps),
        WARPS // row.warps,
        gpu.shared // (row.shared + SHARED_OF_A_PROGRAM),
        PROGRAMS,
    )


def estimate(row: Compiled, gpu: Gpu, rows: int, assumed: Assumed = ASSUMED) -> Estimate:
    """A kernel over `rows` rows; the busiest multiprocessor counts."""
    entries = entries_of(row)
    programs = programs_of(row, gpu)
    # One block of what a program reads is on its way at a time.
    in_flight = int(programs * row.block * row.read)
    running = min(rows, gpu.multiprocessors * programs) * row.block * row.read
    rate = min(assumed.bandwidth * gpu.bandwidth, running / assumed.latency)
    busiest = -(-rows // gpu.multiprocessors) * entries / gpu.clock
    counts = row.counts
    return Estimate(
        programs,
        in_flight,
        memory=rows * entries * (row.read + row.written) / rate,
        issue=busiest * max(counts.instructions / ISSUED, counts.multiply_add / gpu.float32_lanes) / assumed.issue,
        special=busiest * counts.special / SPECIAL_LANES,
        alu=busiest * counts.alu / ALU_LANES,
    )


def entries_of(row: Compiled) -> int:
    """Entries of a row: the vocabulary, or what a kernel of a top-k support holds at once."""
    return row.block if row.kernel in ("bucket", "candidates") else VOCAB


class Step(NamedTuple):
    """A forward and backward pass of the fused divergence over N rows, in seconds."""

    chunk: int  # rows
    limit: float  # the bare products
    products: float  # those of the chunks, whose rows are rounded up
    tiles: float  # logits and gradient tiles that products write and read, and the head that they read
    accumulated: float  # the head's gradient, once per chunk, and its rounding at the end
    kernels: float
    hidden: float  # of the traffic, what at best goes on behind the products

    @property
    def slowest(self) -> float:
        return self.products + self.tiles + self.accumulated + self.kernels

    @property
    def fastest(self) -> float:
        return self.slowest - self.hidden

    @property
    def least_share(self) -> float:
        """Of the limit, where nothing hides."""
        return self.limit / self.slowest

    @property
    def most_share(self) -> float:
        return self.limit / self.fastest


def step(
    gpu: Gpu,
    rows_of: Mapping[tuple[str, str], Compiled],
    kind: str,
    hidden: int,
    workspace_mb: int,
    *,
    frozen: bool,
    assumed: Assumed = ASSUMED,
    multiple: int = 1,
) -> Step:
    """The divergence of one head of bfloat16 on both sides, H = `hidden`.

    `multiple`: as if chunks were rounded down to a multiple of so many rows where they have four times as many, which
    `plan_tiling` does not do.
    """
    from .triton_backend import scratch_bytes

    chunk = plan_tiling(
        ROWS,
        VOCAB,
        sides=2,
        hidden_entries=8 * hidden,
        cast_width=0,
        itemsize=4,
        scratch=scratch_bytes(ROWS, VOCAB, "cuda", 0),
        workspace_bytes=workspace_mb * MIB,
    ).chunk_rows
    if chunk >= 4 * multiple:
        chunk -= chunk % multiple
    rate, bandwidth = assumed.products * gpu.bf16, assumed.bandwidth * gpu.bandwidth
    head = VOCAB * hidden
    of_kernels = products = tiles = accumulated = behind = 0.0
    for start in range(0, ROWS, chunk):
        count = min(chunk, ROWS - start)
        product = 2 * head * (-(-count // assumed.product_rows) * assumed.product_rows) / rate
        projection = (4 * count * VOCAB + 2 * head + 2 * count * hidden) / bandwidth
        to_hidden = (2 * count * VOCAB + 2 * head + 4 * count * hidden) / bandwidth
        moved = [(projection, 0.0), (projection, 0.0), (to_hidden, 0.0)]
        if not frozen:
            moved.append(((2 * count * VOCAB + 2 * count * hidden) / bandwidth, (8 if start else 4) * head / bandwidth))
        products += len(moved) * product
        tiles += sum(tile for tile, _ in moved)
        accumulated += sum(gradient for _, gradient in moved)
        behind += sum(min(product, tile + gradient) for tile, gradient in moved)
        of_kernels += sum(estimate(rows_of[name], gpu, count, assumed).seconds for name in KERNELS_OF[kind])
    if not frozen:
        accumulated += 6 * head / bandwidth  # read in float32, written in bfloat16
    limit = (3 if frozen else 4) * 2 * ROWS * head / rate
    return Step(chunk, limit, products, tiles, accumulated, of_kernels, behind)
