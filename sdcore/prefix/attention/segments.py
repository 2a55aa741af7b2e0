"""Says which part of one packed row attends to which, as integers, and cuts the tensors of one attention accordingly.

A row holds the nodes of trees in depth-first order, so that the descendants of a node are one block behind it. Nodes
may be borrowed: then their tokens are not in the row, but keys and values of another pass. A token sees its own node up
to its own position and the nodes above it; with a sliding window only the last `window` tokens of these.

`Row.blocks` cuts that into rectangles of queries and keys that a dense attention kernel can do: each node against
itself, and each node against all of its descendants (with a window against each of them that reaches it). Every visible
pair of tokens is in exactly one rectangle, and every query of a rectangle sees at least one of its keys: kernels
disagree on what the softmax over nothing is.

`Call` goes from these integers to tensors: it gives each rectangle's keys and values (`cut`), from the row or from what
is borrowed, and its mask. The kernels that take them are in `function` and `cuda`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

KeyValue: TypeAlias = tuple[Tensor, Tensor]  # (1, kv heads, tokens, head size) each, rotated

# `Block.source` of keys: they are in the row, or in what is borrowed.
ROW, BORROWED = 0, 1


class Span(NamedTuple):
    """Names neighbouring tokens of the row, or of what is borrowed, and the first's absolute position."""

    start: int
    length: int
    position: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class Node(NamedTuple):
    """Names the tokens that some sequences have in common, and what comes after them. Lengths of 0 are allowed."""

    span: Span
    parent: int  # index of the node before it; -1: none
    after: Span  # all of the row's tokens that come after it
    source: int = ROW


class Block(NamedTuple):
    """Puts queries `query .. query + queries` against keys `key .. key + keys`, which may be borrowed."""

    query: int
    queries: int
    key: int
    keys: int
    offset: int  # position of the first query minus position of the first key
    source: int = ROW
    causal: bool = False  # equally many queries and keys, the i-th query sees the first i + 1 keys
    masked: bool = False  # some pairs are not visible: query i sees key j where 0 <= offset + i - j < window
    copies: int = 1  # so many blocks of this size follow each other along the diagonal
    opens: bool = False  # the first block of its queries; the others are merged into it


@dataclass(frozen=True)
class Row:
    """Lists the nodes of one packed row, depth first; those in the row without gaps."""

    nodes: tuple[Node, ...]

    @property
    def own(self) -> list[Span]:
        """Lists the nodes that are in the row."""
        return [node.span for node in self.nodes if node.source == ROW]

    @property
    def length(self) -> int:
        return max((span.stop for span in self.own), default=0)

    @property
    def longest(self) -> int:
        """Counts the tokens of the longest sequence in the row, from position 0."""
        return max((span.position + span.length for span in self.own), default=0)

    def blocks(self, window: int | None = None, *, at_most: int | None = None) -> list[Block]:
        """Returns the rectangles, first those that open their queries. `at_most` bounds the queries of each."""
        if window is not None and window >= self.longest:
            window = None
        rectangles: list[Block] = []
        for span, copies in _runs(self.own):
            rectangles += _own(span, copies, window, at_most)
        for node in self.nodes:
            if window is None:
                # All that comes after it sees all of it: one rectangle, however long each branch is.
                rectangles += _across(node.after, node.span, node.source, None, at_most)
                continue
            above = node.parent if node.source == ROW else -1
            while above >= 0:
                keys = self.nodes[above]
                if node.span.position >= keys.after.position - 1 + window:
                    break  # what is above it is further away
                rectangles += _across(node.span, keys.span, keys.source, window, at_most)
                above = keys.parent
        return rectangles


def pack(parents: Sequence[int], lengths: Sequence[int], borrowed: Sequence[int] | None = None) -> Row:
    """Lays out a row of nodes, depth first: of each its parent's index (-1: none) and its tokens.

    `borrowed` says of each where its keys and values are in what is borrowed; -1: they are in the row.
    """
    spans: list[Span] = []
    stop, stops = 0, [0] * len(parents)  # of each node where the row had got to behind it
    for i, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
        position = spans[parent].position + spans[parent].length if parent >= 0 else 0
        place = -1 if borrowed is None else borrowed[i]
        spans.append(Span(stop if place < 0 else place, length, position))
        stop += length if place < 0 else 0
        stops[i] = stop
    ends = list(stops)
    for i in reversed(range(len(parents))):
        if parents[i] >= 0:
            ends[parents[i]] = max(ends[parents[i]], ends[i])
    return Row(
        tuple(
            Node(
                span,
                parents[i],
                Span(stops[i], ends[i] - stops[i], span.position + span.length),
                ROW if borrowed is None or borrowed[i] < 0 else BORROWED,
            )
            for i, span in enumerate(spans)
        )
    )


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
    borrowed: KeyValue | None
    scaling: float
    window: int | None  # None also where no sequence of the row is longer
    softcap: float | None
    shared: dict[Any, Any]

    def blocks(self, at_most: int | None) -> list[Block]:
        name = ("blocks", self.window, at_most)
        if name not in self.shared:
            self.shared[name] = self.row.blocks(self.window, at_most=at_most)
        return self.shared[name]

    def keys_of(self, block: Block, key: Tensor, value: Tensor) -> KeyValue:
        if block.source == BORROWED and self.borrowed is not None:
            key, value = self.borrowed
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
