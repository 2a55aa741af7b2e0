"""The suite `step` measures the update phase of a step of SDPO, TRL's and ours, from token ids to gradients.

    run(SUITE, Options(suite="step"))                     # this machine; half an hour on two cores
    run(SUITE, Options(suite="step", model="qwen3-0.6b", shapes=("L=2,G=4",)))

No sampling and no optimizer: student's and teacher's passes, the Jensen-Shannon divergence (alpha 0.5) on the tokens of
G completions of one prompt, and the gradients of all parameters. What TRL does is its own code,
`SDPOTrainer.compute_loss` on a prepared batch, followed by backward, as in its `training_step`. Loss and gradients are
compared with TRL's before anything is timed. The times mean something on a machine that does nothing else.

Every contender starts from the same weights, and an average of them that was never updated is equal to them, so all
of a case must agree whatever their teacher. TRL's teacher is the copy that its "ema" has; that it computes a prompt
anew for every completion does not depend on whose weights they are. On the student's own fresh samples, as here, TRL
applies no importance weights, so ours have none either.

Not covered: padding, which costs TRL and not us; TRL with a vLLM server as its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...models.names import set_checkpointing
from ...presets.methods import SDPO
from ...step import distill_step
from ...teachers import EMA, Live
from .. import cases as of_passes
from ..cases import ONE, Case, PassContender, Setup, chosen_cases, gradients_of, in_dtype
from ..limit import LIMITS
from ..measure import model_bytes
from ..models import described, size_of
from ..options import Options
from ..passes import (
    PassSuite,
    compare,
    draw_cases,
    errors,
    limit,
    memory_share,
    milliseconds,
    models_of,
    speedup,
    timed_rows,
)
from ..rows import Outcome, PassReport, PassRow, Step
from ..shapes import MIB
from ..tables import NONE, Table, mebibytes, pivot, ratio, spread
from ..trl_trainers import ALPHA, trl_batch, trl_trainer

TOPK, TINY_TOPK = 100, 10
CPU_MODEL, CUDA_MODELS = "h512", ("h1024, heads of 64", "h2048, heads of 128")
# What counts as equal to TRL, of the loss and relative to the norm of all gradients.
EQUAL = {"fp32": 1e-4, "bf16": 0.1}
# With a top-k, the tokens next to the k-th place change it with the last digits of the hidden states (1e-5 of noise
# moves 2 of 1024 rows, and the gradients by 6e-3). The full vocabulary has no such steps, and is held to the above.
EQUAL_TOPK = {"fp32": (1e-3, 0.02), "bf16": (0.1, 0.1)}


FIELDS = ("model", "prompt", "context", "completion", "completions", "topk", "contexts", "dtype")


def named(case: Case) -> str:
    name = f"{case.objective}, {case.contexts}, {case.sizes} {case.dtype}, {case.model}"
    return name[0].upper() + name[1:]


def own_cases(device: str, *, quick: bool = False) -> list[Case]:
    """Lists both objectives with a context for each completion, which is the harder for us; and one context for all."""
    if quick:
        first = [Case(model="quick", prompt=48, context=12, completion=8, completions=3, topk=TINY_TOPK)]
    else:
        models, dtype = ((CPU_MODEL,), "fp32") if device == "cpu" else (CUDA_MODELS, "bf16")
        sizes: dict[str, Any] = {"prompt": 1024, "context": 256, "completion": 128, "completions": 8}
        first = [Case(model=model, dtype=dtype, topk=TOPK, **sizes) for model in models]
    return [variant for case in first for variant in (case, replace(case, topk=None), replace(case, contexts=ONE))]


def planned_cases(options: Options, device: str) -> list[Case]:
    """Returns the suite's own cases, or those of a model and of shapes, with both objectives."""
    if options.chosen:
        return [replace(case, topk=k) for case in chosen_cases(options, device, CPU_MODEL) for k in (TOPK, None)]
    return in_dtype(own_cases(device, quick=options.quick), options.dtype)


def config_of(model: str) -> Any:
    """Returns transformers' configuration of a whole step's model.

    The weights' standard deviation makes that of the logits 1: the divergence of flatter distributions is so small that
    TRL's sum of signed terms in float32 has few digits of it.
    """
    size = size_of(model)
    # Ids that the model may not lack: TRL sets those of padding and of the end.
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return size.config(vocab=size.step_vocab, initializer_range=size.hidden**-0.5, **ids)


def make_setup(case: Case, device: str = "cpu", seed: int = 0) -> Setup:
    """Makes model and tokens from a seed."""
    contexts = 1 if case.contexts == ONE else case.completions
    return of_passes.make_setup(case, config_of(case.model), device, contexts=contexts, seed=seed)


def contenders(case: Case) -> list[PassContender]:
    """Lists the contenders, TRL's batch first: it is what the others are compared with."""
    theirs = PassContender("TRL", _trl, ours=False, micro_batch=case.completions)
    one: dict[str, Any] = {"strategy": "two_phase", "micro_batch": 1}
    two: dict[str, Any] = {"strategy": "two_phase", "micro_batch": 2}
    return [
        theirs,
        replace(theirs, name="TRL, checkpointing", checkpointing=True),
        replace(theirs, name="TRL, 1 at a time", micro_batch=1),
        replace(theirs, name="TRL, 1, checkpointing", micro_batch=1, checkpointing=True),
        PassContender("packed, live", _ours),
        PassContender("packed, EMA", _ours, live=False),
        PassContender("two_phase 2, live", _ours, **two),
        PassContender("two_phase 2, EMA", _ours, **two, live=False),
        PassContender("two_phase 1, live", _ours, **one),
        PassContender("two_phase 1, EMA", _ours, **one, live=False),
        PassContender("packed, live, checkpointing", _ours, checkpointing=True),
        PassContender("two_phase 1, EMA, checkpointing", _ours, **one, live=False, checkpointing=True),
    ]


def _ours(setup: Setup, contender: PassContender) -> Step:
    method = SDPO(alpha=ALPHA, topk=setup.case.topk, importance_clip=None)
    teacher = Live() if contender.live else EMA(setup.model, method.update_rate)
    how: dict[str, Any] = {"strategy": contender.strategy, "micro_batch": contender.micro_batch}
    loss, planned = method.build_loss(), setup.plan

    def step() -> Outcome:
        setup.model.zero_grad()
        with training(setup.model, checkpointing=contender.checkpointing):
            out = distill_step(setup.model, planned, loss=loss, teacher=teacher, **how)
        return Outcome(out.loss, gradients_of(setup.model))

    setup.model.zero_grad()
    return step


def _trl(setup: Setup, contender: PassContender) -> Step:
    """Runs TRL's `compute_loss` and a backward on so many completions at a time, as gradient accumulation does."""
    trainer, whole, count = trl_trainer(setup, "SDPO"), trl_batch(setup, "SDPO"), setup.case.completions
    size = contender.micro_batch or count
    parts = [{name: rows[i : i + size] for name, rows in whole.items()} for i in range(0, count, size)]
    trainer.current_gradient_accumulation_steps = len(parts)

    def step() -> Outcome:
        setup.model.zero_grad()
        total = torch.zeros((), device=setup.device)
        with training(setup.model, checkpointing=contender.checkpointing):
            for part in parts:
                loss = trainer.compute_loss(setup.model, part)
                loss.backward()
                total += loss.detach()
        return Outcome(total, gradients_of(setup.model))

    setup.model.zero_grad()
    return step


@contextmanager
def training(model: Any, *, checkpointing: bool) -> Iterator[None]:
    """Puts the model into the state that a trainer has it in, for the time of the block."""
    model.train()
    if checkpointing:
        set_checkpointing(model, True)
    try:
        yield
    finally:
        if checkpointing:
            set_checkpointing(model, False)
        model.eval()


def tolerance(case: Case) -> tuple[float, float]:
    """Returns how far the loss and the gradients may be from TRL's."""
    return (EQUAL[case.dtype],) * 2 if case.topk is None else EQUAL_TOPK[case.dtype]


def judge(row: PassRow, outcome: Outcome, exact: Outcome) -> str | None:
    """Notes how far an outcome is from TRL's, and says so if that is more than rounding."""
    row.values_error, row.gradient_error = compare(outcome, exact)
    loss, gradient = tolerance(row.group)
    if not row.values_error <= loss:
        return f"its loss differs from TRL's by {row.values_error:.1e}"
    if not row.gradient_error <= gradient:
        return f"its gradients differ from TRL's by {row.gradient_error:.1e}"
    return None


def reference(rows: Sequence[PassRow]) -> PassRow | None:
    """Returns what times and bytes are relative to: TRL's batch, or the first of the others' rows that ran."""
    return next((row for row in rows if not row.ours and not row.reason and row.contender not in LIMITS), None)


def best(rows: Sequence[PassRow]) -> list[str]:
    """Compares the best: TRL's batch is neither its fastest setting nor its smallest."""
    theirs, ours = ([row for row in timed_rows(rows) if row.ours == mine] for mine in (False, True))
    if not theirs or not ours:
        return []
    fast, fastest = (min(some, key=lambda row: row.median) for some in (theirs, ours))
    small, smallest = (min(some, key=lambda row: row.live_bytes or math.inf) for some in (theirs, ours))
    notes = [f"The fastest of ours, {fastest.contender}: {fast.median / fastest.median:.2f}× {fast.contender}'s speed."]
    share = memory_share(smallest, small)
    if not math.isnan(share):
        notes.append(f"The smallest of ours, {smallest.contender}: {share:.2f} of {small.contender}'s peak.")
    return notes


def overview(report: PassReport) -> Table:
    """Shows all cases at a glance: a line per contender, two columns per case."""
    groups = report.by_case()
    heads = [f"{case.objective}, {case.contexts}, {case.model}" for case in groups]
    columns = [f"{head}: {what}" for head in heads for what in ("times faster", "peak of TRL's")]
    table = Table("Update phase of a step of SDPO, against TRL's batch", ("contender", *columns))

    def cells(row: PassRow | None, rows: Sequence[PassRow]) -> list[str]:
        base = reference(rows)
        return [NONE, NONE] if row is None else [ratio(speedup(row, base)), ratio(memory_share(row, base))]

    pivot(table, list(groups.values()), cells, lambda row: row.ours, keep_empty=True)
    bases = [reference(rows) for rows in groups.values()]
    absolute = [(ratio(base.median), mebibytes(base.live_bytes)) if base else (NONE, NONE) for base in bases]
    table.add("TRL, seconds and MiB", *(cell for pair in absolute for cell in pair))
    return table


def describe_models(report: PassReport) -> list[str]:
    sizes, vocabularies = described(models_of(report), until=" (")
    return [f"{sizes}, here {vocabularies}; random weights, sdpa attention."]


def draw(report: PassReport, path: Path, *, title: str, head: Callable[[Any], str]) -> None:
    """Draws per case a bar for each contender's seconds, the limit as a line, and its peak beneath."""
    draw_cases(
        report.by_case(),
        path,
        title=f"{title}, {report.machine['name']}",
        head=head,
        colour=lambda row: "#0b6e99" if row.ours else "#8c8c8c",
        above=("seconds", lambda row, rows: row.median),
        below=("peak MiB", lambda row, rows: (row.live_bytes or 0) / MIB),
        mark=lambda row, rows: least.median if (least := limit(rows)) else None,
    )


def _head(case: Case) -> str:
    return f"{case.objective}\n{case.contexts}\n{case.sizes}\n{case.model}, {case.dtype}"


COLUMNS = (
    ("median", lambda row, base: milliseconds(row)),
    ("spread", lambda row, base: spread(row)),
    ("runs", lambda row, base: str(len(row.seconds))),
    ("times faster", lambda row, base: ratio(speedup(row, base), "×")),
    ("peak MiB", lambda row, base: mebibytes(row.live_bytes)),
    ("of {base}'s", lambda row, base: ratio(memory_share(row, base))),
    ("process MiB", lambda row, base: mebibytes(row.resident_bytes)),
    ("error", lambda row, base: errors(row)),
)
SUITE = PassSuite(
    name="step",
    title="Benchmark of a step's update phase",
    seconds=20.0,
    case=Case,
    case_fields={name: name for name in FIELDS},
    row_fields={"ours": "ours", "loss_error": "values_error"},
    named=named,
    cases=planned_cases,
    contenders=contenders,
    setup=make_setup,
    limits=of_passes.limits,
    judge=judge,
    # Weights, their gradients, and the copy that TRL's teacher is.
    resident_bytes=lambda case: model_bytes(config_of(case.model), case.dtype, gradients=True, copies=1),
    about=describe_models,
    overviews=lambda report: [overview(report)],
    draw=lambda report, path: draw(report, path, title="Update phase of SDPO", head=_head),
    reference=reference,
    columns=COLUMNS,
    notes=best,
)
