"""`linear_divergence` says what the float64 reference says, for everything that it can compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdkernels import LogitTransform, TeacherMix, TopK, linear_divergence, logit_divergence
from sdkernels.testing import (
    OBJECTIVES,
    Run,
    allowed_error,
    assert_within_reference_error,
    make_arguments,
    make_inputs,
    relative_error,
    run_operation,
    run_reference,
)

pytestmark = pytest.mark.usefixtures("each_cpu_backend")


def test_the_backend_is_the_one_that_is_named(each_cpu_backend: str) -> None:
    inputs = make_inputs(3, 4, 20)
    assert linear_divergence(*inputs[:3]).backend == each_cpu_backend


objectives = pytest.mark.parametrize("objective", OBJECTIVES)
gradients = pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
# A soft-cap, a scale and both temperatures at once, and a bias that needs its gradient.
HEAD = LogitTransform(scale=0.8, softcap=6.0, temperature=1.3)


def check(actual: Run, exact: Run, loss: float = 1e-6, gradient: float = 1e-5) -> None:
    """`loss` is relative to the sum of magnitudes (the sampled form may cancel), `gradient` to the norm."""
    size = exact.output.per_token.abs().sum() / max(exact.output.per_token.sum().abs(), 1e-300)
    assert relative_error(actual.output.loss, exact.output.loss) <= loss * max(1.0, size.item())
    assert relative_error(actual.output.per_token, exact.output.per_token) <= loss
    for name in ("hidden_gradient", "weight_gradient", "bias_gradient"):
        got, wanted = getattr(actual, name), getattr(exact, name)
        assert (got is None) == (wanted is None), name
        if got is not None:
            assert relative_error(got, wanted) <= gradient, name
    for name in ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy"):
        got, wanted = getattr(actual.output, name), getattr(exact.output, name)
        assert (got is None) == (wanted is None), name
        if got is not None:
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def limit_of(arguments: dict[str, Any], exact: Run) -> float:
    """1e-6, or twice the naive float32 path's error where that is more: few entries, summands of both signs."""
    naive = run_reference(**arguments, naive=True)
    return max(1e-6, allowed_error(naive.output.per_token, exact.output.per_token))


def compare(arguments: dict[str, Any], **run_only: Any) -> None:
    exact = run_reference(**arguments)
    check(run_operation(linear_divergence, **arguments, **run_only), exact, limit_of(arguments, exact))


def with_bias(vocab: int, head: LogitTransform = HEAD, dtype: torch.dtype = torch.float32) -> LogitTransform:
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(7), dtype=dtype)
    return replace(head, bias=bias.requires_grad_())


@gradients
@objectives
@pytest.mark.parametrize("shape", [(1, 63, 17), (63, 507, 33), (37, 1201, 40)], ids=str)
def test_single_precision_is_within_1e_6_and_1e_5(shape: tuple[int, int, int], objective: str, gradient: str) -> None:
    rows, vocab, hidden = shape
    inputs = make_inputs(rows, hidden, vocab, masked=0.3)
    arguments = make_arguments(inputs, objective)
    exact = run_reference(**arguments)
    # A sum of capped contributions is no divergence: it has either sign, and is as well conditioned as luck has it.
    limit = limit_of(arguments, exact) if "entry clip" in objective else 1e-6
    check(run_operation(linear_divergence, **arguments, gradient=gradient), exact, limit)


@gradients
@objectives
def test_both_heads_transform_their_logits(objective: str, gradient: str) -> None:
    inputs = make_inputs(9, 15, 41, teacher_size=22)
    teacher_head = LogitTransform(bias=torch.linspace(-1, 1, 41), scale=1.2, softcap=8.0, temperature=0.7)
    compare(make_arguments(inputs, objective, student_head=with_bias(41), teacher_head=teacher_head), gradient=gradient)


@pytest.mark.parametrize("separate_head", [False, True])
def test_the_teachers_head_defaults_to_the_students(separate_head: bool) -> None:
    inputs = make_inputs(9, 15, 41, teacher_size=15 if separate_head else None)
    compare(make_arguments(inputs, "JSD", student_head=with_bias(41)))


def test_the_call_has_a_temperature_and_a_head_may_overrule_it() -> None:
    inputs = make_inputs(9, 15, 41)
    compare(make_arguments(inputs, "reverse KL", temperature=2.0))
    compare(make_arguments(inputs, "reverse KL", temperature=2.0, teacher_head=LogitTransform(temperature=0.5)))
    by_head = make_arguments(inputs, "reverse KL", student_head=LogitTransform(temperature=2.0))
    by_call = make_arguments(inputs, "reverse KL", temperature=2.0)
    assert torch.equal(linear_divergence(**by_head).loss, linear_divergence(**by_call).loss)


@objectives
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_1_5_times_the_naive_error(objective: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(33, 24, 130, dtype=dtype, masked=0.2)
    arguments = make_arguments(inputs, objective, student_head=with_bias(130, dtype=dtype))
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    naive = run_reference(**arguments, naive=True)
    assert actual.output.loss.dtype == torch.float32
    pairs = [(run.output.per_token, *run[1:]) for run in (actual, exact, naive)]
    names = ("per_token", "hidden_gradient", "weight_gradient", "bias_gradient")
    for name, got, wanted, other in zip(names, *pairs, strict=True):
        assert_within_reference_error(got, wanted, other, factor=1.5, name=name)


def smooth(objective: str) -> bool:
    """Whether the gradient is the loss's derivative: no factor without gradient, no kink."""
    return not any(word in objective for word in ("sampled", "importance", "entry clip"))


@gradients
@pytest.mark.parametrize("objective", list(filter(smooth, OBJECTIVES)))
def test_float64_gradients_pass_gradcheck(objective: str, gradient: str) -> None:
    inputs = make_inputs(4, 3, 8, teacher_size=5, dtype=torch.float64)
    head = with_bias(8, dtype=torch.float64)
    assert head.bias is not None
    arguments = make_arguments(inputs, objective, teacher_head=LogitTransform(), gradient=gradient)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        changes = {"student_hidden": hidden, "student_weight": weight, "student_head": replace(head, bias=bias)}
        return linear_divergence(**arguments | changes).loss

    assert torch.autograd.gradcheck(loss, (inputs.student_hidden, inputs.student_weight, head.bias))


@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 70),
    hidden=st.integers(1, 19),
    objective=st.sampled_from(sorted(OBJECTIVES)),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    gradient=st.sampled_from(["auto", "in_forward", "recompute"]),
    separate_head=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape_mask_and_mode_agrees(
    rows: int,
    vocab: int,
    hidden: int,
    objective: str,
    masked: float,
    reduction: str,
    gradient: str,
    separate_head: bool,
    seed: int,
) -> None:
    if reduction == "none" and gradient == "in_forward":
        gradient = "auto"  # the upstream gradient of each row is not known before backward
    inputs = make_inputs(
        rows, hidden, vocab, teacher_size=7 if separate_head else None, masked=masked, seed=seed, dtype=torch.float64
    )
    upstream = torch.linspace(-1, 2, rows, dtype=torch.float64) if reduction == "none" else None
    arguments = make_arguments(inputs, objective, reduction=reduction, upstream=upstream)
    # In float64, so that the comparison is of formulas: ids near a tie, entries near the clip are the same for both.
    check(run_operation(linear_divergence, **arguments, gradient=gradient), run_reference(**arguments), 1e-9, 1e-9)


@pytest.mark.parametrize("size", [1e2, 1e4])
@objectives
def test_extreme_logits_give_no_nan(objective: str, size: float) -> None:
    inputs = make_inputs(12, 8, 50, logit_std=size)
    run = run_operation(linear_divergence, **make_arguments(inputs, objective))
    for value in (*run.output[:-1], run.hidden_gradient, run.weight_gradient):
        assert value is None or value.isfinite().all()


@pytest.mark.parametrize("objective", ["forward KL", "reverse KL", "JSD", "JSD, teacher top-k", "sampled"])
def test_far_apart_distributions_agree_with_float64(objective: str) -> None:
    inputs = make_inputs(12, 8, 50, logit_std=300.0, dtype=torch.float64)
    arguments = make_arguments(inputs, objective)
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert relative_error(actual.output.per_token, exact.output.per_token) <= 1e-9
    # Most gradients vanish here, so the error is held against what a gradient of 1 per logit would give.
    for got, wanted, other in ((actual[1], exact[1], inputs[1]), (actual[2], exact[2], inputs[0])):
        assert (got - wanted).abs().max() <= 1e-9 * other.abs().max()


def strided(tensor: Tensor) -> Tensor:
    """The same values, transposed in memory (matrices) or with gaps (vectors)."""
    if tensor.dim() == 1:
        return tensor.detach().repeat_interleave(2)[::2].requires_grad_(tensor.requires_grad)
    return tensor.detach().T.contiguous().T.requires_grad_(tensor.requires_grad)


@gradients
def test_memory_layout_does_not_matter(gradient: str) -> None:
    inputs = make_inputs(9, 15, 41, masked=0.3)
    head = with_bias(41)
    plain = make_arguments(inputs, "JSD, importance clip", student_head=head, gradient=gradient)
    changes = {n: strided(t) for n, t in plain.items() if isinstance(t, Tensor)}
    assert not changes["student_hidden"].is_contiguous()
    assert head.bias is not None
    changes["student_head"] = replace(head, bias=strided(head.bias))
    expected, actual = run_operation(linear_divergence, **plain), run_operation(linear_divergence, **plain | changes)
    torch.testing.assert_close(actual[1:], expected[1:])
    torch.testing.assert_close(actual.output[:-1], expected.output[:-1])


def padded_by(tensor: Tensor, rows: int) -> Tensor:
    """Returns a leaf with so many rows of NaN more."""
    tail = tensor.new_full((rows, *tensor.shape[1:]), math.nan)
    return torch.cat([tensor.detach(), tail]).requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("of_teacher", [5, 0, 8])
@gradients
@objectives
def test_padded_columns_take_no_part(objective: str, gradient: str, of_teacher: int) -> None:
    """Whether both heads are padded alike, the teacher's is not, or more."""
    inputs = make_inputs(9, 15, 41, teacher_size=7)
    arguments = make_arguments(inputs, objective, student_head=with_bias(41))
    if arguments["teacher_weight"] is not None:
        arguments["teacher_head"] = replace(HEAD, bias=torch.linspace(-1, 1, 41))
    expected = run_operation(linear_divergence, **arguments, gradient=gradient)
    padded = dict(arguments, vocab_size=41, gradient=gradient)
    padded["student_weight"] = padded_by(inputs.student_weight, 5)
    padded["student_head"] = replace(HEAD, bias=padded_by(arguments["student_head"].bias, 5))
    if padded["teacher_weight"] is not None:
        padded["teacher_weight"] = padded_by(padded["teacher_weight"], of_teacher)
        padded["teacher_head"] = replace(HEAD, bias=padded_by(arguments["teacher_head"].bias, of_teacher))
    if isinstance(padded.get("teacher"), TeacherMix):
        padded["teacher"] = replace(padded["teacher"], weight=padded_by(padded["teacher"].weight, 13 - of_teacher))
    actual = run_operation(linear_divergence, **padded)
    torch.testing.assert_close(actual.output[:-1], expected.output[:-1])
    torch.testing.assert_close(actual.hidden_gradient, expected.hidden_gradient)
    for got, wanted in ((actual[2], expected[2]), (actual[3], expected[3])):
        torch.testing.assert_close(got[:41], wanted)
        assert (got[41:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("objective", ["JSD", "sampled", "JSD, importance clip"])
def test_the_upstream_gradient_scales_all_gradients(objective: str, reduction: str) -> None:
    inputs = make_inputs(9, 15, 41, masked=0.3)
    upstream = torch.linspace(-2, 3, 9) if reduction == "none" else torch.tensor(-2.5)
    compare(make_arguments(inputs, objective, reduction=reduction, upstream=upstream, student_head=with_bias(41)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@gradients
def test_backward_twice_gives_the_same_gradients(gradient: str, reduction: str) -> None:
    if reduction == "none" and gradient == "in_forward":
        pytest.skip("not a valid combination")
    inputs = make_inputs(9, 15, 41, masked=0.3)
    loss = linear_divergence(**make_arguments(inputs, "JSD", gradient=gradient, reduction=reduction)).loss.sum()
    leaves = (inputs.student_hidden, inputs.student_weight)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(2 * loss, leaves)
    for once, twice in zip(first, second, strict=True):
        torch.testing.assert_close(twice, 2 * once)


@gradients
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight"), ()])
def test_only_required_gradients_come_and_they_do_not_depend_on_the_others(
    wanted: tuple[str, ...], gradient: str
) -> None:
    inputs = make_inputs(9, 15, 41, masked=0.3)
    arguments = make_arguments(inputs, "JSD", student_head=with_bias(41), gradient=gradient)
    everything = run_operation(linear_divergence, **arguments)
    inputs.student_hidden.requires_grad_("hidden" in wanted)
    inputs.student_weight.requires_grad_("weight" in wanted)
    arguments["student_head"].bias.requires_grad_("bias" in wanted)
    some = run_operation(linear_divergence, **arguments)
    assert torch.equal(some.output.loss, everything.output.loss)
    for name in ("hidden", "weight", "bias"):
        got, expected = (getattr(run, f"{name}_gradient") for run in (some, everything))
        assert (got is not None) == (name in wanted)
        if got is not None:
            torch.testing.assert_close(got, expected)


def test_the_teacher_gets_no_gradient() -> None:
    inputs = make_inputs(9, 15, 41, teacher_size=7)
    second = torch.randn(9, 7, requires_grad=True)
    teacher_bias = torch.zeros(41, requires_grad=True)
    assert inputs.teacher_weight is not None
    teacher = (inputs.teacher_hidden.requires_grad_(), inputs.teacher_weight.requires_grad_(), second, teacher_bias)
    changes = {"teacher": TeacherMix(second), "teacher_head": LogitTransform(bias=teacher_bias)}
    linear_divergence(**make_arguments(inputs, "JSD", **changes)).loss.backward()
    assert all(tensor.grad is None for tensor in teacher)
    assert inputs.student_hidden.grad is not None


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "clip" not in name and name != "sampled"])
def test_a_divergence_is_never_negative(objective: str) -> None:
    for noise in (1.0, 1e-2, 1e-4, 1e-6, 0.0):
        inputs = make_inputs(64, 16, 301, noise=noise, requires_grad=False)
        assert (linear_divergence(**make_arguments(inputs, objective)).per_token >= 0).all()


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "cached" not in name and "entry" not in name])
def test_a_teacher_that_is_the_student_teaches_nothing(objective: str) -> None:
    inputs = make_inputs(32, 16, 301, noise=0.0)
    arguments = make_arguments(inputs, objective)
    if isinstance(arguments.get("teacher"), TeacherMix):
        arguments["teacher"] = TeacherMix(inputs.teacher_hidden)
    run = run_operation(linear_divergence, **arguments)
    assert run.output.loss.abs() < 1e-6
    assert run.hidden_gradient is not None
    assert run.weight_gradient is not None
    assert run.hidden_gradient.abs().max() < 1e-6
    assert run.weight_gradient.abs().max() < 1e-6


@gradients
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_learn_from_is_zero_and_stays_in_the_graph(rows: int, reduction: str, gradient: str) -> None:
    inputs = make_inputs(rows, 15, 41, masked=1.0)
    output = linear_divergence(**make_arguments(inputs, "JSD", reduction=reduction, gradient=gradient))
    assert output.loss.item() == 0
    assert output.active_tokens.item() == 0
    assert output.loss.requires_grad
    output.loss.backward()
    for leaf in (inputs.student_hidden, inputs.student_weight):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@gradients
@objectives
def test_rows_of_weight_zero_may_hold_anything(objective: str, gradient: str) -> None:
    inputs = make_inputs(9, 15, 41, masked=0.4)
    masked = inputs.token_weights == 0
    arguments = make_arguments(inputs, objective, target_ids=inputs.target_ids, gradient=gradient)
    expected = run_operation(linear_divergence, **arguments)
    for tensor in (inputs.student_hidden, inputs.teacher_hidden):
        tensor.data[masked] = math.nan
    inputs.target_ids[masked] = -100  # the label that Hugging Face gives to tokens without loss
    actual = run_operation(linear_divergence, **arguments)
    torch.testing.assert_close(actual[1:], expected[1:])
    torch.testing.assert_close(actual.output[:-1], expected.output[:-1])
    assert actual.output.active_tokens.item() == int((~masked).sum())
    assert actual.hidden_gradient is not None
    assert (actual.hidden_gradient[masked] == 0).all()
    per_row = (actual.output.per_token, actual.output.student_logprobs, actual.output.student_entropy)
    assert all((values[masked] == 0).all() for values in per_row)


def test_only_the_loss_is_in_the_graph() -> None:
    inputs = make_inputs(9, 15, 41)
    for reduction in ("mean", "sum", "none"):
        output = linear_divergence(**make_arguments(inputs, "JSD", target_ids=inputs.target_ids, reduction=reduction))
        assert output.loss.requires_grad
        assert output.loss.shape == ((9,) if reduction == "none" else ())
        others = [value for value in output[2:] if isinstance(value, Tensor)]
        assert not any(value.requires_grad for value in others)


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = make_inputs(63, 33, 507, masked=0.3)
    for objective in OBJECTIVES:
        first, second = (run_operation(linear_divergence, **make_arguments(inputs, objective)) for _ in range(2))
        assert torch.equal(first.output.loss, second.output.loss)
        for one, other in zip(first[1:3], second[1:3], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("workspace_mb", [None, 20])
def test_the_budget_changes_the_chunks_and_not_the_result(workspace_mb: int | None) -> None:
    inputs = make_inputs(300, 12, 2003, masked=0.2)
    compare(make_arguments(inputs, "JSD, student top-k without tail", vocab_size=1999), workspace_mb=workspace_mb)


@objectives
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_at_hand_agree_too(objective: str, reduction: str) -> None:
    inputs = make_inputs(9, 15, 41, masked=0.3)
    upstream = torch.linspace(-1, 2, 9) if reduction == "none" else None
    arguments = make_arguments(inputs, objective, reduction=reduction, temperature=1.3)
    if isinstance(arguments.get("teacher"), TeacherMix):
        pytest.skip("mixing logits at hand is one line of the caller's")
    hidden, weight, teacher_hidden, _ = (arguments.pop(name) for name in list(arguments)[:4])
    student = (hidden @ weight.T).detach().requires_grad_()
    teacher = None if teacher_hidden is None else (teacher_hidden @ weight.T).detach()
    output = logit_divergence(student, teacher, **arguments)
    output.loss.backward(upstream)
    # Logits are hidden states under a head that does nothing.
    arguments |= {"student_hidden": student, "student_weight": torch.eye(41), "teacher_hidden": teacher}
    exact = run_reference(**arguments, upstream=upstream)
    actual = Run(output._replace(loss=output.loss.detach()), student.grad, None, None)
    check(actual, exact, limit_of(arguments | {"upstream": upstream}, exact))


def test_topk_of_everything_is_the_full_vocabulary() -> None:
    inputs = make_inputs(9, 15, 41)
    for alpha in (0.0, 0.5, 1.0):
        arguments = make_arguments(inputs, "JSD", alpha=alpha)
        full = run_operation(linear_divergence, **arguments)
        for tail in (True, False):
            some = run_operation(linear_divergence, **arguments, support=TopK(41, tail=tail))
            torch.testing.assert_close(some[1:], full[1:], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(some.output.loss, full.output.loss)
