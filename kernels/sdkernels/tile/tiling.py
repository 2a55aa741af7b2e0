"""Says how many rows are worked on at a time, from shapes and a byte budget, and where their gradient goes.

The workspace of the fused operations is, for a chunk of C rows: the logits of every side (C, V), the rows' hidden
states and gradient (C, H), one tile of the head in the compute dtype where the head's own dtype cannot be multiplied
with full accumulation, the scratch of one block of rows, and a few vectors of N entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 1 << 20
DEFAULT_WORKSPACE_MB = 256
# On a GPU every chunk of rows reads the whole head, and passes over its float32 gradient: fewer chunks, less traffic.
# More gains little (docs/gpu.md), and the model needs the rest.
GPU_WORKSPACE_MB = 1536
GPU_WORKSPACE_SHARE = 0.04  # of the device's memory
# Entries of a block of the torch backend. On a CPU its buffers then stay in the second-level cache of a few cores; on
# a GPU a block must fill the chip.
BLOCK_ENTRIES = {"cpu": 1 << 17, "other": 1 << 19}
# Upper bound on the bytes per block entry over all objectives; the float64 branches of `topk` take the most.
BLOCK_BYTES_PER_ENTRY = 144
# Of a chunk of projected rows. On a CPU more of them gain nothing in the products, and are memory to be asked for.
MOST_ROWS = {"cpu": 256}
# Whole chunks have a multiple of this many rows: a GPU's products work on tiles of 128 or 256, filled or not.
ROW_MULTIPLES = {"cuda": 256}
# A cast tile of the head; larger ones gain nothing, smaller ones make the matrix products thin.
CAST_TILE_BYTES = 16 * MIB
LEAST_CAST_COLUMNS = 64
# Per row of the whole input, however long: the index of active rows, row values and weights.
VECTOR_BYTES_PER_ROW = 64
# Off the CPU, rows of logits start on multiples of this: 64 bytes of float32, to be read in full-width pieces.
PADDED_COLUMNS = 16


@dataclass(frozen=True)
class Tiling:
    """Says how many rows a chunk has, and columns of the head are cast at a time (0 where nothing is cast)."""

    chunk_rows: int
    cast_columns: int


def block_rows(vocab: int, device_type: str) -> int:
    """Returns the rows of one block of the torch backend's element-wise part."""
    return max(1, BLOCK_ENTRIES["cpu" if device_type == "cpu" else "other"] // max(vocab, 1))


def plan_tiling(
    rows: int,
    vocab: int,
    *,
    sides: int,
    hidden_entries: int,
    cast_width: int,
    itemsize: int,
    scratch: tuple[int, int],
    workspace_bytes: int,
    most_rows: int | None = None,
    multiple: int = 1,
) -> Tiling:
    """Returns the rows per chunk so that everything stays within `workspace_bytes`.

    `sides` counts the distributions that are projected, `hidden_entries` what a row costs beside its logits,
    `cast_width` the widest hidden size of a head that is cast (0: none), `itemsize` the bytes of the compute dtype.
    `scratch` is the backend's, in bytes: once, and per row of a chunk. Not more than `most_rows`, however many fit; a
    whole `multiple` of rows where one fits, but for the last chunk.
    Raises ValueError with the least budget that works.
    """
    scratch_once, scratch_per_row = scratch
    row_bytes = itemsize * (sides * vocab + hidden_entries) + scratch_per_row
    fixed = VECTOR_BYTES_PER_ROW * rows + scratch_once
    least_columns = min(vocab, LEAST_CAST_COLUMNS) if cast_width else 0
    least = fixed + row_bytes + least_columns * cast_width * itemsize
    if workspace_bytes < least:
        raise ValueError(
            f"workspace_mb must be at least {-(-least // MIB)} for {rows} rows and V={vocab}, "
            f"got {workspace_bytes / MIB:g}"
        )
    cast_columns = 0
    if cast_width:
        affordable = min(CAST_TILE_BYTES, (workspace_bytes - fixed - row_bytes) // 4)
        cast_columns = min(vocab, max(least_columns, affordable // (cast_width * itemsize)))
    affordable_rows = (workspace_bytes - fixed - cast_columns * cast_width * itemsize) // row_bytes
    # Fewer rows than all of them: no tensor ever has N·V elements, even where the budget would hold it.
    most = max(1, min(affordable_rows, rows - 1, most_rows or rows))
    multiple = multiple if most >= multiple else 1
    most -= most % multiple
    chunks = -(-rows // most) if rows else 1
    evenly = -(-rows // (chunks * multiple)) * multiple
    return Tiling(chunk_rows=max(1, min(most, evenly)), cast_columns=cast_columns)


def tile_columns(vocab: int, device_type: str) -> int:
    """Returns the columns of a buffer for rows of `vocab` logits."""
    return vocab if device_type == "cpu" else -(-vocab // PADDED_COLUMNS) * PADDED_COLUMNS


def gradient_view(logits: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Returns where the gradient (C, V) goes: the logits' own memory, half of each row for a 16-bit `dtype`."""
    if dtype is None or dtype == logits.dtype:
        return logits
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"gradient_dtype must be float32, bfloat16 or float16, got {dtype}")
    return logits.view(dtype)[:, : logits.shape[1]]
