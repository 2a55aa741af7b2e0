"""`linear_topk`, and teachers of which only a top-k is known."""

from __future__ import annotations

import pytest
import torch

from sdkernels import LogitTransform, TopK, TopKLogprobs, linear_divergence, linear_topk
from sdkernels.reference import final_logits
from sdkernels.testing import make_arguments, make_inputs, relative_error, run_operation, run_reference


@pytest.mark.parametrize("k", [1, 5, 41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_most_likely_ids_come_first_with_their_log_probabilities(k: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(9, 15, 41, dtype=dtype)
    bias = torch.linspace(-1, 1, 41, dtype=dtype)
    head = LogitTransform(bias=bias, scale=0.8, softcap=9.0)
    output = linear_topk(inputs.student_hidden, inputs.student_weight, k, head=head, temperature=0.7)
    projection = inputs.student_hidden.double() @ inputs.student_weight.double().T
    exact = final_logits(projection, bias, 0.8, 9.0, 0.7).log_softmax(-1).topk(k)
    assert torch.equal(output.ids, exact.indices)
    assert output.ids.dtype == torch.int64
    assert relative_error(output.logprobs, exact.values) < 1e-6
    assert not output.logprobs.requires_grad


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_log_probabilities_of_large_logits_keep_their_digits(size: float) -> None:
    weight = torch.linspace(0, 10, 41).mul(64).round().div(64)[:, None] + size  # exact in float32
    output = linear_topk(torch.ones(3, 1), weight, 41)
    exact = weight.T.double().log_softmax(-1).topk(41).values
    torch.testing.assert_close(output.logprobs.double(), exact.expand(3, 41))


def test_padded_columns_are_not_found() -> None:
    inputs = make_inputs(9, 15, 41)
    weight = torch.cat([inputs.student_weight, 100 * torch.ones(7, 15), -100 * torch.ones(7, 15)])
    output = linear_topk(inputs.student_hidden, weight, 6, vocab_size=41)
    expected = linear_topk(inputs.student_hidden, inputs.student_weight, 6)
    assert torch.equal(output.ids, expected.ids)
    assert torch.equal(output.logprobs, expected.logprobs)


def test_no_rows_have_no_ids() -> None:
    inputs = make_inputs(0, 15, 41)
    output = linear_topk(inputs.student_hidden, inputs.student_weight, 3)
    assert output.ids.shape == output.logprobs.shape == (0, 3)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_a_teacher_known_by_its_top_k_teaches_like_the_teacher_itself(alpha: float, tail: bool) -> None:
    """What a server returns is enough for a support of the teacher's top k."""
    inputs = make_inputs(9, 15, 41, teacher_size=7)
    assert inputs.teacher_weight is not None
    support = TopK(6, of="teacher", tail=tail)
    arguments = make_arguments(inputs, "JSD", alpha=alpha, support=support)
    expected = run_operation(linear_divergence, **arguments)
    found = linear_topk(inputs.teacher_hidden, inputs.teacher_weight, 6)
    changes = {"teacher": TopKLogprobs(found.ids, found.logprobs), "teacher_hidden": None, "teacher_weight": None}
    actual = run_operation(linear_divergence, **arguments | changes)
    torch.testing.assert_close(actual.output.per_token, expected.output.per_token, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_teacher_that_lists_all_its_mass_has_no_tail(alpha: float) -> None:
    """A student puts mass outside; at alpha=0 nothing is asked of it there, and no gradient is NaN."""
    inputs = make_inputs(9, 15, 41, dtype=torch.float64)
    ids = torch.rand(9, 41).argsort(-1)[:, :3]
    teacher = TopKLogprobs(ids, torch.randn(9, 3, dtype=torch.float64).log_softmax(-1))
    arguments = make_arguments(inputs, "JSD", alpha=alpha, teacher=teacher, teacher_hidden=None)
    run = run_operation(linear_divergence, **arguments)
    assert run.hidden_gradient is not None
    assert run.hidden_gradient.isfinite().all()
    if alpha < 1:  # the reverse KL to a teacher without a tail is infinite, and the operation's large but finite
        exact = run_reference(**arguments)
        assert relative_error(run.output.per_token, exact.output.per_token) < 1e-9
    assert run.output.per_token.isfinite().all()


def test_ties_are_no_error_and_ids_do_not_repeat() -> None:
    hidden, weight = torch.ones(4, 3), torch.ones(10, 3)
    output = linear_topk(hidden, weight, 7)
    assert all(len(set(row.tolist())) == 7 for row in output.ids)
    torch.testing.assert_close(output.logprobs, torch.full((4, 7), 0.1).log())
    arguments = make_arguments(make_inputs(4, 3, 10), "JSD", support=TopK(7), student_weight=weight)
    assert linear_divergence(**arguments).loss.abs() < 1e-6
