"""Describes a case of whole passes, and makes what its contenders have in common: a model, tokens, and their plan.

Every case is one prompt with G completions of equal length, so that no contender pads. Models have random weights and
sdpa attention: the time does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..models import Body, find_body
from ..prefix import Plan, cost, plan
from .limit import LIMITS, SHARED, Products
from .models import with_layers
from .options import Options, workload
from .rows import Outcome, Step
from .shapes import DTYPES

# Tokens of a generation prompt, after which a completion begins: the teacher's context is put in before them.
TAIL = 16
ONE, EACH = "one context", "a context per completion"
AnyCase = TypeVar("AnyCase", bound=Any)  # a frozen dataclass with a `dtype`


@dataclass(frozen=True, kw_only=True)
class Case:
    """Is one table: P prompt, C context, R completion tokens, G completions; `work` is what a suite does with them."""

    model: str  # as `size_of` takes it
    prompt: int
    context: int
    completion: int
    completions: int
    dtype: str = "fp32"  # a key of DTYPES
    work: str = ""
    contexts: str = EACH  # ONE: all completions are shown the same, as where there is one successful attempt
    topk: int | None = None  # None: the full vocabulary

    @property
    def sizes(self) -> str:
        return f"P={self.prompt} C={self.context} R={self.completion} G={self.completions}"

    @property
    def objective(self) -> str:
        return "full vocabulary" if self.topk is None else f"top {self.topk} and tail"


def chosen_cases(options: Options, device: str, model: str) -> list[Case]:
    """Returns the cases of a model (by default `model`) and of shapes; on a CPU in float32 unless asked otherwise."""
    dtype = options.dtype or ("fp32" if device == "cpu" else "bf16")
    return [
        Case(model=with_layers(options.model or model, sizes.get("L")), dtype=dtype, **workload(sizes, device))
        for sizes in options.sizes
    ]


def in_dtype(cases: list[AnyCase], dtype: str | None) -> list[AnyCase]:
    """Returns the cases in the dtype that was asked for, each once; None leaves them."""
    return list(dict.fromkeys(replace(case, dtype=dtype or case.dtype) for case in cases))


@dataclass(eq=False)
class Setup:
    """Holds what the contenders of a case have in common."""

    case: Case
    model: Any  # the student
    prompt: Tensor  # (P,)
    completions: list[Tensor]  # G of (R,)
    teacher_prompts: list[Tensor]  # (P + C,): none without a teacher, one for all completions, or one for each
    direction: Tensor  # (N, H) the gradient of the completions' states, where there is no loss
    exact: Outcome | None = None  # the right answer, where it is not the first contender's

    @property
    def device(self) -> torch.device:
        return self.prompt.device

    @cached_property
    def body(self) -> Body:
        return find_body(self.model)

    @cached_property
    def plan(self) -> Plan:
        """Plans the tokens that student and teacher read; a context that all share is one trunk."""
        several = self.teacher_prompts if len(self.teacher_prompts) > 1 else None
        teachers: list[Any] | None = [several] if several else self.teacher_prompts or None
        return plan([self.prompt], [self.completions], teachers)


@dataclass(frozen=True)
class PassContender:
    """Has `build(setup, contender)`, which returns what is timed; the other fields say how, also to the cost model."""

    name: str
    build: Callable[[Any, Any], Step]
    ours: bool = True
    strategy: Any = "packed"
    micro_batch: int | None = None
    shares: bool = True  # the prompt is computed once
    live: bool = True  # the teacher reads the student's prompt states
    checkpointing: bool = False


def random_model(config: Any, dtype: torch.dtype, device: str, seed: int) -> Any:
    """Makes a seeded model of transformers' configuration, with sdpa attention."""
    # Made where it is used: a CPU takes half a minute to fill billions of weights.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device=device, dtype=dtype)


def make_setup(case: Case, config: Any, device: str, *, contexts: int, seed: int = 0) -> Setup:
    """Makes a seeded setup whose teacher has so many prompts."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=generator).to(device)

    model = random_model(config, DTYPES[case.dtype], device, seed)
    prompt = ids(case.prompt)
    completions = [ids(case.completion) for _ in range(case.completions)]
    texts = [torch.cat([prompt[:-TAIL], ids(case.context), prompt[-TAIL:]]) for _ in range(contexts)]
    rows = case.completion * case.completions
    direction = torch.randn(rows, config.hidden_size, generator=generator).to(prompt.device, DTYPES[case.dtype])
    return Setup(case, model, prompt, completions, texts, direction)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the gradients by parameter, of those that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def limits(
    setup: Setup, *, student: bool = True, head: bool = True, teacher_shares: bool = True
) -> list[tuple[str, Products]]:
    """Makes the matrix products of a case alone: tokens shared as far as any contender does, and not at all."""
    counted = cost(setup.plan, setup.body.config, teacher_shares=teacher_shares)
    products = []
    for name in LIMITS:
        students, teachers = (
            0 if side is None else side.tokens if name == SHARED else side.naive_tokens
            for side in (counted.student if student else None, counted.teacher)
        )
        made = Products.of(
            setup.body.config,
            student_tokens=students,
            teacher_tokens=teachers,
            rows=setup.plan.num_rows if head else 0,
            dtype=setup.case.dtype,
            device=setup.device,
        )
        products.append((name, made))
    return products
