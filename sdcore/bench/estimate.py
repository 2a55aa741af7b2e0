"""Estimates what a row will need in memory, so that one that does not fit is said and not tried.

The estimates come from measured peaks (the committed results) and what the peers allocate by their code: 0.85 to 1.7
times the measured peaks at the shapes of the suite, which a test checks for those whose tensors can be counted. The
estimates of whole passes are `sdcore.prefix.cost`'s and `sdcore.memory`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from .shapes import DTYPES, MIB, Divergence, Group

FLOAT32: Final = 4
# Arrays of float32 (N, V) at the peak: of a KL, of a JSD, of a top-k with its tail.
LOGIT_ARRAYS: Final = {
    "plain torch": (6.5, 12.5, 3.5),
    "plain torch, no upcast": (6.5, 12.5, 3.5),
    "torch.compile": (3.0, 7.0, 2.0),
    "orda-kernel": (15.5, 15.5, 15.5),
}
# Arrays of float32 (rows, V), of so many rows at a time at most.
CHUNK_ARRAYS: Final = {
    "Liger chunked": (4.0, 8.0),
    "Liger FusedLinearJSD": (4.0, 8.0),
    "Liger FusedLinearJSD, CuTe": (4.0, 8.0),
    "flash-linear-attention": (2.0, 2.0),
}
CHUNK_ROWS: Final = 1024
# TRL's kernel goes through tiles of 4096 rows and 32768 columns, with so many float32 arrays of a tile: KL, JSD.
TRL_ROWS, TRL_COLUMNS = 4096, 32768
TRL_ARRAYS: Final = (11.1, 12.1)
# The workspace, and what a gradient of the head is added up in.
SDCORE_WORKSPACE: Final = 256 * MIB
SDCORE_ARRAYS: Final = 1.4


def peak_bytes(contender: str, group: Group, device: str) -> float:
    """Estimates the peak of one step of a contender of the output layer beyond the inputs, gradients included."""
    rows, vocab, hidden = group.shape
    entries = FLOAT32 * rows * vocab
    gradients = DTYPES[group.dtype].itemsize * (rows + vocab) * hidden
    wide = FLOAT32 * vocab * hidden if group.dtype != "fp32" else 0
    which = _kind(group.divergence)
    if contender in LOGIT_ARRAYS:
        # orda-kernel holds whole logits in its torch code only.
        arrays = LOGIT_ARRAYS[contender][which] if contender != "orda-kernel" or device == "cpu" else 2.0
        return gradients + arrays * entries
    if contender in CHUNK_ARRAYS:
        chunk = min(rows, CHUNK_ROWS) * vocab * FLOAT32
        return gradients + wide + CHUNK_ARRAYS[contender][min(which, 1)] * chunk
    if contender == "TRL chunked":
        return gradients + wide + trl_bytes(rows, vocab, min(which, 1))
    return gradients + wide + min(SDCORE_WORKSPACE, SDCORE_ARRAYS * entries)


def group_bytes(group: Group, divergences: Iterable[Divergence]) -> float:
    """Estimates the inputs of a group, the exact answers to all divergences, and the products that are the limit."""
    rows, vocab, hidden = group.shape
    sides = (2 * rows + vocab) * hidden
    answers = sum(1 for _ in divergences) * FLOAT32 * (rows + vocab) * hidden
    tiles = 640 * MIB  # float64, see `oracle`
    products = DTYPES[group.dtype].itemsize * (2 * rows * vocab + sides)
    return DTYPES[group.dtype].itemsize * sides + FLOAT32 * sides + answers + max(tiles, products)


def model_bytes(config: Any, dtype: str, *, gradients: bool, copies: int = 0, moments: bool = False) -> float:
    """Counts the weights of a configuration, their gradients, copies (teachers) and AdamW's two moments."""
    from ..memory import count_parameters  # with transformers, which the divergence suite does without

    arrays = 1 + gradients + copies + 2 * moments
    return arrays * count_parameters(config).all * DTYPES[dtype].itemsize


def trl_bytes(rows: int, vocab: int, which: int) -> float:
    """Estimates the arrays of a tile of TRL's kernel: `which` is 0 for a KL, 1 for a JSD."""
    return TRL_ARRAYS[which] * FLOAT32 * min(rows, TRL_ROWS) * min(vocab, TRL_COLUMNS)


def _kind(divergence: Divergence) -> int:
    if divergence.topk is not None:
        return 2
    return 0 if divergence.alpha in (0.0, 1.0) else 1
