"""How many FLOPs of matrix products a call does, exactly: the divergence is four products, whatever is asked of it.

N rows, H hidden, Ht of a teacher with a head of its own, V vocabulary; a product is 2·N·V·H FLOPs.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from sdkernels import LogitTransform, linear_divergence, linear_logprobs, linear_topk, logit_divergence
from sdkernels.testing import OBJECTIVES, make_arguments, make_inputs, run_operation
from sdkernels.tile import head
from sdkernels.tile.head import Head
from tests.sdkernels.products import Products, counted_products

N, H, HT, V = 60, 24, 40, 251
STUDENT, TEACHER = 2 * N * V * H, 2 * N * V * HT
DTYPES = [torch.float32, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def products_of(
    objective: str = "JSD",
    *,
    dtype: torch.dtype = torch.float32,
    own_head: bool = False,
    hidden: bool = True,
    weight: bool = True,
    masked: float = 0.0,
    **changes: Any,
) -> Products:
    """Of a call and, where anything requires a gradient, its backward."""
    inputs = make_inputs(N, H, V, teacher_size=HT if own_head else None, dtype=dtype, masked=masked)
    inputs.student_hidden.requires_grad_(hidden)
    inputs.student_weight.requires_grad_(weight)
    if changes.get("reduction") == "none":
        changes["upstream"] = torch.ones(N)
    arguments = make_arguments(inputs, objective, **changes)
    with counted_products() as products:
        run_operation(linear_divergence, **arguments)
    return products


@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_divergence_and_its_gradients_are_four_products(dtype: torch.dtype, reduction: str) -> None:
    assert products_of(dtype=dtype, reduction=reduction).flops == 4 * STUDENT
    assert products_of(dtype=dtype, reduction=reduction, own_head=True).flops == 3 * STUDENT + TEACHER


@dtypes
@reductions
def test_a_frozen_head_is_a_product_less(dtype: torch.dtype, reduction: str) -> None:
    assert products_of(dtype=dtype, reduction=reduction, weight=False).flops == 3 * STUDENT
    assert products_of(dtype=dtype, reduction=reduction, weight=False, own_head=True).flops == 2 * STUDENT + TEACHER


@dtypes
def test_frozen_hidden_states_are_a_product_less(dtype: torch.dtype) -> None:
    assert products_of(dtype=dtype, hidden=False).flops == 3 * STUDENT


@dtypes
def test_values_alone_are_the_projections(dtype: torch.dtype) -> None:
    assert products_of(dtype=dtype, hidden=False, weight=False).flops == 2 * STUDENT
    inputs = make_inputs(N, H, V, teacher_size=HT, dtype=dtype)
    with counted_products() as products, torch.no_grad():
        linear_divergence(*inputs[:4])
    assert products.flops == STUDENT + TEACHER


@dtypes
def test_recomputation_is_both_projections_more(dtype: torch.dtype) -> None:
    assert products_of(dtype=dtype, gradient="recompute").flops == 6 * STUDENT
    assert products_of(dtype=dtype, gradient="recompute", own_head=True).flops == 4 * STUDENT + 2 * TEACHER
    assert products_of(dtype=dtype, gradient="recompute", weight=False).flops == 5 * STUDENT
    # Each token's upstream gradient has to be known before the head's gradient is added up.
    assert products_of(dtype=dtype, reduction="none").flops == 6 * STUDENT


@dtypes
@pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
def test_rows_without_weight_cost_nothing(dtype: torch.dtype, gradient: str) -> None:
    everything = products_of(dtype=dtype, gradient=gradient).flops
    assert products_of(dtype=dtype, gradient=gradient, masked=0.75).flops * 4 == everything
    assert products_of(dtype=dtype, gradient=gradient, token_weights=torch.zeros(N)).flops == 0


@dtypes
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_its_projections_and_two_products(objective: str, dtype: torch.dtype) -> None:
    projections = {"trust region": 3}.get(objective, 1 if "cached" in objective else 2)
    assert products_of(objective, dtype=dtype).flops == (projections + 2) * STUDENT
    assert products_of(objective, dtype=dtype, weight=False).flops == (projections + 1) * STUDENT


@dtypes
def test_chunks_add_up_to_the_whole(dtype: torch.dtype) -> None:
    vocab = 8009
    inputs = make_inputs(N, H, vocab, dtype=dtype)
    chunks = []
    for workspace_mb in (64, 19):
        with counted_products() as products:
            run_operation(linear_divergence, **make_arguments(inputs, "forward KL", workspace_mb=workspace_mb))
        chunks.append(products.calls["project"])
        assert products.flops == 4 * 2 * N * vocab * H
    assert 2 == chunks[0] < chunks[1]


@dtypes
def test_padding_columns_cost_nothing(dtype: torch.dtype) -> None:
    assert products_of(dtype=dtype, vocab_size=240).flops == 4 * 2 * N * 240 * H


def test_the_gradient_of_a_bias_is_one_pass_over_the_tile() -> None:
    bias = torch.zeros(V, requires_grad=True)
    products = products_of(student_head=LogitTransform(bias=bias))
    assert products.flops == 4 * STUDENT + 2 * N * V
    assert products.asked == 4 * STUDENT


@dtypes
def test_log_probabilities_are_projected_once_more_in_backward(dtype: torch.dtype) -> None:
    def of(weight: bool, backward: bool) -> int:
        inputs = make_inputs(N, H, V, dtype=dtype)
        inputs.student_weight.requires_grad_(weight)
        with counted_products() as products, torch.set_grad_enabled(backward):
            output = linear_logprobs(inputs.student_hidden, inputs.student_weight, inputs.target_ids)
            if backward:
                (output.logprobs.sum() + output.entropy.sum()).backward()
        return products.flops

    assert of(weight=True, backward=False) == STUDENT
    assert of(weight=True, backward=True) == 4 * STUDENT
    assert of(weight=False, backward=True) == 3 * STUDENT


@dtypes
def test_the_most_likely_ids_are_one_projection(dtype: torch.dtype) -> None:
    inputs = make_inputs(N, H, V, dtype=dtype)
    with counted_products() as products:
        linear_topk(inputs.student_hidden, inputs.student_weight, 7)
    assert products.flops == STUDENT


def test_logits_that_are_there_are_not_multiplied() -> None:
    student, teacher = torch.randn(2, N, V).unbind()
    with counted_products() as products:
        logit_divergence(student.requires_grad_(), teacher, alpha=0.5).loss.backward()
    assert products.flops == 0


@pytest.mark.parametrize("narrow", [False, True])
def test_bf16_gradient_products_are_no_more_with_and_without_instructions_for_them(
    monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    monkeypatch.setattr(head, "prefers_bfloat16", lambda: narrow)
    assert products_of(dtype=torch.bfloat16).flops == 4 * STUDENT
    assert products_of(dtype=torch.bfloat16, weight=False).flops == 3 * STUDENT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_wide_products_are_all_seen(dtype: torch.dtype) -> None:
    """What the heads were asked for is what torch's operators did: nothing is counted on trust."""
    for changes in ({}, {"own_head": True}, {"gradient": "recompute"}, {"masked": 0.5}):
        products = products_of(dtype=dtype, **changes)  # type: ignore[arg-type]
        assert not products.opaque
        assert products.seen == products.asked == products.flops


def test_products_past_the_dispatcher_are_counted_by_what_was_asked() -> None:
    def project(head: Head, sides: list[torch.Tensor], outs: list[torch.Tensor]) -> None:
        for hidden, out in zip(sides, outs, strict=True):
            out.numpy()[:] = hidden.numpy() @ head.weight.detach().numpy().T

    with mock.patch.object(Head, "project", project):
        products = products_of()
    assert set(products.opaque) == {"project"}
    assert (products.seen, products.flops) == (2 * STUDENT, 4 * STUDENT)


def test_a_product_that_is_done_twice_is_seen() -> None:
    method = Head.hidden_gradient

    def twice(head: Head, gradient: torch.Tensor, out: torch.Tensor) -> None:
        method(head, gradient, out)
        method(head, gradient, out)

    with mock.patch.object(Head, "hidden_gradient", twice):
        assert products_of().flops == 5 * STUDENT
