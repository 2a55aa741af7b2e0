"""Gives whoever checks a fused operation inputs, the float64 answer, tolerances and live bytes.

Tolerances come from the data: an error is held against that of an independent naive run on the same inputs, and is
never a number that somebody widened. Memory is counted by `LiveBytes`, see `live_bytes.py`.

Dimensions: N rows, H hidden, Ht teacher hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .live_bytes import LiveBytes, Matmul
from .reference_call import reference_output
from .types import DivergenceOutput, ImportanceClip, Operands, Options, TeacherMix, TopK, TopKLogprobs


class Inputs(NamedTuple):
    """Holds tensors for `linear_divergence`; `teacher_weight` is None where both sides share a head."""

    student_hidden: Tensor  # (N, H)
    student_weight: Tensor  # (V, H)
    teacher_hidden: Tensor  # (N, H), or (N, Ht)
    teacher_weight: Tensor | None  # (V, Ht)
    token_weights: Tensor  # (N,) float32
    target_ids: Tensor  # (N,) int64


def make_inputs(
    rows: int,
    hidden: int,
    vocab: int,
    *,
    teacher_size: int | None = None,
    noise: float = 1.0,
    logit_std: float = 3.0,
    masked: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    requires_grad: bool = True,
) -> Inputs:
    """Makes seeded inputs; their logits' standard deviation, `logit_std`, is far enough from uniform to show errors.

    The teacher's states are the student's plus `noise` times a normal variable, or, with `teacher_size`, independent
    states (N, teacher_size) with a head of their own. A share `masked` of the rows gets weight 0, the others weights
    between 0.5 and 1.5. Student states and weight are leaves that require a gradient unless told otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    made_in = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=made_in)

    def place(tensor: Tensor, differentiable: bool = False) -> Tensor:
        return tensor.to(device=device, dtype=dtype).requires_grad_(differentiable)

    student_hidden = normal(rows, hidden)
    student_weight = normal(vocab, hidden).mul_(logit_std / math.sqrt(hidden))
    teacher_weight = None
    if teacher_size is None:
        teacher_hidden = student_hidden + noise * normal(rows, hidden)
    else:
        teacher_hidden = normal(rows, teacher_size)
        teacher_weight = normal(vocab, teacher_size).mul_(logit_std / math.sqrt(teacher_size))
    token_weights = 0.5 + torch.rand(rows, generator=generator)
    token_weights[torch.randperm(rows, generator=generator)[: round(masked * rows)]] = 0.0
    return Inputs(
        student_hidden=place(student_hidden, requires_grad),
        student_weight=place(student_weight, requires_grad),
        teacher_hidden=place(teacher_hidden),
        teacher_weight=None if teacher_weight is None else place(teacher_weight),
        token_weights=token_weights.to(device),
        target_ids=torch.randint(vocab, (rows,), generator=generator).to(device),
    )


def _cached_topk(inputs: Inputs) -> TopKLogprobs:
    """Makes up a teacher's log-probabilities of K ids; they leave some mass to the tail."""
    rows, vocab = len(inputs.student_hidden), len(inputs.student_weight)
    k = min(4, vocab)
    generator = torch.Generator().manual_seed(rows)
    ids = (torch.randint(vocab, (rows, 1), generator=generator) + torch.arange(k)) % vocab
    logprobs = torch.randn(rows, k + 1, generator=generator).log_softmax(-1)[:, :k]
    device = inputs.student_hidden.device
    return TopKLogprobs(ids.to(device), logprobs.to(device))


def _topk(inputs: Inputs, of: Literal["student", "teacher"], tail: bool) -> TopK:
    return TopK(min(5, len(inputs.student_weight)), of=of, tail=tail)


# One call of `linear_divergence` for each thing that it can compute: what to add to the inputs' own arguments.
OBJECTIVES: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "forward KL": lambda i: {"alpha": 0.0},
    "reverse KL": lambda i: {"alpha": 1.0},
    "JSD": lambda i: {"alpha": 0.5},
    "JSD normalized": lambda i: {"alpha": 0.1, "normalize": True},
    "forward KL, student top-k": lambda i: {"alpha": 0.0, "support": _topk(i, "student", True)},
    "reverse KL, student top-k": lambda i: {"alpha": 1.0, "support": _topk(i, "student", True)},
    "JSD, teacher top-k": lambda i: {"alpha": 0.5, "support": _topk(i, "teacher", True)},
    "reverse KL, teacher top-k without tail": lambda i: {"alpha": 1.0, "support": _topk(i, "teacher", False)},
    "JSD, student top-k without tail": lambda i: {"alpha": 0.3, "support": _topk(i, "student", False)},
    "sampled": lambda i: {"support": "sampled", "target_ids": i.target_ids},
    "JSD, importance clip": lambda i: {
        "alpha": 0.5,
        "target_ids": i.target_ids,
        "importance": ImportanceClip(torch.linspace(-9.0, -1.0, len(i.target_ids)).to(i.target_ids.device), clip=2.0),
    },
    "forward KL, entry clip": lambda i: {"alpha": 0.0, "entry_clip": 0.02},
    "reverse KL, entry clip": lambda i: {"alpha": 1.0, "entry_clip": 0.02},
    "JSD, entry clip": lambda i: {"alpha": 0.4, "entry_clip": 0.01},
    "trust region": lambda i: {
        "alpha": 0.5,
        "teacher": TeacherMix(i.teacher_hidden.flip(0).contiguous(), i.teacher_weight, share=0.3),
    },
    "forward KL, cached teacher": lambda i: {"alpha": 0.0, "teacher": _cached_topk(i), "teacher_hidden": None},
    "JSD, cached teacher": lambda i: {"alpha": 0.5, "teacher": _cached_topk(i), "teacher_hidden": None},
}


def make_arguments(inputs: Inputs, objective: str, **changes: Any) -> dict[str, Any]:
    """Returns keyword arguments of `linear_divergence` for one of `OBJECTIVES`, with `changes` on top."""
    arguments = {
        "student_hidden": inputs.student_hidden,
        "student_weight": inputs.student_weight,
        "teacher_hidden": inputs.teacher_hidden,
        "teacher_weight": inputs.teacher_weight,
        "token_weights": inputs.token_weights,
    }
    arguments |= OBJECTIVES[objective](inputs)
    if arguments["teacher_hidden"] is None:
        arguments["teacher_weight"] = None
    return arguments | changes


class Run(NamedTuple):
    """Holds values and the gradients of the loss (or of `upstream · loss`), None for a tensor without one."""

    output: Any  # DivergenceOutput or ReferenceOutput
    hidden_gradient: Tensor | None  # (N, H)
    weight_gradient: Tensor | None  # (V, H)
    bias_gradient: Tensor | None  # (V,)


def run_operation(
    operation: Callable[..., DivergenceOutput], *, upstream: Tensor | None = None, **arguments: Any
) -> Run:
    """Calls `operation` on fresh leaves over the same memory, goes backward if anything requires a gradient."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    hidden, weight = leaf(arguments.pop("student_hidden")), leaf(arguments.pop("student_weight"))
    head, bias = arguments.pop("student_head", None), None
    if head is not None and head.bias is not None:
        bias = leaf(head.bias)
        head = replace(head, bias=bias)
    output = operation(hidden, weight, student_head=head, **arguments)
    return _with_gradients(output, hidden, weight, bias, upstream)


def _with_gradients(output: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor | None) -> Run:
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    if any(tensor.requires_grad for tensor in leaves):
        output.loss.backward(upstream)
    gradients = [None if tensor is None else tensor.grad for tensor in (hidden, weight, bias)]
    return Run(output._replace(loss=output.loss.detach()), *gradients)


def run_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    upstream: Tensor | None = None,
    naive: bool = False,
    **options: Any,
) -> Run:
    """Returns the float64 answer to a call of `linear_divergence` with the same arguments, gradients included.

    `options` are those of `Options`. With `naive` it is the path to hold errors against instead: logits and gradient
    matmuls in the dtype of the inputs, `log_softmax` and textbook sums in float32.
    """

    def leaf(tensor: Tensor) -> Tensor:
        copy = tensor.detach().to(tensor.dtype if naive else torch.float64, copy=True)
        return copy.requires_grad_(tensor.requires_grad)

    hidden, weight = leaf(student_hidden), leaf(student_weight)
    student_head = options.get("student_head")
    bias = None if student_head is None or student_head.bias is None else leaf(student_head.bias)
    given = Operands(
        student_hidden=hidden,
        student_weight=weight,
        student_bias=bias,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        token_weights=token_weights,
        target_ids=target_ids,
    )
    output = reference_output(given, Options(**options), torch.float32 if naive else torch.float64)
    return _with_gradients(output, hidden, weight, bias, upstream)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Returns `‖actual - exact‖ / ‖exact‖` in float64; the absolute norm where `exact` is 0; NaN if `actual` holds one.

    ValueError where `exact` is not finite: it is the test's truth that is wrong then.
    """
    exact = exact.detach().double()
    if not exact.isfinite().all():
        raise ValueError(f"exact must be finite, got {exact}")
    distance, size = (actual.detach().double() - exact).norm().item(), exact.norm().item()
    return distance / size if size else distance


def allowed_error(others: Tensor | Sequence[Tensor], exact: Tensor, *, factor: float = 2.0) -> float:
    """Returns `factor` times the largest relative error of `others`, independent runs on the same inputs.

    ValueError where one of them holds a NaN: nothing could be held against it fairly.
    """
    runs = [others] if isinstance(others, Tensor) else others
    errors = [relative_error(run, exact) for run in runs]
    if not all(map(math.isfinite, errors)):  # max() would pass over a NaN
        raise ValueError(f"the runs that an error is held against must be finite, their relative errors are {errors}")
    return factor * max(errors)


def assert_within(actual: Tensor, exact: Tensor, tolerance: Tensor, *, name: str = "value") -> None:
    """Raises AssertionError unless every `|actual - exact|` is at most its own `tolerance`.

    ValueError where `exact` is not finite, or a tolerance is not a positive number: the test is wrong then.
    """
    if not actual.shape == exact.shape == tolerance.shape:
        shapes = (tuple(actual.shape), tuple(exact.shape), tuple(tolerance.shape))
        raise ValueError(f"actual, exact and tolerance must have one shape, got {shapes}")
    if not exact.isfinite().all():
        raise ValueError(f"exact must be finite, got {exact}")
    if not ((tolerance > 0) & tolerance.isfinite()).all():
        raise ValueError(f"tolerance must be positive and finite, got {tolerance}")
    error = (actual.double() - exact.double()).abs()
    wrong = ~(error <= tolerance)
    if wrong.any():
        raise AssertionError(f"{name}: off by {error[wrong]} of {exact[wrong]}, allowed {tolerance[wrong]}")


def assert_within_reference_error(
    actual: Tensor, exact: Tensor, naive: Tensor, *, factor: float = 2.0, name: str = "value"
) -> None:
    """Raises AssertionError unless `actual` is at most `factor` times as far from `exact` as `naive`, plus rounding.

    `exact` is float64, `naive` an independent run on the same inputs in the precision under test, and the rounding is
    one unit in the last place of `actual.dtype`, relative to the norm of `exact`.
    """
    if actual.shape != exact.shape or naive.shape != exact.shape:
        shapes = (tuple(actual.shape), tuple(exact.shape), tuple(naive.shape))
        raise ValueError(f"actual, exact and naive must have one shape, got {shapes}")
    error = relative_error(actual, exact)
    allowed = allowed_error(naive, exact, factor=factor) + torch.finfo(actual.dtype).eps
    if not error <= allowed:
        raise AssertionError(
            f"{name}: relative error {error:.2e} against float64, allowed {allowed:.2e} "
            f"({factor:g} times the naive run's, plus rounding)"
        )


__all__ = [
    "OBJECTIVES",
    "Inputs",
    "LiveBytes",
    "Matmul",
    "Run",
    "allowed_error",
    "assert_within",
    "assert_within_reference_error",
    "make_arguments",
    "make_inputs",
    "relative_error",
    "run_operation",
    "run_reference",
]
