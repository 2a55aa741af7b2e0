"""Runs the student's pass in bounded memory: a trunk, then few branches at a time, each with its own backward.

    for part in micro_batches(body, plan.student, micro_batch=4):
        loss = loss_of(part.hidden, part.rows)
        with part.no_sync():                  # DistributedDataParallel: only the last backward synchronises
            backward(part.attach(loss))       # loss.backward(), or accelerator.backward

At any time there are the trunk's graph and one micro-batch's. A micro-batch reads the trunk's keys and values as
leaves, where the gradients of all of them add up. Its own states are a leaf too: `backward` ends there, and goes on
into the body, at last into the trunk, when the next part is asked for. So the output layer's gradient has been added to
its `.grad`, and is gone, before the body makes gradients of that size (the embedding's, once for each pass).

Where ranks reduce their gradients, the last micro-batch of a step reads the trunk itself, and its backward goes on into
it with what has been added up: one backward that reaches every parameter, which `DistributedDataParallel` has to see.

What differs from the obvious: `attach` returns the same loss, and what `backward` multiplies it with (a loss scale, the
share of an accumulation step) need not be known: the added up gradients were multiplied already, and are passed on as
they are.

Not covered: `DistributedDataParallel(static_graph=True)`, which aborts here, is refused. FSDP2 reduces every
micro-batch's gradients, so ranks must have equally many: who has fewer is given some without rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError, SdcoreError, UnsupportedModelError
from ...models import Body
from ..tree import Tree
from . import cached, ranks
from .cached import PromptStates, Trunk, branch_batches, run_branches, run_trunk, split_of
from .caches import OneLevel, one_level, require_readable

# Branches at a time where there is no gradient.
MICRO_BATCH = 4


class BackwardError(SdcoreError, RuntimeError):
    """Says that a micro-batch was taken before the last one's backward had run."""


@dataclass(eq=False)
class MicroBatch:
    """Holds some rows of the student's pass, with a graph; `attach` what is made of them and call backward on it."""

    hidden: Tensor  # (n, H)
    rows: Tensor  # (n,) int64: which of the N rows these are
    group: int  # of whose completions they are
    # The detached states of this group's prompt, as those of a single group; None unless `record` was given.
    prompts: PromptStates | None
    _synchronises: bool
    _body: Body
    # Of the part whose backward goes on into the trunk: where to, and the gradients that belong there.
    _roots: list[Tensor] = field(default_factory=list)
    _gradients: list[Tensor] = field(default_factory=list)
    _done: bool = False

    def attach(self, loss: Tensor) -> Tensor:
        """Returns the same loss (), whose backward is noticed. To be called once, on the loss of all rows."""
        if loss.dim() != 0:
            raise ArgumentError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
        return _Attached.apply(loss, self, *self._roots)

    def no_sync(self) -> AbstractContextManager[Any]:
        """Goes around the backward: under `DistributedDataParallel` all but the last of the pass stay on their rank."""
        return nullcontext() if self._synchronises else unsynchronised(self._body)


class _Attached(torch.autograd.Function):
    """Is the identity on a loss; its backward notes that it ran, and gives each root its gradient, unscaled."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, part: MicroBatch, *roots: Tensor) -> Tensor:
        ctx.part = part
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.part._done = True
        return gradient, None, *ctx.part._gradients


def micro_batches(
    body: Body, trees: Sequence[Tree], *, micro_batch: int, record: bool | Sequence[Sequence[tuple[int, int]]] = False
) -> Iterator[MicroBatch]:
    """Yields the student's rows, group by group, at most `micro_batch` completions at a time.

    Equivalent to one backward through `cached.hidden_states`, if the losses of the parts add up to its loss and all
    parts are taken, until there is none. `record` is that of `cached.hidden_states`: each part then has its group's
    `prompts` for a live teacher. Trees without rows give no parts; where there is no row at all, one part without rows
    does, so that a rank without completions takes part in what ranks do together. Under FSDP2 a rank may get more parts
    without rows, also of groups that it does not have, which are counted on from the last.

    Raises `BackwardError` if a part is taken before the backward of the one before it has run, `ArgumentError` for a
    bad `micro_batch`, `UnsupportedModelError` where `cached` does and for a static graph.
    """
    if micro_batch < 1:
        raise ArgumentError(f"micro_batch must be at least 1, got {micro_batch}")
    require_readable(body, trees)
    if isinstance(body.through, DistributedDataParallel) and body.through.static_graph:
        raise UnsupportedModelError("DistributedDataParallel with static_graph=True allows one backward per step only")
    levels = [one_level(body, tree) for tree in trees]
    active = [g for g, tree in enumerate(trees) if tree.active]
    splits = [split_of(record, g) for g in active]
    batches = [branch_batches(body, levels[g], micro_batch=micro_batch) for g in active]
    parts = ranks.runs_of_all(body, [len(of_group) for of_group in batches])
    trunks = ranks.runs_of_all(
        body, [ranks.trunk_runs(body, levels[g], at) for g, at in zip(active, splits, strict=True)]
    )
    if not parts:
        hidden, _ = cached.hidden_states(body, trees)
        yield MicroBatch(hidden, torch.empty(0, dtype=torch.int64, device=hidden.device), 0, None, True, body)
    for k, g in enumerate(active):
        last_group = g == active[-1]
        yield from _group(
            body, g, levels[g], batches[k], record is not False, splits[k], last_group, parts[k], trunks[k]
        )
    for k in range(len(active), len(parts)):
        trunk = ranks.idle(body, trunks[k])
        for _ in range(parts[k] - 1):
            yield from _to_be_done(_idle_part(body, len(trees) + k))
        yield from _to_be_done(_idle_part(body, len(trees) + k, *trunk))
        del trunk


def hidden_states(
    body: Body,
    trees: Sequence[Tree],
    *,
    prompts: PromptStates | None = None,
    record: bool | Sequence[Sequence[tuple[int, int]]] = False,
    micro_batch: int = MICRO_BATCH,
) -> tuple[Tensor, PromptStates | None]:
    """Runs `cached.hidden_states` with few branches at a time: without gradient, no second phase is needed."""
    return cached.hidden_states(body, trees, prompts=prompts, record=record, micro_batch=micro_batch)


def unsynchronised(body: Body) -> AbstractContextManager[Any]:
    """Leaves gradients on their rank under `DistributedDataParallel`, around forwards and backwards."""
    wrapper = body.through
    return wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else nullcontext()


def _group(
    body: Body,
    group: int,
    tree: OneLevel,
    batches: Sequence[Sequence[int]],
    record: bool,
    split_at: int,
    last_group: bool,
    parts: int,
    trunk_runs: int,
) -> Iterator[MicroBatch]:
    """Yields the parts of one tree: as many as asked for, of which its batches are the last."""
    # Forwards are run unsynchronised too, all but the last before the last backward: that one arms the reduction.
    runs_branches = any(len(tree.branches[i]) for i in batches[-1])
    with nullcontext() if last_group and not runs_branches else unsynchronised(body):
        trunk = run_trunk(body, tree, split_at=split_at)
    idle = ranks.idle(body, trunk_runs - ranks.trunk_runs(body, tree, split_at))
    prompts = PromptStates((trunk.detached(),)) if record else None
    if trunk.whole is not None:  # what no branch can see is dropped
        trunk = Trunk((trunk.whole.reachable(body),), trunk.last)
    leaves = _leaves(trunk)
    for _ in range(parts - len(batches)):
        yield from _to_be_done(_idle_part(body, group, prompts=prompts))
    # Where ranks reduce their gradients, the last backward has to reach every parameter by itself.
    reduces = isinstance(body.through, DistributedDataParallel) or body.sharded is not None
    for batch in batches[:-1] if reduces else batches:
        with unsynchronised(body):
            part = _part(body, group, tree, batch, leaves, prompts, synchronises=False)
        states = part.hidden
        if not reduces:
            part.hidden = states.detach().requires_grad_(states.requires_grad)
        yield from _to_be_done(part)
        if not reduces and part.hidden.grad is not None:
            states.backward(part.hidden.grad)
        # Its graph is gone; what is left of it must not outlive the next forward.
        del part, states
    roots, gradients = [], []
    for root, leaf in zip(_tensors(trunk), _tensors(leaves), strict=True):
        if leaf.grad is not None:
            roots.append(root)
            gradients.append(leaf.grad)
    if not reduces:
        if roots:
            torch.autograd.backward(roots, gradients)
        return
    with nullcontext() if last_group else unsynchronised(body):
        part = _part(body, group, tree, batches[-1], trunk, prompts, synchronises=last_group)
    if body.sharded is not None:
        # Every part runs the model once, on every rank.
        idle += ranks.idle(body, 0 if runs_branches else 1)
        part.hidden = torch.cat([part.hidden, *idle])
    part._roots, part._gradients = roots, gradients
    del trunk, leaves, idle, roots, gradients
    yield from _to_be_done(part)


def _part(
    body: Body,
    group: int,
    tree: OneLevel,
    batch: Sequence[int],
    trunk: Trunk,
    prompts: PromptStates | None,
    *,
    synchronises: bool,
) -> MicroBatch:
    pieces = run_branches(body, tree, batch, trunk.whole, trunk.last)
    rows = torch.cat([places for places, _ in pieces]).to(body.device)
    hidden = torch.cat([states for _, states in pieces])
    return MicroBatch(hidden, rows, group, prompts, synchronises, body)


def _idle_part(body: Body, group: int, *others: Tensor, prompts: PromptStates | None = None) -> MicroBatch:
    """Makes a part without rows, whose backward also goes through `others`, (0, H) each."""
    hidden = torch.cat([*ranks.idle(body, 1), *others])
    return MicroBatch(hidden, torch.empty(0, dtype=torch.int64, device=hidden.device), group, prompts, False, body)


def _leaves(trunk: Trunk) -> Trunk:
    """Copies a trunk with a leaf for every tensor that gathers gradient, where the original has any."""

    def leaf(state: Tensor) -> Tensor:
        return state.detach().requires_grad_(state.requires_grad)

    return Trunk(tuple(states.map(leaf) for states in trunk.states), None if trunk.last is None else leaf(trunk.last))


def _tensors(trunk: Trunk) -> list[Tensor]:
    """Lists what a branch may read of a trunk, in a fixed order."""
    states = [state for whole in trunk.states for state in whole.tensors()]
    return states if trunk.last is None else [*states, trunk.last]


def _to_be_done(part: MicroBatch) -> Iterator[MicroBatch]:
    """Yields a part, and refuses to go on before its backward has run."""
    yield part
    if not part._done:
        raise BackwardError("call backward on part.attach(loss) before taking the next micro-batch")
