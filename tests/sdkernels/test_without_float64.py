"""A device without float64, as Apple's GPUs are: the same numbers, from the CPU where float64 is needed.

The device is imitated (`tests/apple.py`). Its operators are the CPU's, so results can be held to the torch backend's to
the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchgen
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

from sdkernels import linear_divergence, linear_logprobs, linear_topk, logit_divergence
from sdkernels.testing import OBJECTIVES, make_arguments, make_inputs, relative_error, run_operation, run_reference
from sdkernels.tile import head
from sdkernels.types import float64_device, in_float64
from tests.apple import AppleGpu, OnGpu, apple_gpu

TERMS = ("hidden_gradient", "weight_gradient")


@pytest.fixture
def gpu() -> Iterator[AppleGpu]:
    with apple_gpu() as gpu:
        yield gpu


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Consists of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def same_products(monkeypatch: pytest.MonkeyPatch, torch_backend: None) -> None:
    """Has the CPU's products done as another device's."""
    monkeypatch.setattr(head, "left_to_onednn", frozenset)
    monkeypatch.setattr(head, "prefers_bfloat16", lambda: False)


def inputs_of(device: str, **changes: Any) -> Any:
    return make_inputs(9, 16, 112, masked=0.3, device=device, **changes)


def test_the_imitation_refuses_what_the_device_refuses(gpu: AppleGpu) -> None:
    tensor = torch.ones(3, device="mps")
    assert tensor.device.type == (tensor + 1).device.type == "mps"
    assert tensor.cpu().device.type == "cpu"
    refused = [
        lambda: tensor.double(),
        lambda: tensor.to("cpu", torch.float64),  # PyTorch has the cast done by the device
        lambda: torch.zeros(3, dtype=torch.float64).copy_(tensor),
        lambda: torch.zeros(3, dtype=torch.float64).to("mps"),
        lambda: torch.zeros(3, dtype=torch.float64, device="mps"),
        lambda: torch.tensor([1.0], dtype=torch.float64, device="mps"),
    ]
    for refuse in refused:
        with pytest.raises(TypeError, match="float64"):
            refuse()
    with pytest.raises(RuntimeError, match="same device"):
        tensor + torch.ones(3)


def test_float64_is_had_on_the_cpu(gpu: AppleGpu) -> None:
    there, here = torch.ones(3, device="mps"), torch.ones(3)
    assert in_float64(there).device.type == in_float64(here).device.type == "cpu"
    assert in_float64(there).dtype == torch.float64
    assert float64_device(torch.device("meta")).type == "meta"
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


@pytest.mark.usefixtures("same_products")
@pytest.mark.parametrize(
    ("noise", "dtype"),
    [(3e-3, torch.float32), (1.0, torch.float16), (100.0, torch.float32)],
    ids=["near", "usual", "far"],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_results_are_those_of_the_cpu_to_the_last_bit(objective: str, noise: float, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"noise": noise, "dtype": dtype}
    expected = run_operation(linear_divergence, **make_arguments(inputs_of("cpu", **options), objective))
    with apple_gpu():
        actual = run_operation(linear_divergence, **make_arguments(inputs_of("mps", **options), objective))
        assert type(actual.output.loss) is type(actual.output.per_token) is type(actual.weight_gradient) is OnGpu
        pairs = [
            *zip(actual.output[:-1], expected.output[:-1], strict=True),
            *zip(actual[1:], expected[1:], strict=True),
        ]
        for value, other in pairs:
            assert (value is None) == (other is None)
            assert value is None or torch.equal(value.cpu(), other)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.3, 3e-3])
@pytest.mark.parametrize("objective", ["JSD", "JSD, teacher top-k"])
def test_near_teachers_keep_their_digits(objective: str, noise: float, alpha: float) -> None:
    """As `test_accuracy` asks of every device: 1e-5 of the loss, 1e-4 of the gradients."""
    inputs = make_inputs(32, 64, 2003, noise=noise)
    exact = run_reference(**make_arguments(inputs, objective, alpha=alpha))
    with apple_gpu():
        inputs = make_inputs(32, 64, 2003, noise=noise, device="mps")
        actual = run_operation(linear_divergence, **make_arguments(inputs, objective, alpha=alpha))
        assert relative_error(actual.output.loss.cpu(), exact.output.loss) <= 1e-5
        for name in TERMS:
            assert relative_error(getattr(actual, name).cpu(), getattr(exact, name)) <= 1e-4, name


@pytest.mark.usefixtures("same_products")
def test_siblings_do_without_it_too() -> None:
    def results(device: str) -> list[torch.Tensor]:
        inputs = inputs_of(device)
        hidden, weight = inputs.student_hidden, inputs.student_weight
        logits = (hidden @ weight.T).detach().requires_grad_()
        logprobs = linear_logprobs(hidden, weight, inputs.target_ids)
        loss = logit_divergence(logits, logits.detach() * 1.01, token_weights=inputs.token_weights).loss
        (loss + logprobs.logprobs.sum() + logprobs.entropy.sum()).backward()
        gradients = (logits.grad, hidden.grad, weight.grad)
        return [value.cpu() for value in (loss, *linear_topk(hidden, weight, 5)[:2], *gradients)]

    expected = results("cpu")
    with apple_gpu():
        actual = results("mps")
    assert all(map(torch.equal, actual, expected))


def test_what_needs_it_on_the_device_says_so(gpu: AppleGpu, group: dist.ProcessGroup) -> None:
    arguments = make_arguments(inputs_of("mps"), "JSD")
    with pytest.raises(ValueError, match=r"backend='reference' needs .* float64, such as the CPU, got mps:0"):
        linear_divergence(**arguments, backend="reference")
    with pytest.raises(ValueError, match=r"process_group needs .* float64, got mps:0"):
        linear_divergence(**arguments, process_group=group)


def test_the_weights_of_several_ranks_are_summed_on_the_cpu(gpu: AppleGpu, group: dist.ProcessGroup) -> None:
    arguments = make_arguments(inputs_of("mps"), "JSD")
    assert torch.equal(
        linear_divergence(**arguments, normalizer_group=group).loss.cpu(), linear_divergence(**arguments).loss.cpu()
    )


def test_every_operator_has_a_kernel_on_the_device() -> None:
    """By PyTorch's own table, which the imitation does not know."""
    table = torchgen.__path__[0] + "/packaged/ATen/native/"
    parsed = parse_native_yaml(table + "native_functions.yaml", table + "tags.yaml")
    functions = {f"aten::{function.func.name}": function for function in parsed.native_functions}
    composite = [key for key in parsed.backend_indices if key.name.startswith("Composite")]

    def has_kernel(name: str) -> bool:
        function = functions[name]
        if function.structured_delegate is not None:
            function = functions[f"aten::{function.structured_delegate}"]
        return any(parsed.backend_indices[key].has_kernel(function) for key in (DispatchKey.MPS, *composite))

    with apple_gpu() as gpu:
        for objective in OBJECTIVES:
            run_operation(linear_divergence, **make_arguments(inputs_of("mps", noise=0.01), objective))
    assert len(gpu.operators) > 30
    assert [name for name in sorted(gpu.operators) if not has_kernel(name)] == []
