"""Says in which order `cached` and `two_phase` run a tree: depth first, what nothing goes on from in batches.

    for step in schedule.steps:
        ENTER   run a stretch alone, and keep its states for those that go on from it
        BATCH   run stretches that go on from the same one, or from nothing, and that none goes on from
        LEAVE   drop the states of a stretch: all that goes on from it has been run

A stretch is a piece of one path without a branching. So at any time the states of one path are kept. A sequence is
done with the batch after which all its rows have been computed.

What differs from the obvious: recurrent layers keep states only where a stretch ends, so one is cut where a teacher
will go on from the student's states. And with gradient such layers never run a single token after a state, which would
be computed as in decoding, for which fused kernels have no backward: a node of one token is run again by all its
children but the first. What a teacher will read is entered, though nothing of the student's goes on from it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...models import Body
from ..planner import buckets
from ..tree import Tree
from .caches import TrunkStates, far
from .naive import FREE_PADDING, Piece, length_buckets, taken


@dataclass(eq=False)
class Stretch:
    """Is the tokens `start .. stop` of a tree, flat, which follow each other."""

    start: int
    stop: int
    before: int  # which stretch they go on from; -1: none
    given: TrunkStates | None  # where there is none: the states that are known from elsewhere
    again: int = -1  # the token between, flat, that is run once more; -1: none
    inner: bool = False  # whether its states are kept
    asked: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (n,) which of its states are
    # Per sequence that has rows here which of the tree's rows these are, and which of those asked for, (m,).
    rows: list[tuple[int, slice, Tensor]] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.stop - self.start + (self.again >= 0)

    def kept(self, hidden: Tensor) -> Tensor:
        """Returns the (n, H) asked-for of its (L, H) states."""
        return taken(hidden, self.asked) if len(self.asked) else hidden[:0]


class Step(NamedTuple):
    """Is something to do, with one stretch or with several."""

    kind: Literal["enter", "batch", "leave"]
    stretch: int  # is entered or left, or is what the batch goes on from; -1: none
    batch: tuple[int, ...] = ()  # the stretches of a batch; none where only sequences are done
    sequences: tuple[int, ...] = ()  # those that are done with a batch

    @property
    def runs(self) -> bool:
        """True where the model is run."""
        return self.kind == "enter" or len(self.batch) > 0


class Schedule(NamedTuple):
    """Holds the stretches of a tree, and the steps that run them."""

    tree: Tree
    ids: Tensor  # (L,) of the tree
    stretches: tuple[Stretch, ...]
    steps: tuple[Step, ...]

    @property
    def entered(self) -> int:
        return sum(step.kind == "enter" for step in self.steps)

    @property
    def batches(self) -> list[Step]:
        return [step for step in self.steps if step.kind == "batch"]

    @property
    def one_path(self) -> bool:
        """True where all that others go on from is entered before the first batch."""
        kinds = [step.kind for step in self.steps]
        return "enter" not in kinds[kinds.index("batch") :] if "batch" in kinds else True

    @property
    def runs(self) -> int:
        """Counts how often the model is run."""
        return sum(step.runs for step in self.steps)

    @property
    def lengths(self) -> list[list[int]]:
        """Lists of each run of the model the lengths of the sequences in it."""
        return [[self.stretches[k].length for k in step.batch or (step.stretch,)] for step in self.steps if step.runs]

    def tokens(self, k: int) -> Tensor:
        """Returns the (L,) ids that are run for a stretch."""
        stretch = self.stretches[k]
        own = self.ids[stretch.start : stretch.stop]
        return own if stretch.again < 0 else torch.cat([self.ids[stretch.again : stretch.again + 1], own])

    def pieces(self, k: int, kept: Tensor, sequences: Collection[int] | None = None) -> list[Piece]:
        """Returns the rows of a stretch, of all sequences or of these, where (n, H) of its states are kept."""
        return [
            (self.tree.places[of_sequence], taken(kept, index))
            for i, of_sequence, index in self.stretches[k].rows
            if sequences is None or i in sequences
        ]


@dataclass(frozen=True, eq=False)
class Recorded:
    """Holds the detached states of a student's tree that a teacher of the same weights reads."""

    # Per stretch its start and stop, flat, and the states after it; ascending.
    stretches: tuple[tuple[int, int, TrunkStates], ...]

    def up_to(self, place: int, body: Body, *, long: bool) -> TrunkStates | None:
        """Returns the states after at most the token before this place, flat, with positions encoded as asked."""
        for start, stop, states in self.stretches:
            if start < place <= stop and far(body, states.length) == long:
                return states.up_to(states.length - (stop - place), body)
        return None


def schedule(
    body: Body,
    tree: Tree,
    *,
    known: Recorded | None = None,
    record: Sequence[tuple[int, int]] = (),
    micro_batch: int | None = None,
) -> Schedule:
    """Plans a pass over a tree: `known` states need not be computed, those of the spans `record`, flat, are kept.

    A batch has at most `micro_batch` stretches (None: any number), and little padding.
    """
    stretches = _cut(body, _stretches(body, tree, known), record)
    starts = [stretch.start for stretch in stretches]
    follow: dict[tuple[int, int], list[int]] = {}
    for k, stretch in enumerate(stretches):
        stretch.rows = []
        follow.setdefault((stretch.before, id(stretch.given)), []).append(k)
        if stretch.before >= 0:
            stretches[stretch.before].inner = True
    ending: list[list[int]] = [[] for _ in stretches]
    flats = tree.rows.tolist()
    of_rows = [bisect_right(starts, flat) - 1 for flat in flats]
    for i in tree.active:
        at, stop = tree.slices[i].start, tree.slices[i].stop
        k = of_rows[stop - 1]
        ending[k].append(i)
        while k >= 0:
            if stretches[k].again >= 0:  # that token is another stretch's, too
                of_rows[at:stop] = [
                    k if flat == stretches[k].again else of
                    for flat, of in zip(flats[at:stop], of_rows[at:stop], strict=True)
                ]
            k = stretches[k].before
        while at < stop:
            end = bisect_right(of_rows, of_rows[at], at, stop)
            stretch = stretches[of_rows[at]]
            offsets = (tree.rows[at:end] - stretch.start + (stretch.again >= 0)).clamp(min=0)
            stretch.rows.append((i, slice(at, end), offsets))
            at = end
    for stretch in stretches:
        if stretch.rows:
            stretch.asked = torch.cat([offsets for *_, offsets in stretch.rows]).unique()
            stretch.rows = [(i, of, torch.searchsorted(stretch.asked, offsets)) for i, of, offsets in stretch.rows]
    steps = _steps(body, stretches, follow, ending, micro_batch)
    return Schedule(tree, torch.cat(tree.spans) if tree.spans else tree.rows, tuple(stretches), tuple(steps))


def _stretches(body: Body, tree: Tree, known: Recorded | None) -> list[Stretch]:
    """Joins nodes that nothing branches off between, and leaves out what is known and what no row asks for."""
    stretches: list[Stretch] = []
    rows = sorted(tree.rows.tolist())
    # Of each node what its children go on from: a stretch, or known states, and a token that they run again. Last: -1.
    after: list[Stretch] = [Stretch(0, 0, -1, None)] * (len(tree.spans) + 1)
    finished = [False] * len(tree.spans) + [True]
    for i, parent in enumerate(tree.parents):
        start, stop = tree.starts[i], tree.starts[i + 1]
        if bisect_left(rows, start) == bisect_left(rows, tree.stops[i]):
            continue
        own = replace(after[parent], start=start, stop=stop)
        if known is not None and tree.borrowed[i] >= 0 and finished[parent]:
            last = bisect_right(tree.starts, tree.stops[i] - 1) - 1
            long = far(body, tree.begins[last] + len(tree.spans[last]))
            states = known.up_to(tree.borrowed[i] + stop - start, body, long=long)
            if states is not None and states.length > tree.begins[i]:
                own.start, own.given = start + states.length - tree.begins[i], states
        if own.start == stop:
            after[i], finished[i] = own, True
            continue
        k = own.before
        if k >= 0 and stretches[k].stop == own.start and parent >= 0 and len(tree.children[parent]) == 1:
            stretches[k].stop = stop
            after[i] = after[parent]
            continue
        if own.again == own.start - 1 >= 0:  # the first child
            own.start, own.again = own.again, -1
        single = own.length == 1 and (own.before >= 0 or own.given is not None)
        if single and body.recurrent and torch.is_grad_enabled() and len(tree.children[i]) > 1:
            after[i] = replace(own, again=own.start)
            continue
        stretches.append(own)
        after[i] = Stretch(start, stop, len(stretches) - 1, None)
    return stretches


def _cut(body: Body, stretches: Sequence[Stretch], record: Sequence[tuple[int, int]]) -> list[Stretch]:
    """Cuts stretches where recurrent layers' states are to be kept, and marks those that are to be entered for it."""
    cut: list[Stretch] = []
    became: list[int] = []
    for whole in stretches:
        own = replace(whole, before=became[whole.before] if whole.before >= 0 else -1)
        wanted = [stop for start, stop in record if start < own.stop and stop > own.start]
        for stop in sorted({min(stop, own.stop - 2) for stop in wanted if stop < own.stop} if body.recurrent else ()):
            follows_state = own.before >= 0 or own.given is not None
            if stop - own.start + (own.again >= 0) >= (2 if follows_state else 1):
                cut.append(replace(own, stop=stop, inner=True))
                own = Stretch(stop, own.stop, len(cut) - 1, None)
        own.inner = any(stop >= own.stop or not body.recurrent for stop in wanted)
        became.append(len(cut))
        cut.append(own)
    return cut


def _steps(
    body: Body,
    stretches: Sequence[Stretch],
    follow: dict[tuple[int, int], list[int]],
    ending: Sequence[Sequence[int]],
    micro_batch: int | None,
) -> list[Step]:
    """Orders the stretches: first those that others go on from, then the batches."""
    steps: list[Step] = []
    entered: list[int] = []  # of each open stretch how many steps there were
    nothing = id(None)
    todo: list[tuple[str, int, int]] = [("children", key[0], key[1]) for key in reversed(follow) if key[0] < 0]
    while todo:
        kind, k, given = todo.pop()
        if kind == "children":
            after = follow.get((k, given), ())
            todo.append(("batches", k, given))
            todo += [("enter", inner, nothing) for inner in reversed(after) if stretches[inner].inner]
        elif kind == "enter":
            steps.append(Step("enter", k))
            entered.append(len(steps))
            todo += [("leave", k, nothing), ("children", k, nothing)]
        elif kind == "batches":
            leaves = [leaf for leaf in follow.get((k, given), ()) if not stretches[leaf].inner]
            lengths = [stretches[leaf].length for leaf in leaves]
            alone = k < 0 and given == nothing
            alike = length_buckets(body, lengths) if alone else buckets(lengths, free_padding=FREE_PADDING)
            step = micro_batch or max(1, len(leaves))
            for batch in (bucket[at : at + step] for bucket in alike for at in range(0, len(bucket), step)):
                running = tuple(leaves[index] for index in batch)
                steps.append(Step("batch", k, running, tuple(i for leaf in running for i in ending[leaf])))
        else:
            # Sequences that end here are done with the last batch, to which they are no burden.
            if ending[k]:
                if len(steps) == entered[-1]:
                    steps.append(Step("batch", k))
                last = next(at for at in reversed(range(len(steps))) if steps[at].kind == "batch")
                steps[last] = steps[last]._replace(sequences=(*steps[last].sequences, *ending[k]))
            steps.append(Step("leave", k))
            entered.pop()
    return steps
