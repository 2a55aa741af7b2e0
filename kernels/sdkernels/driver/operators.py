"""Registers the passes as `torch.library` operators: opaque to `torch.compile`, with fakes and autograd formulas.

An operator takes tensors and plain scalars and returns tensors, so `Objective` travels as words, floats and ints, a
tensor that is not there comes back empty, and `wanted` lists what is formed ("h", "w", "b": hidden states, weight,
bias). Autograd scales what the forward pass left, or, where that formed nothing, runs the pass again.

The operators' namespace is the package's name: a copy of this package under another name, such as one loaded from a
Hub, has operators of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from ..types import Gradients, Objective, Operands, Setting, held_dtype
from ..validation import check_values
from .backends import load_backend
from .passes import Values, divergence_pass, logprob_pass, topk_pass

# A copy of the package may have another name.
NAMESPACE = __name__.partition(".")[0]
# What every operator begins with: `Operands`, `Objective.encode()`, `Setting`.
OPERANDS, OBJECTIVE, SETTING = len(Operands._fields), 3, len(Setting._fields)
LEADING = OPERANDS + OBJECTIVE + SETTING
SCHEMA = (
    f"Tensor {', Tensor? '.join(Operands._fields)}, str objective, float[] numbers, int[] counts, str backend, "
    "int workspace_bytes, str process_group, int[] shards, str reduction, float normalizer, bool raise_on_nonfinite, "
    "float gradient_tolerance, str wanted"
)
Tensors = tuple[Tensor, ...]
# What an operator does: operands, objective, setting, wanted and, in backward, gradients of the outputs, to tensors.
Pass = Callable[..., Tensors]


def register(
    name: str, run: Pass, fake: Pass, outputs: int, backward: Pass | None = None, differentiable: int = 1
) -> Any:
    """Registers a pass as an operator, and its backward pass as another.

    The first `differentiable` outputs have gradients. The last three outputs of a pass that was told to form gradients
    are these, and autograd scales them.
    """
    operator = _operator(name, run, fake, outputs)
    if backward is None:
        return operator
    upstreams = "".join(f", Tensor? upstream_{i}" for i in range(differentiable))
    backward_operator = _operator(f"{name}_backward", backward, _fake_gradients, 3, upstreams)
    register_autograd(backward_operator, _no_second_order)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[differentiable:])
        *ctx.scalars, ctx.formed = inputs[OPERANDS:]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
        hidden, weight, bias = inputs[:3]
        if weight is not None and not weight.is_leaf and ctx.needs_input_grad[0]:
            weight = hidden  # ties the gradient to the graph as well, and the head may be a copy, made by autocast
        ctx.save_for_backward(*((hidden, weight, bias, *output[-3:]) if ctx.formed else inputs[:OPERANDS]))

    def gradients(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream, needed = upstream[:differentiable], ctx.needs_input_grad[:3]
        results: Sequence[Tensor | None] = (None, None, None)
        if any(tensor is not None for tensor in upstream):
            if ctx.formed:
                results = _scaled(ctx, upstream[0], needed)
            else:
                wanted = "".join(letter for letter, is_needed in zip("hwb", needed, strict=True) if is_needed)
                results = backward_operator(*ctx.saved_tensors, *ctx.scalars, wanted, *upstream)
        formed = (result if is_needed else None for result, is_needed in zip(results, needed, strict=True))
        return *formed, *[None] * (len(ctx.needs_input_grad) - 3)

    register_autograd(operator, gradients, setup_context=setup_context)
    return operator


def _operator(name: str, run: Pass, fake: Pass, outputs: int, more: str = "") -> Any:
    """Registers a pass and its fake, without gradients."""
    schema = f"({SCHEMA}{more}) -> ({', '.join(['Tensor'] * outputs)})"
    # A pass looks at numbers on the host (how many rows have a weight), which no CUDA graph can replay.
    options: dict[str, Any] = {"mutates_args": (), "schema": schema, "tags": (torch.Tag.cudagraph_unsafe,)}
    operator = custom_op(f"{NAMESPACE}::{name}", lambda *args: run(*_split(args)), **options)
    operator.register_fake(lambda *args: fake(*_split(args)))
    return operator


def _split(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns operands, objective, setting and what follows them."""
    operands, scalars = Operands(*arguments[:OPERANDS]), arguments[OPERANDS:]
    setting = Setting(*scalars[OBJECTIVE : OBJECTIVE + SETTING])
    return operands, Objective.decode(*scalars[:OBJECTIVE]), setting, *arguments[LEADING:]


def _no_second_order(ctx: Any, *upstream: Tensor | None) -> NoReturn:
    # Without it a gradient penalty would silently miss what goes through our gradients.
    raise RuntimeError(
        "sdkernels has no second-order gradients: its gradient was formed without a graph. "
        "Call backward without create_graph=True, or use the plain PyTorch expression for this term."
    )


@custom_op(f"{NAMESPACE}::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, upstream: Tensor, source: Tensor, dtype: str) -> Tensor:
    """Returns `gradient` times `upstream`, () or a factor a row, in `dtype`; `source` ties it to the graph.

    See `_no_second_order`. The dtype is a name ("float32"): in a backward pass inductor leaves a `torch.dtype` out of
    the call that it writes (torch 2.13).
    """
    return torch.mul(gradient, _factor(gradient, upstream), out=_empty_like(gradient, dtype))


def _empty_like(gradient: Tensor, dtype: str) -> Tensor:
    return torch.empty_like(gradient, dtype=getattr(torch, dtype))


scale_gradient.register_fake(lambda gradient, upstream, source, dtype: _empty_like(gradient, dtype))
register_autograd(scale_gradient, _no_second_order)


def _scaled(ctx: Any, upstream: Any, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Returns the gradients that the forward pass left, times `upstream`."""
    saved, backend, ends = ctx.saved_tensors, ctx.scalars[OBJECTIVE], _graph_ends_here(upstream)

    def scaled(source: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        if ends:
            return _scaled_in_place(gradient, upstream, dtype, backend)
        return scale_gradient(gradient, upstream, source, str(dtype).removeprefix("torch."))

    of_each = zip(saved[:3], saved[3:], ctx.dtypes, needed, strict=True)
    return [scaled(*one) if is_needed else None for *one, is_needed in of_each]


def _scaled_in_place(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Does it without a second tensor of the head's size, but for float16: see `held_dtype`."""
    kernels = load_backend(backend) if backend == "triton" else None
    if kernels is not None and kernels.can_scale(gradient, upstream):
        return kernels.scale_(gradient, upstream).to(dtype)
    factor = _factor(gradient, upstream)
    if isinstance(factor, Tensor) or factor != 1.0:
        torch.mul(gradient, factor, out=gradient)
    return gradient.to(dtype)


def _factor(gradient: Tensor, upstream: Tensor) -> Tensor | float:
    """Returns what `gradient` is multiplied by. A tensor () would be rounded to its 16 bits first, these are not."""
    if upstream.dim() == 0 and upstream.device.type == "cpu":
        return float(upstream)
    return upstream.reshape(-1, *[1] * (gradient.dim() - 1))


def _graph_ends_here(upstream: Tensor) -> bool:
    """True where this backward is the last to see what was saved: eager, no retain_graph, no create_graph."""
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    return type(upstream) is Tensor and not keeps_graph and not torch.is_grad_enabled()


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _vocab(objective: Objective, setting: Setting) -> int:
    """Returns the size of the whole vocabulary where it is said, 0 where it is the head's own."""
    return objective.vocab_size or sum(setting.shards)


def _value_tensors(values: Values, reduction: str) -> Tensors:
    rows = values.per_token
    loss = rows.clone() if reduction == "none" else rows.sum() / values.denominator
    active = torch.full((), values.active_tokens, device=rows.device)  # no copy from the host, which would wait
    error = _or_empty(values.gradient_error, rows)
    return loss, rows, *(_or_empty(tensor, rows) for tensor in values[1:5]), active, error


def _gradient_tensors(gradients: Gradients, operands: Operands) -> Tensors:
    hidden = operands.student_hidden
    weight = hidden if operands.student_weight is None else operands.student_weight
    return tuple(map(_or_empty, gradients, (hidden, weight, weight)))


def _fake_gradients(operands: Operands, objective: Objective, setting: Setting, wanted: str, *_: Any) -> Tensors:
    hidden, bias = operands.student_hidden, operands.student_bias
    weight = hidden if operands.student_weight is None else operands.student_weight
    return (
        torch.empty_like(hidden) if "h" in wanted else hidden.new_empty(0),
        weight.new_empty(weight.shape) if "w" in wanted else weight.new_empty(0),
        torch.empty_like(bias) if "b" in wanted and bias is not None else weight.new_empty(0),
    )


def _divergence(operands: Operands, objective: Objective, setting: Setting, wanted: str) -> Tensors:
    """Returns loss, row values, active rows and the gradients' error, eight tensors, and the three gradients."""
    # A normalizer that is given has been found positive, and the weights' own sum says nothing.
    reduction = "sum" if setting.normalizer else setting.reduction
    weighed = check_values(operands, _vocab(objective, setting), reduction)
    values, formed = divergence_pass(operands, objective, setting, wanted, weighed=weighed)
    return *_value_tensors(values, setting.reduction), *_gradient_tensors(formed, operands)


def _fake_divergence(operands: Operands, objective: Objective, setting: Setting, wanted: str) -> Tensors:
    hidden = operands.student_hidden
    rows, none = hidden.new_empty(hidden.shape[0], dtype=operands.dtype), hidden.new_empty(0, dtype=operands.dtype)
    targets, cached = operands.target_ids is not None, operands.teacher_ids is not None
    return (
        torch.empty_like(rows) if setting.reduction == "none" else rows.new_empty(()),
        rows,
        torch.empty_like(rows if targets else none),
        torch.empty_like(rows if targets and not cached else none),
        torch.empty_like(rows),
        torch.empty_like(none if cached else rows),
        hidden.new_empty((), dtype=torch.int64),
        rows.new_empty(2 if wanted and setting.gradient_tolerance else 0),
        *(
            gradient.to(held_dtype(gradient.dtype)) if letter in wanted else gradient
            for gradient, letter in zip(_fake_gradients(operands, objective, setting, wanted), "hwb", strict=True)
        ),
    )


def _divergence_backward(
    operands: Operands, objective: Objective, setting: Setting, wanted: str, upstream: Tensor
) -> Tensors:
    """Returns the gradients for an upstream gradient (N,) or (), found by a second pass."""
    per_row = upstream.to(operands.dtype).expand(operands.student_hidden.shape[0])
    again = setting._replace(raise_on_nonfinite=False)
    return _gradient_tensors(divergence_pass(operands, objective, again, wanted, per_row)[1], operands)


def _logprobs(operands: Operands, objective: Objective, setting: Setting, wanted: str) -> Tensors:
    """Returns log-probabilities (N,), empty without targets, and entropies (N,)."""
    check_values(operands, _vocab(objective, setting), "none")
    logprobs, entropy, _ = logprob_pass(operands, objective, setting, wanted)
    return _or_empty(logprobs, entropy), entropy


def _fake_logprobs(operands: Operands, objective: Objective, setting: Setting, wanted: str) -> Tensors:
    rows = operands.student_hidden.new_empty(operands.student_hidden.shape[0], dtype=operands.dtype)
    return torch.empty_like(rows if operands.target_ids is not None else rows[:0]), rows


def _logprobs_backward(
    operands: Operands,
    objective: Objective,
    setting: Setting,
    wanted: str,
    of_logprobs: Tensor | None,
    of_entropy: Tensor | None,
) -> Tensors:
    """Returns the gradients for upstream ones (N,) of either output."""
    if operands.target_ids is None:
        of_logprobs = None
    return _gradient_tensors(logprob_pass(operands, objective, setting, wanted, of_logprobs, of_entropy)[2], operands)


def _topk(operands: Operands, objective: Objective, setting: Setting, wanted: str) -> Tensors:
    """Returns ids (N, k) and log-probabilities (N, k) of the most likely tokens."""
    return topk_pass(operands, objective, setting)


def _fake_topk(operands: Operands, objective: Objective, setting: Setting, wanted: str) -> Tensors:
    hidden, shape = operands.student_hidden, (operands.student_hidden.shape[0], objective.topk)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=operands.dtype)


divergence = register("divergence", _divergence, _fake_divergence, outputs=11, backward=_divergence_backward)
logprobs = register("logprobs", _logprobs, _fake_logprobs, outputs=2, backward=_logprobs_backward, differentiable=2)
topk = register("topk", _topk, _fake_topk, outputs=2)
