"""Does a tile of logits over one rank's columns of a sharded vocabulary, in stages.

What a stage adds up over the columns is gathered from all ranks before the next begins:

1. Sums of exponentials of both sides, the logits of the ids that are asked for, each rank's own top-k.
2. The divergence's terms (or the mass outside the top-k), given the normalisers of 1.
3. The gradient's centre (or the tail's share of it), given the sums of 2.

What differs from the obvious: between stages a tile is kept in the memory of its two logits and nowhere else. The
first stage leaves final logits, the second numerators of the gradient where the student's logits were and `-p` where
the teacher's were, so that the third is one pass. A stage that has nothing to tell is left out: `alpha=0` and top-k
without tail have no third, "sampled" has only the first. The formulas are those of `elementwise` and `support`.

A rank whose columns are all padding has a stand-in column, of which nothing is used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..tile.elementwise import (
    CLOSE,
    FAR,
    Scratch,
    Terms,
    blocks_of,
    capped_terms,
    centre_,
    chain_,
    divergence_terms,
    far_terms,
    is_close,
    logprob_gradient_,
    narrow_,
    slope_of,
    transform_,
)
from ..tile.topk import bucket_divergence, tail_share, with_tail
from ..types import Objective, TileRows
from .moments import Normaliser, by_row, lower_, merge_exponentials, merge_topk, side_sums
from .shards import Places, Shards


class Merged(NamedTuple):
    """What the first stage finds of C rows, float64; of the teacher where there are logits of one.

    The offset is exact for close sides too, whose sums of exponentials differ by the exact growth: see `side_sums`.
    """

    student: Normaliser
    teacher: Normaliser | None
    offset: Tensor | None  # (C,) log of the teacher's normaliser minus the student's
    share: Tensor  # (C,) this rank's part of p's mass
    lowered: Tensor  # (C, 1) what this rank's student logits have been lowered by
    teacher_lowered: Tensor | None  # (C, 1)
    gathered: dict[str, Tensor]  # (R, C, F) by name

    def at_target(self, name: str) -> Tensor:
        """Returns the (C,) that the one rank with the target says: the others say 0."""
        return self.gathered[name].sum(0)[:, 0]


class Entries(NamedTuple):
    """Lists some ids of each row with their final logits, and the teacher's minus the student's."""

    ids: Tensor  # (C, k) int64
    logits: Tensor  # (C, k) float64
    gaps: Tensor | None  # (C, k) float64


class Tile:
    """Does the stages of a tile of C rows over this rank's columns, each one loop over blocks of rows."""

    def __init__(
        self,
        z: Tensor | None,
        other: Tensor | None,
        rows: TileRows,
        objective: Objective,
        shards: Shards,
        choose: int = 0,
    ) -> None:
        assert z is not None
        self.z, self.other, self.objective, self.shards = z, other, objective, shards
        # A stand-in column has no bias.
        self.rows = rows if shards.width else replace(rows, student_bias=None, teacher_bias=None)
        lists_ids = objective.support == "topk" and rows.teacher_ids is None
        self.choose = objective.topk if lists_ids and other is not None else choose
        self.blocks = blocks_of(z)
        self.close: dict[int, bool] = {}  # by first row of a block: whether all of its gaps are small

    def merge(self) -> Merged:
        """Does the first stage, which leaves final logits, or the gap, in the tile."""
        parts = [self._statistics(block, scratch) for block, scratch in self.blocks]
        mine = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        gathered = self._gather(mine)

        def merged(side: str) -> Normaliser:
            return merge_exponentials(*(gathered[side + name][..., 0] for name in ("shift", "total", "weighted")))

        student, teacher, offset = merged("student_"), None, None
        if self.other is not None:
            teacher = merged("teacher_")
            offset = teacher.level - student.level
        lowered = mine["student_shift"]
        share = mine["student_total"][:, 0] * (lowered[:, 0] - student.level).exp()
        return Merged(student, teacher, offset, share, lowered, mine.get("teacher_shift"), gathered)

    def chosen(self, merged: Merged) -> Entries:
        """Returns the `choose` most likely ids of each row."""
        gathered = merged.gathered
        logits, gaps = gathered["chosen_logit"], gathered.get("chosen_gap")
        values = logits if gaps is None or self.objective.topk_of == "student" else logits + gaps
        ids, places = merge_topk(values, gathered["chosen_id"], self.choose)
        return Entries(ids, by_row(logits).gather(1, places), None if gaps is None else by_row(gaps).gather(1, places))

    def full_vocabulary(self, merged: Merged, gradient: Tensor | None) -> Tensor:
        """Returns the loss (C,) over all ids."""
        objective, other = self.objective, self.other
        assert other is not None
        capped = objective.entry_clip is not None
        has_centre = objective.alpha > 0.0 or capped
        sums, taken_off = [], []
        for block, scratch in self.blocks:
            z = self.z[block]
            slope = self._slope(merged, block)
            self._masses(merged, block, scratch)
            terms = self._terms(merged, block, scratch)
            centre = torch.zeros_like(terms.loss) if terms.centre is None else terms.centre * terms.factor
            sums.append(torch.stack([terms.loss, centre], -1).double())
            taken_off.append(torch.zeros_like(centre) if terms.taken_off is None else terms.taken_off)
            if gradient is None:
                continue
            centre_(z, scratch.neg_p, None, terms.factor)
            chain_(z, objective.student, slope)
            if has_centre:
                chain_(scratch.neg_p, objective.student, slope)
                other[block].copy_(scratch.neg_p)
            else:
                narrow_(z, gradient[block])
        whole = self._gather({"sums": torch.cat(sums)})["sums"].sum(0)
        if gradient is not None and has_centre:
            for (block, _), taken in zip(self.blocks, taken_off, strict=True):
                centre_(self.z[block], other[block], (whole[block, 1] - taken).to(other.dtype))
                narrow_(self.z[block], gradient[block])
        return whole[:, 0] if capped else whole[:, 0].clamp(min=0.0)

    def sampled(self, merged: Merged, log_p: Tensor, gap: Tensor, gradient: Tensor | None) -> Tensor:
        """Returns sg(log p(y) - log q(y))·log p(y) for each row, given the bracket; see `torch_backend`."""
        if gradient is not None and self.rows.target_ids is not None:
            places = self.shards.places(self.rows.target_ids[:, None])
            factors = gap.to(self.z.dtype)[:, None]
            for block, scratch in self.blocks:
                z, slope = self.z[block], self._slope(merged, block)
                self._masses(merged, block, scratch)
                torch.mul(scratch.neg_p, factors[block], out=z)
                self._add_at(z, places.of(block), factors[block])
                chain_(z, self.objective.student, slope)
                narrow_(z, gradient[block])
        return gap * log_p

    def top_k(self, merged: Merged, gradient: Tensor | None) -> Tensor:
        """Returns the loss (C,) over k ids and the tail."""
        objective, head = self.objective, self.objective.student
        if self.rows.teacher_ids is None:
            entries = self.chosen(merged)
        else:
            entries = Entries(self.rows.teacher_ids, merged.gathered["listed"].sum(0), None)
        log_p = entries.logits - merged.student.level[:, None]
        log_q = self.rows.teacher_logprobs
        if entries.gaps is not None and merged.offset is not None:
            log_q = log_p + entries.gaps - merged.offset[:, None]
        if log_q is None:
            raise ValueError("a top-k support needs a teacher")
        places = self.shards.places(entries.ids)
        tail = objective.tail and entries.ids.shape[1] < self.shards.vocab
        tails = None
        if tail:
            parts = [self._tails(merged, block, scratch, places.of(block)) for block, scratch in self.blocks]
            tails = self._gather({"masses": torch.cat(parts)})["masses"].sum(0)
        losses = []
        for block, _ in self.blocks:
            tail_p = None if tails is None else tails[block, 0]
            tail_q = None if tails is None or tails.shape[1] == 1 else tails[block, 1]
            buckets = with_tail(log_p[block], tail_p, tail), with_tail(log_q[block].double(), tail_q, tail)
            loss, slopes = bucket_divergence(*buckets, objective.alpha, objective.normalize)
            losses.append(loss)
            if gradient is None:
                continue
            z = self.z[block]
            if tail_p is not None:
                z.mul_(tail_share(slopes[:, -1], tail_p).to(z.dtype)[:, None])
            else:
                z.zero_()
            slopes = slopes[:, : entries.ids.shape[1]]
            chain_(slopes, head, slope_of(entries.logits[block], head))
            self._add_at(z, places.of(block), slopes.to(z.dtype))
            narrow_(z, gradient[block])
        return torch.cat(losses)

    def logprob_gradient(
        self, merged: Merged, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, gradient: Tensor
    ) -> None:
        """Writes the gradient for upstream ones (C,) of log p(target) and of the entropy."""
        dtype, target_ids = self.z.dtype, self.rows.target_ids
        level = (merged.student.entropy - merged.student.log_sum).to(dtype)[:, None]
        of_target = None if grad_logprobs is None or target_ids is None else grad_logprobs[:, None]
        of_entropy = None if grad_entropy is None else grad_entropy[:, None]
        places = None if of_target is None or target_ids is None else self.shards.places(target_ids[:, None])
        for block, scratch in self.blocks:
            z, slope = self.z[block], self._slope(merged, block)
            self._masses(merged, block, scratch)
            upstream = None if of_target is None else of_target[block]
            logprob_gradient_(
                z, scratch.neg_p, level[block], upstream, None if of_entropy is None else of_entropy[block]
            )
            if places is not None and upstream is not None:
                self._add_at(z, places.of(block), upstream.to(dtype))
            chain_(z, self.objective.student, slope)
            narrow_(z, gradient[block])

    def _gather(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """Collects (C, F) by name from all ranks, (R, C, F), in one collective."""
        whole = self.shards.gather(torch.cat(list(mine.values()), dim=-1))
        return dict(zip(mine, whole.split([part.shape[-1] for part in mine.values()], dim=-1), strict=True))

    def _statistics(self, block: slice, scratch: Scratch) -> dict[str, Tensor]:
        """Returns what the first stage has to say of a block, (rows, F) float64 each."""
        rows, objective = self.rows.part(block), self.objective
        z, other = self.z[block], None if self.other is None else self.other[block]
        transform_(z, objective.student, rows.student_bias)
        if other is not None and rows.teacher_is_gap:
            chain_(other, objective.student, None)
        elif other is not None:
            transform_(other, objective.teacher, rows.teacher_bias)
        fields = self._entries(z, other, rows)
        close = other is not None and rows.teacher_is_gap and is_close(other)
        self.close[block.start] = close
        if objective.entry_clip is None:
            student, teacher = side_sums(z, other, rows.teacher_is_gap, close, scratch)
        else:
            # Capped sums are of first order: an error in the normalisers counts.
            copies = z.double(), None if other is None else other.double()
            wide = Scratch(*(torch.empty_like(copies[0]) for _ in Scratch._fields))
            student, teacher = side_sums(*copies, rows.teacher_is_gap, close, wide)
            z.copy_(copies[0])
            if other is not None and copies[1] is not None:
                other.copy_(copies[1])
        return fields | student | teacher

    def _entries(self, z: Tensor, other: Tensor | None, rows: TileRows) -> dict[str, Tensor]:
        """Reads final logits of the ids that are asked for, and the teacher's minus them; 0 of other ranks' ids."""
        fields = {}

        def gaps(columns: Tensor, logits: Tensor) -> Tensor | None:
            if other is None:
                return None
            teacher = other.gather(1, columns).double()
            return teacher if rows.teacher_is_gap else teacher - logits

        for name, ids in (
            ("target", None if rows.target_ids is None else rows.target_ids[:, None]),
            ("listed", rows.teacher_ids),
        ):
            if ids is None:
                continue
            columns = ids - self.shards.first_id
            inside = (columns >= 0) & (columns < self.shards.width)
            columns = columns.clamp(0, z.shape[1] - 1)
            logits = z.gather(1, columns).double()
            fields[name] = torch.where(inside, logits, 0.0)
            gap = gaps(columns, logits)
            if gap is not None:
                fields[name + "_gap"] = torch.where(inside, gap, 0.0)
        if self.choose:
            of_teacher = other is not None and self.objective.topk_of == "teacher"
            chooser = z
            if of_teacher and other is not None:
                chooser = z + other if rows.teacher_is_gap else other
            columns = chooser.topk(min(self.choose, z.shape[1]), dim=-1).indices
            logits = z.gather(1, columns).double()
            chosen = {"chosen_id": (columns + self.shards.first_id).double(), "chosen_logit": logits}
            gap = gaps(columns, logits)
            if gap is not None:
                chosen["chosen_gap"] = gap
            # Ranks with fewer columns than others send as many entries; the last choice is none of these.
            missing = min(self.choose, self.shards.widest) - columns.shape[1]
            fill = {"chosen_id": float(self.shards.vocab), "chosen_logit": -torch.inf, "chosen_gap": 0.0}
            for name, entries in chosen.items():
                fields[name] = torch.nn.functional.pad(entries, (0, missing), value=fill[name])
        return fields

    def _terms(self, merged: Merged, block: slice, scratch: Scratch) -> Terms:
        """Sums the divergence's terms over this rank's columns; z becomes their numerators."""
        objective, z = self.objective, self.z[block]
        student, alpha, normalize = merged.student, self.objective.alpha, self.objective.normalize
        u = self._log_ratio(merged, block, scratch)
        if objective.entry_clip is not None or (not self._is_near(merged, block) and u.amax() > FAR):
            log_p = z.double() - student.log_sum[block, None]
            if objective.entry_clip is None:
                return far_terms(z, log_p, log_p + u, alpha, normalize)
            log_q = log_p + self._log_ratio(merged, block, scratch, wide=True)
            return capped_terms(z, log_p, log_q, alpha, normalize, objective.entry_clip)
        share = merged.share[block].to(z.dtype)
        return divergence_terms(z, u, None, scratch, alpha, normalize, share)

    def _tails(self, merged: Merged, block: slice, scratch: Scratch, places: Places) -> Tensor:
        """Sums masses outside the chosen ids, of p and, where it is known, q; z becomes -p, 0 at the ids."""
        z, slope = self.z[block], self._slope(merged, block)
        neg_p = self._masses(merged, block, scratch)
        neg_p[places.row, places.column] = 0.0
        tails = [-neg_p.sum(-1).double()]
        if self.other is not None:
            u = self._log_ratio(merged, block, scratch)
            if self._is_near(merged, block):
                difference = torch.expm1(u, out=scratch.a).mul_(neg_p).sum(-1).double()
                tails.append(tails[0] - difference)
            else:
                log_q = torch.add(z, u, out=scratch.a).sub_(merged.student.log_sum[block, None].to(z.dtype))
                q = log_q.exp_()
                q[places.row, places.column] = 0.0
                tails.append(q.sum(-1).double())
        z.copy_(neg_p)
        chain_(z, self.objective.student, slope)
        return torch.stack(tails, -1)

    def _is_near(self, merged: Merged, block: slice) -> bool:
        """True where the log-ratios of a block are known to have an exponential, its gaps being small."""
        return (
            self.close[block.start] and merged.offset is not None and bool((merged.offset[block] > CLOSE - FAR).all())
        )

    def _slope(self, merged: Merged, block: slice) -> Tensor | None:
        """Returns the soft-cap's derivative, from final logits as the first stage left them."""
        if self.objective.student[1] is None:
            return None
        return slope_of(self.z[block] + merged.lowered[block].to(self.z.dtype), self.objective.student)

    def _masses(self, merged: Merged, block: slice, scratch: Scratch) -> Tensor:
        """Lowers z as the whole vocabulary asks for, and writes -p into scratch."""
        z, student = self.z[block], merged.student
        lower_(z, student.shift[block, None] - merged.lowered[block])
        return torch.exp(z, out=scratch.neg_p).mul_(-(-student.log_sum[block, None]).exp().to(z.dtype))

    def _log_ratio(self, merged: Merged, block: slice, scratch: Scratch, wide: bool = False) -> Tensor:
        """Writes u = log q - log p (rows, V) into scratch.u, or makes it in float64; after `_masses`."""
        z, other, offset = self.z[block], self.other, merged.offset
        assert other is not None
        assert offset is not None
        other, offset = other[block], offset[block, None]
        if not self.rows.teacher_is_gap and merged.teacher is not None and merged.teacher_lowered is not None:
            shift = merged.teacher.shift[block, None]
            if not wide:
                lower_(other, shift - merged.teacher_lowered[block])
            offset = offset - (shift - merged.student.shift[block, None])
        if wide:
            return (other.double() if self.rows.teacher_is_gap else other.double() - z) - offset
        rounded = offset.to(z.dtype)
        if self.rows.teacher_is_gap:
            u = torch.sub(other, rounded, out=scratch.u)
        else:
            u = torch.sub(other, z, out=scratch.u).sub_(rounded)
        # What rounding a large offset cost would be in all log-ratios of a row alike.
        return u.sub_((offset - rounded).to(z.dtype)) if bool((offset.abs() > CLOSE).any()) else u

    def _add_at(self, z: Tensor, places: Places, values: Tensor) -> None:
        """Adds (rows, k) values to the entries of z that are theirs."""
        z[places.row, places.column] += values[places.row, places.position]
