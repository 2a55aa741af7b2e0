"""The passes as `torch.library` operators: opaque to `torch.compile`, with fakes and autograd formulas.

An operator takes tensors and plain scalars and returns tensors, so `Objective` travels as words, floats and ints, a
tensor that is not there comes back empty, and `gradients` lists what the forward pass forms ("h", "w", "b": hidden
states, weight, bias). Autograd scales what the forward pass left, or, where `gradients` is empty, runs the pass again.

The operators' namespace is the package's name: a copy of this package under another name, such as one loaded from a
Hub, has operators of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from ..types import Gradients, Objective, Operands, Wanted
from ..validation import check_values
from .passes import Setting, Values, linear_divergence_pass, logit_divergence_pass, logprob_pass, topk_pass

# The first part of its dotted name: a copy may have another one.
NAMESPACE = __name__.partition(".")[0]
OPERANDS = tuple(Operands.__dataclass_fields__)
OPERANDS_SCHEMA = "Tensor " + ", Tensor? ".join(OPERANDS)


LEADING_SCHEMA = OPERANDS_SCHEMA + ", str objective, float[] numbers, int[] counts"
LEADING = len(OPERANDS) + 3
# How a pass over a head is run. The group is that over which the head is sharded, "" and no shards where it is not.
MACHINE_SCHEMA = "str backend, int workspace_bytes, str process_group, int[] shards"


def _split(arguments: tuple[Any, ...]) -> tuple[Operands, Objective, tuple[Any, ...]]:
    """What every operator begins with, and its own arguments after that."""
    operands = Operands(**dict(zip(OPERANDS, arguments, strict=False)))
    return operands, Objective.decode(*arguments[len(OPERANDS) : LEADING]), arguments[LEADING:]


def _vocab(objective: Objective, machine: Sequence[Any]) -> int:
    """The size of the whole vocabulary where it is said, 0 where it is the head's own."""
    return objective.vocab_size or sum(machine[-1])


def _wanted(letters: str) -> Wanted:
    return Wanted(hidden="h" in letters, weight="w" in letters, bias="b" in letters)


def _letters(needed: tuple[bool, ...]) -> str:
    return "".join(letter for letter, is_needed in zip("hwb", needed, strict=True) if is_needed)


def _where_needed(results: tuple[Tensor, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
    return [result if is_needed else None for result, is_needed in zip(results, needed, strict=True)]


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


ValueTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
GradientTensors = tuple[Tensor, Tensor, Tensor]


def _value_tensors(values: Values, reduction: str) -> ValueTensors:
    rows = values.per_token
    loss = rows.clone() if reduction == "none" else rows.sum() / values.denominator
    student_logprobs, teacher_logprobs, student_entropy, teacher_entropy = (_or_empty(v, rows) for v in values[1:5])
    active = torch.tensor(values.active_tokens, device=rows.device)
    return loss, rows, student_logprobs, teacher_logprobs, student_entropy, teacher_entropy, active


def _fake_value_tensors(operands: Operands, reduction: str) -> ValueTensors:
    hidden = operands.student_hidden
    rows, none = hidden.new_empty(hidden.shape[0], dtype=operands.dtype), hidden.new_empty(0, dtype=operands.dtype)
    loss = torch.empty_like(rows) if reduction == "none" else rows.new_empty(())
    targets, cached = operands.target_ids is not None, operands.teacher_ids is not None
    return (
        loss,
        rows,
        torch.empty_like(rows if targets else none),
        torch.empty_like(rows if targets and not cached else none),
        torch.empty_like(rows),
        torch.empty_like(none if cached else rows),
        hidden.new_empty((), dtype=torch.int64),
    )


def _gradient_tensors(gradients: Gradients, operands: Operands) -> GradientTensors:
    hidden, weight = operands.student_hidden, operands.weight
    return _or_empty(gradients.hidden, hidden), _or_empty(gradients.weight, weight), _or_empty(gradients.bias, weight)


def _fake_gradient_tensors(operands: Operands, letters: str) -> GradientTensors:
    hidden, weight, bias = operands.student_hidden, operands.weight, operands.student_bias
    return (
        torch.empty_like(hidden) if "h" in letters else hidden.new_empty(0),
        weight.new_empty(weight.shape) if "w" in letters else weight.new_empty(0),
        torch.empty_like(bias) if "b" in letters and bias is not None else weight.new_empty(0),
    )


@custom_op(
    f"{NAMESPACE}::divergence",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, str reduction, str gradients, float normalizer, {MACHINE_SCHEMA}, "
    "bool raise_on_nonfinite) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def divergence(*arguments: Any) -> tuple[Tensor, ...]:
    """The seven value tensors and the three gradient tensors of `linear_divergence_pass`."""
    operands, objective, options = _split(arguments)
    reduction, gradients, normalizer, *machine, raise_on_nonfinite = options
    # A normalizer that is given has been found positive, and the weights' own sum says nothing.
    check_values(operands, _vocab(objective, machine), "sum" if normalizer else reduction)
    setting = replace(
        Setting(*machine), reduction=reduction, normalizer=normalizer, raise_on_nonfinite=raise_on_nonfinite
    )
    values, formed = linear_divergence_pass(operands, objective, setting, _wanted(gradients))
    return *_value_tensors(values, reduction), *_gradient_tensors(formed, operands)


@divergence.register_fake
def _(*arguments: Any) -> Any:
    operands, _, (reduction, gradients, *_) = _split(arguments)
    return *_fake_value_tensors(operands, reduction), *_fake_gradient_tensors(operands, gradients)


@custom_op(
    f"{NAMESPACE}::divergence_backward",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, Tensor upstream, str reduction, str gradients, float normalizer, {MACHINE_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)
def divergence_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients for an upstream gradient (N,) or (), found by a second pass."""
    operands, objective, (upstream, reduction, gradients, normalizer, *machine) = _split(arguments)
    per_row = upstream.to(operands.dtype).expand(operands.student_hidden.shape[0])
    setting = replace(Setting(*machine), reduction=reduction, normalizer=normalizer)
    _, formed = linear_divergence_pass(operands, objective, setting, _wanted(gradients), per_row)
    return _gradient_tensors(formed, operands)


@divergence_backward.register_fake
def _(*arguments: Any) -> Any:
    operands, _, (_, _, gradients, *_) = _split(arguments)
    return _fake_gradient_tensors(operands, gradients)


@custom_op(f"{NAMESPACE}::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, upstream: Tensor, source: Tensor) -> Tensor:
    """`gradient` times `upstream`, () or one factor a row. `source` ties the result to the graph, see the end."""
    factor = upstream if upstream.dim() == 0 else upstream[:, None]
    return gradient * factor.to(gradient.dtype)


def _scaled_in_place(gradient: Tensor, upstream: Tensor, source: Tensor) -> Tensor:
    """`scale_gradient` without a second tensor of the head's size; not even a pass where the factor is seen to be 1."""
    if upstream.dim() == 0 and upstream.device.type == "cpu" and float(upstream) == 1.0:
        return gradient
    return gradient.mul_((upstream if upstream.dim() == 0 else upstream[:, None]).to(gradient.dtype))


def _graph_ends_here(upstream: Tensor) -> bool:
    """Whether this backward is the last to see what was saved: eager, no retain_graph, no create_graph."""
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    return type(upstream) is Tensor and not keeps_graph and not torch.is_grad_enabled()


@scale_gradient.register_fake
def _(gradient: Tensor, upstream: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _divergence_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    operands, _, (*options, _) = _split(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.objective, ctx.options = inputs[len(OPERANDS) : LEADING], options
    if options[1]:
        ctx.save_for_backward(operands.student_hidden, operands.student_weight, operands.student_bias, *output[7:])
    else:
        ctx.save_for_backward(*inputs[: len(OPERANDS)])


def _divergence_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    reduction, in_forward, normalizer, *machine = ctx.options
    needed = ctx.needs_input_grad[:3]
    formed: list[Tensor | None] = [None, None, None]
    if upstream is not None and in_forward:
        hidden, weight, bias, *gradients = ctx.saved_tensors
        scale = _scaled_in_place if _graph_ends_here(upstream) else scale_gradient
        for place, (source, gradient) in enumerate(zip((hidden, weight, bias), gradients, strict=True)):
            if needed[place]:
                formed[place] = scale(gradient, upstream, source)
    elif upstream is not None:
        options = (reduction, _letters(needed), normalizer, *machine)
        results = divergence_backward(*ctx.saved_tensors, *ctx.objective, upstream, *options)
        formed = _where_needed(results, needed)
    return *formed, *[None] * (len(ctx.needs_input_grad) - 3)


register_autograd(divergence, _divergence_gradients, setup_context=_divergence_context)


@custom_op(
    f"{NAMESPACE}::logit_divergence",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, str reduction, str backend, int workspace_bytes, "
    "bool raise_on_nonfinite) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def logit_divergence(*arguments: Any) -> tuple[Tensor, ...]:
    """The seven value tensors of `logit_divergence_pass`; both sides' logits stand where hidden states would."""
    operands, objective, (reduction, backend, workspace_bytes, raise_on_nonfinite) = _split(arguments)
    check_values(operands, objective.vocab_size, reduction)
    setting = Setting(backend, workspace_bytes, reduction=reduction, raise_on_nonfinite=raise_on_nonfinite)
    values, _ = logit_divergence_pass(operands, objective, setting)
    return _value_tensors(values, reduction)


@logit_divergence.register_fake
def _(*arguments: Any) -> Any:
    operands, _, (reduction, *_) = _split(arguments)
    return _fake_value_tensors(operands, reduction)


@custom_op(
    f"{NAMESPACE}::logit_divergence_backward",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, Tensor upstream, str reduction, str backend, int workspace_bytes) -> Tensor",
)
def logit_divergence_backward(*arguments: Any) -> Tensor:
    """The gradient of the student's logits (N, V)."""
    operands, objective, (upstream, reduction, backend, workspace_bytes) = _split(arguments)
    per_row = upstream.to(operands.dtype).expand(operands.student_hidden.shape[0])
    setting = Setting(backend, workspace_bytes, reduction=reduction)
    _, gradient = logit_divergence_pass(operands, objective, setting, per_row)
    return _or_empty(gradient, operands.student_hidden)


@logit_divergence_backward.register_fake
def _(*arguments: Any) -> Any:
    return torch.empty_like(arguments[0])


def _logit_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, (*options, _) = _split(inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.objective, ctx.options = inputs[len(OPERANDS) : LEADING], options
    ctx.save_for_backward(*inputs[: len(OPERANDS)])


def _logit_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    formed = None
    if upstream is not None:
        formed = logit_divergence_backward(*ctx.saved_tensors, *ctx.objective, upstream, *ctx.options)
    return formed, *[None] * (len(ctx.needs_input_grad) - 1)


register_autograd(logit_divergence, _logit_gradients, setup_context=_logit_context)


@custom_op(
    f"{NAMESPACE}::logprobs",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, {MACHINE_SCHEMA}) -> (Tensor, Tensor)",
)
def logprobs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,), empty without targets, and entropies (N,)."""
    operands, objective, machine = _split(arguments)
    check_values(operands, _vocab(objective, machine), "none")
    found, entropy, _ = logprob_pass(operands, objective, Setting(*machine), Wanted())
    return _or_empty(found, entropy), entropy


@logprobs.register_fake
def _(*arguments: Any) -> Any:
    operands, *_ = _split(arguments)
    rows = operands.student_hidden.new_empty(operands.student_hidden.shape[0], dtype=operands.dtype)
    return torch.empty_like(rows if operands.target_ids is not None else rows[:0]), rows


@custom_op(
    f"{NAMESPACE}::logprobs_backward",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, Tensor? grad_logprobs, Tensor? grad_entropy, str gradients, {MACHINE_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor)",
)
def logprobs_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients for upstream ones (N,) of either output."""
    operands, objective, options = _split(arguments)
    grad_logprobs, grad_entropy, gradients, *machine = options
    *_, formed = logprob_pass(operands, objective, Setting(*machine), _wanted(gradients), grad_logprobs, grad_entropy)
    return _gradient_tensors(formed, operands)


@logprobs_backward.register_fake
def _(*arguments: Any) -> Any:
    operands, _, (_, _, gradients, *_) = _split(arguments)
    return _fake_gradient_tensors(operands, gradients)


def _logprobs_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.objective, ctx.options = inputs[len(OPERANDS) : LEADING], inputs[LEADING:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(OPERANDS)])


def _logprobs_gradients(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved, needed = ctx.saved_tensors, ctx.needs_input_grad[:3]
    formed: list[Tensor | None] = [None, None, None]
    if saved[OPERANDS.index("target_ids")] is None:
        grad_logprobs = None
    if grad_logprobs is not None or grad_entropy is not None:
        upstream = (grad_logprobs, grad_entropy)
        results = logprobs_backward(*saved, *ctx.objective, *upstream, _letters(needed), *ctx.options)
        formed = _where_needed(results, needed)
    return *formed, *[None] * (len(ctx.needs_input_grad) - 3)


register_autograd(logprobs, _logprobs_gradients, setup_context=_logprobs_context)


@custom_op(
    f"{NAMESPACE}::topk",
    mutates_args=(),
    schema=f"({LEADING_SCHEMA}, {MACHINE_SCHEMA}) -> (Tensor, Tensor)",
)
def topk(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Ids (N, k) and log-probabilities (N, k) of the most likely tokens."""
    operands, objective, machine = _split(arguments)
    return topk_pass(operands, objective, Setting(*machine))


@topk.register_fake
def _(*arguments: Any) -> Any:
    operands, objective, _ = _split(arguments)
    hidden, shape = operands.student_hidden, (operands.student_hidden.shape[0], objective.topk)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=operands.dtype)


def _no_second_order(ctx: Any, *upstream: Tensor | None) -> NoReturn:
    raise RuntimeError(
        "sdkernels has no second-order gradients: its gradient was formed without a graph. "
        "Call backward without create_graph=True, or use the plain PyTorch expression for this term."
    )


# Without these a gradient penalty would silently miss what goes through our gradients.
for _operator in (scale_gradient, divergence_backward, logit_divergence_backward, logprobs_backward):
    register_autograd(_operator, _no_second_order)
