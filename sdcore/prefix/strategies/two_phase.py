"""Runs the student's pass in bounded memory: one path of a tree, then few leaves at a time, each with its own backward.

    for part in micro_batches(body, plan.student, micro_batch=4):
        loss = loss_of(part.hidden, part.rows)
        with part.no_sync():                  # DistributedDataParallel: only the last backward synchronises
            backward(part.attach(loss))       # loss.backward(), or accelerator.backward

At any time there are the graphs of one path from a root and of one micro-batch. Whatever goes on from a node reads its
keys and values as leaves, where the gradients of all descendants add up; after the last of them the node's own backward
runs, and adds to those of its ancestors. A micro-batch's own states are a leaf too: `backward` ends there, and goes on
into the body, at last into the nodes, when the next part is asked for. So the output layer's gradient has been added to
its `.grad`, and is gone, before the body makes gradients of that size (the embedding's, once for each pass).

Where ranks reduce their gradients, the last micro-batch below a node reads the node itself, and its backward goes on
into it with what has been added up: so the last backward of a step reaches every parameter, which
`DistributedDataParallel` has to see.

What differs from the obvious: `attach` returns the same loss, and what `backward` multiplies it with (a loss scale, the
share of an accumulation step) need not be known: the added up gradients were multiplied already, and are passed on as
they are. A live teacher reads what the student has run until the first part of a tree: one path.

Not covered: `DistributedDataParallel(static_graph=True)`, which aborts here, is refused. FSDP2 reduces every
micro-batch's gradients, so ranks must have equally many: who has fewer is given some without rows. And ranks must go
forward and backward in the same order, so that trees which branch at several depths are refused there.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError, SdcoreError, UnsupportedModelError
from ...models import Body
from ..tree import Tree, places_of
from . import cached, ranks
from .cached import PromptStates, Ran, Recorder, enter, run_batch, schedules, spans_of
from .caches import TrunkStates, require_readable
from .schedule import Schedule, Step, schedule

# Leaves at a time where there is no gradient.
MICRO_BATCH = 4
UNORDERED = "under FSDP2 two_phase runs trees that branch at one depth only: take packed or cached"


class BackwardError(SdcoreError, RuntimeError):
    """Says that a micro-batch was taken before the last one's backward had run."""


@dataclass(eq=False)
class MicroBatch:
    """Holds some rows of the student's pass, with a graph; `attach` what is made of them and call backward on it."""

    hidden: Tensor  # (n, H)
    rows: Tensor  # (n,) int64: which of the N rows these are
    group: int  # of whose tree they are
    # Detached states of this group's first path, as those of a single group; None unless `record` was given.
    prompts: PromptStates | None
    _synchronises: bool
    _body: Body
    # Of a part whose backward goes on into nodes: where to, and the gradients that belong there.
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
    """Yields the student's rows, group by group, at most `micro_batch` leaves of a tree at a time.

    Equivalent to one backward through `cached.hidden_states`, if the losses of the parts add up to its loss and all
    parts are taken, until there is none. A sequence's rows are all in one part. `record` is that of
    `cached.hidden_states`: each part then has its group's `prompts` for a live teacher. Trees without rows give no
    parts; where there is no row at all, one part without rows does, so that a rank without completions takes part in
    what ranks do together. Under FSDP2 a rank may get more parts without rows, also of groups that it does not have,
    which are counted on from the last.

    Raises `BackwardError` if a part is taken before the backward of the one before it has run, `ArgumentError` for a
    bad `micro_batch`, `UnsupportedModelError` where `cached` does, for a static graph, and under FSDP2 where the tree
    of some rank branches at several depths.
    """
    if micro_batch < 1:
        raise ArgumentError(f"micro_batch must be at least 1, got {micro_batch}")
    require_readable(body, trees)
    if (reason := takes_one_backward(body)) is not None:
        raise UnsupportedModelError(reason)
    active = [g for g, tree in enumerate(trees) if tree.active]
    wanted = [spans_of(tree, record, g) for g, tree in enumerate(trees)]
    first_paths = [_on_first_path(tree, spans or ()) for tree, spans in zip(trees, wanted, strict=True)]
    plans = schedules(body, trees, record=first_paths, micro_batch=micro_batch)
    if body.sharded is not None and ranks.most(body, unordered(body, trees) is not None)[0]:
        raise UnsupportedModelError(UNORDERED)
    parts = ranks.runs_of_all(body, [len(plans[g].batches) for g in active])
    entered = ranks.runs_of_all(body, [plans[g].entered for g in active])
    if not parts:
        hidden, _ = cached.hidden_states(body, trees)
        yield MicroBatch(hidden, torch.empty(0, dtype=torch.int64, device=hidden.device), 0, None, True, body)
    for k, g in enumerate(active):
        yield from _group(body, g, plans[g], wanted[g], g == active[-1], parts[k], entered[k])
    for k in range(len(active), len(parts)):
        runs = ranks.idle(body, entered[k])
        for _ in range(parts[k] - 1):
            yield from _to_be_done(_idle_part(body, len(trees) + k))
        yield from _to_be_done(_idle_part(body, len(trees) + k, *runs))
        del runs


def row_by_row(
    body: Body, strategy: ModuleType, trees: Sequence[Tree], rows: Sequence[Sequence[int]], *, record: Any
) -> Iterator[MicroBatch]:
    """Yields the student's rows of several trees at a time, by any strategy; `rows` are lists of trees.

    As with `micro_batches`, a part goes backward before the next one is taken, if there are several.
    """
    for k, row in enumerate(rows):
        last, own = k == len(rows) - 1, [trees[g] for g in row]
        wanted = record if isinstance(record, bool) else [record[g] for g in row]
        with nullcontext() if last else unsynchronised(body):
            hidden, prompts = ranks.hidden_states(body, strategy, own, record=wanted)
        places = places_of(own).sort().values
        part = MicroBatch(hidden, places.to(hidden.device), k, prompts, last, body)
        del hidden, prompts
        if len(rows) == 1:
            yield part
        else:
            yield from _to_be_done(part)
        del part


def takes_one_backward(body: Body) -> str | None:
    """Says why a model's step must not go backward in parts; None if it may."""
    if body.one_backward:
        return "DeepSpeed takes one backward per step, not one for each part of it"
    if isinstance(body.through, DistributedDataParallel) and body.through.static_graph:
        return "DistributedDataParallel with static_graph=True allows one backward per step only"
    return None


def hidden_states(
    body: Body,
    trees: Sequence[Tree],
    *,
    prompts: PromptStates | None = None,
    record: bool | Sequence[Sequence[tuple[int, int]]] = False,
    micro_batch: int = MICRO_BATCH,
) -> tuple[Tensor, PromptStates | None]:
    """Runs `cached.hidden_states` with few leaves at a time: without gradient, no second phase is needed."""
    return cached.hidden_states(body, trees, prompts=prompts, record=record, micro_batch=micro_batch)


def unsynchronised(body: Body) -> AbstractContextManager[Any]:
    """Leaves gradients on their rank under `DistributedDataParallel`, around forwards and backwards."""
    wrapper = body.through
    return wrapper.no_sync() if isinstance(wrapper, DistributedDataParallel) else nullcontext()


def unordered(body: Body, trees: Sequence[Tree]) -> str | None:
    """Says why these trees cannot be run forward and backward in the order that other ranks have; None if they can."""
    if body.sharded is None or all(schedule(body, tree).one_path for tree in trees):
        return None
    return UNORDERED


def _on_first_path(tree: Tree, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Takes the spans before the end of the first leaf, which are run before the first part."""
    end = next((tree.starts[i + 1] for i in range(len(tree.spans)) if not tree.children[i]), 0)
    return [span for span in spans if span[0] < end]


def _group(
    body: Body,
    group: int,
    plan: Schedule,
    record: Sequence[tuple[int, int]] | None,
    last_group: bool,
    parts: int,
    entered: int,
) -> Iterator[MicroBatch]:
    """Yields the parts of one tree: as many as asked for, of which its batches are the last."""
    # Where ranks reduce their gradients, the last backward has to reach every parameter by itself.
    reduces = isinstance(body.through, DistributedDataParallel) or body.sharded is not None
    batches = [at for at, step in enumerate(plan.steps) if step.kind == "batch"]
    # Of each node the last batch below it.
    lasts = {
        step.stretch: batches[bisect(batches, at) - 1] for at, step in enumerate(plan.steps) if step.kind == "leave"
    }
    # Forwards are run unsynchronised too, all but the last before the last backward: that one arms the reduction.
    arming = max(at for at, step in enumerate(plan.steps) if step.runs) if last_group else -1
    recorder, prompts, idle = Recorder(record), None, list[Tensor]()
    nodes: dict[int, Ran] = {}  # on the path, with their graphs
    leaves: dict[int, Ran] = {}  # the same as leaves

    def read_by(batch: int, node: int) -> Ran:
        return nodes[node] if reduces and lasts[node] == batch else leaves[node]

    for at, step in enumerate(plan.steps):
        k, before = step.stretch, plan.stretches[step.stretch].before
        if step.kind == "enter":
            with nullcontext() if at == arming else unsynchronised(body):
                ran = enter(body, plan, k, read_by(lasts[k], before).states if before >= 0 else None)
            if at < batches[0]:
                recorder.add(plan, k, ran.states)
            nodes[k] = ran._replace(states=ran.states.reachable(body))  # what no other can see is dropped
            leaves[k] = _leaves(nodes[k], leaves[before].states if before >= 0 else None)
            del ran
        elif step.kind == "leave":
            if not reduces:
                _go_on(nodes[k], leaves[k])
            nodes.pop(k, None)
            leaves.pop(k, None)
        else:
            if at == batches[0]:
                prompts = None if record is None else PromptStates((recorder.recorded(),))
                idle = ranks.idle(body, entered - plan.entered)
                for _ in range(parts - len(batches)):
                    yield from _to_be_done(_idle_part(body, group, prompts=prompts))
            with nullcontext() if at == arming else unsynchronised(body):
                part = _part(body, group, plan, step, {node: read_by(at, node) for node in nodes}, prompts)
            if not reduces:
                states = part.hidden
                part.hidden = states.detach().requires_grad_(states.requires_grad)
                yield from _to_be_done(part)
                if part.hidden.grad is not None:
                    states.backward(part.hidden.grad)
                del states
            else:
                part._synchronises = last_group and at == batches[-1]
                _take_in(part, [(nodes.pop(node), leaves.pop(node)) for node in list(nodes) if lasts[node] == at])
                if body.sharded is not None:
                    # Every part runs the model once, on every rank; the last goes on into all that was run before.
                    others = [*(idle if at == batches[-1] else ()), *ranks.idle(body, 0 if step.batch else 1)]
                    part.hidden = torch.cat([part.hidden, *others])
                    del others
                yield from _to_be_done(part)
            # Its graph is gone; what is left of it must not outlive the next forward.
            del part


def _part(
    body: Body,
    group: int,
    plan: Schedule,
    step: Step,
    nodes: dict[int, Ran],
    prompts: PromptStates | None,
) -> MicroBatch:
    """Runs a batch after these nodes, the path to it, and takes the rows of the sequences that are done with it."""
    pieces = run_batch(body, plan, step, nodes[step.stretch].states if step.batch and step.stretch >= 0 else None)
    done = frozenset(step.sequences)
    pieces += [piece for node, ran in nodes.items() for piece in plan.pieces(node, ran.kept, done)]
    rows = torch.cat([places for places, _ in pieces]).to(body.device)
    hidden = torch.cat([states for _, states in pieces])
    return MicroBatch(hidden, rows, group, prompts, False, body)


def _idle_part(body: Body, group: int, *others: Tensor, prompts: PromptStates | None = None) -> MicroBatch:
    """Makes a part without rows, whose backward also goes through `others`, (0, H) each."""
    hidden = torch.cat([*ranks.idle(body, 1), *others])
    return MicroBatch(hidden, torch.empty(0, dtype=torch.int64, device=hidden.device), group, prompts, False, body)


def _leaves(node: Ran, before: TrunkStates | None) -> Ran:
    """Copies a node with a leaf for every tensor that gathers gradient, where the original has any."""

    def leaf(state: Tensor) -> Tensor:
        return state.detach().requires_grad_(state.requires_grad)

    return Ran(node.states.map(leaf, before), leaf(node.kept))


def _gathered(node: Ran, leaves: Ran) -> tuple[list[Tensor], list[Tensor]]:
    """Lists the tensors of a node whose leaves have gathered gradient, and what they have."""
    pairs = [(root, leaf.grad) for root, leaf in zip(node.tensors(), leaves.tensors(), strict=True)]
    return [root for root, grad in pairs if grad is not None], [grad for _, grad in pairs if grad is not None]


def _go_on(node: Ran, leaves: Ran) -> None:
    """Goes backward into a node with what its descendants have added up."""
    roots, gradients = _gathered(node, leaves)
    if roots:
        torch.autograd.backward(roots, gradients)


def _take_in(part: MicroBatch, nodes: Sequence[tuple[Ran, Ran]]) -> None:
    """Makes a part's backward go on into nodes, with what their descendants have added up."""
    for node, leaves in nodes:
        roots, gradients = _gathered(node, leaves)
        part._roots += roots
        part._gradients += gradients
        # FSDP2 gathers a layer's weights for backward when a gradient arrives at its output, not at its states.
        part.hidden = torch.cat([part.hidden, node.kept[:0]])


def _to_be_done(part: MicroBatch) -> Iterator[MicroBatch]:
    """Yields a part, and refuses to go on before its backward has run."""
    yield part
    if not part._done:
        raise BackwardError("call backward on part.attach(loss) before taking the next micro-batch")
