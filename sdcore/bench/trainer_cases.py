"""What the suite `trainer` measures: one optimizer step's update by whole trainers, TRL's and the fused ones.

`training_step` of the trainer on a fixed batch, which is sampling left out, then AdamW: forward passes, loss, backward,
update, and whatever a trainer logs. The batch is one prompt with G completions, as the trainer's own `_prepare_inputs`
(GKD: its collator) would give it; all lengths are equal, so that nobody pads. AdamW's learning rate is 0, so that every
run of a case starts from the same weights and must come to the same loss and gradients.

Teachers: of SDPO and SDFT a copy of the student, which is what TRL's "ema" and "base" have (it reads them from the disk
by the model's name, hence is given one here); GKD's and Distillation's is another model of the same sizes.

Not covered: sampling, rewards, data loading, several devices; gradient checkpointing (see the suite `step`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor

from ..prefix import Plan, plan
from .models import with_layers
from .options import Options, workload
from .passes import Outcome, Step, gradients_of
from .peers import require
from .step_cases import ALPHA, EACH, StepCase, StepSetup, make_setup, small_tokenizer

SDPO, SDFT, GKD, DISTILLATION = "SDPO", "SDFT", "GKD", "Distillation"
TRAINERS: Final = (SDPO, SDFT, GKD, DISTILLATION)
CPU_MODEL, CUDA_MODELS = "h512, V=151936", ("h1024, heads of 64", "qwen3-0.6b")
TOPK, TINY_TOPK = 100, 10
# Of another model's weights beside the student's.
TEACHER_NOISE = 0.3
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainerCase:
    """One table: P prompt, C context, R completion tokens, G completions."""

    trainer: str  # one of TRAINERS
    model: str = CPU_MODEL  # as `size_of` takes it
    prompt: int = 1024
    context: int = 256  # none in GKD and Distillation
    completion: int = 64
    completions: int = 8
    topk: int | None = None  # of SDPO and SDFT; None: the full vocabulary
    dtype: str = "fp32"  # a key of DTYPES

    @property
    def objective(self) -> str:
        return "full vocabulary" if self.topk is None else f"top {self.topk} and tail"

    @property
    def has_context(self) -> bool:
        return self.trainer in (SDPO, SDFT)

    def __str__(self) -> str:
        context = f" C={self.context}" if self.has_context else ""
        sizes = f"P={self.prompt}{context} R={self.completion} G={self.completions}"
        return f"{self.trainer}, {self.objective}, {sizes} {self.dtype}, {self.model}"


def cases(device: str, *, quick: bool = False) -> list[TrainerCase]:
    """SDPO with a top-k and the others with the full vocabulary. TRL's GKD makes the logits of prompts too, so that its
    case is smaller."""
    if quick:
        tiny = TrainerCase(trainer=SDPO, model="quick", prompt=48, context=12, completion=8, completions=3)
        return _of(tiny, TINY_TOPK)
    if device == "cpu":
        return _of(TrainerCase(trainer=SDPO), TOPK, gkd={"prompt": 512, "completions": 2})
    found = []
    for model in CUDA_MODELS:
        case = TrainerCase(trainer=SDPO, model=model, completion=512, dtype="bf16")
        found += _of(case, TOPK, gkd={"completion": 256, "completions": 2})
    return found


def chosen_cases(options: Options, device: str) -> list[TrainerCase]:
    """Of a model and of shapes; on a CPU in float32 unless asked otherwise."""
    found = []
    for sizes in options.sizes:
        load = workload(sizes, device)
        case = TrainerCase(
            trainer=SDPO,
            model=with_layers(options.model or CPU_MODEL, sizes.get("L")),
            prompt=load.prompt,
            context=load.context,
            completion=load.completion,
            completions=load.completions,
            dtype=options.dtype or ("fp32" if device == "cpu" else "bf16"),
        )
        found += _of(case, TOPK)
    return found


def _of(case: TrainerCase, topk: int, gkd: Mapping[str, Any] | None = None) -> list[TrainerCase]:
    changes: dict[str, Mapping[str, Any]] = {SDPO: {"topk": topk}, GKD: gkd or {}}
    return [replace(case, trainer=name, **changes.get(name, {})) for name in TRAINERS]


@dataclass(eq=False)
class TrainerSetup:
    """What the contenders of a case have in common: tokens, weights, optimizer."""

    case: TrainerCase
    step: StepSetup
    teacher: Any  # another model; None where it is made of the student
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # Learning rate 0: the whole work of an update, and the weights stay. Its moments are made before any step.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, foreach=self.device.type == "cuda")
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.model.zero_grad()

    @property
    def model(self) -> Any:
        return self.step.model

    @property
    def device(self) -> torch.device:
        return self.step.device

    def plan(self) -> Plan:
        """The tokens that the two models read; another model reads what the student does."""
        if self.case.has_context:
            return self.step.plan()
        return plan([self.step.prompt], [self.step.completions], [self.step.prompt])

    def batch(self) -> dict[str, Tensor]:
        """What the trainer's `_prepare_inputs` gives, of one generation step."""
        whole = self.step.batch()
        if self.case.trainer == SDPO:
            return whole
        if self.case.trainer == SDFT:
            del whole["self_distillation_mask"]
            return whole
        if self.case.trainer == DISTILLATION:
            return {name: whole[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
        input_ids = torch.cat([whole["prompt_ids"], whole["completion_ids"]], dim=1)
        labels = input_ids.clone()
        labels[:, : self.case.prompt] = IGNORED
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def make_trainer_setup(case: TrainerCase, device: str = "cpu", seed: int = 0) -> TrainerSetup:
    """Seeded."""
    step = make_setup(
        StepCase(
            model=case.model,
            prompt=case.prompt,
            context=case.context,
            completion=case.completion,
            completions=case.completions,
            topk=case.topk,
            contexts=EACH,
            dtype=case.dtype,
        ),
        device,
        seed,
    )
    return TrainerSetup(case, step, None if case.has_context else _another(step.model, seed))


def _another(model: Any, seed: int) -> Any:
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in teacher.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.data += TEACHER_NOISE * parameter.std() * noise
    return teacher


@dataclass(frozen=True)
class TrainerContender:
    """`build(setup)` returns what is timed."""

    name: str
    build: Callable[[TrainerSetup], Step]
    ours: bool = True


def contenders(case: TrainerCase) -> list[TrainerContender]:
    """TRL's first: it is what the others are compared with."""
    theirs = TrainerContender(f"TRL {case.trainer}Trainer", _theirs, ours=False)
    name = f"Fused{case.trainer}Trainer"
    if not case.has_context:
        return [theirs, TrainerContender(name, _ours())]
    kind = "ema" if case.trainer == SDPO else "base"
    return [
        theirs,
        TrainerContender(f"{name}, {kind} teacher", _ours(kind)),
        TrainerContender(f"{name}, live teacher", _ours("live")),
        TrainerContender(f"{name}, {kind}, micro_batch=1", _ours(kind, micro_batch=1)),
    ]


def _theirs(setup: TrainerSetup) -> Step:
    require("trl", "trl")
    trainer = make_trainer(setup, _trl_class(setup.case.trainer))
    if setup.case.has_context:
        # It was constructed with a live one.
        trainer.teacher_model = copy.deepcopy(setup.model).requires_grad_(False).eval()
    return _updates(setup, trainer)


def _ours(teacher: str | None = None, *, micro_batch: int | None = None) -> Callable[[TrainerSetup], Step]:
    def build(setup: TrainerSetup) -> Step:
        require("trl", "trl")
        from ..integrations import trl as fused

        # Equality is checked against TRL here; the check of the passes would count as memory.
        options = fused.FusedOptions(verify="off", micro_batch=micro_batch)
        kind = getattr(fused, f"Fused{setup.case.trainer}Trainer")
        return _updates(setup, make_trainer(setup, kind, teacher=teacher or "live", fused=options))

    return build


def _updates(setup: TrainerSetup, trainer: Any) -> Step:
    """One optimizer step's update: TRL's training step on the fixed batch, then AdamW."""
    whole = setup.batch()
    # Instead of sampling.
    trainer._prepare_inputs = lambda inputs: inputs
    trainer.current_gradient_accumulation_steps = 1

    def step() -> Outcome:
        setup.model.zero_grad()
        try:
            loss = trainer.training_step(setup.model, dict(whole), None)
            setup.optimizer.step()
        finally:
            setup.model.eval()
        return Outcome(loss.detach(), gradients_of(setup.model))

    return step


def _trl_class(name: str) -> Any:
    if name == DISTILLATION:
        from trl import DistillationTrainer

        return DistillationTrainer
    return getattr(import_module(f"trl.experimental.{name.lower()}"), f"{name}Trainer")


def make_trainer(setup: TrainerSetup, kind: Any, *, teacher: str = "live", **more: Any) -> Any:
    """A trainer of the class `kind`, TRL's or ours, with the case's objective, around the setup's model."""
    from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]

    case, count = setup.case, setup.case.completions
    columns: dict[str, Any] = {"prompt": ["x"] * count}
    if case.trainer == SDFT:
        columns["privileged_context"] = ["y"] * count
    elif case.trainer == GKD:
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        columns = {"messages": [said] * count}
    if case.trainer == SDPO:
        more["reward_funcs"] = _no_reward
    if not case.has_context:
        more["teacher_model"] = setup.teacher
    with tempfile.TemporaryDirectory() as folder:
        return kind(
            model=setup.model,
            args=_config(setup, teacher, folder),
            train_dataset=Dataset.from_dict(columns),
            processing_class=small_tokenizer(),
            **more,
        )


def _config(setup: TrainerSetup, teacher: str, folder: str) -> Any:
    case = setup.case
    common: dict[str, Any] = {
        "output_dir": folder,
        "report_to": "none",
        "use_cpu": setup.device.type == "cpu",
        "bf16": False,  # the weights have the case's dtype
        "per_device_train_batch_size": case.completions,
        "activation_checkpointing": False,
    }
    if case.has_context:
        common |= {
            "num_generations": case.completions if case.trainer == SDPO else 1,
            "max_completion_length": case.completion,
            "distillation_alpha": ALPHA,
            "distillation_mode": "full_logits" if case.topk is None else "topk_logits",
            "distillation_topk": case.topk,
            "distillation_add_tail": case.topk is not None,
            "teacher_model_kind": teacher,
        }
    if case.trainer == SDFT:
        common["num_loss_tokens_to_skip"] = 0
    elif case.trainer == GKD:
        common |= {"beta": ALPHA, "lmbda": 0.0, "max_new_tokens": case.completion}  # never on policy: nothing sampled
    elif case.trainer == DISTILLATION:
        common |= {"beta": ALPHA, "max_completion_length": case.completion}
    return _trl_config(case.trainer)(**common)


def _trl_config(name: str) -> Any:
    if name == DISTILLATION:
        from trl import DistillationConfig

        return DistillationConfig
    return getattr(import_module(f"trl.experimental.{name.lower()}"), f"{name}Config")


def _no_reward(prompts: list[str], **columns: object) -> list[float]:
    """TRL wants a reward function; nothing is sampled here."""
    return [0.0] * len(prompts)


__all__ = [
    "DISTILLATION",
    "GKD",
    "SDFT",
    "SDPO",
    "TRAINERS",
    "TrainerCase",
    "TrainerContender",
    "TrainerSetup",
    "cases",
    "chosen_cases",
    "contenders",
    "make_trainer",
    "make_trainer_setup",
]
