"""The suite `trees` measures passes over conversations: a teacher's view of every turn, a search, attempts that fork.

    run(SUITE, Options(suite="trees"))                 # this machine; forty minutes on two cores
    run(SUITE, Options(suite="trees", quick=True))     # seconds

The conversations are drawn from the distributions of `WORKLOADS`, which are ours: of recorded agents only lengths are
taken as a guide. What is naive depends on the trainer: most run each conversation as one row, and a teacher's view of
each turn as another; those whose template rewrites the past make a row of each turn for the student too. Both are here.

"Dense mask" runs the same tokens as `packed`, each once, as one row with a mask of L × L, in transformers' own sdpa
attention: what a tree costs without kernels that know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ...models import Body, find_body
from ...prefix import Plan, View, plan_trajectories
from ...prefix.strategies import naive
from ...prefix.tree import Tree
from ...step import distill_step
from ..cases import PassContender, gradients_of, in_dtype, random_model
from ..measure import model_bytes
from ..models import described, size_of, with_layers
from ..options import Options
from ..passes import models_of
from ..rows import Outcome, PassReport, Step
from ..shapes import DTYPES
from ..tables import Table
from . import prefix
from .prefix import (
    CPU_MODELS,
    CUDA_MODELS,
    STEP,
    STUDENT,
    at_a_glance,
    draw_groups,
    naive_loop,
    student_pass,
    teacher_pass,
    whole_step,
)

VIEWS: Final = "teacher: a view of every turn"
NAIVE, NAIVE_LOOP, ROW_PER_TURN, DENSE = "naive batch", "naive loop", "a row per turn", "dense mask"


class Workload(NamedTuple):
    """Says what conversations are drawn; pairs are the least and the most tokens, drawn uniformly."""

    title: str
    prompt: int
    own: tuple[int, int]  # of a turn of the model
    other: tuple[int, int] = (0, 0)  # of what a tool says after it
    turns: int = 1  # of a conversation, on the way down a tree
    attempts: int = 1
    branching: int = 1  # every turn is tried so often, after each of those before it
    context: int = 0  # what a view of a turn shows before it


WORKLOADS: Final = {
    "turns": Workload("12 turns, a view of each", 500, (50, 150), (50, 800), turns=12, context=200),
    "search": Workload("a search of depth 6, branching 3", 100, (4, 12), turns=6, branching=3),
    "forks": Workload("8 attempts that fork at turns", 500, (50, 150), (50, 800), turns=6, attempts=8),
}
QUICK: Final = {
    "turns": Workload("3 turns, a view of each", 16, (3, 6), (3, 9), turns=3, context=6),
    "search": Workload("a search of depth 3, branching 2", 16, (2, 5), turns=3, branching=2),
    "forks": Workload("3 attempts that fork at turns", 16, (3, 6), (3, 9), turns=4, attempts=3),
}
OF_WORKLOAD: Final = {"turns": (VIEWS, STEP), "search": (STUDENT,), "forks": (STUDENT,)}


@dataclass(frozen=True, kw_only=True)
class TreeCase:
    """Is one table: conversations of a workload, and what is done with them."""

    workload: str  # a key of WORKLOADS
    work: str  # STUDENT, VIEWS or STEP
    model: str  # as `size_of` takes it
    dtype: str = "fp32"
    quick: bool = False

    @property
    def drawn(self) -> Workload:
        return (QUICK if self.quick else WORKLOADS)[self.workload]


class Turn(NamedTuple):
    """Is what the model says, (L,), and what a tool says after it, (M,)."""

    own: Tensor
    other: Tensor


@dataclass(eq=False)
class TreeSetup:
    """Holds what the contenders of a case have in common."""

    case: TreeCase
    model: Any
    plan: Plan  # a row for every conversation
    per_turn: Plan  # the same rows, in the same order, as sequences of a turn each
    single_turns: list[Plan]  # the same, a plan of each
    direction: Tensor  # (N, H) the gradient of the states, where there is no loss
    exact: Outcome | None = None

    @property
    def device(self) -> torch.device:
        return self.direction.device

    @property
    def teacher_prompts(self) -> list[Tensor]:
        return [ids for tree in self.plan.teacher for ids in tree.spans]

    @cached_property
    def body(self) -> Body:
        return find_body(self.model)


def own_cases(device: str, *, quick: bool = False) -> list[TreeCase]:
    model, dtype = ("quick" if quick else CPU_MODELS[0], "fp32") if device == "cpu" else (CUDA_MODELS[0], "bf16")
    return [
        TreeCase(workload=name, work=work, model=model, dtype=dtype, quick=quick)
        for name, works in OF_WORKLOAD.items()
        for work in works
    ]


def planned_cases(options: Options, device: str) -> list[TreeCase]:
    """Returns the suite's own cases, of another model or with fewer layers if that was asked for."""
    cases = in_dtype(own_cases(device, quick=options.quick), options.dtype)
    if not options.chosen:
        return cases
    models = [with_layers(options.model or CPU_MODELS[0], sizes.get("L")) for sizes in options.sizes]
    return [replace(case, model=model) for model in models for case in cases]


def conversations(workload: Workload, generator: torch.Generator, vocab: int) -> tuple[Tensor, list[list[Turn]]]:
    """Draws the prompt, (P,), and the turns of each conversation; those that fork have the same ones before."""

    def ids(count: int) -> Tensor:
        return torch.randint(vocab, (count,), generator=generator)

    def turn() -> Turn:
        counts = [int(torch.randint(low, most + 1, (1,), generator=generator)) for low, most in workload[2:4]]
        return Turn(ids(counts[0]), ids(counts[1]))

    prompt, drawn = ids(workload.prompt), [[]] if workload.branching > 1 else list[list[Turn]]()
    if workload.branching > 1:
        for _ in range(workload.turns):
            drawn = [[*turns, turn()] for turns in drawn for _ in range(workload.branching)]
    while len(drawn) < workload.attempts:
        # Each goes on from an earlier one, after any of its turns.
        forked = drawn[int(torch.randint(len(drawn), (1,), generator=generator))] if drawn else []
        kept = int(torch.randint(1, workload.turns, (1,), generator=generator)) if drawn else 0
        drawn.append(forked[:kept] + [turn() for _ in range(workload.turns - kept)])
    return prompt, drawn


def plans_of(case: TreeCase, generator: torch.Generator, vocab: int, device: str) -> tuple[Plan, Plan, list[Plan]]:
    """Plans the conversations whole, as a row for each turn, and each turn by itself; with views for a context."""
    workload = case.drawn
    prompt, drawn = conversations(workload, generator, vocab)
    whole: list[tuple[Tensor, Tensor]] = []  # ids and mask
    parts: list[tuple[Tensor, Tensor]] = []
    views: list[View] = []
    of_parts: list[View] = []
    for turns in drawn:
        past, mask = prompt, torch.zeros(len(prompt), dtype=torch.bool)
        for turn in turns:
            start, count = len(past), len(turn.own)
            if workload.context:
                hint = torch.randint(vocab, (workload.context,), generator=generator)
                shown = range(start + workload.context, start + workload.context + count)
                view = View(
                    ids=torch.cat([past, hint, turn.own]).to(device),
                    trajectory=len(whole),
                    tokens=range(start, start + count),
                    positions=shown,
                )
                views.append(view)
                of_parts.append(replace(view, trajectory=len(parts)))
            silent, said = torch.zeros(start, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
            parts.append((torch.cat([past, turn.own]), torch.cat([silent, said])))
            past = torch.cat([past, *turn])
            mask = torch.cat([mask, said, torch.zeros(len(turn.other), dtype=torch.bool)])
        whole.append((past, mask))

    def planned(sequences: list[tuple[Tensor, Tensor]], scored: list[View]) -> Plan:
        ids, masks = [ids.to(device) for ids, _ in sequences], [mask for _, mask in sequences]
        return plan_trajectories(ids, masks, scored if workload.context else None)

    singles = [planned([part], [replace(view, trajectory=0)]) for part, view in zip(parts, of_parts, strict=False)]
    return planned(whole, views), planned(parts, of_parts), singles


def make_setup(case: TreeCase, device: str = "cpu", seed: int = 0) -> TreeSetup:
    """Makes model, conversations and plans from a seed."""
    generator, config = torch.Generator().manual_seed(seed), config_of(case)
    plan, per_turn, single_turns = plans_of(case, generator, config.vocab_size, device)
    dtype = DTYPES[case.dtype]
    direction = torch.randn(plan.num_rows, config.hidden_size, generator=generator).to(device, dtype)
    model = random_model(config, dtype, device, seed)
    return TreeSetup(case, model, plan, per_turn, single_turns, direction)


def config_of(case: TreeCase) -> Any:
    size = size_of(case.model)
    return size.config(vocab=size.step_vocab if case.work == STEP else size.vocab)


def contenders(case: TreeCase) -> list[PassContender]:
    """Lists the contenders; the first that fits is what the others are compared with."""
    loop = PassContender(NAIVE_LOOP, naive_loop, ours=False, strategy="two_phase", micro_batch=1, shares=False)
    per_turn = PassContender(ROW_PER_TURN, naive_loop, ours=False, strategy="two_phase", micro_batch=1, shares=False)
    if case.work == STUDENT:
        return [
            PassContender(NAIVE, student_pass, ours=False, strategy="naive", shares=False),
            loop,
            # Of a search, every path's turns would be thousands of rows.
            *([replace(per_turn, build=_student_per_turn)] if case.workload == "forks" else []),
            PassContender(DENSE, _dense, ours=False),
            PassContender("cached", student_pass, strategy="cached"),
            PassContender("packed", student_pass),
            PassContender("two_phase, 1", student_pass, strategy="two_phase", micro_batch=1),
        ]
    if case.work == STEP:
        return [
            PassContender(NAIVE, whole_step, ours=False, strategy="naive", shares=False),
            replace(per_turn, build=_step_per_turn),
            PassContender("cached", whole_step, strategy="cached"),
            PassContender("packed", whole_step),
            PassContender("two_phase, 1", whole_step, strategy="two_phase", micro_batch=1),
        ]
    return [
        PassContender(NAIVE, teacher_pass, ours=False, strategy="naive", shares=False, live=False),
        PassContender(NAIVE_LOOP, _teacher_loop, ours=False, strategy="naive", shares=False, live=False),
        PassContender(DENSE, _dense_teacher, ours=False, live=False),
        PassContender("packed, frozen", teacher_pass, live=False),
        PassContender("cached, live", teacher_pass, strategy="cached"),
        PassContender("packed, live", teacher_pass),
    ]


def _student_per_turn(setup: TreeSetup, contender: PassContender) -> Step:
    return naive_loop(replace(setup, plan=setup.per_turn), contender)


def _step_per_turn(setup: TreeSetup, contender: PassContender) -> Step:
    """Takes a turn at a time, as its own row with its own view, with a backward each."""

    def step() -> Outcome:
        setup.model.zero_grad()
        losses = [
            distill_step(setup.model, plan, strategy="naive", normalizer=setup.plan.num_rows).loss
            for plan in setup.single_turns
        ]
        return Outcome(torch.stack(losses).sum(), gradients_of(setup.model))

    return step


def _teacher_loop(setup: TreeSetup, contender: PassContender) -> Step:
    @torch.no_grad()
    def step() -> Outcome:
        hidden = torch.empty_like(setup.direction)
        for tree in setup.plan.teacher:
            for i in tree.active:
                states = naive.run_whole(setup.body, [tree.sequence(i)])[0]
                hidden[tree.places[tree.slices[i]]] = naive.taken(states, tree.positions[tree.slices[i]])
        return Outcome(hidden, {})

    return step


def dense_mask(tree: Tree) -> Tensor:
    """Returns bool (L, L): which of a tree's tokens, flat, each sees."""
    length = tree.starts[-1]
    visible = torch.zeros(length, length, dtype=torch.bool)
    for start, end, stop in zip(tree.starts, tree.starts[1:], tree.stops, strict=False):
        visible[start:stop, start:end] = True
    return visible.tril_()


def _dense_states(setup: TreeSetup, trees: Sequence[Tree]) -> Tensor:
    """Runs each tree as one row with a mask of all pairs, (N, H)."""
    hidden = torch.empty_like(setup.direction)
    for tree in trees:
        # As numbers: from a bool mask every layer would make them, and keep them for backward.
        mask = torch.zeros(tree.starts[-1], tree.starts[-1], dtype=hidden.dtype, device=setup.device)
        mask.masked_fill_(~dense_mask(tree).to(setup.device), float("-inf"))
        at = [torch.arange(begin, begin + len(ids)) for begin, ids in zip(tree.begins, tree.spans, strict=True)]
        states = setup.body.base(
            input_ids=torch.cat(tree.spans)[None],
            position_ids=torch.cat(at)[None].to(setup.device),
            attention_mask=mask[None, None],
        ).last_hidden_state[0]
        hidden = hidden.index_copy(0, tree.places.to(setup.device), states[tree.rows.to(setup.device)])
    return hidden


def _dense(setup: TreeSetup, contender: PassContender) -> Step:
    def step() -> Outcome:
        setup.model.zero_grad()
        hidden = _dense_states(setup, setup.plan.student)
        (hidden * setup.direction).sum().backward()
        return Outcome(hidden.detach(), gradients_of(setup.model))

    return step


def _dense_teacher(setup: TreeSetup, contender: PassContender) -> Step:
    @torch.no_grad()
    def step() -> Outcome:
        return Outcome(_dense_states(setup, [tree.alone for tree in setup.plan.teacher]), {})

    return step


def heading(case: TreeCase) -> str:
    return f"{case.drawn.title}; {case.work}, {case.dtype}"


def overviews(report: PassReport) -> list[Table]:
    """Shows the speed of everything, and the memory."""
    heads, groups = [heading(case) for case in report.by_case()], list(report.by_case().values())
    return [at_a_glance("Conversations", heads, groups, memory=memory) for memory in (False, True)]


def described_workloads(report: PassReport) -> list[str]:
    """Says what was drawn, on which models."""
    lines = [f"{described(models_of(report))[0]}; random weights, sdpa attention."]
    for drawn in dict.fromkeys(case.drawn for case in report.by_case()):
        said = f"{drawn.title}: a prompt of {drawn.prompt} tokens, turns of {drawn.own[0]} to {drawn.own[1]}"
        said += f", tool output of {drawn.other[0]} to {drawn.other[1]}" if drawn.other[1] else ""
        lines.append(said + (f", {drawn.context} tokens of context in each view." if drawn.context else "."))
    return lines


SUITE = replace(
    prefix.SUITE,
    name="trees",
    title="Benchmark of conversations as trees",
    picture="Speed and memory of trees of turns",
    case=TreeCase,
    case_fields={name: name for name in ("workload", "work", "model", "dtype", "quick")},
    named=lambda case: f"{heading(case)}, {case.model}",
    cases=planned_cases,
    contenders=contenders,
    setup=make_setup,
    resident_bytes=lambda case: model_bytes(config_of(case), case.dtype, gradients=True),
    about=described_workloads,
    overviews=overviews,
    draw=lambda report, path: draw_groups(
        report.by_case(), path, report.machine, lambda case: heading(case).replace("; ", "\n")
    ),
)
