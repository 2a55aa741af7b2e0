"""Says which part of one packed row attends to which, as integers, and cuts the tensors of one attention accordingly.

A row holds groups one after the other, a group is `[trunk | branch 0 | branch 1 | ...]`. A trunk may continue a prefix
that is not in the row: keys and values from another pass, `prefix` tokens of them. A token sees the prefix and the
trunk of its group, and its own branch, up to its own position; with a sliding window only the last `window` of these.

`Row.blocks` cuts that into rectangles of queries and keys that a dense attention kernel can do. Every visible pair of
tokens is in exactly one rectangle, and every query of a rectangle sees at least one of its keys: kernels disagree on
what the softmax over nothing is.

`Call` goes from these integers to tensors: it gives each rectangle's keys and values (`cut`), from the row or from a
prefix, and its mask. The kernels that take them are in `function` and `cuda`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

KeyValue: TypeAlias = tuple[Tensor, Tensor]  # (1, kv heads, tokens, head size) each, rotated

# `Block.source` of keys that are in the row.
ROW = -1


class Span(NamedTuple):
    """Names neighbouring tokens of the row, and the absolute position of the first in its sequence."""

    start: int
    length: int
    position: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class Group(NamedTuple):
    """Names a trunk, what it continues, and its branches. Spans of length 0 are allowed."""

    prefix: int  # tokens before the trunk whose keys and values are not in the row
    trunk: Span
    branches: tuple[Span, ...]

    @property
    def all_branches(self) -> Span:
        start, position = self.trunk.stop, self.trunk.position + self.trunk.length
        return Span(start, sum(branch.length for branch in self.branches), position)


class Block(NamedTuple):
    """Puts queries `query .. query + queries` of the row against keys `key .. key + keys` of it or of a prefix."""

    query: int
    queries: int
    key: int
    keys: int
    offset: int  # position of the first query minus position of the first key
    source: int = ROW  # ROW, or the index of the group whose prefix holds the keys
    causal: bool = False  # equally many queries and keys, the i-th query sees the first i + 1 keys
    masked: bool = False  # some pairs are not visible: query i sees key j where 0 <= offset + i - j < window
    copies: int = 1  # so many blocks of this size follow each other along the diagonal
    opens: bool = False  # the first block of its queries; the others are merged into it


@dataclass(frozen=True)
class Row:
    """Lists the groups of one packed row, in order and without gaps."""

    groups: tuple[Group, ...]

    @property
    def length(self) -> int:
        return self.groups[-1].all_branches.stop if self.groups else 0

    @property
    def longest(self) -> int:
        """Counts the tokens of the longest sequence in the row, from position 0."""
        spans = [span for group in self.groups for span in (group.trunk, *group.branches)]
        return max((span.position + span.length for span in spans), default=0)

    def blocks(self, window: int | None = None, *, at_most: int | None = None) -> list[Block]:
        """Returns the rectangles, first those that open their queries. `at_most` bounds the queries of each."""
        if window is not None and window >= self.longest:
            window = None
        rectangles: list[Block] = []
        for group in self.groups:
            for span, copies in _runs([group.trunk, *group.branches]):
                rectangles += _own(span, copies, window, at_most)
        for index, group in enumerate(self.groups):
            trunk, prefix = group.trunk, Span(0, group.prefix, 0)
            # Without a window the branches see all of it: one rectangle for all of them, however long each is.
            branches = [group.all_branches] if window is None else group.branches
            for span in branches:
                rectangles += _across(span, trunk, ROW, window, at_most)
            for span in (trunk, *branches):
                rectangles += _across(span, prefix, index, window, at_most)
        return rectangles


def pack(groups: Sequence[tuple[int, int, Sequence[int]]]) -> Row:
    """Lays out a row of these groups, each given as (prefix tokens, trunk tokens, tokens of each branch)."""
    packed, start = [], 0
    for prefix, trunk_length, branch_lengths in groups:
        trunk = Span(start, trunk_length, prefix)
        start += trunk_length
        branches = []
        for length in branch_lengths:
            branches.append(Span(start, length, prefix + trunk_length))
            start += length
        packed.append(Group(prefix, trunk, tuple(branches)))
    return Row(tuple(packed))


def _runs(spans: Sequence[Span]) -> Iterator[tuple[Span, int]]:
    """Yields spans with tokens; neighbours of one length are one entry, with their number."""
    for _, run in groupby((span for span in spans if span.length), key=lambda span: span.length):
        same = list(run)
        yield same[0], len(same)


def _own(span: Span, copies: int, window: int | None, at_most: int | None) -> Iterator[Block]:
    """Cuts a span (or `copies` of its length) against itself, causal."""
    short = at_most is None or span.length <= at_most
    if short and (window is None or span.length <= window):
        yield Block(span.start, span.length, span.start, span.length, 0, causal=True, copies=copies, opens=True)
        return
    for copy in range(copies):
        start = span.start + copy * span.length
        for first in range(0, span.length, _step(window, at_most)):
            last = min(first + _step(window, at_most), span.length) - 1
            key = 0 if window is None else max(0, first - window + 1)
            yield Block(
                start + first,
                last + 1 - first,
                start + key,
                last + 1 - key,
                first - key,
                masked=last > first,
                opens=True,
            )


def _across(queries: Span, keys: Span, source: int, window: int | None, at_most: int | None) -> Iterator[Block]:
    """Cuts queries against keys that all come before them."""
    length, behind = queries.length, queries.position - keys.position
    if window is not None:
        # The later ones are further than a window from the last key.
        length = max(0, min(length, keys.length + window - 1 - behind))
    if not length or not keys.length:
        return
    everything = window is None or behind + length - 1 < window
    step = length if everything and at_most is None else _step(window, at_most)
    for first in range(0, length, step):
        last = min(first + step, length) - 1
        key = 0 if window is None else max(0, behind + first - window + 1)
        yield Block(
            queries.start + first,
            last + 1 - first,
            keys.start + key,
            keys.length - key,
            behind + first - key,
            source=source,
            masked=window is not None and behind + last - key >= window,
        )


def _step(window: int | None, at_most: int | None) -> int:
    """Returns the queries per rectangle: with a window few enough that most of what is computed is visible."""
    return min(at_most or 256, max(64, window or 256))


@dataclass(frozen=True, eq=False)
class Call:
    """Describes one attention over a row: what it borrows, scales, bounds and remembers."""

    row: Row
    prefixes: tuple[Any, ...]  # per group KeyValue or None
    scaling: float
    window: int | None  # None also where no sequence of the row is longer
    softcap: float | None
    shared: dict[Any, Any]

    def keys_of(self, block: Block, key: Tensor, value: Tensor) -> KeyValue:
        if block.source != ROW:
            key, value = self.prefixes[block.source]
        return cut(key, block.key, block.keys, block.copies), cut(value, block.key, block.keys, block.copies)

    def mask_of(self, block: Block, like: Tensor) -> Tensor | None:
        """Returns (queries, keys) of 0 and -inf as `like`, or None where the kernel's causal flag says it all."""
        if not block.masked:
            return None
        name = (block.queries, block.keys, block.offset, self.window, like.dtype, like.device)
        if name not in self.shared:
            size = (block.queries, block.keys)
            visible = torch.ones(size, dtype=torch.bool, device=like.device).tril_(block.offset)
            if self.window is not None:
                visible.triu_(block.offset - self.window + 1)
            mask = torch.full(size, float("-inf"), dtype=like.dtype, device=like.device)
            self.shared[name] = mask.masked_fill_(visible, 0.0)
        return self.shared[name]


def cut(states: Tensor, start: int, count: int, copies: int = 1) -> Tensor:
    """Returns (copies, heads, count, ...) of (1, heads, L, ...), without copying."""
    part = states.narrow(2, start, copies * count)
    return part if copies == 1 else part.unflatten(2, (copies, count)).squeeze(0).transpose(0, 1)
