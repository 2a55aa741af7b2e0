"""Holds token sequences that begin alike as a tree, in which every token stands once, and says which states are asked.

A node is a span of ids that some sequences have in common; its parent is what they have before it. What a model reads
for a sequence is the spans from a root down to the token whose state is asked for last. Nodes are in depth-first order:
the tokens of a node are followed by those of all its descendants, in one block. So a token is named by one number, its
place in the spans one after the other (*flat*), and who sees a node is an interval.

What differs from the obvious: a sequence may end inside a node, and asked-for states (rows) may be anywhere, also
several times the same one: the first token of every branch is predicted by the last state before the branching. And a
tree under the student's weights can borrow: of nodes that are spans of the student's tree, too, only the place there is
needed. Borrowed nodes have no rows and only borrowed ancestors.

Letters: S sequences, R rows, L tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import PlanError


@dataclass(frozen=True, kw_only=True, eq=False)
class Tree:
    """Is a group of sequences under one set of weights. Each of its tokens is computed once, or borrowed."""

    spans: tuple[Tensor, ...]  # of each node (L_i,) int64 ids, at least one; depth first
    parents: tuple[int, ...]  # of each node; -1: sequences begin here
    counts: tuple[int, ...]  # of each sequence its R_i >= 0 rows; of one without, nothing is computed
    rows: Tensor  # (R,) int64 on the CPU: the tokens whose states are asked for, flat; in order sequence, position
    places: Tensor  # (R,) int64 on the CPU: which of the plan's rows these are
    borrowed: tuple[int, ...]  # of each node where in the student's tree its tokens are, flat; -1: nowhere
    names: tuple[str, ...]  # of each sequence what errors call it

    def __post_init__(self) -> None:
        for i, ids in enumerate(self.spans):
            if ids.dim() != 1 or ids.dtype != torch.int64 or len(ids) == 0:
                raise PlanError(
                    f"spans[{i}] must be 1-D int64 of at least one token, got shape {tuple(ids.shape)} and {ids.dtype}"
                )
        nodes, rows = len(self.spans), len(self.rows)
        if not nodes == len(self.parents) == len(self.borrowed):
            raise PlanError(f"parents and borrowed must be {nodes} nodes', got {self.parents} and {self.borrowed}")
        path: list[int] = []
        for i, parent in enumerate(self.parents):
            while path and path[-1] != parent:
                path.pop()
            if parent != -1 and not path:
                raise PlanError(f"parents[{i}] must be -1 or an open node, as depth first has them, got {parent}")
            path.append(i)
        if not sum(self.counts) == rows == len(self.places) or min(self.counts, default=0) < 0:
            raise PlanError(f"counts must say whose the {rows} rows are, got {self.counts}")
        if rows and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < self.starts[-1]:
            raise PlanError(f"rows must be in [0, {self.starts[-1]}), the tree's tokens, got {self.rows.tolist()}")
        stops, lent = (torch.tensor([*of_nodes, 0])[self.row_nodes] for of_nodes in (self.stops, self.borrowed))
        for i, of in enumerate(self.slices):
            own = self.rows[of]
            if bool((own.diff() <= 0).any() | (stops[of] <= own[-1:]).any() | (lent[of] >= 0).any()):
                raise PlanError(f"rows of sequence {i} must go down one path, not borrowed, got {own.tolist()}")

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Says of each node where its tokens start, flat; and last how many tokens there are."""
        return tuple(accumulate((len(ids) for ids in self.spans), initial=0))

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """Says of each node which position its first token has in its sequences."""
        begins: list[int] = []
        for parent in self.parents:
            begins.append(0 if parent < 0 else begins[parent] + len(self.spans[parent]))
        return tuple(begins)

    @cached_property
    def stops(self) -> tuple[int, ...]:
        """Says of each node where its last descendant's tokens stop, flat."""
        stops = list(self.starts[1:])
        for i in reversed(range(len(stops))):
            if (parent := self.parents[i]) >= 0:
                stops[parent] = max(stops[parent], stops[i])
        return tuple(stops)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Lists of each node its children, in order; the last entry, that of "parent" -1, are the roots."""
        children: list[list[int]] = [[] for _ in range(len(self.spans) + 1)]
        for i, parent in enumerate(self.parents):
            children[parent].append(i)
        return tuple(map(tuple, children))

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Says of each sequence where its rows are among the tree's."""
        ends = list(accumulate(self.counts, initial=0))
        return tuple(map(slice, ends, ends[1:]))

    @cached_property
    def row_nodes(self) -> Tensor:
        """Says, (R,), in which node each row is."""
        return torch.bucketize(self.rows, torch.tensor(self.starts[1:]), right=True)

    @cached_property
    def positions(self) -> Tensor:
        """Says, (R,), which position each row has in its sequence."""
        moved = [begin - start for begin, start in zip(self.begins, self.starts, strict=False)]
        return self.rows + torch.tensor([*moved, 0])[self.row_nodes]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Counts the tokens that a model reads for each sequence; 0 for one without rows."""
        ends = self.positions.tolist()
        return tuple(ends[of.stop - 1] + 1 if of.stop > of.start else 0 for of in self.slices)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def active(self) -> tuple[int, ...]:
        """Lists the sequences that have rows; nothing needs computing for the others, and none if this is empty."""
        return tuple(i for i, count in enumerate(self.counts) if count)

    @property
    def shared(self) -> int:
        """Counts the tokens that can be borrowed from the student's tree."""
        return sum(len(ids) for ids, place in zip(self.spans, self.borrowed, strict=True) if place >= 0)

    @property
    def reads(self) -> tuple[tuple[int, int], ...]:
        """Lists the spans (start, stop) of the student's tree, flat, that can be borrowed from it: one a node."""
        pairs = zip(self.borrowed, self.spans, strict=True)
        return tuple(sorted((place, place + len(ids)) for place, ids in pairs if place >= 0))

    @property
    def depth(self) -> int:
        """Counts the branchings on the way to the deepest node: 0 for sequences that have nothing in common."""
        depths: list[int] = []
        for parent in self.alone.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)

    @cached_property
    def alone(self) -> Tree:
        """Is the tree where nothing is borrowed: nodes that only borrowing told from their parents are joined."""
        if max(self.borrowed, default=-1) < 0:
            return self
        spans: list[list[Tensor]] = []
        parents, became = [], [-1] * (len(self.spans) + 1)
        for i, parent in enumerate(self.parents):
            if parent >= 0 and self.borrowed[parent] >= 0 and len(self.children[parent]) == 1:
                spans[-1].append(self.spans[i])
            else:
                parents.append(became[parent])
                spans.append([self.spans[i]])
            became[i] = len(spans) - 1
        joined = tuple(torch.cat(pieces) for pieces in spans)
        return replace(self, spans=joined, parents=tuple(parents), borrowed=(-1,) * len(joined))

    def path(self, node: int) -> list[int]:
        """Lists the nodes from the root down to this one."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def sequence(self, i: int) -> Tensor:
        """Returns (L,) what a model reads for a sequence with rows when nothing is shared."""
        node = bisect_right(self.starts, int(self.rows[self.slices[i].stop - 1])) - 1
        return torch.cat([self.spans[of_path] for of_path in self.path(node)])[: self.lengths[i]]

    def tokens(self, *, read_shared: bool) -> int:
        """Counts each token once, and those that can be borrowed only unless they are read."""
        if not self.num_rows:
            return 0
        return self.starts[-1] - (self.shared if read_shared else 0)

    def naive_tokens(self) -> int:
        """Counts the tokens that are computed when each sequence is run by itself."""
        return sum(self.lengths)


def places_of(trees: Sequence[Tree]) -> Tensor:
    """Lists, (R,), which of the plan's rows those of trees are, one tree after the other."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(tree.places for tree in trees)])


def in_order(trees: Sequence[Tree]) -> Tensor | None:
    """Returns (R,) how to order the rows of trees, one tree after the other, by their places; None if they are."""
    places = places_of(trees)
    return None if bool((places[1:] > places[:-1]).all()) else places.argsort()
