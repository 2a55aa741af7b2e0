"""The operations inside PyTorch's machinery: compile, autocast, checkpointing, modes, higher orders, threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sdkernels import LogitTransform, linear_divergence, linear_logprobs, linear_topk, logit_divergence
from sdkernels.testing import OBJECTIVES, Inputs, make_arguments, make_inputs, run_operation

gradients = pytest.mark.parametrize("gradient", ["in_forward", "recompute"])


class _Recorder(TorchDispatchMode):
    """The calls of our operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sdkernels":
            self.calls.append((func, args))
        return func(*args, **kwargs or {})


def small() -> Inputs:
    return make_inputs(5, 4, 11, masked=0.2)


def operator_calls() -> list[Any]:
    """One call of every operator that we register, and of `divergence` with several optional arguments."""
    inputs = small()
    bias = torch.linspace(-1, 1, 11).requires_grad_()
    head = LogitTransform(bias=bias, softcap=5.0)
    with _Recorder() as recorder:
        for objective in ("forward KL", "JSD, student top-k without tail", "trust region", "JSD, cached teacher"):
            for gradient in ("in_forward", "recompute"):
                arguments = make_arguments(inputs, objective, student_head=head, gradient=gradient)
                linear_divergence(**arguments).loss.backward(retain_graph=True)
        arguments = make_arguments(inputs, "JSD, importance clip", reduction="none")
        linear_divergence(**arguments).loss.sum().backward()
        logits = (inputs.student_hidden @ inputs.student_weight.T).detach().requires_grad_()
        logit_divergence(logits, logits.detach().flip(0)).loss.backward()
        for ids in (inputs.target_ids, None):
            output = linear_logprobs(inputs.student_hidden, inputs.student_weight, ids, head=head)
            output.entropy.sum().backward()
        linear_topk(inputs.student_hidden, inputs.student_weight, 3)
    return [pytest.param(func, args, id=f"{func.name()}-{i}") for i, (func, args) in enumerate(recorder.calls)]


def test_every_operator_is_among_the_checked_ones() -> None:
    # Those of compiled products are called inside the others, without a graph, and write into what they are given.
    inner = "sdkernels::native_"
    names = torch._C._dispatch_get_all_op_names()
    registered = {name for name in names if name.startswith("sdkernels::") and not name.startswith(inner)}
    assert registered == {parameter.values[0].name() for parameter in operator_calls()}
    assert len(registered) >= 5


def test_passes_are_kept_out_of_cuda_graphs() -> None:
    for parameter in operator_calls():
        func = parameter.values[0]
        assert (torch.Tag.cudagraph_unsafe in func.tags) == (func.name() != "sdkernels::scale_gradient"), func


@pytest.mark.parametrize(("func", "args"), operator_calls())
def test_operators_pass_opcheck(func: Any, args: tuple[Any, ...]) -> None:
    # Operators that are called in backward refuse a gradient of their own (below), and a top-k has none.
    differentiable = func.name().removeprefix("sdkernels::") in ("divergence", "logit_divergence", "logprobs")

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone().requires_grad_(value.requires_grad and differentiable)

    torch.library.opcheck(func, tuple(leaf(value) for value in args))


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual[1:], expected[1:])
    torch.testing.assert_close(actual.output[:-1], expected.output[:-1])


@gradients
@pytest.mark.parametrize("objective", ["JSD", "forward KL, student top-k", "sampled", "JSD, cached teacher"])
def test_a_compiled_call_is_one_graph_and_the_same(objective: str, gradient: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    arguments = make_arguments(small(), objective, gradient=gradient, student_head=LogitTransform(softcap=5.0))
    assert_same(run_operation(compiled, **arguments), run_operation(linear_divergence, **arguments))


def test_a_compiled_call_takes_other_numbers_of_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    for rows in (5, 8, 13, 21):
        arguments = make_arguments(make_inputs(rows, 4, 11), "JSD")
        assert_same(run_operation(compiled, **arguments), run_operation(linear_divergence, **arguments))


def test_a_compiled_call_takes_other_options() -> None:
    """A schedule of alpha or temperature: from the second value on torch.compile sees a symbolic number."""
    torch._dynamo.reset()
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    for alpha, temperature in ((0.5, 1.0), (0.6, 1.0), (0.7, 1.5), (0.8, 1.7)):
        arguments = make_arguments(small(), "JSD", alpha=alpha, temperature=temperature)
        assert_same(run_operation(compiled, **arguments), run_operation(linear_divergence, **arguments))


def test_inductor_compiles_it_with_what_is_around_it() -> None:
    torch._dynamo.reset()
    inputs = small()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        output = linear_divergence(torch.tanh(hidden), weight, inputs.teacher_hidden, alpha=0.5)
        return 2 * output.loss + 0 * output.student_entropy.sum()

    leaves = (inputs.student_hidden, inputs.student_weight)
    expected = torch.autograd.grad(step(*leaves), leaves)
    loss = torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


@gradients
def test_autocast_computes_in_its_dtype_and_returns_the_leaves_dtype(gradient: str) -> None:
    inputs = make_inputs(9, 15, 41)
    arguments = make_arguments(inputs, "JSD", gradient=gradient)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = run_operation(linear_divergence, **arguments)
    assert run.output.loss.dtype == torch.float32
    assert run.hidden_gradient is not None
    assert run.weight_gradient is not None
    assert run.hidden_gradient.dtype == run.weight_gradient.dtype == torch.float32
    rounded = {n: t.detach().bfloat16() for n, t in arguments.items() if n.startswith(("student", "teacher_hidden"))}
    for name in ("student_hidden", "student_weight"):
        rounded[name].requires_grad_()
    expected = run_operation(linear_divergence, **arguments | rounded)
    torch.testing.assert_close(run.output.loss, expected.output.loss)
    torch.testing.assert_close(run.hidden_gradient, expected.hidden_gradient, check_dtype=False)
    torch.testing.assert_close(run.weight_gradient, expected.weight_gradient, check_dtype=False)


def test_between_forward_and_backward_nothing_of_the_heads_size_is_kept_but_its_gradient() -> None:
    """Under autocast a head is a copy in 16 bits, which nothing else keeps alive."""
    inputs = make_inputs(9, 15, 41)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16), saved:
        loss = linear_divergence(**make_arguments(inputs, "JSD")).loss
    assert sum(tensor.shape == inputs.student_weight.shape for tensor in kept) == 1
    loss.backward()
    assert inputs.student_weight.grad is not None


@gradients
def test_activation_checkpointing_gives_the_same_gradients(gradient: str) -> None:
    arguments = make_arguments(small(), "JSD", gradient=gradient)

    def checkpointed(hidden: Tensor, weight: Tensor, **rest: Any) -> Any:
        def block(states: Tensor, head: Tensor) -> Any:
            return linear_divergence(torch.tanh(states), head, **rest)

        return checkpoint(block, hidden, weight, use_reentrant=False)

    def plain(hidden: Tensor, weight: Tensor, **rest: Any) -> Any:
        return linear_divergence(torch.tanh(hidden), weight, **rest)

    assert_same(run_operation(checkpointed, **arguments), run_operation(plain, **arguments))


def differentiate_twice(value: Tensor, leaf: Tensor) -> None:
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    torch.autograd.grad(first.square().sum(), leaf)


@gradients
@pytest.mark.parametrize("which", ["student_hidden", "student_weight"])
def test_a_second_order_gradient_is_refused_by_name(gradient: str, which: str) -> None:
    inputs = small()
    loss = linear_divergence(**make_arguments(inputs, "JSD", gradient=gradient)).loss
    with pytest.raises(RuntimeError, match="second-order"):
        differentiate_twice(loss, getattr(inputs, which))


def test_no_operation_has_second_order_gradients() -> None:
    inputs = small()
    hidden, weight = inputs.student_hidden, inputs.student_weight
    logits = (hidden @ weight.T).detach().requires_grad_()
    for leaf, value in (
        (hidden, linear_logprobs(hidden, weight, inputs.target_ids).entropy.sum()),
        (logits, logit_divergence(logits, logits.detach().flip(0)).loss),
    ):
        with pytest.raises(RuntimeError, match="second-order"):
            differentiate_twice(value, leaf)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_gradients_the_values_are_the_same(objective: str, mode: Any) -> None:
    arguments = make_arguments(small(), objective)
    expected = linear_divergence(**arguments)
    with mode():
        actual = linear_divergence(**arguments)
    assert not actual.loss.requires_grad
    for value, same in zip(actual[:-1], expected[:-1], strict=True):
        assert (value is None) == (same is None)
        if value is not None:
            torch.testing.assert_close(value, same.detach())


def test_the_head_may_be_a_parameter_that_is_used_elsewhere_too() -> None:
    """Tied embeddings: the weight's gradients of both uses add up."""
    inputs = small()
    weight = torch.nn.Parameter(inputs.student_weight.detach().clone())
    hidden = weight[inputs.target_ids] + inputs.student_hidden.detach()
    linear_divergence(hidden, weight, inputs.teacher_hidden, alpha=0.5).loss.backward()
    leaf, head = hidden.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    linear_divergence(leaf, head, inputs.teacher_hidden, alpha=0.5).loss.backward()
    assert leaf.grad is not None
    assert head.grad is not None
    torch.testing.assert_close(weight.grad, head.grad.index_add(0, inputs.target_ids, leaf.grad))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaling_a_gradient_in_place_is_not_seen_from_outside(reduction: str) -> None:
    """Backward may reuse what forward formed only where nobody looks at it again."""
    inputs = small()
    inputs.student_weight.requires_grad_(False)
    leaf = inputs.student_hidden

    def gradient(factor: float, **options: Any) -> Tensor:
        return torch.autograd.grad(factor * loss, leaf, **options)[0]

    loss = linear_divergence(**make_arguments(inputs, "JSD", reduction=reduction)).loss.sum()
    once = gradient(1.0, retain_graph=True)
    twice = gradient(2.0, retain_graph=True)
    copy = once.clone()
    last = gradient(3.0)
    assert torch.equal(once, copy)
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(last, 3 * once)


def test_gradients_add_up_over_calls() -> None:
    arguments = make_arguments(small(), "JSD")
    once = run_operation(linear_divergence, **arguments)
    linear_divergence(**arguments).loss.backward()
    linear_divergence(**arguments).loss.backward()
    torch.testing.assert_close(arguments["student_weight"].grad, 2 * once.weight_gradient)


def test_a_head_given_as_a_frozen_dataclass_is_not_changed() -> None:
    bias = torch.zeros(11, requires_grad=True)
    head = LogitTransform(bias=bias, scale=0.5)
    same = replace(head)
    linear_divergence(**make_arguments(small(), "JSD", student_head=head)).loss.backward()
    assert head == same
    assert bias.grad is not None
