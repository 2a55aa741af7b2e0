"""Plans trajectories: whole conversations, of which some tokens carry loss, and teachers who see them otherwise.

    views = [View(ids=hint + turn, trajectory=0, tokens=range(40, 60), positions=range(12, 32))]
    plan = plan_trajectories([ids], [mask], views)        # rows: the tokens of the mask, in order trajectory, position

All sequences are merged wherever they begin alike: turns, attempts at one task, tasks with one system prompt. A view is
what a teacher reads, and says where in it which tokens of which trajectory are. Views are merged like trajectories, and
where a teacher has the student's weights it borrows what they begin with alike, up to any depth of the student's tree.
So T turns with a view each cost the tokens that the views add, and not T times the trajectory.

What differs from the obvious: trees are by first tokens, whoever asks: trajectories that begin with the same token are
one `Tree`, and the views of its trajectories are the teacher's. Tokens behind the last one with loss are not computed.
A token that no view scores has no row in that teacher's trees.

Sequences are compared whole, span by span: plans of thousands of tokens a sequence cost what reading them costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import PlanError, PlanTypeError
from .planner import Plan, TokenIds, collect_ids, common_prefix, entries, supervised
from .tree import Tree


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Is what a teacher reads, and which tokens it scores there."""

    ids: TokenIds
    trajectory: int  # index of whose tokens it scores
    tokens: TokenIds  # positions in the trajectory of the tokens, all with loss, ascending
    positions: TokenIds  # where in `ids` the same tokens are, ascending
    teacher: int = 0  # of `TrustRegion` 0 is the reference and 1 the live one; where all are 0, both read these


def plan_trajectories(
    trajectories: Sequence[TokenIds],
    masks: Sequence[Tensor | Sequence[bool]],
    views: Sequence[View] | None = None,
    *,
    groups: Sequence[int] | None = None,
    teachers: int | None = None,
) -> Plan:
    """Finds what passes over trajectories, and over the views of them, share.

    `masks` says of each trajectory, bool (L,), which tokens carry loss: any but the first, with holes or none at all.
    `views` None plans the student's pass alone. `groups` says how many trajectories, one after the other, are attempts
    at the same task, which `tilt_step` compares; None: all. `teachers` is how many are told apart, for batches in which
    one may have no view; None: as many as the views name. Rows are in the order trajectory, position.

    Raises `PlanError` or `PlanTypeError`, which name the argument and the index, before anything is computed.
    """
    named = [(f"trajectories[{i}]", ids) for i, ids in entries("trajectories", trajectories)]
    if not named:
        raise PlanError("trajectories must have at least one trajectory, got none")
    given_views = []
    for v, view in [] if views is None else entries("views", views):
        if not isinstance(view, View):
            raise PlanTypeError(f"views[{v}] must be a View, got {type(view).__name__}")
        given_views.append(view)
        named.append((f"views[{v}]", view.ids))
    ids, host = (list(of_name.values()) for of_name in collect_ids(named, may_be_empty=frozenset()))
    given_masks = [mask for _, mask in entries("masks", masks)]
    if len(given_masks) != len(trajectories):
        raise PlanError(f"masks must have one entry per trajectory, {len(trajectories)}, got {len(given_masks)}")
    with_loss = [
        supervised(f"masks[{i}]", mask, len(host[i]), f"trajectories[{i}]") for i, mask in enumerate(given_masks)
    ]
    if (at := next((i for i, tokens in enumerate(with_loss) if tokens[:1].tolist() == [0]), None)) is not None:
        raise PlanError(f"masks[{at}] must not be true at position 0: no token comes before it, to predict it")
    counts = [len(tokens) for tokens in with_loss]
    firsts = list(accumulate(counts, initial=0))
    ends = list(accumulate([len(counts)] if groups is None else groups, initial=0))
    if ends[-1] != len(counts) or min(groups or [0]) < 0:
        raise PlanError(f"groups must add up to the {len(counts)} trajectories, got {groups}")

    wanted = [
        _Wanted(i, tokens - 1, torch.arange(firsts[i], firsts[i + 1]), named[i][0])
        for i, tokens in enumerate(with_loss)
    ]
    told_apart = sorted({view.teacher for view in given_views})
    if teachers is None:
        teachers = len(told_apart)
        if told_apart != list(range(teachers)):
            raise PlanError(f"views must have teachers counted from 0, got {told_apart}")
    elif not set(told_apart) <= set(range(teachers)):
        raise PlanError(f"views must have a teacher below teachers={teachers}, got {told_apart}")
    scorers = torch.full((teachers, firsts[-1]), -1)
    scored = [_scored(v, view, host, with_loss, firsts, scorers) for v, view in enumerate(given_views)]
    trie = _Trie(host)
    for sequence in (*wanted, *scored):
        trie.add(sequence.index, sequence.length)
    for sequence in scored:
        # What is before the first state that is asked for may be borrowed.
        trie.add(sequence.index, int(sequence.rows[0]) if len(sequence.rows) else 0)
    # A tree for each first token; one, without a node, where there is nothing to compute.
    roots = list(dict.fromkeys(int(host[i][0]) for i, count in enumerate(counts) if count)) or [-1]

    def trees(teacher: int) -> tuple[Tree, ...]:
        by_root: dict[int, list[_Wanted]] = {root: [] for root in roots}
        for i, sequence in enumerate(wanted if teacher < 0 else scored):
            if len(sequence.rows) and (teacher < 0 or given_views[i].teacher == teacher):
                by_root[int(host[i if teacher < 0 else given_views[i].trajectory][0])].append(sequence)
        return tuple(trie.tree((root, teacher), of_root, ids) for root, of_root in by_root.items())

    return Plan(
        student=trees(-1),
        teachers=tuple(trees(teacher) for teacher in range(teachers)),
        target_ids=torch.cat([ids[i][tokens.to(ids[i].device)] for i, tokens in enumerate(with_loss)]),
        counts=tuple(tuple(counts[a:b]) for a, b in pairwise(ends)),
        given=tuple((name, own) for (name, _), own in zip(named, ids, strict=True)),
    )


@dataclass(frozen=True, eq=False)
class _Wanted:
    """Is a sequence of which states are asked for."""

    index: int  # of its ids
    rows: Tensor  # (n,) positions, ascending
    places: Tensor  # (n,) which of the plan's rows
    name: str

    @property
    def length(self) -> int:
        """Counts the tokens that are read."""
        return int(self.rows[-1]) + 1 if len(self.rows) else 0


_Reader: TypeAlias = tuple[int, int]  # the root of a student's tree, and whose: a teacher's, or the student's (-1)


@dataclass(eq=False)
class _Node:
    """Holds ids `begin .. end` of a sequence, which others have at the same positions."""

    sequence: int
    begin: int
    end: int
    children: dict[int, _Node] = field(default_factory=dict)  # by their first id
    flats: dict[_Reader, int] = field(default_factory=dict)  # of whoever reads it: where its tokens are in the tree
    asked: set[_Reader] = field(default_factory=set)  # who asks for states in it


class _Trie:
    """Merges all sequences that begin alike, whoever reads them."""

    def __init__(self, host: Sequence[Tensor]) -> None:
        self.host = host
        self.top = _Node(-1, 0, 0)

    def walk(self, ids: Tensor) -> list[tuple[_Node, int]]:
        """Lists the nodes that these ids go through, and up to which position they are alike."""
        path, node, at = [], self.top, 0
        while at == node.end and at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            at += common_prefix(self.host[child.sequence][child.begin : child.end], ids[at:])
            path.append((child, at))
            node = child
        return path

    def add(self, index: int, length: int) -> None:
        """Lets a node end behind so many ids of a sequence."""
        ids = self.host[index][:length]
        node, at = (self.walk(ids) or [(self.top, 0)])[-1]
        if at < node.end:
            rest = _Node(node.sequence, at, node.end, node.children)
            node.end, node.children = at, {int(self.host[node.sequence][at]): rest}
        if at < length:
            node.children[int(ids[at])] = _Node(index, at, length)

    def tree(self, reader: _Reader, wanted: Sequence[_Wanted], ids: Sequence[Tensor]) -> Tree:
        """Lays out depth first what one reads, who may borrow what the student reads below the same root."""
        # Of each sequence its nodes, and in which of them each row is.
        paths = [[node for node, _ in self.walk(self.host[s.index][: s.length])] for s in wanted]
        rows_in = []
        for sequence, path in zip(wanted, paths, strict=True):
            rows_in.append(torch.bucketize(sequence.rows, torch.tensor([node.end for node in path]), right=True))
            for node in path:
                node.flats[reader] = -1
            for n in rows_in[-1].unique().tolist():
                path[n].asked.add(reader)
        lender = (reader[0], -1)
        spans: list[list[Tensor]] = []
        parents: list[int] = []
        borrowed: list[int] = []
        flat = after = 0  # where the next token is, and where it would be in the lender's tree if it went on
        stack = [(self.top, -1, False)]
        while stack:
            node, at, only = stack.pop()
            if node is not self.top:
                node.flats[reader], length = flat, node.end - node.begin
                lends = reader != lender and (at < 0 or borrowed[at] >= 0) and reader not in node.asked
                place = node.flats.get(lender, -1) if lends else -1
                # A cut that someone else needed, or that only told what is borrowed from what is borrowed, is none.
                if not (only and (place == after if place >= 0 else borrowed[at] < 0)):
                    spans.append([])
                    parents.append(at)
                    borrowed.append(place)
                    at = len(spans) - 1
                spans[at].append(ids[node.sequence][node.begin : node.end])
                flat, after = flat + length, place + length
            below = [child for child in node.children.values() if reader in child.flats]
            stack += [(child, at, node is not self.top and len(below) == 1) for child in reversed(below)]
        nothing = torch.empty(0, dtype=torch.int64)
        flats = [torch.tensor([node.flats[reader] - node.begin for node in path]) for path in paths]
        rows = [sequence.rows + flats[i][rows_in[i]] for i, sequence in enumerate(wanted)]
        return Tree(
            spans=tuple(torch.cat(pieces) for pieces in spans),
            parents=tuple(parents),
            counts=tuple(len(sequence.rows) for sequence in wanted),
            rows=torch.cat([nothing, *rows]),
            places=torch.cat([nothing, *(sequence.places for sequence in wanted)]),
            borrowed=tuple(borrowed),
            names=tuple(sequence.name for sequence in wanted),
        )


def _scored(
    v: int,
    view: View,
    host: Sequence[Tensor],
    with_loss: Sequence[Tensor],
    firsts: Sequence[int],
    scorers: Tensor,  # (teachers, N) which view scores a row, -1: none yet
) -> _Wanted:
    """Checks a view, and returns the states that it asks for."""
    i, count, name = view.trajectory, len(with_loss), f"views[{v}]"
    if type(i) is not int or not 0 <= i < count:
        raise PlanError(f"{name} must have a trajectory in [0, {count}), got {i!r}")
    tokens, positions = (torch.as_tensor(x, dtype=torch.int64).cpu() for x in (view.tokens, view.positions))
    if tokens.dim() != 1 or tokens.shape != positions.shape:
        shapes = f"{tuple(tokens.shape)} and {tuple(positions.shape)}"
        raise PlanError(f"{name} must have as many positions as tokens, 1-D, got shapes {shapes}")
    ids = host[count + v]
    for what, numbers, least, most in (("tokens", tokens, 1, len(host[i])), ("positions", positions, 1, len(ids))):
        if len(numbers) and (bool((numbers.diff() <= 0).any()) or numbers[0] < least or numbers[-1] >= most):
            raise PlanError(f"{name} must have {what} in [{least}, {most}), ascending, got {numbers.tolist()}")
    without = tokens[~torch.isin(tokens, with_loss[i])]
    if len(without):
        raise PlanError(f"{name} must score tokens with loss, got token {int(without[0])}, where masks[{i}] is false")
    for at in (ids[positions] != host[i][tokens]).nonzero()[:1, 0].tolist():
        token, position = int(tokens[at]), int(positions[at])
        raise PlanError(
            f"{name} must have at position {position} token {token} of trajectories[{i}], which is id "
            f"{int(host[i][token])}, got id {int(ids[position])}"
        )
    places = torch.searchsorted(with_loss[i], tokens) + firsts[i]
    for at in (scorers[view.teacher][places] >= 0).nonzero()[:1, 0].tolist():
        raise PlanError(
            f"{name} must not score token {int(tokens[at])} of trajectories[{i}], as "
            f"views[{int(scorers[view.teacher][places[at]])}] of the same teacher does: give one another teacher"
        )
    scorers[view.teacher][places] = v
    return _Wanted(count + v, positions - 1, places, name)
