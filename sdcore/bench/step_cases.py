"""What the suite `step` measures: the update phase of a step of SDPO, TRL's and ours, from token ids to gradients.

No sampling and no optimizer: student's and teacher's passes, the Jensen-Shannon divergence (alpha 0.5) on the tokens of
G completions of one prompt, all lengths equal so that nobody pads, and the gradients of all parameters. What TRL does
is its own code, `SDPOTrainer.compute_loss` on a prepared batch, followed by backward, as in its `training_step`.

Every contender starts from the same weights, and an average of them that was never updated is equal to them, so all
of a case must agree whatever their teacher. TRL's teacher is the copy that its "ema" has; that it computes a prompt
anew for every completion does not depend on whose weights they are. On the student's own fresh samples, as here, TRL
applies no importance weights, so ours have none either.

Not covered: padding, which costs TRL and not us; TRL with a vLLM server as its teacher.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import world
from ..prefix import Plan, plan
from ..presets.methods import SDPO
from ..step import distill_step
from ..teachers import EMA, Live
from .models import size_of, with_layers
from .options import Options, workload
from .passes import Outcome, Step, gradients_of
from .peers import require
from .prefix_cases import TAIL, random_model
from .shapes import DTYPES

ALPHA, TOPK, TINY_TOPK = 0.5, 100, 10
ONE, EACH = "one context", "a context per completion"
CPU_MODEL, CUDA_MODELS = "h512", ("h1024, heads of 64", "h2048, heads of 128")


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """One table: P prompt, C context, R completion tokens, G completions."""

    model: str = CPU_MODEL  # as `size_of` takes it
    prompt: int = 1024
    context: int = 256
    completion: int = 128
    completions: int = 8
    topk: int | None = TOPK  # None: the full vocabulary
    contexts: str = EACH  # ONE: all completions are shown the same, as where there is one successful attempt
    dtype: str = "fp32"  # a key of DTYPES

    @property
    def objective(self) -> str:
        return "full vocabulary" if self.topk is None else f"top {self.topk} and tail"

    def __str__(self) -> str:
        sizes = f"P={self.prompt} C={self.context} R={self.completion} G={self.completions}"
        return f"{self.objective}, {self.contexts}, {sizes} {self.dtype}, {self.model}"


def cases(device: str, *, quick: bool = False) -> list[StepCase]:
    """Both objectives with a context for each completion, which is the harder for us; and one context for all."""
    if quick:
        tiny = StepCase(model="quick", prompt=48, context=12, completion=8, completions=3, topk=TINY_TOPK)
        return [tiny, replace(tiny, topk=None), replace(tiny, contexts=ONE)]
    models, dtype = ((CPU_MODEL,), "fp32") if device == "cpu" else (CUDA_MODELS, "bf16")
    found = []
    for model in models:
        case = StepCase(model=model, dtype=dtype)
        found += [case, replace(case, topk=None), replace(case, contexts=ONE)]
    return found


def chosen_cases(options: Options, device: str) -> list[StepCase]:
    """Of a model and of shapes, with both objectives; on a CPU in float32 unless asked otherwise."""
    found = []
    for sizes in options.sizes:
        load = workload(sizes, device)
        case = StepCase(
            model=with_layers(options.model or CPU_MODEL, sizes.get("L")),
            prompt=load.prompt,
            context=load.context,
            completion=load.completion,
            completions=load.completions,
            dtype=options.dtype or ("fp32" if device == "cpu" else "bf16"),
        )
        found += [case, replace(case, topk=None)]
    return found


@dataclass(eq=False)
class StepSetup:
    """What the contenders of a case have in common."""

    case: StepCase
    model: Any  # the student
    prompt: Tensor  # (P,)
    completions: list[Tensor]  # G of (R,)
    teacher_prompts: list[Tensor]  # G of (P + C,)

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    def plan(self) -> Plan:
        # Where all are the same there is one trunk.
        alike = self.case.contexts == ONE
        teacher: list[Any] = [self.teacher_prompts[0] if alike else self.teacher_prompts]
        return plan([self.prompt], [self.completions], teacher)

    def batch(self) -> dict[str, Tensor]:
        """What TRL's `_prepare_inputs` gives, of one generation step."""
        completion_ids = torch.stack(self.completions)  # (G, R)
        prompt_ids = self.prompt.expand(len(self.completions), -1)
        teacher_ids = torch.cat([torch.stack(self.teacher_prompts), completion_ids], dim=1)
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": completion_ids,
            "completion_mask": torch.ones_like(completion_ids),
            "teacher_input_ids": teacher_ids,
            "teacher_attention_mask": torch.ones_like(teacher_ids),
            "self_distillation_mask": torch.ones(len(self.completions), device=self.device),
        }


def config_of(model: str) -> Any:
    """transformers' configuration of a whole step's model."""
    size = size_of(model)
    return size.config(
        vocab=size.step_vocab,
        initializer_range=size.hidden**-0.5,
        # Ids that the model may not lack: TRL sets those of padding and of the end.
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )


def make_setup(case: StepCase, device: str = "cpu", seed: int = 0) -> StepSetup:
    """Seeded. The weights' standard deviation makes that of the logits 1: the divergence of flatter distributions is so
    small that TRL's sum of signed terms in float32 has few digits of it."""
    config = config_of(case.model)
    model = random_model(config, DTYPES[case.dtype], device, seed)
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=generator).to(device)

    prompt = ids(case.prompt)
    completions = [ids(case.completion) for _ in range(case.completions)]
    contexts = [ids(case.context) for _ in range(1 if case.contexts == ONE else case.completions)]
    teacher_prompts = [torch.cat([prompt[:-TAIL], context, prompt[-TAIL:]]) for context in contexts]
    if case.contexts == ONE:
        teacher_prompts *= case.completions
    return StepSetup(case, model, prompt, completions, teacher_prompts)


@dataclass(frozen=True)
class StepContender:
    """`build(setup)` returns what is timed."""

    name: str
    build: Callable[[StepSetup], Step]
    ours: bool = True


def contenders(case: StepCase) -> list[StepContender]:
    """TRL's batch first: it is what the others are compared with."""
    return [
        StepContender("TRL", _trl(case.completions), ours=False),
        StepContender("TRL, checkpointing", _trl(case.completions, checkpointing=True), ours=False),
        StepContender("TRL, 1 at a time", _trl(1), ours=False),
        StepContender("TRL, 1, checkpointing", _trl(1, checkpointing=True), ours=False),
        StepContender("packed, live", _ours("packed", None, live=True)),
        StepContender("packed, EMA", _ours("packed", None, live=False)),
        StepContender("two_phase 2, live", _ours("two_phase", 2, live=True)),
        StepContender("two_phase 2, EMA", _ours("two_phase", 2, live=False)),
        StepContender("two_phase 1, live", _ours("two_phase", 1, live=True)),
        StepContender("two_phase 1, EMA", _ours("two_phase", 1, live=False)),
        StepContender("packed, live, checkpointing", _ours("packed", None, live=True, checkpointing=True)),
        StepContender("two_phase 1, EMA, checkpointing", _ours("two_phase", 1, live=False, checkpointing=True)),
    ]


def _ours(
    strategy: Any, micro_batch: int | None, *, live: bool, checkpointing: bool = False
) -> Callable[[StepSetup], Step]:
    def build(setup: StepSetup) -> Step:
        method = SDPO(alpha=ALPHA, topk=setup.case.topk, importance_clip=None)
        loss, planned = method.build_loss(), setup.plan()
        teacher = Live() if live else EMA(setup.model, method.update_rate)

        def step() -> Outcome:
            setup.model.zero_grad()
            with training(setup.model, checkpointing=checkpointing):
                out = distill_step(
                    setup.model, planned, loss=loss, teacher=teacher, strategy=strategy, micro_batch=micro_batch
                )
            return Outcome(out.loss, gradients_of(setup.model))

        return step

    return build


def _trl(micro_batch: int, *, checkpointing: bool = False) -> Callable[[StepSetup], Step]:
    """TRL's `compute_loss` and a backward, on so many completions at a time, as gradient accumulation does."""

    def build(setup: StepSetup) -> Step:
        trainer = make_trainer(setup)
        whole = setup.batch()
        count = setup.case.completions
        starts = range(0, count, micro_batch)
        parts = [{name: rows[i : i + micro_batch] for name, rows in whole.items()} for i in starts]
        trainer.current_gradient_accumulation_steps = len(parts)

        def step() -> Outcome:
            setup.model.zero_grad()
            total = torch.zeros((), device=setup.device)
            with training(setup.model, checkpointing=checkpointing):
                for part in parts:
                    loss = trainer.compute_loss(setup.model, part)
                    loss.backward()
                    total += loss.detach()
            return Outcome(total, gradients_of(setup.model))

        return step

    return build


@contextmanager
def training(model: Any, *, checkpointing: bool) -> Iterator[None]:
    """The model as a trainer has it, for the time of the block."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            model.activation_checkpointing_disable()
        model.eval()


def make_trainer(setup: StepSetup) -> Any:
    """TRL's trainer of the case's objective around the setup's model. Raises `Unavailable` without TRL."""
    require("trl", "trl")
    from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    case = setup.case
    with tempfile.TemporaryDirectory() as folder:
        config = SDPOConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=setup.device.type == "cpu",
            bf16=False,
            num_generations=case.completions,
            per_device_train_batch_size=case.completions,
            max_completion_length=case.completion,
            distillation_alpha=ALPHA,
            distillation_mode="full_logits" if case.topk is None else "topk_logits",
            distillation_topk=case.topk,
            distillation_add_tail=case.topk is not None,
            # A "live" one here; its copy below. TRL would read it from the disk, by the model's name.
            teacher_model_kind="live",
            activation_checkpointing=False,
        )
        trainer = SDPOTrainer(
            model=setup.model,
            reward_funcs=_no_reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * case.completions}),
            processing_class=small_tokenizer(),
        )
    teacher: nn.Module = copy.deepcopy(setup.model)
    trainer.teacher_model = teacher.requires_grad_(False).eval()
    return trainer


def _no_reward(prompts: list[str], **columns: object) -> list[float]:
    """TRL wants a reward function; nothing is sampled here."""
    return [0.0] * len(prompts)


def small_tokenizer() -> PreTrainedTokenizerBase:
    """The bundled world's: a trainer wants one, and reads nothing with it here."""
    return AutoTokenizer.from_pretrained(Path(world.__file__).parent / "checkpoint")


__all__ = [
    "EACH",
    "ONE",
    "StepCase",
    "StepContender",
    "StepSetup",
    "cases",
    "chosen_cases",
    "config_of",
    "contenders",
    "make_setup",
    "make_trainer",
    "small_tokenizer",
    "training",
]
