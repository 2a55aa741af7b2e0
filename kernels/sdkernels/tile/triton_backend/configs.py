"""Holds block sizes by kernel and architecture, and what else a launch needs from the host.

A table that was measured (`tile/tuned.py`) goes before the one here, of which no row was tuned by a measurement:
there was no GPU. The reasoning, for an H200 (132 multiprocessors, 4.8 TB/s, 21 bytes per clock and multiprocessor, 600
to 800 ns from request to data, hence 25 to 30 KiB in flight per multiprocessor to be bound by bandwidth):

- A program walks over one row, so a chunk has C programs. With 8 warps and BV = 2048 a lane has 8 float32 of each
  side, two 16-byte loads, and a block of both sides is 16 KiB. The statistics take 96 registers, so 2 programs
  share a multiprocessor, each with the next block prefetched (STAGES = 2; the compiler does so through shared
  memory). The gradient passes take 32 to 60 registers, so 4 to 8 programs do; there the barrier keeps the compiler
  from prefetching.
- In sm_90 machine code, per pair of logits: statistics 34 instructions, a KL's gradient 41 to 44, the JSD's sums
  110 and gradient 90. 128 lanes have 47 in the time of 8 bytes and 59 in that of 10: the KLs are bound by memory,
  if narrowly, the JSD's two later passes by arithmetic, a third of which is the logarithm. Its block size matters
  little.
- sm_80 has 11 bytes per clock and multiprocessor; its statistics spill at 2048. sm_100 has 1.7 times Hopper's
  bandwidth on 148 multiprocessors, which asks for more in flight: one more block (4096 leaves room for one program).

Triton compiles a kernel anew where an integer is 1 or a multiple of 16, and where an address is such a multiple, if it
was not before. The number of rows and where a chunk's part of a row-wise operand begins differ from chunk to chunk and
matter to no speed: kernels name them as not to be specialised (`do_not_specialize`).

`python -m sdkernels.compile_check` compiles every row of either table for its architecture and refuses spills.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..tiling import PADDED_COLUMNS
from ..tuned import architecture, table_for


class Config(NamedTuple):
    """Says how a kernel is launched: vocabulary entries per block, warps per program, blocks in flight."""

    block: int
    warps: int
    stages: int


class HeadFactors(NamedTuple):
    """Holds a head's (scale, softcap, temperature) as the kernels want it: see formulas.final_logits."""

    gain: float
    cap: float
    softcap: bool


# "divergence_clipped" is the same kernel with an entry clip, whose four more sums per lane spill at 2048.
HOPPER = {
    "row_statistics": Config(2048, 8, 2),
    "divergence": Config(2048, 8, 2),
    "divergence_clipped": Config(1024, 8, 2),
    "softmax_gradient": Config(4096, 8, 2),
}
TABLE: dict[str, dict[str, Config]] = {
    "sm_80": HOPPER | {"row_statistics": Config(1024, 8, 2)},
    "sm_90": HOPPER,
    "sm_100": HOPPER | {"row_statistics": Config(2048, 8, 3)},
    # AMD: 64 lanes to a warp, so half the warps are as many lanes. Compiled, not run.
    "rocm": {kernel: Config(launch.block, launch.warps // 2, 1) for kernel, launch in HOPPER.items()},
    # The interpreter: small, so that short rows too take several blocks.
    "interpreter": dict.fromkeys(HOPPER, Config(256, 4, 1)),
}

# Fused multiply-add is on by default in Triton 3.6 and is about to be off: the counts above are with it.
FUSED_MULTIPLY_ADD = True

# Buckets of a top-k support are held in registers all at once; 4096 would spill.
MOST_BUCKETS = 2048
BUCKET_LANES_PER_WARP = 256


def config(kernel: str, device: torch.device, vocab: int) -> Config:
    """Returns what was measured at the V nearest to `vocab`, or the table's above where nothing was."""
    tuned = table_for(device)
    row = None if tuned is None else tuned.launch(kernel, vocab)
    return untuned(kernel, device) if row is None else Config(row.block, row.warps, row.stages)


def untuned(kernel: str, device: torch.device) -> Config:
    """Returns what the table above says."""
    return TABLE[architecture(device)][kernel]


def block_size(chosen: Config, vocab: int, *, least: int = 1) -> int:
    """Returns the table's block, or the whole row where that is shorter; at least `least`, a power of two."""
    return max(min(chosen.block, triton.next_power_of_2(vocab)), least)


def bucket_config(buckets: int) -> Config:
    """Returns one block over all buckets of a row."""
    block = triton.next_power_of_2(buckets)
    return Config(block, max(block // BUCKET_LANES_PER_WARP, 1), 1)


def head_factors(head: tuple[float, float | None, float]) -> HeadFactors:
    scale, softcap, temperature = head
    if softcap is None:
        return HeadFactors(scale / temperature, 1.0, False)
    return HeadFactors(scale / softcap, softcap / temperature, True)


def is_padded(*tiles: Tensor | None) -> bool:
    """True where rows of V entries, V no multiple of 16, begin and end on such multiples: their padding is theirs."""
    logits = [tile for tile in tiles if tile is not None]
    return logits[0].shape[1] % PADDED_COLUMNS != 0 and all(
        tile.stride(0) % PADDED_COLUMNS == 0
        and tile.storage_offset() % PADDED_COLUMNS == 0
        and tile.untyped_storage().nbytes() // tile.itemsize % PADDED_COLUMNS == 0
        for tile in logits
    )


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
