"""Which products are done how: nothing of it may change a result beyond rounding, or outlive the call."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from sdkernels import LogitTransform, TopK, linear_divergence
from sdkernels.testing import allowed_error, make_arguments, make_inputs, relative_error, run_operation, run_reference
from sdkernels.tile import head
from sdkernels.tile.head import fast_products, left_to_onednn

ALPHAS = (0.0, 0.5, 1.0)


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture
def any_cpu_prefers_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "left_to_onednn", lambda: frozenset({"projection", "gradient"}))


@pytest.mark.usefixtures("any_cpu_prefers_onednn")
def test_the_precision_setting_is_put_back_after_a_call_and_after_an_error() -> None:
    before = precision()
    inputs = make_inputs(8, 8, 50)
    linear_divergence(*inputs[:3]).loss.backward()
    assert precision() == before
    seen = []

    def fail() -> None:
        with fast_products(torch.device("cpu"), "gradient"):
            seen.append(precision())
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert seen == ["bf16"]
    assert precision() == before


@pytest.mark.usefixtures("any_cpu_prefers_onednn")
def test_the_last_of_several_threads_puts_the_setting_back() -> None:
    before = precision()
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with fast_products(torch.device("cpu"), "gradient"):
            first_is_in.set()
            second_is_in.wait(10)
        first_is_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with fast_products(torch.device("cpu"), "gradient"):
        second_is_in.set()
        first_is_out.wait(10)
        assert precision() == "bf16"
    thread.join()
    assert precision() == before


def test_products_are_left_to_onednn_only_where_it_does_not_round_the_factors() -> None:
    if not left_to_onednn():
        pytest.skip("this CPU leaves its products to torch.mm")
    a, b = torch.randn(70, 300), torch.randn(300, 90)
    with fast_products(a.device, "projection"):
        product = a @ b
    assert relative_error(product, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("narrow", [False, True])
def test_bf16_gradients_agree_with_and_without_bf16_products(
    monkeypatch: pytest.MonkeyPatch, alpha: float, narrow: bool
) -> None:
    """Also on CPUs without the instructions, where small products are merely slow."""
    monkeypatch.setattr(head, "prefers_bfloat16", lambda: narrow)
    inputs = make_inputs(37, 24, 2003, masked=0.2, dtype=torch.bfloat16)
    bias = torch.randn(2003, generator=torch.Generator().manual_seed(1)).requires_grad_()
    arguments = make_arguments(inputs, "JSD", alpha=alpha, student_head=LogitTransform(bias=bias))
    actual = run_operation(linear_divergence, **arguments, workspace_mb=9)
    exact = run_reference(**arguments)
    assert relative_error(actual.output.loss, exact.output.loss) < 1e-5
    for name in ("hidden_gradient", "weight_gradient", "bias_gradient"):
        assert relative_error(getattr(actual, name), getattr(exact, name)) < 4e-3, name


@pytest.mark.parametrize("noise", [0.003, 0.3, 3.0])
@pytest.mark.parametrize("support", [None, TopK(5), TopK(5, of="teacher"), TopK(5, tail=False), "sampled"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_shared_head_gives_what_two_equal_ones_do(noise: float, support: Any, alpha: float) -> None:
    """With one head, the difference of the hidden states is projected: near, far, and across the switch between."""
    if support == "sampled" and alpha != 1.0:
        pytest.skip("sampled is the reverse KL")
    inputs = make_inputs(29, 16, 501, noise=noise, masked=0.2)
    changes = {"alpha": alpha, "support": support, "target_ids": inputs.target_ids, "temperature": 1.3}
    shared = make_arguments(inputs, "JSD", **changes)
    apart = shared | {"teacher_weight": inputs.student_weight.detach().clone()}
    exact = run_reference(**shared)
    of_shared, of_apart = run_operation(linear_divergence, **shared), run_operation(linear_divergence, **apart)
    for name in ("per_token", "student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy"):
        wanted = getattr(exact.output, name)
        found, other = (getattr(run.output, name) for run in (of_shared, of_apart))
        assert relative_error(found, wanted) <= allowed_error(other, wanted) + 1e-6, name
    for name in ("hidden_gradient", "weight_gradient"):
        wanted = getattr(exact, name)
        found, other = (getattr(run, name) for run in (of_shared, of_apart))
        assert relative_error(found, wanted) <= allowed_error(other, wanted) + 1e-6, name


@pytest.mark.parametrize("support", [None, TopK(20), TopK(20, of="teacher")])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_teacher_next_to_the_student_is_told_apart(alpha: float, support: TopK | None) -> None:
    """At a noise of 1e-4 two separate projections leave three digits of the difference, and none of a loss of 1e-8."""
    inputs = make_inputs(16, 64, 2001, noise=1e-4)
    arguments = make_arguments(inputs, "JSD", alpha=alpha, support=support)
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert relative_error(actual.output.per_token, exact.output.per_token) < 1e-5
    assert relative_error(actual.hidden_gradient, exact.hidden_gradient) < 1e-5
    assert relative_error(actual.weight_gradient, exact.weight_gradient) < 1e-5


def test_a_detached_view_of_the_head_is_the_same_head() -> None:
    inputs = make_inputs(16, 64, 2001, noise=1e-4)
    arguments = make_arguments(inputs, "JSD", teacher_weight=inputs.student_weight.detach())
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert relative_error(actual.output.per_token, exact.output.per_token) < 1e-5


def test_a_teacher_without_the_students_bias_is_not_taken_for_one_with_it() -> None:
    inputs = make_inputs(9, 16, 101)
    bias = torch.randn(101)
    arguments = make_arguments(
        inputs, "JSD", student_head=LogitTransform(bias=bias), teacher_head=LogitTransform(), alpha=1.0
    )
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert relative_error(actual.output.per_token, exact.output.per_token) < 1e-5


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_rows_are_not_rounded_to_a_head_of_16_bits(dtype: torch.dtype) -> None:
    inputs = make_inputs(24, 32, 300)
    weight = inputs.student_weight.detach().to(dtype).requires_grad_()
    # Sides that differ by less than a rounding of either to 16 bits.
    teacher = inputs.student_hidden.detach() + 1e-4 * inputs.teacher_hidden
    arguments = {
        "student_hidden": inputs.student_hidden,
        "student_weight": weight,
        "teacher_hidden": teacher,
        "alpha": 1.0,
    }
    actual, exact = run_operation(linear_divergence, **arguments, backend="torch"), run_reference(**arguments)
    assert relative_error(actual.output.loss, exact.output.loss) < 0.01
    assert relative_error(actual.hidden_gradient, exact.hidden_gradient) < 0.01
