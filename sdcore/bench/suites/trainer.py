"""The suite `trainer` measures one optimizer step's update by whole trainers, TRL's and the fused ones.

    run(SUITE, Options(suite="trainer"))                  # this machine; ten minutes on two cores

`training_step` of the trainer on a fixed batch, which is sampling left out, then AdamW: forward passes, loss, backward,
update, and whatever a trainer logs. The batch is one prompt with G completions, as the trainer's own `_prepare_inputs`
(GKD: its collator) would give it. AdamW's learning rate is 0, so that every run of a case starts from the same weights
and must come to the same loss and gradients, which are compared with TRL's as in the suite `step`.

The peak has the activations, gradients and temporaries of one update, and not what stays between updates: weights,
teachers, AdamW's moments. Not covered: sampling, rewards, data loading, several devices; gradient checkpointing (see
the suite `step`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ...prefix import Plan, cost_of_sizes, plan
from .. import cases as of_passes
from ..cases import EACH, Case, PassContender, Setup, chosen_cases, gradients_of, in_dtype
from ..measure import model_bytes, trl_bytes
from ..models import described
from ..options import Options
from ..passes import PassSuite, limit, memory_share, milliseconds, models_of, speedup
from ..peers import require
from ..rows import Outcome, PassReport, Step
from ..shapes import DTYPES
from ..tables import Table, mebibytes, ratio
from ..trl_trainers import DISTILLATION, GKD, SDPO, TRAINERS, has_context, make_trainer, trl_batch, trl_trainer
from . import step
from .step import config_of

CPU_MODEL, CUDA_MODELS = "h512, V=151936", ("h1024, heads of 64", "qwen3-0.6b")
TOPK, TINY_TOPK = 100, 10  # of SDPO; the others have the full vocabulary
# Of another model's weights beside the student's.
TEACHER_NOISE = 0.3
# Arrays (N, V) of whole logits in TRL's trainers: of SDPO and SDFT, of GKD; with a top-k.
TRAINER_ARRAYS = (13.0, 17.0)
TRAINER_TOPK_ARRAYS = 5.0
# Names on disk of a case; `work` is the trainer.
FIELDS = {"trainer": "work"} | {
    name: name for name in ("model", "prompt", "context", "completion", "completions", "topk", "dtype")
}


def named(case: Case) -> str:
    sizes = case.sizes if has_context(case.work) else case.sizes.replace(f" C={case.context}", "")
    return f"{case.work}, {case.objective}, {sizes} {case.dtype}, {case.model}"


def own_cases(device: str, *, quick: bool = False) -> list[Case]:
    """Lists SDPO with a top-k and the others with the full vocabulary.

    TRL's GKD makes the logits of prompts too, so that its case is smaller.
    """
    if quick:
        return _of(Case(model="quick", prompt=48, context=12, completion=8, completions=3), TINY_TOPK)
    sizes: dict[str, Any] = {"prompt": 1024, "context": 256, "completions": 8}
    if device == "cpu":
        case = Case(model=CPU_MODEL, completion=64, **sizes)
        return _of(case, TOPK, gkd={"prompt": 512, "completions": 2})
    cases = [Case(model=model, completion=512, dtype="bf16", **sizes) for model in CUDA_MODELS]
    return [of for case in cases for of in _of(case, TOPK, gkd={"completion": 256, "completions": 2})]


def _of(case: Case, topk: int, gkd: Mapping[str, Any] | None = None) -> list[Case]:
    changes: dict[str, Mapping[str, Any]] = {SDPO: {"topk": topk}, GKD: gkd or {}}
    return [replace(case, work=name, **changes.get(name, {})) for name in TRAINERS]


def planned_cases(options: Options, device: str) -> list[Case]:
    """Returns the suite's own cases, or those of a model and of shapes; of the trainers that `peers` names."""
    if options.chosen:
        cases = [of for case in chosen_cases(options, device, CPU_MODEL) for of in _of(case, TOPK)]
    else:
        cases = in_dtype(own_cases(device, quick=options.quick), options.dtype)
    return [case for case in cases if options.peers is None or case.work.lower() in options.peers]


@dataclass(eq=False)
class TrainerSetup(Setup):
    """Holds tokens, weights and optimizer, which the contenders of a case have in common."""

    other: Any = None  # the teacher that is another model; None where it is made of the student
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # Learning rate 0: the whole work of an update, and the weights stay. Its moments are made before any step.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, foreach=self.device.type == "cuda")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.model.zero_grad()

    @cached_property
    def plan(self) -> Plan:
        """Plans the tokens that the two models read; another model reads what the student does."""
        if has_context(self.case.work):
            return super().plan
        return plan([self.prompt], [self.completions], [self.prompt])


def make_setup(case: Case, device: str = "cpu", seed: int = 0) -> TrainerSetup:
    """Makes models, tokens and optimizer from a seed."""
    made = step.make_setup(replace(case, contexts=EACH), device, seed)
    other = None if has_context(case.work) else _another(made.model, seed)
    return TrainerSetup(**vars(made) | {"case": case, "other": other})


def _another(model: Any, seed: int) -> Any:
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.data += TEACHER_NOISE * parameter.std() * noise
    return teacher


def contenders(case: Case) -> list[PassContender]:
    """Lists the contenders, TRL's first: it is what the others are compared with."""
    theirs = PassContender(f"TRL {case.work}Trainer", _theirs, ours=False)
    name = f"Fused{case.work}Trainer"
    if not has_context(case.work):
        return [theirs, PassContender(name, _ours)]
    kind = "ema" if case.work == SDPO else "base"
    return [
        theirs,
        PassContender(f"{name}, {kind} teacher", _ours, live=False),
        PassContender(f"{name}, live teacher", _ours),
        PassContender(f"{name}, {kind}, micro_batch=1", _ours, live=False, micro_batch=1),
    ]


def _theirs(setup: TrainerSetup, contender: PassContender) -> Step:
    return _updates(setup, trl_trainer(setup, setup.case.work, setup.other))


def _ours(setup: TrainerSetup, contender: PassContender) -> Step:
    require("trl", "trl")
    from ...integrations import trl as fused

    # Equality is checked against TRL here; the check of the passes would count as memory.
    options = fused.FusedOptions(verify="off", micro_batch=contender.micro_batch)
    name = setup.case.work
    teacher = "live" if contender.live else "ema" if name == SDPO else "base"
    kind = getattr(fused, f"Fused{name}Trainer")
    return _updates(setup, make_trainer(setup, name, kind, teacher=teacher, other=setup.other, fused=options))


def _updates(setup: TrainerSetup, trainer: Any) -> Step:
    """Makes one optimizer step's update: TRL's training step on the fixed batch, then AdamW."""
    whole = trl_batch(setup, setup.case.work)
    # Instead of sampling.
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.current_gradient_accumulation_steps = 1

    def update() -> Outcome:
        setup.model.zero_grad()
        try:
            loss = trainer.training_step(setup.model, dict(whole), None)
            setup.optimizer.step()
        finally:
            setup.model.eval()
        return Outcome(loss.detach(), gradients_of(setup.model))

    setup.model.zero_grad()
    return update


def trainer_bytes(case: Case, config: Any) -> float:
    """Estimates the peak of an update by TRL's trainer beyond what stays between updates."""
    length = case.prompt + case.completion
    gradients = model_bytes(config, case.dtype, gradients=False)
    if case.work == DISTILLATION:
        logits = trl_bytes(case.completions * case.completion, config.vocab_size, 1)
    else:
        # GKD makes the logits of the prompts too.
        tokens = case.completions * (length if case.work == GKD else case.completion)
        arrays = TRAINER_ARRAYS[case.work == GKD] if case.topk is None else TRAINER_TOPK_ARRAYS
        logits = arrays * tokens * config.vocab_size * DTYPES[case.dtype].itemsize
    kept = cost_of_sizes(
        config,
        prompt_tokens=case.prompt,
        context_tokens=0,
        completion_tokens=case.completion,
        completions=case.completions,
        dtype_bytes=DTYPES[case.dtype].itemsize,
    ).student.naive_kept_bytes
    return gradients + logits + kept


def overview(report: PassReport) -> Table:
    """Shows all cases at a glance, a line for each row that was timed."""
    table = Table(
        "One optimizer step's update, sampling left out",
        ("case", "trainer", "seconds", "times faster", "peak MiB", "of TRL's", "of the matmuls"),
        text_columns=2,
    )
    for case, rows in report.by_case().items():
        base, least = step.reference(rows), limit(rows)
        for row in rows:
            if row.reason:
                table.notes.append(f"{case.work}, {row.contender}: {row.reason}")
                continue
            table.add(
                f"{case.work}, {case.objective}",
                row.contender,
                milliseconds(row) if row.median < 1 else f"{row.median:.2f}",
                ratio(speedup(row, base), "×"),
                mebibytes(row.live_bytes),
                ratio(memory_share(row, base)),
                ratio(row.median / least.median if least else math.nan, "×"),
                ours=row.ours,
            )
    return table


def describe_models(report: PassReport) -> list[str]:
    """Says what was trained, and on which sizes."""
    sizes, vocabularies = described(models_of(report), until=", vocabulary")
    prompts = ", ".join(dict.fromkeys(f"P={case.prompt}" for case in report.by_case()))
    return [f"{sizes}, vocabulary {vocabularies}, {prompts}; random weights, sdpa attention, AdamW."]


SUITE = PassSuite(
    name="trainer",
    title="Benchmark of whole trainers",
    seconds=20.0,
    case=Case,
    case_fields=FIELDS,
    row_fields=step.SUITE.row_fields,
    named=named,
    cases=planned_cases,
    contenders=contenders,
    setup=make_setup,
    # A teacher that is another model shares nothing with the student.
    limits=lambda setup: of_passes.limits(setup, teacher_shares=has_context(setup.case.work)),
    judge=step.judge,
    # Weights, gradients, two teachers' copies and AdamW's moments.
    resident_bytes=lambda case: model_bytes(config_of(case.model), case.dtype, gradients=True, copies=2, moments=True),
    needed_bytes=lambda setup, contender: 0.0 if contender.ours else trainer_bytes(setup.case, setup.model.config),
    about=describe_models,
    overviews=lambda report: [overview(report)],
    draw=lambda report, path: step.draw(
        report, path, title="An optimizer step's update", head=lambda case: named(case).replace(", ", "\n")
    ),
    reference=step.reference,
    columns=step.COLUMNS,
    notes=step.best,
)
