"""`linear_logprobs`: log-probabilities of given tokens and entropies, with gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import LogitTransform, linear_logprobs
from sdkernels.reference import at, entropy, final_logits
from sdkernels.testing import LiveBytes, assert_within_reference_error, make_inputs, relative_error

HEAD = LogitTransform(scale=0.8, softcap=6.0, temperature=1.3)
Leaves = tuple[Tensor, Tensor, Tensor]


def leaves(rows: int, hidden: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Leaves:
    inputs = make_inputs(rows, hidden, vocab, dtype=dtype, seed=seed)
    bias = torch.linspace(-1, 1, vocab, dtype=dtype).requires_grad_()
    return inputs.student_hidden, inputs.student_weight, bias


def exact_run(tensors: Leaves, ids: Tensor, upstream: tuple[Tensor, Tensor], naive: bool = False) -> list[Tensor]:
    """Log-probabilities, entropies and the three gradients, in float64 or the naive way in the inputs' dtype."""
    hidden, weight, bias = (
        tensor.detach().to(tensor.dtype if naive else torch.float64, copy=True).requires_grad_() for tensor in tensors
    )
    log_p = final_logits(hidden @ weight.T, bias, HEAD.scale, HEAD.softcap, HEAD.temperature or 1.0).log_softmax(-1)
    values = (at(log_p, ids), entropy(log_p))
    torch.autograd.backward(values, [u.double() for u in upstream])
    return [value.detach() for value in values] + [
        leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None
    ]


def run(tensors: Leaves, ids: Tensor, upstream: tuple[Tensor, Tensor], **options: Any) -> list[Tensor]:
    hidden, weight, bias = (tensor.detach().requires_grad_() for tensor in tensors)
    output = linear_logprobs(hidden, weight, ids, head=replace(HEAD, bias=bias), **options)
    assert output.logprobs is not None
    torch.autograd.backward(tuple(output), [u.to(output.entropy.dtype) for u in upstream])
    values = [output.logprobs.detach(), output.entropy.detach()]
    return values + [leaf.grad for leaf in (hidden, weight, bias) if leaf.grad is not None]


@pytest.mark.parametrize("shape", [(1, 63, 17), (63, 507, 33)], ids=str)
def test_single_precision_is_within_1e_6_and_1e_5(shape: tuple[int, int, int]) -> None:
    rows, vocab, hidden = shape
    tensors = leaves(rows, hidden, vocab, torch.float32)
    ids, upstream = torch.arange(rows) % vocab, (torch.linspace(-1, 2, rows), torch.linspace(1, -1, rows))
    actual, exact = run(tensors, ids, upstream), exact_run(tensors, ids, upstream)
    for got, wanted, limit in zip(actual, exact, [1e-6, 1e-6, 1e-5, 1e-5, 1e-5], strict=True):
        assert relative_error(got, wanted) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_1_5_times_the_naive_error(dtype: torch.dtype) -> None:
    tensors = leaves(33, 24, 130, dtype)
    ids, upstream = torch.arange(33), (torch.linspace(-1, 2, 33), torch.linspace(1, -1, 33))
    actual, exact = run(tensors, ids, upstream), exact_run(tensors, ids, upstream)
    naive = exact_run(tensors, ids, upstream, naive=True)
    for got, wanted, other in zip(actual, exact, naive, strict=True):
        assert_within_reference_error(got, wanted, other, factor=1.5)


@given(rows=st.integers(0, 9), vocab=st.integers(1, 70), hidden=st.integers(1, 19), seed=st.integers(0, 99))
def test_any_shape_agrees(rows: int, vocab: int, hidden: int, seed: int) -> None:
    tensors = leaves(rows, hidden, vocab, torch.float64, seed)
    ids, upstream = torch.arange(rows) % vocab, (torch.linspace(-1, 2, rows), torch.linspace(1, -1, rows))
    for got, wanted in zip(run(tensors, ids, upstream), exact_run(tensors, ids, upstream), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_float64_gradients_pass_gradcheck() -> None:
    tensors, ids = leaves(4, 3, 8, torch.float64), torch.tensor([0, 7, 3, 3])
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: tuple(linear_logprobs(hidden, weight, ids, head=replace(HEAD, bias=bias))), tensors
    )


@pytest.mark.parametrize("only", ["logprobs", "entropy"])
def test_either_output_may_be_used_alone(only: str) -> None:
    tensors, ids = leaves(9, 15, 41, torch.float64), torch.arange(9)
    zero, one = torch.zeros(9), torch.linspace(-1, 2, 9)
    exact = exact_run(tensors, ids, (one, zero) if only == "logprobs" else (zero, one))
    output = linear_logprobs(tensors[0], tensors[1], ids, head=replace(HEAD, bias=tensors[2]))
    (getattr(output, only) * one).sum().backward()
    for tensor, wanted in zip(tensors, exact[2:], strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


def test_without_ids_there_is_only_the_entropy() -> None:
    tensors = leaves(9, 15, 41, torch.float64)
    output = linear_logprobs(tensors[0], tensors[1], head=replace(HEAD, bias=tensors[2]))
    assert output.logprobs is None
    exact = exact_run(tensors, torch.zeros(9, dtype=torch.int64), (torch.zeros(9), torch.ones(9)))
    torch.testing.assert_close(output.entropy, exact[1])
    output.entropy.sum().backward()
    torch.testing.assert_close(tensors[1].grad, exact[3])


def test_padded_columns_take_no_part() -> None:
    tensors, ids = leaves(9, 15, 41, torch.float32), torch.arange(9)
    upstream = (torch.ones(9), torch.ones(9))
    expected = run(tensors, ids, upstream)
    padded = (tensors[0], torch.cat([tensors[1], torch.full((4, 15), 9.0)]), torch.cat([tensors[2], torch.ones(4)]))
    actual = run(padded, ids, upstream, vocab_size=41)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got[: len(wanted)], wanted)
        assert (got[len(wanted) :] == 0).all()


def test_extreme_logits_give_no_nan() -> None:
    inputs = make_inputs(12, 8, 50, logit_std=1e4)
    output = linear_logprobs(inputs.student_hidden, inputs.student_weight, inputs.target_ids)
    assert output.logprobs is not None
    (output.logprobs.sum() + output.entropy.sum()).backward()
    for tensor in (*output, inputs.student_hidden.grad, inputs.student_weight.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_no_gradient_costs_one_product_and_both_cost_four() -> None:
    inputs = make_inputs(64, 48, 1009)
    with LiveBytes() as probe, torch.no_grad():
        linear_logprobs(inputs.student_hidden, inputs.student_weight, inputs.target_ids)
    assert probe.matmul_count(64, 48, 1009) == pytest.approx(1)
    with LiveBytes() as probe:
        output = linear_logprobs(inputs.student_hidden, inputs.student_weight, inputs.target_ids)
        assert output.logprobs is not None
        output.logprobs.sum().backward()
    assert probe.matmul_count(64, 48, 1009) == pytest.approx(4)
    assert probe.largest_numel < 64 * 1009, probe.largest_origin
