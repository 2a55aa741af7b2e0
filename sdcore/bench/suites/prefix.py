"""The suite `prefix` measures the student's pass, the teacher's, and the whole step, naive and with shared prefixes.

    run(SUITE, Options(suite="prefix"))                                  # this machine; ten minutes on two cores
    run(SUITE, Options(suite="prefix", everything=True, seconds=0))      # the grid, each row once: an hour on a CPU
    run(SUITE, Options(suite="prefix", model="qwen3-0.6b", shapes=("L=2",)))

A student's pass goes forward and backward, from a fixed gradient of the completions' states to those of all parameters;
a teacher's pass goes forward; a step is `distill_step` with a live teacher. Of the teachers' passes, a frozen one
computes the prompt itself; for a live one the student's pass has left its states (untimed here, timed in the step).

"Allowed" is the speed-up by the FLOPs that are left (`sdcore.prefix.cost`), "reached" the measured one's share of it.
The times mean something on a machine that does nothing else.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ...prefix import Cost, cost
from ...prefix.choice import STRATEGIES
from ...prefix.runner import passes, teacher_rows
from ...prefix.strategies import naive
from ...step import distill_step
from ...teachers import Frozen, Live
from .. import cases as of_passes
from ..cases import Case, PassContender, Setup, chosen_cases, gradients_of, in_dtype
from ..limit import LIMITS
from ..measure import model_bytes
from ..models import described, size_of
from ..options import Options
from ..passes import PassSuite, compare, draw_cases, errors, memory_share, milliseconds, models_of, speedup
from ..rows import Outcome, PassReport, PassRow, Step
from ..shapes import DTYPES
from ..tables import NONE, Table, mebibytes, pivot, ratio, spread

STUDENT, TEACHER, TEACHER_EACH, STEP = (
    "student: forward and backward",
    "teacher: one context",
    "teacher: a context per completion",
    "whole step",
)
WORKS = (STUDENT, TEACHER, TEACHER_EACH, STEP)
CPU_MODELS, GRID_CPU_MODELS = ("h512",), ("h512, 2 layers",)
CUDA_MODELS = ("h1024, heads of 64", "h2048, heads of 128")
# What counts as equal to naive, relative to the norm of the states and of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.05}
MOST_PANELS = 10
REFERENCES = ("naive batch", "naive loop")
UNBOUNDED = (*REFERENCES, "a row per turn")  # for which nothing is shared
PEERS = ("PrefixGrouper-style", "dense mask")
FIELDS = ("model", "prompt", "completion", "completions", "context", "dtype", "work")


def sizes_of(case: Case) -> str:
    text = f"P={case.prompt} R={case.completion} G={case.completions}"
    return text if case.work == STUDENT else f"{text} C={case.context}"


def named(case: Case) -> str:
    return f"{case.work}, {sizes_of(case)} {case.dtype}, {case.model}"


def own_cases(device: str, *, quick: bool = False, everything: bool = False) -> list[Case]:
    """Lists the cases of a run: by default what a CPU does in ten minutes, the longest ones in the fewest ways."""
    if quick:
        many = Case(model="quick", prompt=48, completion=8, completions=3, context=12, work=STUDENT)
        one = replace(many, completions=1)
        return [*_of(many, WORKS), *_of(one, (STUDENT,)), replace(many, dtype="bf16")]
    on_cpu = device == "cpu"
    models, dtype = (CPU_MODELS, "fp32") if on_cpu else (CUDA_MODELS, "bf16")
    if everything:
        # All layers do the same, so that two of them say on a CPU what eight would, in a quarter of the time.
        models = GRID_CPU_MODELS if on_cpu else models
        grid = itertools.product((512, 2048, 8192), (64, 128, 512), (1, 4, 8), models)
        sized = [
            Case(model=model, dtype=dtype, prompt=prompt, context=256, completion=completion, completions=completions)
            for prompt, completion, completions, model in grid
        ]
        works = (STUDENT, TEACHER, TEACHER_EACH) if on_cpu else WORKS
        cases = [of_work for case in sized for of_work in _of(case, works)]
        bf16 = [replace(case, dtype="bf16") for case in cases if case.completions == 8 and case.work == STUDENT]
        return cases + bf16 if on_cpu else cases
    cases = []
    for model in models:
        short = Case(model=model, dtype=dtype, prompt=512, context=256, completion=128, completions=8)
        long = replace(short, prompt=2048, completion=64)
        cases += [*_of(short, WORKS), *_of(long, (STUDENT, TEACHER) if on_cpu else WORKS)]
        cases.append(replace(short, completions=1, work=STUDENT))
    return cases


def planned_cases(options: Options, device: str) -> list[Case]:
    """Returns the suite's own cases, or those of a model and of shapes."""
    if options.chosen:
        return [of_work for case in chosen_cases(options, device, CPU_MODELS[0]) for of_work in _of(case, WORKS)]
    return in_dtype(own_cases(device, quick=options.quick, everything=options.everything), options.dtype)


def _of(case: Case, works: Iterable[str]) -> list[Case]:
    # With one completion there is one context, whichever way it is counted.
    return [replace(case, work=work) for work in works if case.completions > 1 or work != TEACHER_EACH]


def config_of(case: Case) -> Any:
    """Returns transformers' configuration of the case's model; only a whole step has its real vocabulary."""
    size = size_of(case.model)
    return size.config(vocab=size.step_vocab if case.work == STEP else size.vocab)


def make_setup(case: Case, device: str = "cpu", seed: int = 0) -> Setup:
    """Makes model and tokens from a seed."""
    contexts = 0 if case.work == STUDENT else case.completions if case.work == TEACHER_EACH else 1
    return of_passes.make_setup(case, config_of(case), device, contexts=contexts, seed=seed)


def cost_of(setup: Setup, contender: PassContender) -> Cost:
    return cost(
        setup.plan,
        setup.body.config,
        strategy=contender.strategy,
        teacher_shares=contender.live,
        micro_batch=contender.micro_batch,
        dtype_bytes=DTYPES[setup.case.dtype].itemsize,
    )


def allowed_speedup(setup: Setup, contender: PassContender) -> float:
    """Returns the speed-up over naive that the FLOPs allow."""
    if not contender.shares:
        return 1.0
    counted = cost_of(setup, contender)
    if setup.case.work == STUDENT:
        return counted.student.speedup
    if setup.case.work == STEP or counted.teacher is None:
        return counted.step_speedup
    return counted.teacher.speedup


def needed_bytes(setup: Setup, contender: PassContender) -> float:
    """Estimates what a contender keeps for backward, and the gradients, which are as many as the weights."""
    if setup.case.work not in (STUDENT, STEP):
        return 0.0
    gradients = model_bytes(setup.body.config, setup.case.dtype, gradients=False)
    return cost_of(setup, contender).student.kept_bytes + gradients


def contenders(case: Case) -> list[PassContender]:
    """Lists the contenders, naive first: it is what the others are compared with."""
    if case.work == STUDENT:
        last = PassContender("two_phase, 2", student_pass, strategy="two_phase", micro_batch=2)
        return [
            PassContender("naive batch", student_pass, strategy="naive", shares=False),
            PassContender("naive loop", naive_loop, strategy="two_phase", micro_batch=1, shares=False),
            PassContender("PrefixGrouper-style", _expanded, strategy="cached"),
            PassContender("cached", student_pass, strategy="cached"),
            PassContender("packed", student_pass),
            PassContender("two_phase, 1", student_pass, strategy="two_phase", micro_batch=1),
            # Its costs are those of packed, which with one completion has nothing to share.
            last if case.completions > 1 else PassContender("auto", auto_pass),
        ]
    if case.work == STEP:
        return [
            PassContender("naive batch", whole_step, strategy="naive", shares=False),
            PassContender("cached", whole_step, strategy="cached"),
            PassContender("packed", whole_step),
            PassContender("two_phase, 2", whole_step, strategy="two_phase", micro_batch=2),
        ]
    return [
        PassContender("naive batch", teacher_pass, strategy="naive", shares=False, live=False),
        PassContender("cached, frozen", teacher_pass, strategy="cached", live=False),
        PassContender("packed, frozen", teacher_pass, live=False),
        PassContender("cached, live", teacher_pass, strategy="cached"),
        PassContender("packed, live", teacher_pass),
    ]


def student_pass(setup: Setup, contender: PassContender) -> Step:
    def step() -> Outcome:
        setup.model.zero_grad()
        hidden = torch.empty_like(setup.direction)
        parts, _ = passes(setup.model, setup.plan, strategy=contender.strategy, micro_batch=contender.micro_batch)
        for part in parts:
            hidden[part.rows] = part.student_hidden.detach()
            part.attach((part.student_hidden * setup.direction[part.rows]).sum()).backward()
        return Outcome(hidden, gradients_of(setup.model))

    return step


def auto_pass(setup: Setup, contender: PassContender) -> Step:
    return student_pass(setup, replace(contender, strategy="auto"))


def naive_loop(setup: Any, contender: PassContender) -> Step:
    """Runs a sequence at a time, each with a backward of its own: gradient accumulation with a batch of 1."""

    def step() -> Outcome:
        setup.model.zero_grad()
        hidden = torch.empty_like(setup.direction)
        for tree in setup.plan.student:
            for i in tree.active:
                rows, at = tree.places[tree.slices[i]], tree.positions[tree.slices[i]]
                states = naive.taken(naive.run_whole(setup.body, [tree.sequence(i)])[0], at)
                hidden[rows] = states.detach()
                (states * setup.direction[rows]).sum().backward()
        return Outcome(hidden, gradients_of(setup.model))

    return step


def _expanded(setup: Setup, contender: PassContender) -> Step:
    """Runs the prompt once, then repeats its keys and values for every completion, in a padded batch with a mask.

    What PrefixGrouper (arXiv:2506.05433) and trainers with a repeated cache do, here with transformers' own cache: one
    prompt a call, in the graph. The published code has an attention function of its own.
    """
    tree = setup.plan.student[0]
    prompt_ids, *branches = tree.spans
    count, length = len(branches), len(prompt_ids)

    def step() -> Outcome:
        setup.model.zero_grad()
        cache = DynamicCache(config=setup.body.config)
        prompt = setup.body(prompt_ids[None], cache=cache)
        cache.batch_repeat_interleave(count)
        tokens = pad_sequence(branches, batch_first=True)  # (G, L)
        mask = torch.ones(count, length + tokens.shape[1], dtype=torch.int64, device=tokens.device)
        for i, branch in enumerate(branches):
            mask[i, length + len(branch) :] = 0
        states = setup.body(tokens, cache=cache, attention_mask=mask)
        last = prompt[0, -1:]
        hidden = torch.cat([torch.cat([last, states[i, : len(b)]]) for i, b in enumerate(branches)])
        (hidden * setup.direction).sum().backward()
        return Outcome(hidden.detach(), gradients_of(setup.model))

    return step


def teacher_pass(setup: Setup, contender: PassContender) -> Step:
    prompts = None
    if contender.live:
        with torch.no_grad():
            record = [tree.reads for tree in setup.plan.teacher]
            _, prompts = STRATEGIES[contender.strategy].hidden_states(setup.body, setup.plan.student, record=record)
    teacher = Live() if contender.live else Frozen(copy.deepcopy(setup.model))

    def step() -> Outcome:
        return Outcome(teacher_rows(setup.body, teacher, setup.plan.teacher, contender.strategy, prompts).hidden, {})

    return step


def whole_step(setup: Setup, contender: PassContender) -> Step:
    def step() -> Outcome:
        setup.model.zero_grad()
        out = distill_step(setup.model, setup.plan, strategy=contender.strategy, micro_batch=contender.micro_batch)
        return Outcome(out.loss, gradients_of(setup.model))

    return step


def judge(row: PassRow, outcome: Outcome, exact: Outcome) -> str | None:
    """Notes how far an outcome is from naive's, and says so if that is more than rounding."""
    row.values_error, row.gradient_error = compare(outcome, exact)
    most = EQUAL[row.group.dtype]
    if not row.values_error <= most:
        return f"differs from naive by {row.values_error:.1e}"
    if row.gradient_error > most:
        return f"gradients differ from naive's by {row.gradient_error:.1e}"
    return None


def reference(rows: Sequence[PassRow]) -> PassRow | None:
    """Returns what others are relative to: the naive batch, or the loop where the batch did not fit."""
    timed = {row.contender: row for row in rows if not row.reason}
    return next((timed[name] for name in REFERENCES if name in timed), None)


def is_ours(row: PassRow) -> bool:
    return row.contender not in (*UNBOUNDED, *LIMITS, *PEERS)


def overview(work: str, report: PassReport, *, memory: bool = False) -> Table:
    """Shows one kind of pass at a glance: a line per contender, a column per case."""
    groups = {case: rows for case, rows in report.by_case().items() if case.work == work}
    several = len({case.model for case in groups}) > 1
    heads = [f"{sizes_of(case)} {case.dtype}" + (f", {case.model}" if several else "") for case in groups]
    return at_a_glance(f"{work[0].upper()}{work[1:]}", heads, list(groups.values()), memory=memory)


def at_a_glance(title: str, heads: Sequence[str], groups: Sequence[Sequence[PassRow]], *, memory: bool) -> Table:
    """Makes a table with a column of each group: speed beside what the FLOPs allow, or peaks."""
    what = "peak MiB (of naive's)" if memory else "times faster than the naive batch (of what the FLOPs allow)"
    table = Table(f"{title}, {what}", ("contender", *heads))

    def cells(row: PassRow | None, rows: Sequence[PassRow]) -> list[str]:
        if row is None or (memory and row.live_bytes is None):
            return [NONE]
        base = reference(rows)
        if memory:
            return [f"{mebibytes(row.live_bytes)} ({memory_share(row, base):.2f})"]
        gained = speedup(row, base)
        bounded = row.contender not in (*UNBOUNDED, *LIMITS)
        return [f"{gained:.2f} ({gained / row.allowed:.0%})" if bounded else f"{gained:.2f}"]

    pivot(table, groups, cells, is_ours)
    if not memory:
        bases = [reference(rows) for rows in groups]
        table.add("naive, seconds", *(NONE if base is None else f"{base.median:.2f}" for base in bases))
    return table


def overviews(report: PassReport) -> list[Table]:
    """Shows the speed of everything, and the memory of what has a backward."""
    works = [work for work in WORKS if any(case.work == work for case in report.by_case())]
    tables = [overview(work, report) for work in works]
    return tables + [overview(work, report, memory=True) for work in works if not work.startswith("teacher")]


def draw(report: PassReport, path: Path) -> None:
    """Draws per case a bar for each contender's speed-up, a mark for what the FLOPs allow, and the peak beneath.

    Of more than `MOST_PANELS` cases it shows only the student's passes with the most completions.
    """
    groups = report.by_case()
    if len(groups) > MOST_PANELS:
        most = max(case.completions for case in groups)
        shown = [case for case in groups if case.work == STUDENT and case.completions == most][:MOST_PANELS]
        groups = {case: groups[case] for case in shown}
    draw_groups(groups, path, report.machine, lambda case: f"{case.work}\n{sizes_of(case)}\n{case.dtype}, {case.model}")


def draw_groups(
    groups: Mapping[Any, Sequence[PassRow]], path: Path, machine: Mapping[str, Any], head: Callable[[Any], str]
) -> None:
    """Draws the bars of these cases."""
    draw_cases(
        groups,
        path,
        title=f"Shared prefixes, {machine['name']} (lines: what the FLOPs allow; dashed: a fifth)",
        head=head,
        colour=lambda row: "#8c8c8c" if row.contender in UNBOUNDED else "#0b6e99" if is_ours(row) else "#e08a1e",
        above=("times faster than naive", lambda row, rows: speedup(row, reference(rows))),
        below=("peak bytes / naive's", lambda row, rows: memory_share(row, reference(rows))),
        mark=lambda row, rows: row.allowed,
        line=0.2,
    )


SUITE = PassSuite(
    name="prefix",
    title="Benchmark of the shared-prefix scheme",
    seconds=3.0,
    picture="Speed and memory of shared prefixes",
    case=Case,
    case_fields={name: name for name in FIELDS},
    row_fields={"allowed": "allowed", "values_error": "values_error"},
    named=named,
    cases=planned_cases,
    contenders=contenders,
    setup=make_setup,
    limits=lambda setup: of_passes.limits(
        setup, student=setup.case.work in (STUDENT, STEP), head=setup.case.work == STEP
    ),
    judge=judge,
    # Weights, and a frozen teacher's or the gradients of all.
    resident_bytes=lambda case: model_bytes(config_of(case), case.dtype, gradients=True),
    needed_bytes=needed_bytes,
    allowed=allowed_speedup,
    about=lambda report: [f"{described(models_of(report))[0]}; random weights, sdpa attention."],
    overviews=overviews,
    draw=draw,
    reference=reference,
    columns=(
        ("median", lambda row, base: milliseconds(row)),
        ("spread", lambda row, base: spread(row, unknown="")),
        ("runs", lambda row, base: str(len(row.seconds))),
        ("speed-up", lambda row, base: ratio(speedup(row, base), "×")),
        ("allowed", lambda row, base: ratio(row.allowed, "×")),
        ("reached", lambda row, base: NONE if math.isnan(row.allowed) else f"{speedup(row, base) / row.allowed:.0%}"),
        ("peak MiB", lambda row, base: mebibytes(row.live_bytes)),
        ("of naive", lambda row, base: ratio(memory_share(row, base))),
        ("error", lambda row, base: errors(row)),
    ),
    is_ours=is_ours,
)
