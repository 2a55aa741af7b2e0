"""`backend="reference"` is the definition: its values and gradients to the last bit, its limits said by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdkernels import (
    DivergenceOutput,
    ImportanceClip,
    LogitTransform,
    TeacherMix,
    TopK,
    TopKLogprobs,
    linear_divergence,
    linear_logprobs,
    logit_divergence,
)
from sdkernels.reference import Transform, linear_divergence_reference
from sdkernels.testing import OBJECTIVES, make_arguments, make_inputs, run_operation
from sdkernels.validation import MOST_REFERENCE_LOGITS

N, H, V = 7, 5, 13
INPUTS = make_inputs(N, H, V, masked=0.3, dtype=torch.float64, requires_grad=False)
OLD = torch.linspace(-9.0, -1.0, N, dtype=torch.float64)
LISTED = TopKLogprobs(torch.arange(3).expand(N, 3), torch.full((N, 3), -2.0))
BIAS = torch.linspace(-1, 1, V, dtype=torch.float64)
TEACHER = {"teacher_hidden": INPUTS.teacher_hidden}

# The arguments of a call, and those of the reference that mean the same.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha 0.5": (TEACHER | {"alpha": 0.5}, TEACHER | {"alpha": 0.5}),
    "weights, targets, sum": (
        TEACHER | {"token_weights": INPUTS.token_weights, "target_ids": INPUTS.target_ids, "reduction": "sum"},
        TEACHER | {"token_weights": INPUTS.token_weights, "target_ids": INPUTS.target_ids, "reduction": "sum"},
    ),
    "top-k": (
        TEACHER | {"alpha": 0.0, "support": TopK(4, of="teacher", tail=False), "vocab_size": 11},
        TEACHER | {"alpha": 0.0, "topk": 4, "topk_of": "teacher", "tail": False, "vocab_size": 11},
    ),
    "trust region": (
        TEACHER | {"alpha": 0.3, "normalize": True, "teacher": TeacherMix(INPUTS.teacher_hidden.flip(0), share=0.2)},
        TEACHER | {"alpha": 0.3, "normalize": True, "mix_hidden": INPUTS.teacher_hidden.flip(0), "mix_share": 0.2},
    ),
    "cached teacher": (
        {"alpha": 0.6, "teacher": LISTED},
        {"alpha": 0.6, "cached_ids": LISTED.ids, "cached_logprobs": LISTED.logprobs},
    ),
    "sampled, importance": (
        TEACHER | {"support": "sampled", "target_ids": INPUTS.target_ids, "importance": ImportanceClip(OLD, 1.5)},
        TEACHER | {"sampled": True, "target_ids": INPUTS.target_ids, "old_logprobs": OLD, "importance_clip": 1.5},
    ),
    "entry clip, each token": (
        TEACHER | {"alpha": 0.4, "entry_clip": 0.01, "reduction": "none"},
        TEACHER | {"alpha": 0.4, "entry_clip": 0.01, "reduction": "none"},
    ),
    "transforms": (
        TEACHER | {"temperature": 0.7, "student_head": LogitTransform(bias=BIAS, scale=1.5, softcap=5.0)},
        TEACHER | {"student": Transform(BIAS, 1.5, 5.0, 0.7), "teacher": Transform(BIAS, 1.5, 5.0, 0.7)},
    ),
}


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return INPUTS.student_hidden.clone().requires_grad_(), INPUTS.student_weight.clone().requires_grad_()


@pytest.mark.parametrize("name", CALLS)
def test_it_gives_the_values_and_gradients_of_the_reference(name: str) -> None:
    arguments, plain = CALLS[name]
    mine, theirs = leaves(), leaves()
    output = linear_divergence(*mine, **arguments, backend="reference")
    expected = linear_divergence_reference(*theirs, **plain)
    assert type(output) is DivergenceOutput
    assert output.backend == "reference"
    assert int(output.active_tokens) == expected.active_tokens
    for field in expected._fields[:-1]:
        value, right = getattr(output, field), getattr(expected, field)
        assert (value is None) == (right is None), field
        assert right is None or torch.equal(value, right), field
    for loss in (output.loss, expected.loss):
        loss.sum().backward()
    for leaf, right in zip(mine, theirs, strict=True):
        assert torch.equal(leaf.grad, right.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_rounded_to_what_other_backends_return(objective: str) -> None:
    head = LogitTransform(bias=BIAS.float())
    arguments = make_arguments(make_inputs(N, H, V, masked=0.3), objective, student_head=head)
    runs = [run_operation(linear_divergence, **arguments, backend=backend) for backend in ("reference", "torch")]
    for value, right in zip(runs[0].output[:-1], runs[1].output[:-1], strict=True):
        assert (value is None) == (right is None)
        if value is not None and right is not None:
            torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
    for gradient, right in zip(runs[0][1:3], runs[1][1:3], strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gradient": "recompute"}, "gradient"),
        ({"workspace_mb": 64}, "workspace_mb"),
        ({"on_nonfinite": "raise"}, "on_nonfinite"),
        ({"normalizer_group": object()}, "normalizer_group"),
    ],
)
def test_it_refuses_options_about_how_a_call_is_run(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"{says} must be left at its default with backend='reference'"):
        linear_divergence(*leaves(), INPUTS.teacher_hidden, backend="reference", **changes)


def test_it_refuses_wrong_values_as_others_do() -> None:
    with pytest.raises(ValueError, match=r"target_ids must be in \[0, V=13\), got 13"):
        linear_divergence(*leaves(), INPUTS.teacher_hidden, backend="reference", target_ids=torch.full((N,), V))


def test_it_refuses_inputs_that_are_too_large() -> None:
    rows = MOST_REFERENCE_LOGITS // V + 1
    hidden = torch.empty(1, H).expand(rows, H)
    with pytest.raises(ValueError, match=rf"at most {MOST_REFERENCE_LOGITS} .*student_hidden has {rows} rows.*V=13"):
        linear_divergence(hidden, torch.empty(V, H), hidden, backend="reference")


def test_it_is_of_linear_divergence_alone() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'native', 'triton', got 'reference'"):
        linear_logprobs(*leaves(), backend="reference")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'torch', 'native', 'triton', got 'reference'"):
        logit_divergence(INPUTS.teacher_hidden, INPUTS.teacher_hidden, backend="reference")  # type: ignore[arg-type]
