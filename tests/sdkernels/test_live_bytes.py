"""The logits are never materialised, the workspace is what was asked for, and no matrix product is done twice.

All of it is counted by a dispatch mode on the CPU, so the numbers are the same on every run. The first tests show that
the probe catches what it is there for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdkernels import linear_divergence, linear_logprobs, linear_topk
from sdkernels.testing import OBJECTIVES, Inputs, LiveBytes, make_arguments, make_inputs, run_operation

MIB = 1 << 20
objectives = pytest.mark.parametrize("objective", OBJECTIVES)


class _ProductsInBackward(torch.autograd.Function):
    """Walks over chunks in forward and holds all logits in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.stack([(rows @ weight.T).logsumexp(-1).sum() for rows in hidden.split(4)]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        gradient = (hidden @ weight.T).softmax(-1) * upstream
        return gradient @ weight, gradient.T @ hidden


@torch.library.custom_op("sdkernels_test::log_normalisers", mutates_args=())
def _log_normalisers(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).logsumexp(-1)


def _in_custom_operator(hidden: Tensor, weight: Tensor) -> Tensor:
    return _log_normalisers(hidden.detach(), weight.detach()).sum() + 0 * hidden.sum()


def _in_16_bits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden.bfloat16() @ weight.bfloat16().T).sum().float()


def _into_a_flat_buffer(hidden: Tensor, weight: Tensor) -> Tensor:
    flat = torch.empty(len(hidden) * len(weight))
    for i, row in enumerate(hidden.detach()):
        torch.mv(weight.detach(), row, out=flat[i * len(weight) : (i + 1) * len(weight)])
    return flat.sum() + 0 * hidden.sum()


MATERIALISING: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda hidden, weight: (hidden @ weight.T).logsumexp(-1).sum(),
    lambda hidden, weight: torch.nn.functional.linear(hidden, weight).softmax(-1).square().sum(),
    _ProductsInBackward.apply,
    _in_custom_operator,
    _in_16_bits,
    _into_a_flat_buffer,
]


@pytest.mark.parametrize("operation", MATERIALISING)
def test_the_probe_catches_whoever_materialises(operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = make_inputs(32, 4, 100)
    with LiveBytes() as probe:
        operation(inputs.student_hidden, inputs.student_weight).backward()
    assert probe.largest_numel >= 32 * 100


def test_the_probe_counts_storages_while_they_live() -> None:
    outside = torch.zeros(1000)
    with LiveBytes(uncounted_bytes=[4000]) as probe:
        outside.add_(1).view(10, 100).t()
        assert probe.peak_bytes == 0
        a = torch.ones(300)
        b = a[:200].view(2, 100).t()
        torch.add(a, 1, out=a)
        assert probe.peak_bytes == 1200
        del a, b
        c = torch.ones(100) + torch.ones(100)  # three at once
        assert probe.peak_bytes == 1200
        del c
        wide = [torch.ones(1000), torch.ones(1000)]  # one of this size is not counted
        assert probe.peak_bytes == 4000
        del wide
    assert probe.largest_numel == 1000
    assert probe.largest_origin == "aten.ones.default (1000,) torch.float32"


def test_the_probe_counts_matrix_products() -> None:
    x, y, out = torch.ones(4, 5), torch.ones(5, 6), torch.empty(4, 6)
    with LiveBytes() as probe:
        torch.mm(x, y, out=out)
        out.addmm_(x, y)
        torch.bmm(x.expand(2, 4, 5), y.expand(2, 5, 6))
        with torch.inference_mode():
            torch.nn.functional.linear(x, y.T)
        assert probe.matmul_count(4, 5, 6) == 5
        torch.mv(x, torch.ones(5))
    assert probe.matmul_count(4, 5, 1) == 31
    with LiveBytes(multiply=False) as probe:
        torch.mm(x, y, out=out)
        assert torch.equal(out, torch.zeros(4, 6))
        assert torch.equal(torch.nn.functional.linear(x, y.T), out)
    assert probe.matmul_count(4, 5, 6) == 2


def gradient_bytes(inputs: Inputs) -> list[int]:
    """Sizes that count as gradient: what the caller gets, and one float32 accumulator of the weight's shape."""
    leaves = [leaf for leaf in (inputs.student_hidden, inputs.student_weight) if leaf.requires_grad]
    sizes = [leaf.numel() * leaf.element_size() for leaf in leaves]
    if inputs.student_weight.requires_grad and inputs.student_weight.element_size() < 4:
        sizes.append(4 * inputs.student_weight.numel())
    return sizes


@pytest.fixture(scope="module")
def long() -> Inputs:
    return make_inputs(4096, 4, 32000, masked=0.05)


@objectives
def test_no_tensor_has_the_size_of_the_logits_and_the_default_workspace_holds(long: Inputs, objective: str) -> None:
    with LiveBytes(uncounted_bytes=gradient_bytes(long)) as probe:
        run_operation(linear_divergence, **make_arguments(long, objective))
    assert probe.largest_numel < 4096 * 32000, probe.largest_origin
    assert probe.peak_bytes <= 256 * MIB


@pytest.mark.parametrize("objective", ["forward KL", "JSD, student top-k without tail"])
def test_recomputation_materialises_nothing_either(long: Inputs, objective: str) -> None:
    arguments = make_arguments(long, objective, reduction="none", upstream=torch.ones(4096))
    with LiveBytes(uncounted_bytes=gradient_bytes(long)) as probe:
        run_operation(linear_divergence, **arguments)
    assert probe.largest_numel < 4096 * 32000, probe.largest_origin
    assert probe.peak_bytes <= 256 * MIB


@pytest.mark.slow
def test_a_large_vocabulary_in_bf16_stays_within_the_default_workspace() -> None:
    """N=4096, V=151936, H=896; the products are left out, which changes no allocation and saves two minutes."""
    inputs = make_inputs(4096, 896, 151936, dtype=torch.bfloat16)
    with LiveBytes(uncounted_bytes=gradient_bytes(inputs), multiply=False) as probe:
        run_operation(linear_divergence, **make_arguments(inputs, "forward KL"))
    assert probe.matmul_count(4096, 896, 151936) == pytest.approx(4)
    assert probe.largest_numel < 4096 * 151936, probe.largest_origin
    assert probe.peak_bytes <= 256 * MIB


@objectives
@pytest.mark.parametrize(
    ("dtype", "workspace_mb", "frozen"),
    [(torch.float32, 24, False), (torch.bfloat16, 32, False), (torch.bfloat16, 24, True)],
)
def test_the_workspace_is_what_was_asked_for(
    objective: str, dtype: torch.dtype, workspace_mb: int, frozen: bool
) -> None:
    inputs = make_inputs(300, 16, 20000, dtype=dtype, masked=0.2)
    inputs.student_weight.requires_grad_(not frozen)
    with LiveBytes(uncounted_bytes=gradient_bytes(inputs)) as probe:
        run_operation(linear_divergence, **make_arguments(inputs, objective, workspace_mb=workspace_mb))
    assert probe.largest_numel < 300 * 20000, probe.largest_origin
    assert probe.peak_bytes <= workspace_mb * MIB


@pytest.mark.parametrize("requires_grad", [False, True])
def test_small_inputs_are_not_materialised_either(requires_grad: bool) -> None:
    inputs = make_inputs(16, 4, 500, requires_grad=requires_grad)
    for objective in OBJECTIVES:
        with LiveBytes(uncounted_bytes=gradient_bytes(inputs)) as probe:
            run_operation(linear_divergence, **make_arguments(inputs, objective, token_weights=None))
        assert probe.largest_numel < 16 * 500, (objective, probe.largest_origin)


def test_a_budget_too_small_for_one_row_says_the_least_that_works() -> None:
    inputs = make_inputs(8, 16, 200_000)
    arguments = make_arguments(inputs, "JSD")
    with pytest.raises(ValueError, match=r"workspace_mb must be at least \d+") as caught:
        linear_divergence(**arguments, workspace_mb=1)
    found = re.search(r"at least (\d+)", str(caught.value))
    assert found is not None
    least = int(found[1])
    linear_divergence(**arguments, workspace_mb=least)
    with pytest.raises(ValueError, match=f"at least {least}"):
        linear_divergence(**arguments, workspace_mb=least - 1)


N, H, V = 64, 48, 1009


def products(**changes: Any) -> float:
    """Products of size N·V·H that a call and its backward do."""
    inputs = make_inputs(N, H, V)
    inputs.student_hidden.requires_grad_(changes.pop("hidden", True))
    inputs.student_weight.requires_grad_(changes.pop("weight", True))
    arguments = make_arguments(inputs, changes.pop("objective", "JSD"), **changes)
    with LiveBytes() as probe:
        run_operation(linear_divergence, **arguments)
    return probe.matmul_count(N, V, H)


@objectives
def test_a_trainable_head_costs_two_products_more_than_its_projections(objective: str) -> None:
    projections = {"trust region": 3}.get(objective, 1 if "cached" in objective else 2)
    assert products(objective=objective) == pytest.approx(projections + 2)


def test_gradients_that_nobody_needs_cost_nothing() -> None:
    assert products(weight=False) == pytest.approx(3)
    assert products(hidden=False) == pytest.approx(3)
    assert products(weight=False, hidden=False) == pytest.approx(2)


def test_recomputing_costs_two_projections_more() -> None:
    assert products(gradient="recompute") == pytest.approx(6)
    assert products(gradient="recompute", weight=False) == pytest.approx(5)
    assert products(reduction="none", upstream=torch.ones(N)) <= 6 + 1e-6
    assert products(reduction="none", upstream=torch.ones(N), weight=False) == pytest.approx(3)


@pytest.mark.parametrize("gradient", ["in_forward", "recompute"])
def test_rows_of_weight_zero_are_never_projected(gradient: str) -> None:
    token_weights = torch.zeros(N)
    token_weights[::4] = 1.5
    everything = products(gradient=gradient)
    assert products(gradient=gradient, token_weights=token_weights) == pytest.approx(everything / 4)
    assert products(gradient=gradient, token_weights=torch.zeros(N)) == 0


def test_by_products_cost_no_product() -> None:
    assert products(target_ids=torch.arange(N)) == pytest.approx(4)


def test_the_siblings_materialise_nothing() -> None:
    inputs = make_inputs(300, 8, 3001)
    with LiveBytes(uncounted_bytes=gradient_bytes(inputs)) as probe:
        output = linear_logprobs(inputs.student_hidden, inputs.student_weight, inputs.target_ids)
        (output.logprobs.sum() + output.entropy.sum()).backward()
    assert probe.largest_numel < 300 * 3001, probe.largest_origin
    with LiveBytes() as probe:
        linear_topk(inputs.student_hidden, inputs.student_weight, 7)
    assert probe.largest_numel < 300 * 3001, probe.largest_origin
    assert probe.matmul_count(300, 8, 3001) == pytest.approx(1)
