"""Every strategy gives the states and gradients of one unpadded forward per sequence, on every model, in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, PreTrainedModel

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.models import Body, find_body
from sdcore.prefix.choice import STRATEGIES as MODULES
from sdcore.prefix.planner import plan
from sdcore.prefix.strategies import two_phase
from sdcore.prefix.strategies.two_phase import BackwardError, micro_batches
from sdcore.prefix.tree import Tree
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.prefix.models import (
    COMMON,
    CONFIGS,
    HEADS,
    HYBRIDS,
    SLIDING,
    VOCAB,
    assert_same_gradients,
    build,
    checkpointed,
    double_precision,
    gradients,
    plain_rows,
    tiny,
)
from tests.sdcore.prefix.trees import random_plan

# A strategy is a module with a function `hidden_states`; those of SHARING read a teacher's prompt from
# the student's.
SHARING = ["packed", "cached", "two_phase"]
STRATEGIES = ["naive", *SHARING]
# Models that a strategy refuses.
REFUSED: dict[str, frozenset[str]] = {"packed": HYBRIDS}
MICRO_BATCH = 2
SEED = 3


def cases(strategies: Sequence[str], names: Iterable[str] = CONFIGS) -> list[Any]:
    return [
        pytest.param(strategy, name, id=f"{strategy}-{name}")
        for strategy in strategies
        for name in names
        if name not in REFUSED.get(strategy, ())
    ]


def weights_of(count: int, width: int) -> Tensor:
    """A loss is the sum of these times the states: its gradient tells every state from every other."""
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def student_pass(strategy: str, body: Body, trees: Sequence[Tree]) -> Tensor:
    """(N, H) of a pass whose backward has been run."""
    count = sum(tree.num_rows for tree in trees)
    weights = weights_of(count, body.hidden_size)
    if strategy == "two_phase":
        hidden = torch.full_like(weights, torch.nan)
        for part in micro_batches(body, trees, micro_batch=MICRO_BATCH):
            hidden[part.rows] = part.hidden.detach()
            part.attach((part.hidden * weights[part.rows]).sum()).backward()
        return hidden
    module = MODULES[strategy]
    hidden, prompts = module.hidden_states(body, trees)
    assert prompts is None
    (hidden * weights).sum().backward()
    return hidden.detach()


def live_teacher(strategy: str, body: Body, student: Sequence[Tree], teacher: Sequence[Tree]) -> Tensor:
    """(N, H) of a teacher that starts from the student's states."""
    module = MODULES[strategy]
    record: Any = True if strategy == "packed" else [tree.reads for tree in teacher]
    _, prompts = module.hidden_states(body, student, record=record)
    return module.hidden_states(body, teacher, prompts=prompts)[0]


@cache
def reference(name: str, attention: str | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    body, trees = find_body(tiny(name, attn_implementation=attention)), random_plan(SEED).student
    with double_precision():
        hidden = plain_rows(body.causal_lm, trees)[0]
        (hidden * weights_of(*hidden.shape)).sum().backward()
    return hidden.detach(), gradients(body.causal_lm)


@cache
def teacher_reference(name: str, teacher: str, seed: int) -> Tensor:
    with double_precision(), torch.no_grad():
        return plain_rows(tiny(name, seed=seed), random_plan(SEED, teacher=teacher).teacher)[0]


def assert_same_states(hidden: Tensor, expected: Tensor) -> None:
    assert hidden.shape == expected.shape
    assert float((hidden - expected).abs().max()) < 1e-10


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("strategy", "name"), cases(STRATEGIES, [*CONFIGS, *HEADS]))
def test_a_students_states_and_gradients_are_those_of_single_sequences(
    strategy: str, name: str, checkpointing: bool
) -> None:
    hidden, grads = reference(name)
    model = checkpointed(tiny(name)) if checkpointing else tiny(name)
    with double_precision():
        assert_same_states(student_pass(strategy, find_body(model), random_plan(SEED).student), hidden)
    assert_same_gradients(gradients(model), grads)


def adapted(kind: str) -> PreTrainedModel:
    """A tiny model with LoRA or DoRA adapters that do something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", use_dora=kind == "dora", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(tiny("llama"), config).double().train()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("strategy", SHARING)
def test_adapters_get_the_gradients_that_naive_gives_them(strategy: str, kind: str, checkpointing: bool) -> None:
    trees = random_plan(SEED).student
    expected = adapted(kind)
    model = checkpointed(adapted(kind)) if checkpointing else adapted(kind)
    with double_precision():
        hidden = student_pass("naive", find_body(expected), trees)
        assert_same_states(student_pass(strategy, find_body(model), trees), hidden)
    assert all("lora" in name for name in gradients(expected))
    assert_same_gradients(gradients(model), gradients(expected))
    with model.disable_adapter(), expected.disable_adapter(), double_precision(), torch.no_grad():
        assert_same_states(student_states(strategy, find_body(model), trees), reference("llama")[0])


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "packed"])  # is its own
@pytest.mark.parametrize("name", ["llama", *sorted(SLIDING)])
def test_eager_attention_gives_the_same(strategy: str, name: str) -> None:
    hidden, grads = reference(name, "eager")
    model = tiny(name, attn_implementation="eager")
    with double_precision():
        assert_same_states(student_pass(strategy, find_body(model), random_plan(SEED).student), hidden)
    assert_same_gradients(gradients(model), grads)


@pytest.mark.parametrize("teacher", ["one", "each"])
@pytest.mark.parametrize(("strategy", "name"), cases(STRATEGIES))
def test_a_teacher_with_other_weights_computes_its_own_prompt(strategy: str, name: str, teacher: str) -> None:
    module = MODULES[strategy]
    body = find_body(tiny(name, seed=1))
    with double_precision(), torch.no_grad():
        hidden, _ = module.hidden_states(body, random_plan(SEED, teacher=teacher).teacher)
    assert_same_states(hidden, teacher_reference(name, teacher, 1))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("teacher", ["one", "each"])
@pytest.mark.parametrize(("strategy", "name"), cases(SHARING))
def test_a_live_teacher_goes_on_from_the_students_prompt(
    strategy: str, name: str, teacher: str, checkpointing: bool
) -> None:
    passes = random_plan(SEED, teacher=teacher)
    body = find_body(checkpointed(tiny(name)) if checkpointing else tiny(name))
    with double_precision(), torch.no_grad():
        hidden = live_teacher(strategy, body, passes.student, passes.teacher)
    assert_same_states(hidden, teacher_reference(name, teacher, 0))


@pytest.mark.parametrize(("strategy", "name"), cases(SHARING))
def test_each_token_is_computed_once(strategy: str, name: str) -> None:
    """Counted at the embedding. Of the teacher what comes after the 10 shared tokens: the context and the tail."""
    prompt = torch.arange(12)
    passes = plan(
        [prompt], [[[1, 2, 3, 4], [5, 6, 7, 8]]], [torch.cat([prompt[:10], torch.arange(20, 27), prompt[10:]])]
    )
    assert passes.teacher[0].shared == 10
    body = find_body(tiny(name))
    seen: list[int] = []
    body.base.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    with torch.no_grad():
        live_teacher(strategy, body, passes.student, passes.teacher)
    assert sum(seen) == (12 + 2 * 3) + (7 + 2 + 2 * 3)


@pytest.mark.parametrize(("strategy", "name"), cases(SHARING))
def test_recording_for_a_teacher_changes_no_gradient(strategy: str, name: str) -> None:
    hidden, grads = reference(name)
    passes = random_plan(SEED)
    model = tiny(name)
    body = find_body(model)
    record: Any = True if strategy == "packed" else [tree.reads for tree in passes.teacher]
    with double_precision():
        if strategy == "two_phase":
            teacher = torch.full_like(hidden, torch.nan)
            for part in micro_batches(body, passes.student, micro_batch=MICRO_BATCH, record=record):
                with torch.no_grad():
                    states, _ = two_phase.hidden_states(body, [passes.teacher[part.group]], prompts=part.prompts)
                first = sum(tree.num_rows for tree in passes.teacher[: part.group])
                teacher[first : first + len(states)] = states
                weights = weights_of(*hidden.shape)[part.rows]
                part.attach((part.hidden * weights).sum()).backward()
        else:
            module = MODULES[strategy]
            states, prompts = module.hidden_states(body, passes.student, record=record)
            with torch.no_grad():
                teacher, _ = module.hidden_states(body, passes.teacher, prompts=prompts)
            (states * weights_of(*hidden.shape)).sum().backward()
    assert not teacher.requires_grad
    assert_same_states(teacher, teacher_reference(name, "one", 0))
    assert_same_gradients(gradients(model), grads)


@pytest.mark.parametrize("shared", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("name", sorted(HYBRIDS))
def test_recurrent_states_are_read_wherever_the_teacher_leaves_the_students_prompt(name: str, shared: int) -> None:
    draw = torch.Generator().manual_seed(shared)
    prompt, context = (torch.randint(VOCAB, (length,), generator=draw) for length in (12, 4))
    context[0] = (prompt[shared] + 1) % VOCAB
    passes = plan([prompt], [[[1, 2, 3], [4]]], [torch.cat([prompt[:shared], context, prompt[shared:]])])
    assert passes.teacher[0].shared == shared
    body = find_body(tiny(name))
    with double_precision(), torch.no_grad():
        hidden = live_teacher("cached", body, passes.student, passes.teacher)
        assert_same_states(hidden, plain_rows(body.causal_lm, passes.teacher)[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_rows_gradients_are_zero_and_not_missing(strategy: str) -> None:
    """A rank without completions must take part in what the others do with their gradients."""
    model = tiny("llama")
    trees = plan([[1, 2, 3]], [[[], []]]).student
    assert student_pass(strategy, find_body(model), trees).shape == (0, 32)
    grads = gradients(model.base_model)
    assert grads.keys() == dict(model.base_model.named_parameters()).keys()
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pass_without_gradient_leaves_no_trace(strategy: str) -> None:
    model = checkpointed(tiny("gemma3"))
    before = {name: vars(module).keys() for name, module in model.named_modules()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        MODULES[strategy].hidden_states(find_body(model), random_plan(0).student)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert gradients(model) == {}


@pytest.mark.parametrize("strategy", SHARING)
def test_reentrant_checkpointing_is_refused(strategy: str) -> None:
    with pytest.raises(UnsupportedModelError, match="use_reentrant=True"):
        student_pass(strategy, find_body(checkpointed(tiny("llama"), reentrant=True)), random_plan(0).student)


def test_naive_is_right_under_reentrant_checkpointing() -> None:
    hidden, grads = reference("llama")
    model = checkpointed(tiny("llama"), reentrant=True)
    with double_precision():
        assert_same_states(student_pass("naive", find_body(model), random_plan(SEED).student), hidden)
    assert_same_gradients(gradients(model), grads)


def long_rope() -> PreTrainedModel:
    """Phi-3 whose rotary factors are others in sequences of more than 16 tokens."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    return build(Phi3Config(**COMMON | {"original_max_position_embeddings": 16, "rope_parameters": rope}))


def test_naive_never_batches_sequences_on_both_sides_of_a_rotary_switch() -> None:
    body = find_body(long_rope())
    trees = plan([list(range(14))], [[list(range(length)) for length in (2, 3, 4, 5)]]).student
    with double_precision(), torch.no_grad():
        assert_same_states(student_states("naive", body, trees), plain_rows(body.causal_lm, trees)[0])


@pytest.mark.parametrize("strategy", ["cached", "two_phase"])
def test_a_prefix_is_not_shared_across_a_rotary_switch(strategy: str) -> None:
    body = find_body(long_rope())
    short, long = (plan([list(range(length))], [[[1, 2, 3], [4]]]).student for length in (14, 17))
    with double_precision(), torch.no_grad():
        for trees in (short, long):
            assert_same_states(student_states(strategy, body, trees), plain_rows(body.causal_lm, trees)[0])
        with pytest.raises(UnsupportedModelError, match="LongRoPE"):
            student_states(strategy, body, plan([list(range(15))], [[[1, 2, 3], [4]]]).student)
        # The student's prompt is on one side, the teacher's on the other: nothing is read, all of it computed.
        passes = plan([list(range(12))], [[[1, 2, 3]]], [list(range(20))])
        assert passes.teacher[0].shared == 12
        hidden = live_teacher(strategy, body, passes.student, passes.teacher)
        assert_same_states(hidden, plain_rows(body.causal_lm, passes.teacher)[0])


def student_states(strategy: str, body: Body, trees: Sequence[Tree]) -> Tensor:
    return MODULES[strategy].hidden_states(body, trees)[0]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8])
def test_micro_batches_cover_each_row_once_and_are_no_larger_than_asked(micro_batch: int) -> None:
    trees = random_plan(SEED).student
    body = find_body(tiny("llama"))
    rows = []
    for part in micro_batches(body, trees, micro_batch=micro_batch):
        first = sum(tree.num_rows for tree in trees[: part.group])
        assert first <= int(part.rows.min())
        assert int(part.rows.max()) < first + trees[part.group].num_rows
        # Completions of one token are read off the trunk, so they are free.
        counts = trees[part.group].counts
        longer = [rows for rows in counts if rows > 1]
        assert len(part.rows) <= sum(sorted(longer)[-micro_batch:]) + counts.count(1)
        rows.append(part.rows)
        part.attach(part.hidden.sum()).backward()
    assert sorted(torch.cat(rows).tolist()) == list(range(sum(tree.num_rows for tree in trees)))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_a_loss_scale_reaches_every_gradient_once(name: str) -> None:
    """accelerate multiplies a loss inside its backward, with what the caller never sees."""
    _, grads = reference(name)
    model = tiny(name)
    body, trees = find_body(model), random_plan(SEED).student
    with double_precision():
        for part in micro_batches(body, trees, micro_batch=1):
            weights = weights_of(sum(tree.num_rows for tree in trees), body.hidden_size)[part.rows]
            (part.attach((part.hidden * weights).sum()) * 1024.0).backward()
    assert_same_gradients(gradients(model), {name: grad * 1024.0 for name, grad in grads.items()})


def test_taking_a_part_before_the_last_ones_backward_is_an_error() -> None:
    parts = micro_batches(find_body(tiny("llama")), random_plan(SEED).student, micro_batch=2)
    part = next(parts)
    part.hidden.sum().backward()  # not through attach: the trunk would miss it at the end
    with pytest.raises(BackwardError, match="attach"):
        next(parts)


def test_a_micro_batch_of_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match="micro_batch must be at least 1, got 0"):
        next(micro_batches(find_body(tiny("llama")), random_plan(SEED).student, micro_batch=0))


def test_a_loss_per_row_is_refused() -> None:
    part = next(micro_batches(find_body(tiny("llama")), random_plan(SEED).student, micro_batch=2))
    with pytest.raises(ArgumentError, match="scalar"):
        part.attach(part.hidden.sum(1))


def test_two_phase_keeps_one_micro_batch_alive() -> None:
    """Sixteen completions take hardly more memory than two, where one backward for all takes much more."""

    def peak(completions: int, micro_batch: int) -> int:
        model = tiny("llama")
        trees = plan([list(range(20))], [[[1] * 40] * completions]).student
        with LiveBytes(uncounted_bytes=[weight.nbytes for weight in model.parameters()]) as probe:
            for part in micro_batches(find_body(model), trees, micro_batch=micro_batch):
                part.attach(part.hidden.sum()).backward()
        return probe.peak_bytes

    small = peak(2, 2)
    assert peak(16, 2) < 1.2 * small
    assert peak(16, 16) > 4 * small
