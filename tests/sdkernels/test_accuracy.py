"""Self-distillation's regime: the teacher differs from the student by a hair, the inputs are bf16.

The shapes and limits are those of issue 3; a divergence summed in its textbook form, or logits rounded to bf16 before
their difference is taken, misses them by orders of magnitude.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import TopK, linear_divergence, logit_divergence
from sdkernels.reference import divergence
from sdkernels.testing import (
    Inputs,
    assert_within,
    make_arguments,
    make_inputs,
    relative_error,
    run_operation,
    run_reference,
)

pytestmark = pytest.mark.usefixtures("each_cpu_backend")

N, H, V = 64, 512, 8192
SUPPORTS = {
    "full": None,
    "student top-k": TopK(20),
    "teacher top-k": TopK(100, of="teacher"),
}
ALPHAS = [(0.0, False), (0.5, False), (1.0, False), (0.1, True)]

alphas = pytest.mark.parametrize(("alpha", "normalize"), ALPHAS)
supports = pytest.mark.parametrize("support", SUPPORTS)


@pytest.fixture(scope="module")
def near() -> dict[tuple[float, torch.dtype], Inputs]:
    """Inputs by (noise, dtype)."""
    keys = [(noise, torch.bfloat16) for noise in (0.3, 0.03, 0.003)] + [(0.03, torch.float32)]
    return {(noise, dtype): make_inputs(N, H, V, noise=noise, dtype=dtype) for noise, dtype in keys}


def errors(inputs: Inputs, **changes: Any) -> tuple[float, float, float]:
    """Relative errors of loss, hidden gradient and weight gradient against float64 on the same inputs."""
    arguments = make_arguments(inputs, "JSD", **changes)
    actual, exact = run_operation(linear_divergence, **arguments), run_reference(**arguments)
    assert (actual.output.per_token >= 0).all()
    assert actual.hidden_gradient is not None
    assert actual.weight_gradient is not None
    assert exact.hidden_gradient is not None
    assert exact.weight_gradient is not None
    return (
        relative_error(actual.output.loss, exact.output.loss),
        relative_error(actual.hidden_gradient, exact.hidden_gradient),
        relative_error(actual.weight_gradient, exact.weight_gradient),
    )


@supports
@alphas
@pytest.mark.parametrize("noise", [0.3, 0.03, 0.003])
def test_bf16_gradients_are_within_0_4_percent_and_the_loss_within_1e_5(
    near: dict[tuple[float, torch.dtype], Inputs], noise: float, alpha: float, normalize: bool, support: str
) -> None:
    loss, hidden, weight = errors(
        near[noise, torch.bfloat16], alpha=alpha, normalize=normalize, support=SUPPORTS[support]
    )
    assert loss <= 1e-5
    assert hidden <= 4e-3
    assert weight <= 4e-3


@supports
@alphas
def test_fp32_gradients_are_within_1e_4(
    near: dict[tuple[float, torch.dtype], Inputs], alpha: float, normalize: bool, support: str
) -> None:
    loss, hidden, weight = errors(
        near[0.03, torch.float32], alpha=alpha, normalize=normalize, support=SUPPORTS[support]
    )
    assert loss <= 1e-5
    assert hidden <= 1e-4
    assert weight <= 1e-4


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.15, 0.08, 0.03, 0.01])
@alphas
def test_no_row_is_off_whatever_the_size_of_its_loss(noise: float, alpha: float, normalize: bool) -> None:
    """Across the sizes where an implementation may change its way of summing, only rounding logits to float32 shows."""
    inputs = make_inputs(48, 64, 4001, noise=noise, dtype=torch.bfloat16)
    arguments = make_arguments(inputs, "JSD", alpha=alpha, normalize=normalize, token_weights=None, reduction="none")
    exact = run_reference(**arguments, upstream=torch.ones(48)).output.loss
    actual = linear_divergence(**arguments).loss.detach()
    hidden, weight, teacher_hidden = (tensor.detach().float() for tensor in inputs[:3])
    log_p, log_q = ((side @ weight.T).double().log_softmax(-1) for side in (hidden, teacher_hidden))
    rounded = divergence(log_p, log_q, alpha, normalize)
    off, unavoidable = ((values - exact).abs() / exact for values in (actual, rounded))
    assert unavoidable.isfinite().all()
    assert off.max() <= 2 * unavoidable.max() + 1e-6


def test_logits_rounded_to_bf16_would_miss_these_limits(near: dict[tuple[float, torch.dtype], Inputs]) -> None:
    arguments = make_arguments(near[0.03, torch.bfloat16], "reverse KL")
    exact, naive = run_reference(**arguments), run_reference(**arguments, naive=True)
    assert naive.hidden_gradient is not None
    assert exact.hidden_gradient is not None
    assert relative_error(naive.hidden_gradient, exact.hidden_gradient) > 0.1
    assert relative_error(naive.output.loss, exact.output.loss) > 0.01


@alphas
@pytest.mark.parametrize("noise", [0.3, 0.03, 0.003, 0.0003])
def test_from_given_float32_logits_every_row_keeps_its_digits(noise: float, alpha: float, normalize: bool) -> None:
    """No product is rounded here: what is off is the summation, which has to be of second order in the noise."""
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(32, 4001, generator=generator)
    teacher = student + noise * torch.randn(32, 4001, generator=generator)
    rows = logit_divergence(student, teacher, alpha=alpha, normalize=normalize, reduction="none").loss
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (student, teacher))
    exact = divergence(log_p, log_q, alpha, normalize)
    assert_within(rows, exact, 2e-6 * exact)


@alphas
@pytest.mark.parametrize("levels", [(0, 0), (48, -46), (48, -60), (-60, 48), (-120, 90)])
def test_logits_of_any_level_lose_nothing(levels: tuple[int, int], alpha: float, normalize: bool) -> None:
    """What is added to all logits of a side changes nothing; one side's sum of e^z may be 1e-45 of the other's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (5 * torch.randn(8, 300, generator=generator) + level for level in levels)
    assert_as_in_float64(student, teacher, alpha=alpha, normalize=normalize)


@alphas
def test_a_small_part_of_a_small_sum_does_not_underflow(alpha: float, normalize: bool) -> None:
    """The sums lie above what float32 has, 1e-29, and the part that the other side favours below it, 1e-44."""
    logits = torch.tensor([[-67.0, -102.0]])
    assert_as_in_float64(logits, logits.flip(1), alpha=alpha, normalize=normalize)


def assert_as_in_float64(student: Tensor, teacher: Tensor, **options: Any) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        logits = student.to(dtype, copy=True).requires_grad_()
        output = logit_divergence(logits, teacher.to(dtype), **options)
        output.loss.backward()
        assert logits.grad is not None
        results.append((output.per_token, logits.grad))
    for actual, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, exact, rtol=2e-5, atol=1e-5, check_dtype=False)
