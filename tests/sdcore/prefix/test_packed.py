"""The packed strategy against each completion as a sequence of its own, on every kind of model that it supports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import GptOssConfig, Lfm2Config, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.models import Body, find_body
from sdcore.prefix.planner import Plan
from sdcore.prefix.strategies import packed
from sdcore.prefix.tree import Tree
from sdkernels.testing import LiveBytes

from .models import CONFIGS, HEADS, HYBRIDS, VOCAB, build, checkpointed, one_by_one, tiny
from .trees import random_plan

pytestmark = pytest.mark.usefixtures("in_double_precision")

SUPPORTED = [name for name in CONFIGS | HEADS if name not in HYBRIDS]


def body_of(name: str, **options: Any) -> Body:
    return find_body(tiny(name, **options))


def gradients(body: Body, hidden: Tensor) -> list[Tensor | None]:
    """Of each of the body's parameters, for one fixed upstream."""
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    parameters = list(body.base.parameters())
    return list(torch.autograd.grad(hidden, parameters, upstream.to(hidden.dtype), allow_unused=True))


def assert_same_gradients(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            # An expert that no token was sent to.
            assert not any(gradient is not None and gradient.any() for gradient in (a, e))
        else:
            assert (a - e).norm() <= 1e-9 * e.norm() + 1e-14


@pytest.fixture(params=["one", "each"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return random_plan(3, teacher=request.param, vocab=VOCAB)


@pytest.mark.parametrize("name", SUPPORTED)
def test_states_and_gradients_are_those_of_one_by_one(name: str, plan: Plan) -> None:
    body = body_of(name)
    assert packed.supports(body) is None
    expected = one_by_one(body, plan.student)
    actual, recorded = packed.hidden_states(body, plan.student)
    assert recorded is None
    assert (actual - expected).abs().max() < 1e-10
    assert_same_gradients(gradients(body, actual), gradients(body, expected))


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_teacher_pass_is_exact_with_and_without_the_students_prompt(name: str, plan: Plan) -> None:
    body = body_of(name)
    _, recorded = packed.hidden_states(body, plan.student, record=True)
    with torch.no_grad():
        expected = one_by_one(body, plan.teacher)
        alone, _ = packed.hidden_states(body, plan.teacher)
        live, _ = packed.hidden_states(body, plan.teacher, prompts=recorded)
    assert (alone - expected).abs().max() < 1e-10
    assert (live - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_shared_prompt_is_read_and_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, trees = body_of(name), random_plan(3, vocab=VOCAB)
    tokens = count_tokens(monkeypatch)
    _, recorded = packed.hidden_states(body, trees.student, record=[tree.reads for tree in trees.teacher])
    with torch.no_grad():
        packed.hidden_states(body, trees.teacher, prompts=recorded)
    assert tokens == [
        sum(tree.tokens(read_shared=False) for tree in trees.student),
        sum(tree.tokens(read_shared=True) for tree in trees.teacher),
    ]
    damaged = replace(recorded, layers={i: (k + 1, v) for i, (k, v) in recorded.layers.items()})
    with torch.no_grad():
        other, _ = packed.hidden_states(body, trees.teacher, prompts=damaged)
        assert (other - one_by_one(body, trees.teacher)).abs().max() > 1e-3


def count_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the tokens of each later call of a body."""
    tokens: list[int] = []
    call = Body.__call__

    def counted(body: Body, input_ids: Tensor, **kwargs: Any) -> Tensor:
        tokens.append(input_ids.numel())
        return call(body, input_ids, **kwargs)

    monkeypatch.setattr(Body, "__call__", counted)
    return tokens


def checkpoint_layers(model: PreTrainedModel) -> None:
    checkpointed(model)


def checkpoint_outside(model: PreTrainedModel) -> None:
    """As accelerate does for FSDP."""
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer))


@pytest.mark.parametrize("checkpointing", [checkpoint_layers, checkpoint_outside])
@pytest.mark.parametrize("name", SUPPORTED)
def test_checkpointing_changes_nothing(name: str, checkpointing: Callable[[PreTrainedModel], None]) -> None:
    trees = random_plan(4, vocab=VOCAB)
    body = body_of(name)
    expected = gradients(body, one_by_one(body, trees.student))
    model = tiny(name)
    checkpointing(model)
    body = find_body(model)
    runs = count_attention_calls(model)
    actual, recorded = packed.hidden_states(body, trees.student, record=True)
    forward = len(runs)
    kept = {layer: (k.clone(), v.clone()) for layer, (k, v) in recorded.layers.items()}
    # In flight at the same time: a teacher's pass, and another student's.
    with torch.no_grad():
        live, _ = packed.hidden_states(body, trees.teacher, prompts=recorded)
        assert (live - one_by_one(body_of(name), trees.teacher)).abs().max() < 1e-10
    another = random_plan(5, prompts=[3, 8], sizes=[[2, 6], [4]], vocab=VOCAB).student
    other, _ = packed.hidden_states(body, another)
    runs.clear()
    assert_same_gradients(gradients(body, actual), expected)
    assert len(runs) == forward, "no layer ran again: nothing was checkpointed"
    # Running a layer again did not touch what was recorded.
    assert kept
    for layer, before in kept.items():
        assert all(torch.equal(a, b) for a, b in zip(before, recorded.layers[layer], strict=True))
    plain = body_of(name)
    assert_same_gradients(gradients(body, other), gradients(plain, one_by_one(plain, another)))


def test_layers_that_run_again_do_not_record() -> None:
    """They would keep each layer's keys and values, which checkpointing is there to avoid."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 6
    model = build(config)
    checkpoint_layers(model)
    body = find_body(model)
    trees = random_plan(3, prompts=[3], sizes=[[100] * 4], vocab=VOCAB, teacher="none").student
    plain, recording = packed_peak(body, trees), packed_peak(body, trees, record=[[(0, 3)]])
    assert recording.peak_bytes < plain.peak_bytes + 2 * 400 * 16 * 8  # less than one layer's keys and values


def count_attention_calls(model: PreTrainedModel) -> list[str]:
    runs: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "attention")):
            module.register_forward_hook(lambda *_, name=name: runs.append(name))
    return runs


def test_what_it_changes_is_put_back_after_a_call_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trees = random_plan(3, vocab=VOCAB).student
    model = tiny("llama")
    checkpoint_layers(model)
    body = find_body(model)

    def state() -> tuple[Any, ...]:
        functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
        return functions, model.config._attn_implementation, body.base.config.to_dict()

    before = state()
    hidden, _ = packed.hidden_states(body, trees)
    assert state() == before
    hidden.sum().backward()
    assert state() == before

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
    with pytest.raises(RuntimeError, match="broken"):
        packed.hidden_states(body, trees)
    assert state() == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_does_not_matter_which_attention_the_model_uses_otherwise(implementation: str) -> None:
    body, trees = body_of("llama", attn_implementation=implementation), random_plan(3, vocab=VOCAB).student
    assert (packed.hidden_states(body, trees)[0] - one_by_one(body, trees)).abs().max() < 1e-10


def test_without_completions_there_are_no_rows_but_a_graph() -> None:
    body = body_of("llama")
    trees = random_plan(3, sizes=[(0, 0), (0,)], prompts=[4, 5], vocab=VOCAB).student
    hidden, recorded = packed.hidden_states(body, trees, record=True)
    assert hidden.shape == (0, 32)
    assert recorded is not None
    hidden.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in body.base.parameters())


@pytest.mark.parametrize("branches", [4, 16])
def test_bytes_do_not_grow_by_a_prompt_per_completion(branches: int) -> None:
    """Eager attention or a repeated prompt would take `branches` times the keys and values, or L x L scores."""
    body = body_of("llama")
    prompt, completion = 400, 5
    trees = random_plan(3, prompts=[prompt], sizes=[[completion] * branches], vocab=VOCAB, teacher="none").student
    one = packed_peak(body, random_plan(3, prompts=[prompt], sizes=[[completion]], vocab=VOCAB, teacher="none").student)
    many = packed_peak(body, trees)
    tokens = prompt + (completion - 1) * branches
    assert many.peak_bytes < 1.1 * one.peak_bytes * tokens / (prompt + completion - 1)
    # The widest thing a token has is its gated MLP.
    assert many.largest_numel <= 48 * tokens, many.largest_origin


def packed_peak(body: Body, trees: Sequence[Tree], *, record: Any = False) -> LiveBytes:
    with LiveBytes() as probe:
        hidden, _ = packed.hidden_states(body, trees, record=record)
        hidden.sum().backward()
    body.causal_lm.zero_grad()
    return probe


@pytest.mark.parametrize("name", sorted(HYBRIDS))
def test_recurrent_models_are_refused_by_name(name: str) -> None:
    body, trees = body_of(name), random_plan(3, vocab=VOCAB).student
    assert "linear_attention" in (packed.supports(body) or "")
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        packed.hidden_states(body, trees)


def changed(name: str, **changes: Any) -> Body:
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    return find_body(build(config))


def test_rotary_embeddings_that_depend_on_the_row_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in (packed.supports(changed("llama", rope_parameters=rope)) or "")
    factors = [1.0 + 0.1 * i for i in range(4)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors[::-1], "rope_theta": 10000.0}
    body = changed("phi3", rope_parameters=rope, original_max_position_embeddings=12)
    assert packed.supports(body) is None
    short = random_plan(3, prompts=[4, 6], sizes=[[3, 4], [5]], vocab=VOCAB)
    long = random_plan(3, prompts=[14, 16], sizes=[[3, 4], [5]], vocab=VOCAB)
    for trees in (short.student, long.student):
        assert (packed.hidden_states(body, trees)[0] - one_by_one(body, trees)).abs().max() < 1e-10
    with pytest.raises(UnsupportedModelError, match="LongRoPE"):
        packed.hidden_states(body, random_plan(3, vocab=VOCAB).student)
    _, recorded = packed.hidden_states(body, short.student, record=True)
    with pytest.raises(UnsupportedModelError, match="LongRoPE"):
        packed.hidden_states(body, long.student, prompts=recorded)


def test_models_with_sinks_convolutions_or_attention_of_their_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": VOCAB, "intermediate_size": 16, "pad_token_id": None}
    sinks = build(
        GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, head_dim=8), attn_implementation="eager"
    )
    assert "sinks" in (packed.supports(find_body(sinks)) or "")
    convolutions = build(Lfm2Config(**sizes, full_attn_idxs=[1]))
    assert "layers of type conv" in (packed.supports(find_body(convolutions)) or "")
    body = body_of("llama")
    monkeypatch.setattr(type(body.base), "_supports_attention_backend", False)
    assert "AttentionInterface" in (packed.supports(body) or "")


def test_reentrant_checkpointing_is_refused() -> None:
    model = tiny("llama")
    checkpointed(model, reentrant=True)
    assert "use_reentrant" in (packed.supports(find_body(model)) or "")
    model.gradient_checkpointing_disable()
    assert packed.supports(find_body(model)) is None


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="dropout"):
        packed.hidden_states(changed("llama", attention_dropout=0.1), random_plan(3, vocab=VOCAB).student)


def test_prompts_that_do_not_fit_are_refused() -> None:
    body, trees = body_of("llama"), random_plan(3, vocab=VOCAB)
    _, recorded = packed.hidden_states(body, trees.student, record=True)
    with pytest.raises(ArgumentError, match="5 trees, got 4"):
        packed.hidden_states(body, trees.teacher, prompts=replace(recorded, kept=recorded.kept[1:]))
    with pytest.raises(ArgumentError, match="record=True"):
        packed.hidden_states(body, trees.teacher, prompts={})
    _, short = packed.hidden_states(body, trees.student, record=[[(0, 1)]] * 5)
    with pytest.raises(ArgumentError, match=r"trees\[0\], got 1"):
        packed.hidden_states(body, trees.teacher, prompts=short)
