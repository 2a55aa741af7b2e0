"""Where a micro-batch's backward ends and how it goes on, and that gradients of the output layer's size come singly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from sdcore.losses import FusedLinearDivergence
from sdcore.models import find_body
from sdcore.prefix import plan
from sdcore.prefix.strategies.two_phase import micro_batches
from sdcore.step import distill_step
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.prefix.models import tiny

PLAN = plan([list(range(9)), list(range(7))], [[[1, 2, 3], [4, 5], [6]], [[7, 8, 9]]])


def wide_model(*, tied: bool) -> Any:
    """Its output layer is most of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_beside_the_gradients_there_is_one_of_the_heads_size_at_a_time(tied: bool, micro_batch: int) -> None:
    """Made by the loss, or by the embedding: for the next micro-batch, the trunk and in a later step alike."""
    model = wide_model(tied=tied)
    planned = plan([list(range(20))], [[[i] * 4 for i in range(4)]], [list(range(30))])
    head = model.lm_head.weight.nbytes
    with LiveBytes() as probe:
        for _ in range(2):
            distill_step(model, planned, loss=FusedLinearDivergence(), micro_batch=micro_batch, verify="off")
    gradients = sum(weight.grad.nbytes for weight in model.parameters())
    assert head < probe.peak_bytes - gradients < 1.4 * head


def test_a_backward_ends_at_the_states_and_goes_on_when_the_next_part_is_asked_for() -> None:
    model = tiny("llama")
    parts = micro_batches(find_body(model), PLAN.student, micro_batch=1)

    def reached() -> set[str]:
        return {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}

    part = next(parts)
    part.attach(model.lm_head(part.hidden).sum()).backward()
    assert part.hidden.is_leaf
    assert reached() == {"lm_head"}
    part = next(parts)
    assert reached() == {"lm_head", "model"}
    seen = model.model.embed_tokens.weight.grad.any(-1).nonzero()[:, 0]
    assert set(seen.tolist()) <= {1, 2, 3}  # not yet the prompt's tokens
    part.attach(model.lm_head(part.hidden).sum()).backward()
    for part in parts:
        part.attach(model.lm_head(part.hidden).sum()).backward()
    seen = model.model.embed_tokens.weight.grad.any(-1).nonzero()[:, 0]
    assert set(range(9)) <= set(seen.tolist())


@pytest.mark.parametrize("ignored", [0, 1, 2])
def test_a_loss_that_ignores_a_parts_states_leaves_the_gradients_of_the_others(ignored: int) -> None:
    """The last one too, after which the trunk's backward follows."""
    planned = plan([list(range(9))], [[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])

    def gradients(weights: list[float], *, constant: bool) -> dict[str, Tensor]:
        model = tiny("llama")
        for i, part in enumerate(micro_batches(find_body(model), planned.student, micro_batch=1)):
            skipped = constant and weights[i] == 0
            loss = torch.zeros((), requires_grad=True) if skipped else weights[i] * part.hidden.square().sum()
            part.attach(loss).backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    weights = [float(i != ignored) for i in range(3)]
    grads, expected = (gradients(weights, constant=constant) for constant in (True, False))
    assert grads.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, msg=name)


def test_a_frozen_body_leaves_the_heads_gradient() -> None:
    model, other = tiny("llama"), tiny("llama")
    for whole in (model, other):
        whole.model.requires_grad_(False)
    planned = plan([list(range(9))], [[[1, 2, 3], [4, 5]]], [list(range(12))])
    distill_step(model, planned, micro_batch=1, verify="off")
    distill_step(other, planned, strategy="naive")
    assert all(weight.grad is None for weight in model.model.parameters())
    torch.testing.assert_close(model.lm_head.weight.grad, other.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
