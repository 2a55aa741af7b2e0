"""Does what the torch backend does for a head that is sharded over the vocabulary, each rank with its own columns.

Its functions are those of `torch_backend`, every rank calls them alike; the stages of a tile are in `stages.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tile import torch_backend
from ..tile.tiling import gradient_view
from ..types import Objective, RowValues, TileRows
from .shards import Shards
from .stages import Tile

# Float64 numbers a row that a stage may send: sums of both sides, both sides at the target.
NUMBERS_PER_ROW = 8
# Numbers a row and entry of a top-k support: id, logit, gap.
NUMBERS_PER_CHOSEN = 3


class VocabularyParallel:
    """`divergence_tile`, `logprob_tile` and `topk_tile` over one rank's columns; every rank calls them alike."""

    TAKES_GAP = True
    make_head = torch_backend.make_head

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def scratch_bytes(self, rows: int, vocab: int, device_type: str, topk: int) -> tuple[int, int]:
        """Returns the bytes needed beside the logits of a tile: once, and per row of it."""
        once, _ = torch_backend.scratch_bytes(rows, vocab, device_type, topk)
        chosen = min(topk, self.shards.widest) * self.shards.ranks
        sent = NUMBERS_PER_ROW * (self.shards.ranks + 2) + NUMBERS_PER_CHOSEN * (chosen + 2 * topk)
        # Merging sorts the candidates twice: order and values of each, and what was found.
        return once, 8 * (sent + 6 * chosen + 6 * topk)

    def divergence_tile(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        rows: TileRows,
        objective: Objective,
        *,
        want_gradient: bool,
        gradient_dtype: torch.dtype | None = None,
    ) -> tuple[RowValues, Tensor | None]:
        """Does `torch_backend.divergence_tile`: both logits (C, width) are destroyed, the first is the gradient."""
        gradient = gradient_view(student_logits, gradient_dtype) if want_gradient else None
        tile = Tile(self._occupied(student_logits), self._occupied(teacher_logits), rows, objective, self.shards)
        merged = tile.merge()
        log_p = log_q = None
        if rows.target_ids is not None:
            log_p = merged.at_target("target") - merged.student.level
            if merged.offset is not None:
                log_q = log_p + merged.at_target("target_gap") - merged.offset
        if objective.support == "topk" or teacher_logits is None:
            loss = tile.top_k(merged, gradient)
        elif objective.support == "sampled" and log_p is not None and log_q is not None:
            loss = tile.sampled(merged, log_p, log_p - log_q, gradient)
        else:
            loss = tile.full_vocabulary(merged, gradient)
        teacher_entropy = None if merged.teacher is None else merged.teacher.entropy
        values = (loss, log_p, log_q, merged.student.entropy, teacher_entropy)
        return RowValues._make(None if v is None else v.to(student_logits.dtype) for v in values), gradient

    def logprob_tile(
        self,
        logits: Tensor,
        rows: TileRows,
        objective: Objective,
        *,
        grad_logprobs: Tensor | None = None,
        grad_entropy: Tensor | None = None,
        gradient_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Does `torch_backend.logprob_tile`."""
        want_gradient = grad_logprobs is not None or grad_entropy is not None
        gradient = gradient_view(logits, gradient_dtype) if want_gradient else None
        tile = Tile(self._occupied(logits), None, rows, objective, self.shards)
        merged = tile.merge()
        if gradient is not None:
            tile.logprob_gradient(merged, grad_logprobs, grad_entropy, gradient)
        logprobs = None
        if rows.target_ids is not None:
            logprobs = (merged.at_target("target") - merged.student.level).to(logits.dtype)
        return logprobs, merged.student.entropy.to(logits.dtype), gradient

    def topk_tile(self, logits: Tensor, rows: TileRows, objective: Objective, k: int) -> tuple[Tensor, Tensor]:
        """Does `torch_backend.topk_tile`, with the ids of the whole vocabulary."""
        tile = Tile(self._occupied(logits), None, rows, objective, self.shards, choose=k)
        merged = tile.merge()
        chosen = tile.chosen(merged)
        return chosen.ids, (chosen.logits - merged.student.level[:, None]).to(logits.dtype)

    def _occupied(self, logits: Tensor | None) -> Tensor | None:
        return logits if logits is None or self.shards.width else logits.new_zeros((logits.shape[0], 1))
