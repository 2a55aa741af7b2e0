"""What the suite `prefix` measures: sizes, models, and who computes the same thing in which way.

Every case is one prompt with G completions of equal length, so that no contender pads. The model, a Llama or what was
asked for, has random weights (standard deviation 0.02) and sdpa attention: the time does not depend on the values. A
student's pass goes forward and backward, from a fixed gradient of the completions' states to those of all parameters;
a teacher's pass goes forward; a step is `distill_step` with a live teacher.

Of the teachers' passes, a frozen one computes the prompt itself; for a live one the student's pass has left its states
(untimed here, timed in the step).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache

from ..models import Body, find_body
from ..prefix import Cost, Plan, cost, plan
from ..prefix.runner import STRATEGIES, passes, teacher_rows
from ..prefix.strategies import naive
from ..step import distill_step
from ..teachers import Frozen, Live
from .models import size_of, with_layers
from .options import Options, workload
from .passes import Outcome, Step, gradients_of
from .shapes import DTYPES

# Tokens of a generation prompt, after which a completion begins: the teacher's context is put in before them.
TAIL = 16
STUDENT, TEACHER, TEACHER_EACH, STEP = (
    "student: forward and backward",
    "teacher: one context",
    "teacher: a context per completion",
    "whole step",
)
WORKS = (STUDENT, TEACHER, TEACHER_EACH, STEP)


CPU_MODELS, GRID_CPU_MODELS = ("h512",), ("h512, 2 layers",)
CUDA_MODELS = ("h1024, heads of 64", "h2048, heads of 128")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One table: P prompt, C context, R completion tokens, G completions."""

    model: str  # as `size_of` takes it
    prompt: int
    completion: int
    completions: int
    context: int = 256
    dtype: str = "fp32"  # a key of DTYPES
    work: str = STUDENT  # one of WORKS

    @property
    def sizes(self) -> str:
        text = f"P={self.prompt} R={self.completion} G={self.completions}"
        return text if self.work == STUDENT else f"{text} C={self.context}"

    def __str__(self) -> str:
        return f"{self.sizes} {self.dtype}, {self.model}"


def cases(device: str, *, quick: bool = False, everything: bool = False) -> list[Case]:
    """The cases of a run. By default what a CPU does in ten minutes: the longest ones in the least number of ways."""
    if quick:
        many = Case(model="quick", prompt=48, completion=8, completions=3, context=12)
        one = replace(many, completions=1)
        return [*_of(many, WORKS), *_of(one, (STUDENT,)), replace(many, dtype="bf16")]
    on_cpu = device == "cpu"
    models, dtypes = (CPU_MODELS, ("fp32",)) if on_cpu else (CUDA_MODELS, ("bf16",))
    if everything:
        # All layers do the same, so that two of them say on a CPU what eight would, in a quarter of the time.
        models = GRID_CPU_MODELS if on_cpu else models
        grid = itertools.product((512, 2048, 8192), (64, 128, 512), (1, 4, 8), models, dtypes)
        sized = [
            Case(model=model, dtype=dtype, prompt=prompt, completion=completion, completions=completions)
            for prompt, completion, completions, model, dtype in grid
        ]
        found = [case for one in sized for case in _of(one, (STUDENT, TEACHER, TEACHER_EACH) if on_cpu else WORKS)]
        bf16 = [replace(case, dtype="bf16") for case in found if case.completions == 8 and case.work == STUDENT]
        return found + bf16 if on_cpu else found
    found = []
    for model in models:
        short = Case(model=model, dtype=dtypes[0], prompt=512, completion=128, completions=8)
        long = replace(short, prompt=2048, completion=64)
        found += [*_of(short, WORKS), *_of(long, (STUDENT, TEACHER) if on_cpu else WORKS)]
        found.append(replace(short, completions=1))
    return found


def chosen_cases(options: Options, device: str) -> list[Case]:
    """Of a model and of shapes; on a CPU in float32 unless asked otherwise."""
    found = []
    for sizes in options.sizes:
        load = workload(sizes, device)
        case = Case(
            model=with_layers(options.model or CPU_MODELS[0], sizes.get("L")),
            prompt=load.prompt,
            context=load.context,
            completion=load.completion,
            completions=load.completions,
            dtype=options.dtype or ("fp32" if device == "cpu" else "bf16"),
        )
        found += _of(case, WORKS)
    return found


def _of(case: Case, works: Iterable[str]) -> list[Case]:
    # With one completion there is one context, whichever way it is counted.
    return [replace(case, work=work) for work in works if case.completions > 1 or work != TEACHER_EACH]


@dataclass(eq=False)
class Setup:
    """What the contenders of a case have in common."""

    case: Case
    model: nn.Module
    plan: Plan
    direction: Tensor  # (N, H) the gradient of the completions' states
    body: Body = field(init=False)

    def __post_init__(self) -> None:
        self.body = find_body(self.model)

    @property
    def device(self) -> torch.device:
        return self.direction.device

    def cost(self, contender: Contender) -> Cost:
        return cost(
            self.plan,
            self.body.config,
            strategy=contender.strategy,
            teacher_shares=contender.live,
            micro_batch=contender.micro_batch,
            dtype_bytes=DTYPES[self.case.dtype].itemsize,
        )

    def allowed_speedup(self, contender: Contender) -> float:
        """Over naive, by the FLOPs that are left."""
        if not contender.shares:
            return 1.0
        counted = self.cost(contender)
        if self.case.work == STUDENT:
            return counted.student.speedup
        if self.case.work == STEP or counted.teacher is None:
            return counted.step_speedup
        return counted.teacher.speedup


def config_of(case: Case) -> Any:
    """transformers' configuration of the case's model; only a whole step has its real vocabulary."""
    size = size_of(case.model)
    return size.config(vocab=size.step_vocab if case.work == STEP else size.vocab)


def random_model(config: Any, dtype: torch.dtype, device: str, seed: int) -> Any:
    """A seeded model of transformers' configuration, with sdpa attention."""
    # Made where it is used: a CPU takes half a minute to fill billions of weights.
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device=device, dtype=dtype)


def make_setup(case: Case, device: str = "cpu", seed: int = 0) -> Setup:
    """Seeded."""
    dtype = DTYPES[case.dtype]
    config = config_of(case)
    model = random_model(config, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (length,), generator=generator).to(device)

    prompt = ids(case.prompt)
    completions = [ids(case.completion) for _ in range(case.completions)]
    teachers: list[Any] | None = None
    if case.work != STUDENT:
        number = case.completions if case.work == TEACHER_EACH else 1
        texts = [torch.cat([prompt[:-TAIL], ids(case.context), prompt[-TAIL:]]) for _ in range(number)]
        teachers = [texts if case.work == TEACHER_EACH else texts[0]]
    planned = plan([prompt], [completions], teachers)
    direction = torch.randn(planned.num_rows, config.hidden_size, generator=generator).to(device=device, dtype=dtype)
    return Setup(case, model, planned, direction)


@dataclass(frozen=True)
class Contender:
    """`build(setup)` returns what is timed. The other fields are for the cost model."""

    name: str
    build: Callable[[Setup], Step]
    strategy: str = "packed"
    micro_batch: int | None = None
    shares: bool = True  # the prompt is computed once
    live: bool = True  # the teacher reads the student's prompt states


def contenders(case: Case) -> list[Contender]:
    """Naive first: it is what the others are compared with."""
    if case.work == STUDENT:
        alone = case.completions == 1
        return [
            Contender("naive batch", _student("naive"), "naive", shares=False),
            Contender("naive loop", _naive_loop, "two_phase", 1, shares=False),
            Contender("PrefixGrouper-style", _expanded, "cached"),
            Contender("cached", _student("cached"), "cached"),
            Contender("packed", _student("packed")),
            Contender("two_phase, 1", _student("two_phase", 1), "two_phase", 1),
            *([] if alone else [Contender("two_phase, 2", _student("two_phase", 2), "two_phase", 2)]),
            *([Contender("auto", _student("auto"))] if alone else []),
        ]
    if case.work == STEP:
        return [
            Contender("naive batch", _step("naive"), "naive", shares=False),
            Contender("cached", _step("cached"), "cached"),
            Contender("packed", _step("packed")),
            Contender("two_phase, 2", _step("two_phase", 2), "two_phase", 2),
        ]
    return [
        Contender("naive batch", _teacher("naive", live=False), "naive", shares=False, live=False),
        Contender("cached, frozen", _teacher("cached", live=False), "cached", live=False),
        Contender("packed, frozen", _teacher("packed", live=False), live=False),
        Contender("cached, live", _teacher("cached", live=True), "cached"),
        Contender("packed, live", _teacher("packed", live=True)),
    ]


def _student(strategy: Any, micro_batch: int | None = None) -> Callable[[Setup], Step]:
    def build(setup: Setup) -> Step:
        def step() -> Outcome:
            setup.model.zero_grad()
            hidden = torch.empty_like(setup.direction)
            parts, _ = passes(setup.model, setup.plan, strategy=strategy, micro_batch=micro_batch)
            for part in parts:
                hidden[part.rows] = part.student_hidden.detach()
                part.attach((part.student_hidden * setup.direction[part.rows]).sum()).backward()
            return Outcome(hidden, gradients_of(setup.model))

        return step

    return build


def _naive_loop(setup: Setup) -> Step:
    """A sequence at a time, each with a backward of its own: gradient accumulation with a batch of 1."""
    tree = setup.plan.student[0]

    def step() -> Outcome:
        setup.model.zero_grad()
        hidden = torch.empty_like(setup.direction)
        for i, rows in enumerate(setup.plan.rows[0]):
            states = naive.run_whole(setup.body, [tree.sequence(i)])[0, -tree.rows[i] :]
            hidden[rows] = states.detach()
            (states * setup.direction[rows]).sum().backward()
        return Outcome(hidden, gradients_of(setup.model))

    return step


def _expanded(setup: Setup) -> Step:
    """The prompt once, then its keys and values repeated for every completion, in a padded batch with a mask.

    What PrefixGrouper (arXiv:2506.05433) and trainers with a repeated cache do, here with transformers' own cache: one
    prompt a call, in the graph. The published code has an attention function of its own.
    """
    tree = setup.plan.student[0]
    count, length = len(tree.branches), len(tree.trunk)

    def step() -> Outcome:
        setup.model.zero_grad()
        cache = DynamicCache(config=setup.body.config)
        prompt = setup.body.base(input_ids=tree.trunk[None], past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(count)
        tokens = pad_sequence(list(tree.branches), batch_first=True)  # (G, L)
        mask = torch.ones(count, length + tokens.shape[1], dtype=torch.int64, device=tokens.device)
        for i, branch in enumerate(tree.branches):
            mask[i, length + len(branch) :] = 0
        states = setup.body.base(
            input_ids=tokens, past_key_values=cache, attention_mask=mask, use_cache=True
        ).last_hidden_state
        last = prompt.last_hidden_state[0, -1:]
        hidden = torch.cat([torch.cat([last, states[i, : len(b)]]) for i, b in enumerate(tree.branches)])
        (hidden * setup.direction).sum().backward()
        return Outcome(hidden.detach(), gradients_of(setup.model))

    return step


def _teacher(strategy: str, *, live: bool) -> Callable[[Setup], Step]:
    def build(setup: Setup) -> Step:
        prompts = None
        if live:
            with torch.no_grad():
                record = [tree.shared for tree in setup.plan.teacher]
                _, prompts = STRATEGIES[strategy].hidden_states(setup.body, setup.plan.student, record=record)
        teacher = Live() if live else Frozen(copy.deepcopy(setup.model))

        def step() -> Outcome:
            return Outcome(teacher_rows(setup.body, teacher, setup.plan.teacher, strategy, prompts).hidden, {})

        return step

    return build


def _step(strategy: Any, micro_batch: int | None = None) -> Callable[[Setup], Step]:
    def build(setup: Setup) -> Step:
        def step() -> Outcome:
            setup.model.zero_grad()
            out = distill_step(setup.model, setup.plan, strategy=strategy, micro_batch=micro_batch)
            return Outcome(out.loss, gradients_of(setup.model))

        return step

    return build


__all__ = [
    "STEP",
    "STUDENT",
    "TEACHER",
    "TEACHER_EACH",
    "WORKS",
    "Case",
    "Contender",
    "Setup",
    "cases",
    "chosen_cases",
    "config_of",
    "contenders",
    "make_setup",
]
