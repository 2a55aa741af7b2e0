"""A gradient in 16 bits times a loss scale: rounded once, when the upstream gradient is known, and in float16's range.

Mixed precision multiplies the loss by up to 2^16 before backward, so that what is small in float16 does not vanish. A
gradient that was formed with the loss must not have lost it by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.losses import FusedLinearDivergence
from sdkernels import LogitTransform, TopK, linear_divergence, linear_logprobs, logit_divergence
from sdkernels.live_bytes import LiveBytes
from sdkernels.testing import (
    Run,
    assert_within_reference_error,
    make_arguments,
    make_inputs,
    relative_error,
    run_operation,
    run_reference,
)
from sdkernels.tile.tiling import MOST_ROWS
from tests.apple import apple_gpu

DTYPES = [torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# 2^16 is GradScaler's first.
scales = pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**16, 2.0**-10])
passes = pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
GRADIENTS = ("hidden_gradient", "weight_gradient", "bias_gradient")
CASES: dict[str, dict[str, Any]] = {
    "forward KL": {"alpha": 0.0},
    "JSD": {"alpha": 0.5},
    "reverse KL": {"alpha": 1.0},
    "reverse KL, near teacher": {"alpha": 1.0, "token_weights": None},
    "JSD, top-k": {"alpha": 0.5, "support": TopK(5)},
}


def arguments_of(case: str, dtype: torch.dtype, scale: float) -> dict[str, Any]:
    noise = 1e-3 if "near" in case else 0.1
    inputs = make_inputs(40, 16, 501, masked=0.2, dtype=dtype, noise=noise, logit_std=1.0)
    bias = torch.zeros(501, dtype=dtype, requires_grad=True)
    changes = CASES[case] | {"student_head": LogitTransform(bias=bias), "upstream": torch.tensor(scale)}
    return make_arguments(inputs, "JSD", **changes)


def assert_rounded_once(actual: Run, exact: Run, dtype: torch.dtype) -> None:
    """Holds gradients to twice the error of the exact ones rounded to `dtype`, which no run in it can do without."""
    for name in GRADIENTS:
        gradient, truth = getattr(actual, name), getattr(exact, name)
        assert gradient.dtype == dtype
        assert_within_reference_error(gradient, truth, truth.to(dtype), name=name)


def assert_as_good_as_plain(actual: Run, exact: Run, arguments: dict[str, Any]) -> None:
    plain = run_reference(**arguments, naive=True)
    for name in GRADIENTS:
        assert_within_reference_error(*(getattr(run, name) for run in (actual, exact, plain)), name=name)


@pytest.mark.usefixtures("each_cpu_backend")
@dtypes
@scales
@passes
@pytest.mark.parametrize("case", CASES)
def test_a_loss_scale_costs_no_digits(dtype: torch.dtype, scale: float, gradient: str, case: str) -> None:
    arguments = arguments_of(case, dtype, scale)
    actual, exact = run_operation(linear_divergence, **arguments, gradient=gradient), run_reference(**arguments)
    assert_as_good_as_plain(actual, exact, arguments)
    assert_rounded_once(actual, exact, dtype)


@pytest.mark.usefixtures("mixed_products")
@dtypes
@passes
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
@pytest.mark.parametrize("case", ["reverse KL", "JSD, top-k"])
def test_a_tile_keeps_its_digits_in_products_of_16_bits(
    dtype: torch.dtype, scale: float, gradient: str, case: str
) -> None:
    arguments = arguments_of(case, dtype, scale) | {"reduction": "sum"}
    # Small rows, of which a float16 tile would have nothing.
    arguments["token_weights"] = arguments["token_weights"] * 1e-4
    actual = run_operation(linear_divergence, **arguments, gradient=gradient, backend="torch")
    exact = run_reference(**arguments)
    for name in GRADIENTS:
        truth = getattr(exact, name)
        # The roundings of tile and hidden rows come beside the result's own.
        assert relative_error(getattr(actual, name), truth) <= 4 * relative_error(truth.to(dtype), truth), name


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
@pytest.mark.parametrize("chunks", [2, 10])
def test_a_float16_head_costs_one_host_read_a_call(chunks: int, gradient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those of a bfloat16 head, however many chunks there are."""
    monkeypatch.setitem(MOST_ROWS, "mps", 40 // chunks)

    def reads(dtype: torch.dtype, frozen: bool = False) -> int:
        with apple_gpu() as gpu:
            inputs = make_inputs(40, 16, 501, dtype=dtype, logit_std=1.0, device="mps")
            inputs.student_weight.requires_grad_(not frozen)
            arguments = make_arguments(inputs, "JSD", gradient=gradient, upstream=torch.tensor(2.0, device="mps"))
            gpu.reads = 0
            run_operation(linear_divergence, **arguments)
            return gpu.reads

    assert reads(torch.float16) - reads(torch.bfloat16) == 1
    assert reads(torch.float16, frozen=True) == reads(torch.bfloat16, frozen=True)


@pytest.mark.usefixtures("mixed_products")
@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
def test_rows_of_very_different_sizes_keep_their_digits(
    rising: bool, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk's tile says nothing of another's: the weights of the rows span 2^40, as their tiles' entries do 2^6."""
    monkeypatch.setitem(MOST_ROWS, "cpu", 1)
    arguments = arguments_of("reverse KL", torch.float16, 2.0**16) | {"reduction": "sum"}
    sizes = 2.0 ** torch.linspace(-24, 16, 40)
    arguments["token_weights"] = sizes if rising else sizes.flip(0)
    arguments["upstream"] = torch.tensor(2.0**-12)
    actual = run_operation(linear_divergence, **arguments, gradient=gradient, backend="torch")
    exact = run_reference(**arguments)
    for name in GRADIENTS:
        truth = getattr(exact, name)
        assert relative_error(getattr(actual, name), truth) <= 4 * relative_error(truth.to(torch.float16), truth), name
    by_row = (actual.hidden_gradient.double() - exact.hidden_gradient).norm(dim=1) / exact.hidden_gradient.norm(dim=1)
    rounded = exact.hidden_gradient.to(torch.float16).double() - exact.hidden_gradient
    allowed = 4 * rounded.norm(dim=1) / exact.hidden_gradient.norm(dim=1) + 2**-10
    assert (by_row <= allowed)[sizes > 2.0**-6 if rising else sizes.flip(0) > 2.0**-6].all()


@pytest.mark.usefixtures("mixed_products")
def test_rows_without_weight_do_not_set_the_range_of_float16() -> None:
    arguments = arguments_of("reverse KL", torch.float16, 1.0)
    with torch.no_grad():
        arguments["student_hidden"][arguments["token_weights"] == 0] = 6e4
    actual, exact = run_operation(linear_divergence, **arguments, backend="torch"), run_reference(**arguments)
    for name in GRADIENTS:
        truth = getattr(exact, name)
        assert relative_error(getattr(actual, name), truth) <= 4 * relative_error(truth.to(torch.float16), truth), name


@pytest.mark.usefixtures("mixed_products")
def test_what_is_not_finite_stays_so_in_a_float16_tile() -> None:
    arguments = arguments_of("reverse KL, near teacher", torch.float16, 1.0)
    with torch.no_grad():
        arguments["student_hidden"][3] = torch.nan
    actual = run_operation(linear_divergence, **arguments, backend="torch")
    assert actual.weight_gradient.isnan().all()
    assert actual.hidden_gradient.isnan().any(1).nonzero().tolist() == [[3]]


@dtypes
def test_an_upstream_gradient_is_not_rounded_before_it_multiplies(dtype: torch.dtype) -> None:
    """1.0 + 3 · 2^-10 is 1.0 in bfloat16: all of a gradient would be off by 0.3 %."""
    inputs = make_inputs(40, 16, 501, dtype=dtype)
    inputs.student_weight.requires_grad_(False)
    upstream = torch.full((40,), 1 + 3 * 2.0**-10)
    rows = make_arguments(inputs, "JSD", reduction="none", upstream=upstream)
    actual, exact = run_operation(linear_divergence, **rows), run_reference(**rows)
    assert abs(float((actual.hidden_gradient / exact.hidden_gradient).nanmean()) - 1) < 2.0**-11


@pytest.mark.usefixtures("each_cpu_backend")
@dtypes
@scales
def test_siblings_take_a_loss_scale_too(dtype: torch.dtype, scale: float) -> None:
    """Their gradients are formed in backward; `retain_graph` has those of the forward pass multiplied out of place."""
    inputs = make_inputs(40, 16, 501, dtype=dtype, noise=0.1)

    def gradients(loss: Callable[[Tensor, Tensor], Tensor], to: torch.dtype) -> list[Tensor]:
        leaves = [side.detach().to(to).requires_grad_() for side in inputs[:2]]
        (loss(*leaves) * scale).backward(retain_graph=True)
        return [leaf.grad for leaf in leaves]

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        # Of leaves, so that it is the logits' own gradient that the scale is in.
        return logit_divergence(hidden @ weight.T, inputs.teacher_hidden.to(weight.dtype) @ weight.detach().T).loss

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, inputs.target_ids).logprobs.mean()

    def retained(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_divergence(hidden, weight, inputs.teacher_hidden.to(weight.dtype)).loss

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        return log_p.gather(1, inputs.target_ids[:, None]).mean()

    for loss, other in ((logits, logits), (logprobs, plain), (retained, logits)):
        exact = gradients(loss, torch.float64)
        for name, gradient, truth, naive in zip(
            ("hidden", "weight"), gradients(loss, dtype), exact, gradients(other, dtype), strict=True
        ):
            assert_within_reference_error(gradient, truth, naive, name=f"{loss.__name__} {name}")


def test_grad_scaler_steps_as_without_it() -> None:
    """torch.amp on a CPU: under autocast, a float32 head, and the first scale of 2^16 is not halved."""
    inputs = make_inputs(40, 16, 501, noise=0.1)
    steps = []
    for enabled in (True, False):
        weight = inputs.student_weight.detach().clone().requires_grad_()
        hidden = inputs.student_hidden.detach().clone().requires_grad_()
        optimizer = torch.optim.SGD([hidden, weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled)
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            loss = FusedLinearDivergence(alpha=0.5)(hidden, weight, inputs.teacher_hidden).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not enabled or scaler.get_scale() == 2.0**16
        steps.append((hidden.detach() - inputs.student_hidden, weight.detach() - inputs.student_weight))
    for scaled, exact in zip(*steps, strict=True):
        assert relative_error(scaled, exact) < 5e-3  # of inputs rounded to float16


def test_float16_holds_a_float32_gradient_until_backward_and_no_other_dtype_does() -> None:
    for dtype, held in ((torch.float16, 4), (torch.bfloat16, 2), (torch.float32, 4)):
        inputs = make_inputs(64, 16, 20011, dtype=dtype)
        with LiveBytes(uncounted_bytes=[64 * 16 * held]) as probe:
            loss = linear_divergence(*inputs[:3], workspace_mb=24).loss
            assert probe._live_bytes - 20011 * 16 * held < 1 << 12, dtype
        loss.backward()
        assert inputs.student_weight.grad.dtype == inputs.student_hidden.grad.dtype == dtype


@passes
def test_a_compiled_call_scales_alike(gradient: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    arguments = arguments_of("JSD", torch.float16, 2.0**16)
    actual = run_operation(compiled, **arguments, gradient=gradient)
    exact = run_operation(linear_divergence, **arguments, gradient=gradient)
    for name in GRADIENTS:
        torch.testing.assert_close(getattr(actual, name), getattr(exact, name), rtol=2e-3, atol=0)
