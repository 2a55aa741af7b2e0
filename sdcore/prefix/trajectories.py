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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import PlanError, PlanTypeError
from .planner import Plan, TokenIds, collect_ids, common_prefix, entries
from .tree import Tree


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Is what a teacher reads, and which tokens it scores there."""

    ids: TokenIds
    trajectory: int  # index of whose tokens it scores
    tokens: TokenIds  # positions in the trajectory of the tokens, all with loss, ascending
    positions: TokenIds  # where in `ids` the same tokens are, ascending
    teacher: int = 0  # tells apart what two teachers read, as `TrustRegion` has them: of its reference, of the other


def plan_trajectories(
    trajectories: Sequence[TokenIds],
    masks: Sequence[Tensor | Sequence[bool]],
    views: Sequence[View] | None = None,
    *,
    groups: Sequence[int] | None = None,
) -> Plan:
    """Finds what passes over trajectories, and over the views of them, share.

    `masks` says of each trajectory, bool (L,), which tokens carry loss: any but the first, with holes or none at all.
    `views` None plans the student's pass alone. `groups` says how many trajectories, one after the other, are attempts
    at the same task, which `tilt_step` compares; None: all. Rows are in the order trajectory, position.

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
    supervised = [_supervised(i, mask, len(host[i])) for i, mask in enumerate(_masks(masks, len(trajectories)))]
    counts = [len(tokens) for tokens in supervised]
    firsts = list(accumulate(counts, initial=0))
    if groups is not None and (sum(groups) != len(counts) or min(groups, default=0) < 0):
        raise PlanError(f"groups must add up to the {len(counts)} trajectories, got {list(groups)}")

    student = _Trie(host)
    wanted = [
        _Wanted(i, tokens - 1, torch.arange(firsts[i], firsts[i + 1]), named[i][0])
        for i, tokens in enumerate(supervised)
        if len(tokens)
    ]
    for sequence in wanted:
        student.add(sequence)
    # A tree for each root; one, without a node, where there is nothing to compute.
    roots = list(student.top.children) or [-1]
    group_of = {sequence.index: roots.index(int(host[sequence.index][0])) for sequence in wanted}
    by_group: list[list[_Wanted]] = [[] for _ in roots]
    for sequence in wanted:
        by_group[group_of[sequence.index]].append(sequence)
    trees = tuple(student.tree(root, of_group, ids) for root, of_group in zip(roots, by_group, strict=True))

    scored = [_scored(v, view, host, supervised, firsts) for v, view in enumerate(given_views)]
    _check_apart(given_views, scored, firsts[-1])
    teachers = []
    for teacher in range(max((view.teacher for view in given_views), default=-1) + 1):
        own = [v for v, view in enumerate(given_views) if view.teacher == teacher]
        of_teacher = []
        for g, root in enumerate(roots):
            here = [scored[v] for v in own if group_of.get(given_views[v].trajectory) == g and len(scored[v].rows)]
            trie = _Trie(host)
            for sequence in here:
                trie.add(sequence)
            for sequence in here:
                trie.lend(sequence, student, root)
            of_teacher.append(trie.tree(None, here, ids))
        teachers.append(tuple(of_teacher))
    ends = list(accumulate([len(counts)] if groups is None else groups, initial=0))
    return Plan(
        student=trees,
        teachers=tuple(teachers),
        target_ids=torch.cat([ids[i][tokens.to(ids[i].device)] for i, tokens in enumerate(supervised)]),
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
        return int(self.rows[-1]) + 1


@dataclass(eq=False)
class _Node:
    """Holds ids `begin .. end` of a sequence, which others have at the same positions."""

    sequence: int
    begin: int
    end: int
    children: dict[int, _Node] = field(default_factory=dict)  # by their first id
    flat: int = -1  # where its tokens start in the tree
    # Of a teacher's: the sequences through it begin like the student's for so many tokens, which are there: (begin,
    # end, flat) each.
    lent: int | None = None
    lenders: Sequence[tuple[int, int, int]] = ()


class _Trie:
    """Merges sequences that begin alike."""

    def __init__(self, host: Sequence[Tensor]) -> None:
        self.host = host
        self.top = _Node(-1, 0, 0)

    def add(self, wanted: _Wanted) -> None:
        ids, node, at = self.host[wanted.index][: wanted.length], self.top, 0
        while at < len(ids):
            first = int(ids[at])
            child = node.children.get(first)
            if child is None:
                if node is not self.top and not node.children:
                    node.sequence, node.end = wanted.index, len(ids)  # it goes on where another one ended
                else:
                    node.children[first] = _Node(wanted.index, at, len(ids))
                return
            own = self.host[child.sequence][child.begin : child.end]
            at += (alike := common_prefix(own, ids[at:]))
            if alike < len(own) and at < len(ids):
                upper = _Node(child.sequence, child.begin, child.begin + alike, {int(own[alike]): child})
                child.begin, node.children[first], child = upper.end, upper, upper
            node = child

    def walk(self, ids: Tensor) -> Iterator[tuple[_Node, int]]:
        """Yields the nodes that these ids go through, and up to which position they are alike."""
        node, at = self.top, 0
        while at < len(ids) and (child := node.children.get(int(ids[at]))) is not None:
            at += common_prefix(self.host[child.sequence][child.begin : child.end], ids[at:])
            yield child, at
            if at < child.end:
                return
            node = child

    def lend(self, wanted: _Wanted, student: _Trie, root: int) -> None:
        """Notes what a teacher's sequence can borrow of the student's tree of this root: all before its first row."""
        ids, most = self.host[wanted.index][: wanted.length], int(wanted.rows[0])
        lenders = []
        if int(ids[0]) == root:
            lenders = [(node.begin, min(end, most), node.flat) for node, end in student.walk(ids) if node.begin < most]
        reach = lenders[-1][1] if lenders else 0
        for node, _ in self.walk(ids):
            node.lent = reach if node.lent is None else min(node.lent, reach)
            node.lenders = lenders

    def tree(self, root: int | None, wanted: Sequence[_Wanted], ids: Sequence[Tensor]) -> Tree:
        """Lays out the nodes below one root, or all, depth first, cut where a node is borrowed from several."""
        spans: list[Tensor] = []
        parents: list[int] = []
        borrowed: list[int] = []
        flat = 0
        roots: Iterable[_Node] = (
            self.top.children.values() if root is None else [self.top.children[root]] if wanted else []
        )
        stack = [(node, -1) for node in reversed(list(roots))]
        while stack:
            node, parent = stack.pop()
            node.flat = flat
            at, reach = node.begin, min(node.lent or 0, node.end)
            if parent >= 0 and borrowed[parent] < 0:
                reach = 0
            pieces = [
                (max(begin, at), min(end, reach), place + max(begin, at) - begin)
                for begin, end, place in node.lenders
                if max(begin, at) < min(end, reach)
            ]
            rest = max(at, reach)
            for begin, end, place in [*pieces, *([(rest, node.end, -1)] if rest < node.end else [])]:
                spans.append(ids[node.sequence][begin:end])
                parents.append(parent)
                borrowed.append(place)
                parent = len(spans) - 1
            flat += node.end - node.begin
            stack += [(child, parent) for child in reversed(node.children.values())]
        return Tree(
            spans=tuple(spans),
            parents=tuple(parents),
            counts=tuple(len(sequence.rows) for sequence in wanted),
            rows=_joined(self._flat(sequence) for sequence in wanted),
            places=_joined(sequence.places for sequence in wanted),
            borrowed=tuple(borrowed),
            names=tuple(sequence.name for sequence in wanted),
        )

    def _flat(self, wanted: _Wanted) -> Tensor:
        """Returns (n,) where in the tree the rows of a sequence are."""
        path = [node for node, _ in self.walk(self.host[wanted.index][: wanted.length])]
        begins, flats = (torch.tensor(numbers) for numbers in zip(*((n.begin, n.flat) for n in path), strict=True))
        of_path = torch.bucketize(wanted.rows, begins, right=True) - 1
        return wanted.rows + (flats - begins)[of_path]


def _joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([*parts, torch.empty(0, dtype=torch.int64)])


def _masks(masks: object, count: int) -> list[object]:
    given = [mask for _, mask in entries("masks", masks)]
    if len(given) != count:
        raise PlanError(f"masks must have one entry per trajectory, {count}, got {len(given)}")
    return given


def _supervised(i: int, mask: object, length: int) -> Tensor:
    """Returns (n,) the positions of the tokens with loss."""
    if not isinstance(mask, Tensor) and (isinstance(mask, str) or not isinstance(mask, Sequence)):
        raise PlanTypeError(f"masks[{i}] must be a bool tensor or a sequence of bools, got {type(mask).__name__}")
    with_loss = torch.as_tensor(mask).cpu() if len(mask) else torch.empty(0, dtype=torch.bool)
    if with_loss.dtype != torch.bool:
        raise PlanTypeError(f"masks[{i}] must be bool, got {with_loss.dtype}")
    if with_loss.shape != (length,):
        raise PlanError(
            f"masks[{i}] must have shape ({length},) as trajectories[{i}] has, got {tuple(with_loss.shape)}"
        )
    if bool(with_loss[0]):
        raise PlanError(f"masks[{i}] must not be true at position 0: no token comes before it, to predict it")
    return with_loss.nonzero()[:, 0]


def _scored(v: int, view: View, host: Sequence[Tensor], supervised: Sequence[Tensor], firsts: Sequence[int]) -> _Wanted:
    """Checks a view, and returns the states that it asks for."""
    i, count, name = view.trajectory, len(supervised), f"views[{v}]"
    if type(i) is not int or not 0 <= i < count:
        raise PlanError(f"{name} must have a trajectory in [0, {count}), got {i!r}")
    if type(view.teacher) is not int or view.teacher < 0:
        raise PlanError(f"{name} must have a teacher of 0 or more, got {view.teacher!r}")
    tokens, positions = (torch.as_tensor(x, dtype=torch.int64).cpu() for x in (view.tokens, view.positions))
    if tokens.dim() != 1 or tokens.shape != positions.shape:
        shapes = f"{tuple(tokens.shape)} and {tuple(positions.shape)}"
        raise PlanError(f"{name} must have as many positions as tokens, 1-D, got shapes {shapes}")
    ids = host[count + v]
    for what, numbers, least, most in (("tokens", tokens, 1, len(host[i])), ("positions", positions, 1, len(ids))):
        if len(numbers) and (bool((numbers.diff() <= 0).any()) or numbers[0] < least or numbers[-1] >= most):
            raise PlanError(f"{name} must have {what} in [{least}, {most}), ascending, got {numbers.tolist()}")
    without = tokens[~torch.isin(tokens, supervised[i])]
    if len(without):
        raise PlanError(f"{name} must score tokens with loss, got token {int(without[0])}, where masks[{i}] is false")
    for at in (ids[positions] != host[i][tokens]).nonzero()[:1, 0].tolist():
        token, position = int(tokens[at]), int(positions[at])
        raise PlanError(
            f"{name} must have at position {position} token {token} of trajectories[{i}], which is id "
            f"{int(host[i][token])}, got id {int(ids[position])}"
        )
    return _Wanted(count + v, positions - 1, torch.searchsorted(supervised[i], tokens) + firsts[i], name)


def _check_apart(views: Sequence[View], scored: Sequence[_Wanted], rows: int) -> None:
    """Refuses two views of one teacher that score one token, and teachers that are counted with gaps."""
    teachers = sorted({view.teacher for view in views})
    if teachers != list(range(len(teachers))):
        raise PlanError(f"views must have teachers counted from 0, got {teachers}")
    scorers = torch.full((len(teachers), rows), -1)
    for v, (view, wanted) in enumerate(zip(views, scored, strict=True)):
        others = scorers[view.teacher][wanted.places]
        for at in (others >= 0).nonzero()[:1, 0].tolist():
            raise PlanError(
                f"views[{v}] must not score token {int(torch.as_tensor(view.tokens)[at])} of "
                f"trajectories[{view.trajectory}], as views[{int(others[at])}] of the same teacher does: give one of "
                "them another teacher"
            )
        scorers[view.teacher][wanted.places] = v
