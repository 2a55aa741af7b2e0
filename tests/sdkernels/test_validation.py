"""Every bad argument is refused before any work, by name, with what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sdkernels import (
    ImportanceClip,
    LogitTransform,
    TeacherMix,
    TopK,
    TopKLogprobs,
    linear_divergence,
    linear_logprobs,
    linear_topk,
    logit_divergence,
)
from sdkernels.testing import LiveBytes, make_inputs

N, H, V, HT = 6, 5, 11, 4
ids = torch.arange(N)
nan, inf = math.nan, math.inf


def spoiled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    spoiled = tensor.clone()
    spoiled.view(-1)[-1] = value
    return spoiled


def cached(ids: torch.Tensor | None = None, logprobs: torch.Tensor | None = None) -> TopKLogprobs:
    ids = torch.arange(3).expand(N, 3) if ids is None else ids
    return TopKLogprobs(ids, torch.full((N, 3), -2.0) if logprobs is None else logprobs)


def arguments() -> dict[str, Any]:
    inputs = make_inputs(N, H, V)
    return {
        "student_hidden": inputs.student_hidden,
        "student_weight": inputs.student_weight,
        "teacher_hidden": inputs.teacher_hidden,
    }


WITHOUT_TEACHER = {"teacher_hidden": None}

# what is changed, the error's type, what its message must say: the argument's name, what was expected, what came
LINEAR_DIVERGENCE: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    # shapes
    ({"student_hidden": torch.ones(H)}, ValueError, ["student_hidden", "(5,)"]),
    ({"student_hidden": torch.ones(N, H, 1)}, ValueError, ["student_hidden", "(6, 5, 1)"]),
    ({"student_weight": torch.ones(V, H + 1)}, ValueError, ["student_weight", "(*, 5)", "(11, 6)"]),
    ({"student_weight": torch.ones(0, H)}, ValueError, ["student_weight", "at least one", "(0, 5)"]),
    ({"teacher_hidden": torch.ones(N + 1, H)}, ValueError, ["teacher_hidden", "(6, *)", "(7, 5)"]),
    ({"teacher_hidden": torch.ones(N, HT)}, ValueError, ["teacher_hidden", "(6, 5)", "(6, 4)"]),
    ({"teacher_weight": torch.ones(V, HT)}, ValueError, ["teacher_weight", "(*, 5)", "(11, 4)"]),
    ({"teacher_weight": torch.ones(V - 1, H)}, ValueError, ["teacher_weight", "V=11", "10", "vocab_size"]),
    (
        {"teacher_weight": torch.ones(V - 2, H), "vocab_size": V - 1},
        ValueError,
        ["vocab_size", "rows of teacher_weight=9", "10"],
    ),
    (
        {"teacher": TeacherMix(torch.ones(N, H), torch.ones(V - 2, H)), "vocab_size": V - 1},
        ValueError,
        ["vocab_size", "rows of teacher.weight=9", "10"],
    ),
    (
        {
            "teacher_weight": torch.ones(V + 2, H),
            "teacher_head": LogitTransform(bias=torch.ones(V)),
            "vocab_size": V - 1,
        },
        ValueError,
        ["teacher_head.bias", "(13)", "(11,)"],
    ),
    ({"token_weights": torch.ones(N, 1)}, ValueError, ["token_weights", "(6)", "(6, 1)"]),
    ({"target_ids": torch.arange(N - 1)}, ValueError, ["target_ids", "(6)", "(5,)"]),
    ({"student_head": LogitTransform(bias=torch.ones(V - 1))}, ValueError, ["student_head.bias", "(11)", "(10,)"]),
    ({"teacher_head": LogitTransform(bias=torch.ones(V, 1))}, ValueError, ["teacher_head.bias", "(11)", "(11, 1)"]),
    ({"teacher": TeacherMix(torch.ones(N, HT))}, ValueError, ["teacher.hidden", "(6, 5)", "(6, 4)"]),
    ({"teacher": TeacherMix(torch.ones(N - 1, H))}, ValueError, ["teacher.hidden", "(6, *)", "(5, 5)"]),
    (
        {"teacher": TeacherMix(torch.ones(N, HT), torch.ones(V, H))},
        ValueError,
        ["teacher.weight", "(*, 4)", "(11, 5)"],
    ),
    (
        WITHOUT_TEACHER | {"teacher": cached(logprobs=torch.ones(N, 4))},
        ValueError,
        ["teacher.logprobs", "(6, 3)", "(6, 4)"],
    ),
    (
        {"importance": ImportanceClip(torch.zeros(N + 1)), "target_ids": ids},
        ValueError,
        ["importance.old_logprobs", "(6)", "(7,)"],
    ),
    # types and dtypes
    ({"student_hidden": [[0.0] * H] * N}, TypeError, ["student_hidden", "torch.Tensor", "list"]),
    ({"student_hidden": torch.ones(N, H, dtype=torch.int64)}, TypeError, ["student_hidden", "floating", "int64"]),
    ({"student_weight": torch.ones(V, H, dtype=torch.int8)}, TypeError, ["student_weight", "floating", "int8"]),
    ({"student_hidden": torch.ones(N, H, dtype=torch.complex64)}, TypeError, ["student_hidden", "complex64"]),
    ({"teacher_hidden": torch.ones(N, H, dtype=torch.bool)}, TypeError, ["teacher_hidden", "floating", "bool"]),
    ({"token_weights": torch.ones(N, dtype=torch.bool)}, TypeError, ["token_weights", "floating", "bool"]),
    ({"target_ids": torch.ones(N)}, TypeError, ["target_ids", "int64", "float32"]),
    ({"target_ids": list(range(N))}, TypeError, ["target_ids", "torch.Tensor", "list"]),
    ({"student_head": 1.0}, TypeError, ["student_head", "LogitTransform", "float"]),
    ({"teacher": "live"}, TypeError, ["teacher", "TeacherMix", "str"]),
    ({"importance": torch.zeros(N), "target_ids": ids}, TypeError, ["importance", "ImportanceClip", "Tensor"]),
    ({"alpha": "0.5"}, TypeError, ["alpha", "number", "str"]),
    ({"alpha": True}, TypeError, ["alpha", "number", "bool"]),
    ({"normalize": 1}, TypeError, ["normalize", "bool", "int"]),
    ({"support": TopK(2.0)}, TypeError, ["support.k", "int", "float"]),  # type: ignore[arg-type]
    ({"vocab_size": 3.0}, TypeError, ["vocab_size", "int", "float"]),
    # devices
    ({"teacher_hidden": torch.ones(N, H, device="meta")}, ValueError, ["teacher_hidden", "cpu", "meta"]),
    ({"student_weight": torch.ones(V, H, device="meta")}, ValueError, ["student_weight", "cpu", "meta"]),
    ({"token_weights": torch.ones(N, device="meta")}, ValueError, ["token_weights", "cpu", "meta"]),
    ({"target_ids": ids.to("meta")}, ValueError, ["target_ids", "cpu", "meta"]),
    ({"backend": "triton"}, ValueError, ["backend", "GPU", "cpu"]),
    # ranges
    ({"alpha": -0.1}, ValueError, ["alpha", "[0, 1]", "-0.1"]),
    ({"alpha": 1.1}, ValueError, ["alpha", "[0, 1]", "1.1"]),
    ({"alpha": nan}, ValueError, ["alpha", "[0, 1]", "nan"]),
    ({"temperature": 0.0}, ValueError, ["temperature", "(0", "0.0"]),
    ({"temperature": -1.0}, ValueError, ["temperature", "(0", "-1.0"]),
    ({"temperature": inf}, ValueError, ["temperature", "finite", "inf"]),
    ({"student_head": LogitTransform(temperature=0.0)}, ValueError, ["student_head.temperature", "(0", "0.0"]),
    ({"teacher_head": LogitTransform(softcap=0.0)}, ValueError, ["teacher_head.softcap", "(0", "0.0"]),
    ({"teacher_head": LogitTransform(softcap=-3.0)}, ValueError, ["teacher_head.softcap", "(0", "-3.0"]),
    ({"student_head": LogitTransform(scale=nan)}, ValueError, ["student_head.scale", "finite", "nan"]),
    ({"support": TopK(0)}, ValueError, ["topk", "[1, V=11]", "0"]),
    ({"support": TopK(V + 1)}, ValueError, ["topk", "[1, V=11]", "12"]),
    ({"support": TopK(8), "vocab_size": 7}, ValueError, ["topk", "[1, V=7]", "8"]),
    ({"support": TopK(2, of="both")}, ValueError, ["support.of", "'student'", "'both'"]),  # type: ignore[arg-type]
    ({"support": "top"}, ValueError, ["support", "'sampled'", "'top'"]),
    ({"vocab_size": 0}, ValueError, ["vocab_size", "[1, V=11]", "0"]),
    ({"vocab_size": V + 1}, ValueError, ["vocab_size", "[1, V=11]", "12"]),
    ({"entry_clip": 0.0}, ValueError, ["entry_clip", "(0", "0.0"]),
    ({"entry_clip": -1.0}, ValueError, ["entry_clip", "(0", "-1.0"]),
    (
        {"importance": ImportanceClip(torch.zeros(N), clip=0.0), "target_ids": ids},
        ValueError,
        ["importance.clip", "0.0"],
    ),
    ({"teacher": TeacherMix(torch.ones(N, H), share=1.5)}, ValueError, ["teacher.share", "[0, 1]", "1.5"]),
    ({"reduction": "batchmean"}, ValueError, ["reduction", "'mean'", "'batchmean'"]),
    ({"backend": "cuda"}, ValueError, ["backend", "'triton'", "'cuda'"]),
    ({"gradient": "forward"}, ValueError, ["gradient", "'in_forward'", "'forward'"]),
    ({"on_nonfinite": "ignore"}, ValueError, ["on_nonfinite", "'propagate'", "'ignore'"]),
    ({"workspace_mb": 0}, ValueError, ["workspace_mb", "0"]),
    ({"workspace_mb": -5}, ValueError, ["workspace_mb", "-5"]),
    # values
    ({"target_ids": spoiled(ids, V)}, ValueError, ["target_ids", "[0, V=11)", "11"]),
    ({"target_ids": spoiled(ids, -1)}, ValueError, ["target_ids", "[0, V=11)", "-1"]),
    ({"target_ids": spoiled(ids, 9), "vocab_size": 9}, ValueError, ["target_ids", "[0, V=9)", "9"]),
    ({"token_weights": spoiled(torch.ones(N), nan)}, ValueError, ["token_weights", "finite", "nan", "5"]),
    ({"token_weights": spoiled(torch.ones(N), -inf)}, ValueError, ["token_weights", "finite", "-inf"]),
    ({"token_weights": -torch.ones(N)}, ValueError, ["token_weights", "positive sum", "-6"]),
    (
        WITHOUT_TEACHER | {"teacher": cached(ids=spoiled(torch.arange(3).expand(N, 3), 77))},
        ValueError,
        ["teacher.ids", "[0, V=11)", "77"],
    ),
    (
        WITHOUT_TEACHER | {"teacher": cached(ids=spoiled(torch.arange(3).expand(N, 3), 0))},
        ValueError,
        ["teacher.ids", "repeat"],
    ),
    (
        WITHOUT_TEACHER | {"teacher": cached(logprobs=torch.full((N, 3), nan))},
        ValueError,
        ["teacher.logprobs", "NaN"],
    ),
    (
        WITHOUT_TEACHER | {"teacher": cached(logprobs=torch.full((N, 3), -0.5))},
        ValueError,
        ["teacher.logprobs", "1", "1.8"],
    ),
    (
        {"importance": ImportanceClip(spoiled(torch.zeros(N), nan)), "target_ids": ids},
        ValueError,
        ["importance.old_logprobs", "NaN"],
    ),
    # contradictions
    (WITHOUT_TEACHER, ValueError, ["teacher_hidden", "TopKLogprobs", "None"]),
    ({"teacher": cached()}, ValueError, ["teacher_hidden", "None", "(6, 5)"]),
    (
        WITHOUT_TEACHER | {"teacher": cached(), "teacher_weight": torch.ones(V, H)},
        ValueError,
        ["teacher_weight", "None", "(11, 5)"],
    ),
    (WITHOUT_TEACHER | {"teacher": cached(), "support": TopK(5)}, ValueError, ["support", "TopK(3", "TopK(k=5"]),
    (
        WITHOUT_TEACHER | {"teacher": cached(), "support": "sampled", "target_ids": ids},
        ValueError,
        ["sampled", "TopKLogprobs"],
    ),
    ({"support": "sampled"}, ValueError, ["sampled", "target_ids", "None"]),
    ({"support": "sampled", "target_ids": ids, "alpha": 0.5}, ValueError, ["alpha", "sampled", "0.5"]),
    ({"importance": ImportanceClip(torch.zeros(N))}, ValueError, ["importance", "target_ids", "None"]),
    ({"entry_clip": 0.1, "support": TopK(3)}, ValueError, ["entry_clip", "full", "TopK"]),
    (
        WITHOUT_TEACHER | {"entry_clip": 0.1, "teacher": cached()},
        ValueError,
        ["entry_clip", "full", "TopKLogprobs"],
    ),
    ({"reduction": "none", "gradient": "in_forward"}, ValueError, ["gradient", "reduction='none'", "'in_forward'"]),
]


def refuse(call: Any, error: type[Exception], says: list[str]) -> None:
    with LiveBytes() as probe, pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    missing = [part for part in says if part not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"
    assert not probe.matmuls


@pytest.mark.parametrize(
    ("changes", "error", "says"), LINEAR_DIVERGENCE, ids=[str(i) for i in range(len(LINEAR_DIVERGENCE))]
)
def test_linear_divergence_refuses(changes: dict[str, Any], error: type[Exception], says: list[str]) -> None:
    linear_divergence(**arguments())
    refuse(lambda: linear_divergence(**arguments() | changes), error, says)


logits = torch.ones(N, V)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: logit_divergence(logits[0], logits[0]), ValueError, ["student_logits", "(11,)"]),
        (lambda: logit_divergence(logits.long(), logits), TypeError, ["student_logits", "floating", "int64"]),
        (lambda: logit_divergence(logits, logits[:, :5]), ValueError, ["teacher_logits", "(6, 11)", "(6, 5)"]),
        (lambda: logit_divergence(logits), ValueError, ["teacher_logits", "neither"]),
        (lambda: logit_divergence(logits, logits, teacher=cached()), ValueError, ["teacher_logits", "both"]),
        (lambda: logit_divergence(logits, logits, alpha=2.0), ValueError, ["alpha", "[0, 1]", "2.0"]),
        (lambda: logit_divergence(logits, logits, teacher_temperature=0.0), ValueError, ["temperature", "0.0"]),
        (lambda: logit_divergence(logits, logits, support=TopK(12)), ValueError, ["topk", "V=11", "12"]),
        (lambda: linear_logprobs(logits, torch.ones(7, V - 1)), ValueError, ["weight", "(*, 11)", "(7, 10)"]),
        (lambda: linear_logprobs(logits, torch.ones(7, V), ids[1:]), ValueError, ["target_ids", "(6)", "(5,)"]),
        (lambda: linear_logprobs(logits, torch.ones(5, V), ids), ValueError, ["target_ids", "[0, V=5)", "5"]),
        (lambda: linear_logprobs(logits.int(), torch.ones(5, V), ids), TypeError, ["hidden", "floating", "int32"]),
        (lambda: linear_logprobs(logits, torch.ones(7, V), temperature=-1), ValueError, ["temperature", "-1"]),
        (lambda: linear_topk(logits, torch.ones(7, V), 0), ValueError, ["topk", "[1, V=7]", "0"]),
        (lambda: linear_topk(logits, torch.ones(7, V), 8), ValueError, ["topk", "[1, V=7]", "8"]),
        (lambda: linear_topk(logits, torch.ones(7, V), 6, vocab_size=5), ValueError, ["topk", "[1, V=5]", "6"]),
        (lambda: linear_topk(logits, torch.ones(0, V), 1), ValueError, ["weight", "at least one row"]),
    ],
)
def test_the_siblings_refuse(call: Any, error: type[Exception], says: list[str]) -> None:
    refuse(call, error, says)


def test_nonfinite_logits_propagate_or_raise_by_choice() -> None:
    bad = arguments()
    bad["student_hidden"].data[3, 0] = inf
    output = linear_divergence(**bad, reduction="none")
    assert output.per_token[3].isnan()
    assert output.per_token[[0, 1, 2, 4, 5]].isfinite().all()
    with pytest.raises(FloatingPointError, match=r"1 rows?.*row 3"):
        linear_divergence(**bad, on_nonfinite="raise")
    masked = torch.ones(N)
    masked[3] = 0
    assert linear_divergence(**bad, token_weights=masked, on_nonfinite="raise").loss.isfinite()
