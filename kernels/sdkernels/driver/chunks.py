"""Cuts the rows into chunks and walks over them, which is what every fused operation does.

Rows without weight are left out before anything is projected. Row factors (token weight, importance, upstream
gradient) multiply a chunk's hidden rows, never its (C, V) tile. Nothing here knows a divergence, and nothing keeps more
than one chunk of logits; `tiling` sizes the chunk so that all of it fits the workspace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..tile.elementwise import transform_
from ..tile.head import fast_products
from ..tile.threads import populated
from ..tile.tiling import MOST_ROWS, ROW_MULTIPLES, block_rows, gradient_view, plan_tiling, tile_columns
from ..types import Gradients, Objective, Operands, TileRows, Weighed, held_dtype, is_same
from ..vocab_parallel.backend import VocabularyParallel
from ..vocab_parallel.shards import Shards
from .backends import load_backend

# Entries of a tile, before the factors of their rows, are below this power of two: float16's own range and a bit.
STEEPEST = 17
MOST_GROWTH = 100  # of a row, in log2: float32 holds it and its inverse
Rows = slice | Tensor  # a chunk's rows: a slice where every row is active, else their indices


class RowWalk:
    """What every pass over rows has: the active ones, in chunks, and their row-wise operands."""

    chunk_rows: int
    gradient_dtype: torch.dtype | None = None  # that in which a tile enters the gradient products; None: its own

    def __init__(
        self,
        operands: Operands,
        objective: Objective,
        backend: str,
        shards: Shards | None = None,
        weighed: Weighed | None = None,
    ) -> None:
        self.operands, self.objective, self.dtype = operands, objective, operands.dtype
        self.vocab = (objective.vocab_size or operands.vocab) if shards is None else shards.width
        self.backend: Any = load_backend(backend) if shards is None else VocabularyParallel(shards)
        weights, self.count = operands.token_weights, operands.student_hidden.shape[0]
        self.weighed = Weighed.of(weights) if weights is not None and weighed is None else weighed
        self.active: Tensor | None = None
        if weights is not None and self.weighed is not None and self.weighed.active < self.count:
            self.count = self.weighed.active
            # Not by nonzero(), for which a GPU is waited for: how many there are is known.
            self.active = (weights == 0).to(torch.uint8).argsort(stable=True)[: self.count]

    def chunks(self) -> Iterator[Rows]:
        for start in range(0, self.count, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, self.count))
            yield chunk if self.active is None else self.active[chunk]

    def per_row(self) -> Tensor:
        """Returns zeros (N,) for row values, which rows without weight keep."""
        hidden = self.operands.student_hidden
        return hidden.new_zeros(hidden.shape[0], dtype=self.dtype)

    def project(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Returns raw logits (C, V) of student and teacher, in buffers that the backend may destroy."""
        raise NotImplementedError

    def tile_rows(self, rows: Rows) -> TileRows:
        operands = self.operands
        return TileRows(
            student_bias=self._bias(operands.student_bias),
            teacher_bias=self._bias(operands.teacher_bias),
            target_ids=_part(operands.target_ids, rows),
            teacher_ids=_part(operands.teacher_ids, rows),
            teacher_logprobs=_part(operands.teacher_logprobs, rows),
        )

    def token_weights(self, rows: Rows) -> Tensor | None:
        weights = _part(self.operands.token_weights, rows)
        return None if weights is None else weights.to(self.dtype)

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias[: self.vocab]


class LogitWalk(RowWalk):
    """Walks over logits that exist already: the operands' hidden states are logits (N, V)."""

    def __init__(
        self,
        operands: Operands,
        objective: Objective,
        backend: str,
        workspace_bytes: int,
        weighed: Weighed | None = None,
    ) -> None:
        sides = [operands.student_hidden]
        if operands.teacher_hidden is not None:
            sides.append(operands.teacher_hidden)
        super().__init__(operands, objective, backend, weighed=weighed)
        device = operands.student_hidden.device.type
        self.chunk_rows = plan_tiling(
            self.count,
            self.vocab,
            sides=len(sides),
            hidden_entries=self.vocab,  # the gathered rows on their way into the buffer
            cast_width=0,
            itemsize=self.dtype.itemsize,
            scratch=self.backend.scratch_bytes(self.count, self.vocab, device, objective.topk),
            workspace_bytes=workspace_bytes,
        ).chunk_rows
        self.sides = sides
        shape = (self.chunk_rows, tile_columns(self.vocab, device))
        self.logits = [side.new_empty(shape, dtype=self.dtype)[:, : self.vocab] for side in sides]

    def project(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        copies = []
        for side, buffer in zip(self.sides, self.logits, strict=True):
            part = side[rows][:, : self.vocab]
            copies.append(buffer[: part.shape[0]].copy_(part))
        return copies[0], copies[1] if len(copies) > 1 else None


class HeadWalk(RowWalk):
    """Walks over hidden states and projects them by their heads, or, with `shards`, by this rank's rows of them.

    `more` bytes, once and per row of a chunk, are what is to be done with its tile takes.
    """

    def __init__(
        self,
        operands: Operands,
        objective: Objective,
        backend: str,
        workspace_bytes: int,
        shards: Shards | None = None,
        more: tuple[int, int] = (0, 0),
        weighed: Weighed | None = None,
    ) -> None:
        sides = operands.sides()
        super().__init__(operands, objective, backend, shards, weighed)
        self.shards = shards
        # The chunks of all ranks have as many rows, or their collectives would not match.
        widest = self.vocab if shards is None else shards.widest
        # Neighbours with one weight are projected together: a tile of the head is cast once for all of them.
        runs = [list(run) for _, run in groupby(sides, key=lambda side: id(side[1]))]
        make_head = self.backend.make_head
        self.groups = []
        for run in runs:
            hidden_dtype = reduce(torch.promote_types, (side[0].dtype for side in run))
            self.groups.append(
                (make_head(run[0][1][: self.vocab], self.dtype, hidden_dtype), [side[0] for side in run])
            )
        self.student_head = self.groups[0][0]
        self.gradient_dtype = self.dtype if self.student_head.narrow else self.student_head.factor_dtype
        hidden = operands.student_hidden
        once, per_row = self.backend.scratch_bytes(self.count, widest, hidden.device.type, objective.topk)
        head_once, head_per_row = map(max, zip(*(head.scratch_bytes() for head, _ in self.groups), strict=True))
        tiling = plan_tiling(
            self.count,
            widest,
            sides=len(sides),
            hidden_entries=3 * sum(side.shape[1] for side, _ in sides) + 2 * hidden.shape[1],
            cast_width=max((head.weight.shape[1] for head, _ in self.groups if head.cast), default=0),
            itemsize=self.dtype.itemsize,
            scratch=(once + head_once + more[0], per_row + head_per_row + more[1]),
            workspace_bytes=workspace_bytes,
            most_rows=MOST_ROWS.get(hidden.device.type),
            multiple=ROW_MULTIPLES.get(hidden.device.type, 1),
        )
        self.chunk_rows = tiling.chunk_rows
        for head, _ in self.groups:
            head.reserve(tiling.cast_columns)
        shape = (tiling.chunk_rows, tile_columns(self.vocab, hidden.device.type))
        self.logits = [populated(hidden.new_empty(shape, dtype=self.dtype))[:, : self.vocab] for _ in sides]
        # Two teachers are mixed by their final logits, so that part of the transform is done here, not in the tile.
        self.mixing = operands.mix_hidden is not None
        if self.mixing:
            self.objective = replace(objective, teacher=(1.0, None, 1.0))
            self.teacher_transform, self.mix_share = objective.teacher, objective.mix_share
        self.gap = (
            self.backend.TAKES_GAP
            and operands.teacher_hidden is not None
            and sides[1][1] is sides[0][1]
            and self.student_head.operand_dtype == self.dtype  # else the difference would be rounded to 16 bits
            and not self.mixing
            and objective.teacher == objective.student
            and objective.student[1] is None
            and is_same(operands.student_bias, operands.teacher_bias)
        )

    def student_rows(self, rows: Rows) -> Tensor:
        """Returns the rows (C, H) as they enter the product with a gradient tile."""
        return self.operands.student_hidden[rows].to(self.student_head.factor_dtype)

    def project(self, rows: Rows) -> tuple[Tensor, Tensor | None]:
        projected: list[Tensor] = []
        for head, members in self.groups:
            hidden = [side[rows].to(head.operand_dtype) for side in members]
            if self.gap:
                hidden[1] = hidden[1] - hidden[0]
            buffers = self.logits[len(projected) : len(projected) + len(members)]
            outs = [buffer[: part.shape[0]] for buffer, part in zip(buffers, hidden, strict=True)]
            if self.vocab:
                with fast_products(hidden[0].device, "projection"):
                    head.project(hidden, outs)
            projected += outs
        if self.mixing:
            student, teacher, other = projected
            for side in (teacher, other):
                transform_(side, self.teacher_transform, self._bias(self.operands.teacher_bias))
            return student, teacher.lerp_(other, self.mix_share)
        return projected[0], projected[1] if len(projected) > 1 else None

    def tile_rows(self, rows: Rows) -> TileRows:
        tile_rows = replace(super().tile_rows(rows), teacher_is_gap=self.gap)
        return replace(tile_rows, teacher_bias=None) if self.mixing else tile_rows


class LogitGradient:
    """Writes the gradient of logits (N, V) chunk by chunk; it is zero in rows without weight."""

    def __init__(self, walk: LogitWalk) -> None:
        self.logits = torch.zeros_like(walk.operands.student_hidden)
        self.vocab = walk.vocab

    def add(self, rows: Rows, gradient: Tensor, factors: Tensor | None, scale: float) -> None:
        gradient.mul_(scale if factors is None else (factors * scale)[:, None])
        self.logits[rows, : self.vocab] = gradient.to(self.logits.dtype)


class HeadGradients:
    """Sums the gradients of hidden states and head chunk by chunk, the head's in the compute dtype.

    `held`: they wait for an upstream gradient, in `held_dtype`. `bounds` (N,), whose product no factor of a row is
    above, are for a float16 head.
    """

    def __init__(self, walk: HeadWalk, wanted: str, held: bool = False, bounds: Sequence[Tensor | None] = ()) -> None:
        self.walk, self.bounds = walk, bounds
        self.result_dtype = held_dtype if held else lambda dtype: dtype
        hidden, weight = walk.operands.student_hidden, walk.operands.weight
        self.hidden = torch.zeros_like(hidden, dtype=self.result_dtype(hidden.dtype)) if "h" in wanted else None
        self.chunk = hidden.new_empty((walk.chunk_rows if "h" in wanted else 0, hidden.shape[1]), dtype=walk.dtype)
        self.weight = self._sums(weight) if "w" in wanted else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=walk.dtype) if "b" in wanted else None
        self.first = True

    def _sums(self, weight: Tensor) -> Tensor:
        """Returns where the head's gradient (V, H) is summed: anything, which the `first` chunk overwrites."""
        return populated(weight.new_empty(weight.shape, dtype=self.walk.dtype))

    def add(self, rows: Rows, gradient: Tensor, factors: Tensor | None, scale: float) -> None:
        """Adds the products of one gradient tile (C, V); row i counts `scale · factors[i]` times."""
        head, vocab = self.walk.student_head, self.walk.vocab
        if self.bias is not None:
            count, dtype = gradient.shape[0], self.bias.dtype
            by_row = gradient.new_ones(count, dtype=dtype) if factors is None else factors
            # A tile of 16 bits is widened, or the factors and the sum would be rounded like it.
            step = count if gradient.dtype == dtype else block_rows(vocab, gradient.device.type)
            for start in range(0, count, step):
                block = slice(start, start + step)
                self.bias[:vocab] += (gradient[block].to(dtype).t() @ by_row[block]) * scale
        grown = None
        if head.narrow and vocab and head.weight.dtype == torch.float16:
            most = MOST_GROWTH if self.weight is None else self._range[0]
            gradient, grown = _into_float16(gradient, factors, most)
            factors = None
        elif head.narrow and vocab:
            # The factors go in before the tile is rounded: in hidden rows they would be rounded once more.
            gradient, factors = _into_bfloat16(gradient, factors), None
        chunk: Tensor | None = None
        hidden: Tensor | None = None
        if self.hidden is not None:
            chunk = self.chunk[: gradient.shape[0]]
            if not vocab:
                chunk.zero_()
        weight_scale = scale
        if self.weight is not None and vocab:
            hidden, of_hidden = self.walk.student_rows(rows), factors
            if grown is not None:
                unit = 2.0 ** self._range[1]
                of_hidden, weight_scale = 1 / (grown * unit), scale * unit
            if of_hidden is not None:
                hidden = (hidden * of_hidden[:, None]).to(hidden.dtype)
        if vocab:
            of_row = factors if grown is None else 1 / grown
            with fast_products(gradient.device, "gradient"):
                self._multiply(gradient, chunk, hidden, of_row, weight_scale)
        if self.hidden is not None and chunk is not None:
            if grown is not None:
                chunk.div_(grown[:, None])
            if self.walk.shards is not None:
                self.walk.shards.add_up_(chunk)
            chunk.mul_(scale if factors is None else (factors * scale)[:, None])
            self.hidden[rows] = chunk.to(self.hidden.dtype)
        self.first = False

    def _multiply(
        self, gradient: Tensor, chunk: Tensor | None, hidden: Tensor | None, of_row: Tensor | None, scale: float
    ) -> None:
        """Writes tile (C, V) · head to `chunk` (C, H), and adds scale · tileᵀ · `hidden` (C, H) to the head's gradient.

        Row i of the tile counts `of_row[i]` times, of which hidden rows are multiples already.
        """
        head = self.walk.student_head
        if chunk is not None:
            head.hidden_gradient(gradient, chunk)
        if hidden is not None and self.weight is not None:
            head.weight_gradient(gradient, hidden, self.weight[: self.walk.vocab], scale, self.first)

    @cached_property
    def _range(self) -> tuple[int, int]:
        """Returns how far rows of float16 tiles may be grown, and the unit of products with hidden rows, both in log2.

        The products of all chunks have one unit, for which hidden rows shrink as those of the tile have grown: so one
        host read does for a call. The largest hidden row is then below 2^15, and where tiles are small above 2^-11.
        """
        low, high = self.walk.operands.student_hidden.aminmax(dim=1)
        sizes = torch.maximum(-low, high).to(self.walk.dtype)
        reaches = sizes
        for bound in self.bounds:
            reaches = reaches if bound is None else reaches * bound.abs().to(sizes.dtype)
        # A row without weight may hold anything.
        counts = reaches.isfinite() & (reaches > 0)
        largest = torch.stack([torch.where(counts, values, 0.0).amax() for values in (sizes, reaches)]).tolist()
        size, reach = (math.frexp(value)[1] for value in largest)
        unit = max(reach + STEEPEST - 30, -100)
        return min(size - unit + 11, MOST_GROWTH), unit

    def result(self) -> Gradients:
        operands, weight, bias = self.walk.operands, self.weight, self.bias
        if weight is not None:
            weight[0 if self.first else self.walk.vocab :].zero_()
            weight = weight.to(self.result_dtype(operands.weight.dtype))
        if bias is not None and operands.student_bias is not None:
            bias = bias.to(self.result_dtype(operands.student_bias.dtype))
        return Gradients(self.hidden, weight, bias)


def _into_float16(gradient: Tensor, factors: Tensor | None, most: int) -> tuple[Tensor, Tensor]:
    """Rounds a tile (C, V) times its rows' factors to float16; returns it, and by what (C,) its rows are too large.

    A row is grown by the power of two, of at most 2^most, that takes its largest entry to float16's upper end. Then all
    entries down to 2^-29 of it keep their digits.
    """
    by_row = gradient.new_ones(gradient.shape[0]) if factors is None else factors
    low, high = gradient.aminmax(dim=1)
    exponents = torch.frexp(torch.maximum(-low, high) * by_row.abs()).exponent
    grow = torch.exp2((15 - exponents).clamp(max=most).to(gradient.dtype))
    rows = gradient.new_empty((gradient.shape[0], gradient.stride(0)), dtype=torch.float16)[:, : gradient.shape[1]]
    return torch.mul(gradient, (by_row * grow)[:, None], out=rows), grow


def _into_bfloat16(gradient: Tensor, factors: Tensor | None) -> Tensor:
    """Rounds a tile times its rows' factors into the first half of the rows' memory: the tile is gone."""
    view = gradient_view(gradient, torch.bfloat16)
    step = block_rows(gradient.shape[1], gradient.device.type)
    for start in range(0, gradient.shape[0], step):
        block = slice(start, start + step)
        view[block] = (gradient[block] if factors is None else gradient[block] * factors[block, None]).to(view.dtype)
    return view


def _part(tensor: Tensor | None, rows: Rows) -> Tensor | None:
    return None if tensor is None else tensor[rows]
