"""Computes the right answer to a case from the definitions in `sdkernels/reference.py`, a few rows at a time.

All divergences of a shape share its projections. They and the gradient products are float64 where that is cheap or is
asked for, and float32 at the shapes of the speed table, whose error (1e-6) is far below what the equality check asks;
everything in between is float64 always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels import reference

from .rows import Errors, Outcome
from .shapes import CaseInputs, Divergence

# Bytes of one float64 tile; about ten are live at a time.
TILE_BYTES = 64 << 20
# Up to here float64 products take under a second.
FLOAT64_PRODUCT = 1 << 29  # N·V·H


# What counts as the same quantity: rounding stays below it in every implementation, a wrong constant, a swapped
# direction or a mixed-in cross-entropy does not. How exact each one is stands in the accuracy table.
EQUAL_LOSS = {"fp32": 1e-4, "bf16": 0.02}
EQUAL_GRADIENT = {"fp32": 1e-3, "bf16": 0.05}
# A trained model's sides are near on most tokens, where rounded logits cost a peer 4 to 6 %. The loss is held to the
# same as elsewhere.
EQUAL_ON_STATES = {"fp32": 1e-3, "bf16": 0.2}


@torch.no_grad()
def solve(
    inputs: CaseInputs, divergences: tuple[Divergence, ...], *, float64: bool = False
) -> dict[Divergence, Outcome]:
    """Returns mean loss over the rows and gradients, per divergence, in the dtype of the products (see above)."""
    shape = inputs.shape
    cheap = shape.rows * shape.vocab * shape.hidden <= FLOAT64_PRODUCT
    dtype = torch.float64 if cheap or float64 else torch.float32
    hidden, weight, teacher_hidden = (tensor.detach().to(dtype) for tensor in inputs)
    results = {}
    for divergence in divergences:
        gradients = {"hidden": torch.empty_like(hidden)}
        if inputs.student_weight.requires_grad:
            gradients["weight"] = torch.zeros_like(weight)
        results[divergence] = Outcome(torch.zeros((), dtype=torch.float64, device=inputs.device), gradients)
    chunk = max(1, TILE_BYTES // (8 * shape.vocab))
    for start in range(0, shape.rows, chunk):
        rows = slice(start, start + chunk)
        student_logits = (hidden[rows] @ weight.T).double()  # (C, V)
        teacher_logits = (teacher_hidden[rows] @ weight.T).double()  # (C, V)
        log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        for divergence, result in results.items():
            if divergence.topk is None:
                loss = reference.divergence(log_p, log_q, divergence.alpha)
                gradient = reference.divergence_gradient(log_p, log_q, divergence.alpha)
            else:
                loss, gradient = _with_support(student_logits, teacher_logits, divergence)
            result.values.add_(loss.sum() / shape.rows)
            gradient = (gradient / shape.rows).to(dtype)
            torch.mm(gradient, weight, out=result.gradients["hidden"][rows])
            if "weight" in result.gradients:
                result.gradients["weight"].addmm_(gradient.T, hidden[rows])
    return results


def _with_support(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    k = divergence.topk or 0
    ids = student_logits.topk(k, -1).indices
    student = reference.bucketed(student_logits, ids, tail=True)  # (C, K + 1)
    teacher = reference.bucketed(teacher_logits, ids, tail=True)
    bucket_gradient = reference.divergence_gradient(student, teacher, divergence.alpha)
    gradient = reference.bucketed_gradient(bucket_gradient, student_logits, ids, tail=True)
    return reference.divergence(student, teacher, divergence.alpha), gradient


def compare(outcome: Outcome, exact: Outcome) -> Errors:
    """Returns the errors of what a step of the output layer computed."""
    of_gradients = {name: relative_error(outcome.gradients[name], right) for name, right in exact.gradients.items()}
    return Errors(relative_error(outcome.values, exact.values), of_gradients["hidden"], of_gradients.get("weight", 0.0))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Returns the norm of the difference by the norm of the right answer."""
    # Sums in float64 without a float64 copy: the head's gradient has 136 million entries.
    distance = torch.linalg.vector_norm(actual - exact, dtype=torch.float64)
    return (distance / torch.linalg.vector_norm(exact, dtype=torch.float64)).item()


def difference(errors: Errors, dtype: str, *, on_states: bool = False, tolerance: float = 0.0) -> str | None:
    """Says why a result is not the quantity that was asked for, its gradients to `tolerance`; None if it is."""
    if not errors.loss <= EQUAL_LOSS[dtype]:
        return f"loss off by {errors.loss:.1e}"
    if not errors.gradient <= max((EQUAL_ON_STATES if on_states else EQUAL_GRADIENT)[dtype], tolerance):
        return f"gradient off by {errors.gradient:.1e}"
    return None
