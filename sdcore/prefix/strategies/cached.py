"""Runs a tree depth first: what is shared once, into a cache; what ends there as batches that read it.

    states, hidden = run_recording(body, node, states_of_parent)
    leaf_hidden = run_reading(body, pad(leaves), states)

One backward goes through all. Works with whatever attention a model uses, and with linear-attention hybrids. What it
costs beside each token once: the keys and values of a path are copied in front of those of each leaf, layer by layer. A
live teacher starts from the student's states (`record=`, `prompts=`), wherever its tree leaves the student's.

Not covered: only leaves of one parent are batched, and groups are computed one after the other, so many small ones
cost many small passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...models import Body
from ..tree import Tree
from .caches import TrunkStates, require_readable, run_reading, run_recording
from .naive import Piece, in_order, run_whole
from .schedule import Recorded, Schedule, Step, schedule


@dataclass(frozen=True, eq=False)
class PromptStates:
    """Holds what a student's pass leaves to a teacher's of the same weights: detached states of each group's tree."""

    groups: tuple[Recorded, ...]  # B


class Ran(NamedTuple):
    """Is a stretch that has been run."""

    states: TrunkStates
    kept: Tensor  # (n, H) its states that are asked for

    def tensors(self) -> list[Tensor]:
        """Lists what others may read of it, in a fixed order."""
        return [*self.states.tensors(), self.kept]


class Recorder:
    """Gathers the states of one tree that a teacher will read, without a graph."""

    def __init__(self, record: Sequence[tuple[int, int]] | None) -> None:
        self.record = record
        self.detached: dict[int, TrunkStates] = {}
        self.stretches: list[tuple[int, int, TrunkStates]] = []

    def add(self, plan: Schedule, k: int, states: TrunkStates) -> None:
        """Keeps the states of a stretch, and of those before it, if they are wanted."""
        if self.record is None:
            return
        start, stop, before = plan.stretches[k].start, plan.stretches[k].stop, plan.stretches[k].before
        self.detached[k] = states.map(Tensor.detach, self.detached.get(before, states.before))
        if any(a < stop and start < b for a, b in self.record):
            self.stretches.append((start, stop, self.detached[k]))

    def recorded(self) -> Recorded:
        return Recorded(tuple(self.stretches))


def hidden_states(
    body: Body,
    trees: Sequence[Tree],
    *,
    prompts: PromptStates | None = None,
    record: bool | Sequence[Sequence[tuple[int, int]]] = False,
    micro_batch: int | None = None,
) -> tuple[Tensor, PromptStates | None]:
    """Returns the (N, H) asked-for states, in the order of the plan's rows.

    With a graph if gradients are enabled. `record` also returns states, detached, for a teacher's pass: True, those of
    all tokens, or per group those that it will read (`Tree.reads`), which recurrent layers have to know beforehand.
    With `prompts`, from such a pass under the same weights, what a tree borrows is read and not computed, as far as it
    is there. At most `micro_batch` leaves run at a time (None: any number).

    Raises `UnsupportedModelError` for models whose prefix cannot be shared, and for reentrant checkpointing.
    """
    require_readable(body, trees)
    pieces: list[Piece] = []
    recorded: list[Recorded] = []
    unread: list[Tensor] = []
    plans = schedules(body, trees, prompts=prompts, record=record, micro_batch=micro_batch)
    for g, plan in enumerate(plans):
        alive: dict[int, Ran] = {}
        recorder = Recorder(spans_of(plan.tree, record, g))
        for step in plan.steps:
            k = step.stretch
            if step.kind == "enter":
                before = plan.stretches[k].before
                alive[k] = enter(body, plan, k, alive[before].states if before >= 0 else None)
                pieces += plan.pieces(k, alive[k].kept)
                # FSDP2 gathers a layer's weights for backward when a gradient arrives at its output, not at its states.
                unread += [alive[k].kept] if body.sharded is not None and not len(alive[k].kept) else []
                recorder.add(plan, k, alive[k].states)
            elif step.kind == "batch":
                pieces += run_batch(body, plan, step, alive[k].states if k >= 0 else None)
            else:
                recorder.detached.pop(k, None)
                del alive[k]
        recorded.append(recorder.recorded())
    hidden = in_order(body, pieces)
    if unread:
        hidden = torch.cat([hidden, *unread])
    return hidden, None if record is False else PromptStates(tuple(recorded))


def schedules(
    body: Body,
    trees: Sequence[Tree],
    *,
    prompts: PromptStates | None = None,
    record: bool | Sequence[Sequence[tuple[int, int]]] = False,
    micro_batch: int | None = None,
) -> list[Schedule]:
    """Plans how `hidden_states` runs the trees."""
    return [
        schedule(
            body,
            tree,
            known=None if prompts is None else prompts.groups[g],
            record=spans_of(tree, record, g) or (),
            micro_batch=micro_batch,
        )
        for g, tree in enumerate(trees)
    ]


def spans_of(
    tree: Tree, record: bool | Sequence[Sequence[tuple[int, int]]], group: int
) -> Sequence[tuple[int, int]] | None:
    """Lists what is to be recorded of a group's tree; None where nothing is asked for."""
    if isinstance(record, bool):
        return [(0, tree.starts[-1])] if record else None
    return record[group]


def enter(body: Body, plan: Schedule, k: int, before: TrunkStates | None) -> Ran:
    """Runs a stretch by itself and keeps its states."""
    stretch = plan.stretches[k]
    states, hidden = run_recording(body, plan.tokens(k), before if stretch.given is None else stretch.given)
    return Ran(states, stretch.kept(hidden))


def run_batch(body: Body, plan: Schedule, step: Step, before: TrunkStates | None) -> list[Piece]:
    """Runs a step's batch, and returns its rows."""
    if not step.batch:
        return []
    sequences = [plan.tokens(k) for k in step.batch]
    given = plan.stretches[step.batch[0]].given
    prefix = before if given is None else given
    if prefix is None:
        hidden = run_whole(body, sequences)  # (B, L, H)
    else:
        tokens = pad_sequence(sequences, batch_first=True)
        # Never a single token after a recurrent layer's state.
        if body.recurrent and tokens.shape[1] == 1:
            tokens = torch.nn.functional.pad(tokens, (0, 1))
        hidden = run_reading(body, tokens, prefix)
    return [
        piece
        for states, k in zip(hidden, step.batch, strict=True)
        for piece in plan.pieces(k, plan.stretches[k].kept(states))
    ]
