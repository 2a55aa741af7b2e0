"""What a row will need in memory, by estimate, so that one that does not fit is said and not tried.

From measured peaks (the committed results) and what the peers allocate by their code: 0.85 to 1.7 times the measured
peaks at the shapes of the suite, which a test checks for those whose tensors can be counted. The
estimates of whole passes are `sdcore.prefix.cost`'s and `sdcore.memory`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from .shapes import DTYPES, Divergence, Group

FLOAT32: Final = 4
MIB: Final = 1 << 20
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
# Arrays (N, V) of whole logits in TRL's trainers: of SDPO and SDFT, of GKD; with a top-k.
TRAINER_ARRAYS: Final = (13.0, 17.0)
TRAINER_TOPK_ARRAYS: Final = 5.0
# The workspace, and what a gradient of the head is added up in.
SDCORE_WORKSPACE: Final = 256 * MIB
SDCORE_ARRAYS: Final = 1.4


def peak_bytes(contender: str, group: Group, device: str) -> float:
    """Beyond the inputs, of one step of a contender of the divergence suite, gradients included."""
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
        return gradients + wide + _trl_bytes(rows, vocab, min(which, 1))
    return gradients + wide + min(SDCORE_WORKSPACE, SDCORE_ARRAYS * entries)


def group_bytes(group: Group, divergences: Iterable[Divergence]) -> float:
    """Inputs of a group, the exact answers to all divergences, and the products that are the limit."""
    rows, vocab, hidden = group.shape
    sides = (2 * rows + vocab) * hidden
    answers = sum(1 for _ in divergences) * FLOAT32 * (rows + vocab) * hidden
    tiles = 640 * MIB  # float64, see `oracle`
    products = DTYPES[group.dtype].itemsize * (2 * rows * vocab + sides)
    return DTYPES[group.dtype].itemsize * sides + FLOAT32 * sides + answers + max(tiles, products)


def model_bytes(config: Any, dtype: str, *, gradients: bool, copies: int = 0, moments: bool = False) -> float:
    """Weights, their gradients, copies (teachers) and AdamW's two moments, of a transformers' configuration."""
    from ..memory import count_parameters  # with transformers, which the divergence suite does without

    arrays = 1 + gradients + copies + 2 * moments
    return arrays * count_parameters(config).all * DTYPES[dtype].itemsize


def trainer_bytes(case: Any, config: Any) -> float:
    """Beyond what stays between updates, of one update by TRL's trainer of a `TrainerCase`."""
    from ..prefix import cost_of_sizes
    from .trainer_cases import DISTILLATION, GKD

    length = case.prompt + case.completion
    gradients = model_bytes(config, case.dtype, gradients=False)
    if case.trainer == DISTILLATION:
        logits = _trl_bytes(case.completions * case.completion, config.vocab_size, 1)
    else:
        # GKD makes the logits of the prompts too.
        tokens = case.completions * (length if case.trainer == GKD else case.completion)
        arrays = TRAINER_ARRAYS[case.trainer == GKD] if case.topk is None else TRAINER_TOPK_ARRAYS
        logits = arrays * tokens * config.vocab_size * DTYPES[case.dtype].itemsize
    kept = cost_of_sizes(
        config,
        prompt_tokens=case.prompt,
        context_tokens=0,
        completion_tokens=case.completion,
        completions=case.completions,
        dtype_bytes=DTYPES[case.dtype].itemsize,
    ).student.naive_kept_bytes
    return gradients + logits + kept


def _trl_bytes(rows: int, vocab: int, which: int) -> float:
    return TRL_ARRAYS[which] * FLOAT32 * min(rows, TRL_ROWS) * min(vocab, TRL_COLUMNS)


def _kind(divergence: Divergence) -> int:
    if divergence.topk is not None:
        return 2
    return 0 if divergence.alpha in (0.0, 1.0) else 1


__all__ = ["group_bytes", "model_bytes", "peak_bytes", "trainer_bytes"]
