"""Lists the situations: for each its name, its case, and what somebody sees whose loss fails it.

They are drawn from reports in the trackers of trainers and kernels, and from what this project found in its own. Each
is small, seeded, and harmless: what crashes or hangs somebody's software is described in `docs/conformance.md` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Case, case


class Situation(NamedTuple):
    """Is a case and its meaning; `words`: a refusal is clear if it names one of these."""

    make: Callable[[], Case]
    symptom: str
    words: tuple[str, ...] = ()
    heavy: bool = False  # minutes in Triton's interpreter, which is spared it


def _mask(*spans: tuple[int, int], rows: int = 24) -> Tensor:
    """Returns weights 1 in these spans of rows and 0 elsewhere."""
    weights = torch.zeros(rows)
    for start, end in spans:
        weights[start:end] = 1.0
    return weights


def _fill(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    """Returns an edit that puts a value into a part of a tensor."""

    def edit(call: dict[str, Any]) -> None:
        with torch.no_grad():
            call[name][index] = value

    return edit


def _set(**changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Returns an edit that makes arguments anew of the others."""
    return lambda call: call.update({name: make(call) for name, make in changes.items()})


def _fill_from_student(rows: slice) -> Callable[[dict[str, Any]], None]:
    """Returns an edit that makes both sides' states equal in these rows."""
    return lambda call: call["teacher_hidden"].__setitem__(rows, call["student_hidden"].detach()[rows])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _exact_logits(size: float, alpha: float) -> Case:
    """Makes logits that float32 products hold exactly: one-hot states, weights in steps of 1/256."""

    def edit(call: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(0)
        steps = torch.randint(-1024, 1024, (120, 16), generator=generator) / 256
        level = torch.tensor([size, -size]).repeat(8)
        call["student_weight"] = (steps + level).requires_grad_()
        call["teacher_weight"] = torch.randint(-1024, 1024, (120, 16), generator=generator) / 256 + level
        # Frozen: its gradient is a sum of such weights, which no float32 holds.
        call["student_hidden"] = torch.eye(16).repeat(2, 1)[:24]
        call["teacher_hidden"] = torch.eye(16).repeat(2, 1)[:24]

    return case(alpha=alpha, edit=edit)


def _peaked(call: dict[str, Any]) -> None:
    """Puts nearly all of both sides' mass on one token a row, of which the sides agree in every other row."""
    # The noise leaves no ties, among which a top-k could choose.
    weight = 24.0 * torch.eye(120, 16) + torch.rand(120, 16, generator=torch.Generator().manual_seed(0))
    call["student_weight"], call["teacher_weight"] = weight.clone().requires_grad_(), weight
    call["student_hidden"] = torch.eye(16).repeat(2, 1)[:24].requires_grad_()
    call["teacher_hidden"] = torch.eye(16).repeat(2, 1)[:24].clone()
    call["teacher_hidden"][::2] = call["teacher_hidden"][::2].roll(1, 1)


def _known_teacher(k: int, alpha: float, **options: Any) -> Case:
    """Makes a teacher of which the k likeliest tokens are known."""

    def edit(call: dict[str, Any]) -> None:
        logits = call.pop("teacher_hidden") @ call.pop("teacher_weight").T
        call["teacher_logprobs"], call["teacher_ids"] = logits.float().log_softmax(-1).topk(k, -1)

    return case(alpha=alpha, edit=edit, **options)


def _hard_labels(**options: Any) -> Case:
    """Makes a teacher that is sure of one token a row: its forward KL is cross-entropy."""
    rows, vocab = options.get("rows", 24), options.get("vocab", 120)

    def edit(call: dict[str, Any]) -> None:
        del call["teacher_hidden"], call["teacher_weight"]
        call["teacher_ids"] = (torch.arange(rows) * 7 % vocab)[:, None]
        call["teacher_logprobs"] = torch.zeros(rows, 1)

    return case(alpha=0.0, edit=edit, **options)


def _far_apart(call: dict[str, Any]) -> None:
    call["teacher_hidden"] = -call["student_hidden"].detach()


def _value(symptom: str, **options: Any) -> Situation:
    return Situation(lambda: case(**options), symptom)


def _refusal(symptom: str, *words: str, **options: Any) -> Situation:
    return Situation(lambda: case(check="refusal", **options), symptom, words)


DIRECTION = "another divergence is trained than the one that was asked for"
NORMALISER = "the loss and the learning rate depend on how many tokens are masked"
NEAR = "near the teacher rounded logits drown what is to be learnt: a large part of gradient or loss is noise"
SOFTCAP = "models with this transform (Gemma, Cohere, Granite) are trained towards another distribution"
SUPPORT = "top-k training pulls towards another distribution than the teacher's"
ACCUMULATED = "gradients are wrong as soon as more than one backward pass is made"
WEIGHTS = "tokens count for more or less than their weights say"
SILENT = "a mistake in the settings trains on, with a number that looks like a loss"
LARGE = "logits far apart give a loss or gradients that are wrong or NaN"
DIGITS = "log-probabilities of large logits lose digits: `z - logsumexp(z)` is rounded at the size of z"
NEAR_LOSS = "near the teacher the reported loss is partly rounding: summands of both signs cancel"
DTYPE = "losses or gradients lose more than this dtype costs"

SITUATIONS: dict[str, Situation] = {
    "forward KL": _value(DIRECTION, alpha=0.0),
    "reverse KL": _value(DIRECTION, alpha=1.0),
    "Jensen-Shannon": _value(DIRECTION, alpha=0.5),
    "Jensen-Shannon, alpha 0.1": _value(DIRECTION, alpha=0.1),
    "Jensen-Shannon, alpha 0.001": _value(DIRECTION, alpha=0.001),
    "forward KL, bfloat16": _value(DTYPE, alpha=0.0, dtype="bf16"),
    "reverse KL, bfloat16": _value(DTYPE, alpha=1.0, dtype="bf16"),
    "reverse KL, float16": _value(DTYPE, alpha=1.0, dtype="fp16"),
    "reverse KL under autocast": _value(DTYPE, alpha=1.0, autocast=True),
    "float16 with a loss scale": _value(
        "small gradients are rounded to 0 before the loss scale reaches them",
        dtype="fp16",
        rows=1024,
        noise=0.1,
        upstream=2.0**14,
    ),
    "never negative, float32": _value(NEAR_LOSS, alpha=0.0, noise=1e-3, check="sign"),
    "never negative, bfloat16": _value(NEAR_LOSS, noise=0.01, dtype="bf16", check="sign"),
    "near the teacher, forward KL": _value(NEAR_LOSS, alpha=0.0, noise=1e-3),
    "near the teacher, reverse KL": _value(NEAR_LOSS, alpha=1.0, noise=1e-3),
    "near the teacher, Jensen-Shannon": _value(NEAR_LOSS, alpha=0.5, noise=1e-3),
    "near the teacher, forward KL, bfloat16": _value(NEAR, alpha=0.0, noise=0.01, dtype="bf16"),
    "near the teacher, reverse KL, bfloat16": _value(NEAR, alpha=1.0, noise=0.01, dtype="bf16"),
    "far from the teacher, reverse KL": _value(LARGE, alpha=1.0, logit_std=30.0, edit=_far_apart),
    "far from the teacher, Jensen-Shannon": _value(LARGE, alpha=0.5, logit_std=10.0, gradients=False, edit=_far_apart),
    "nearly all mass on one token": _value(LARGE, edit=_peaked),
    "logits of ±10,000, forward KL": Situation(lambda: _exact_logits(1e4, 0.0), DIGITS),
    "logits of ±10,000, reverse KL": Situation(lambda: _exact_logits(1e4, 1.0), DIGITS),
    "logits of ±10,000, Jensen-Shannon": Situation(lambda: _exact_logits(1e4, 0.5), DIGITS),
    "half the rows equal to the teacher's": _value(
        "rows on which both sides agree disturb the others",
        edit=_fill_from_student(slice(None, None, 2)),
    ),
    "only the first row differs": _value(
        "the first token of a completion is not learnt",
        edit=_fill_from_student(slice(1, None)),
    ),
    "teacher shifted by one row": _value(
        "rows are compared with their neighbours: a teacher one token late has no loss",
        edit=_set(teacher_hidden=lambda c: c["student_hidden"].detach().roll(1, 0)),
    ),
    "masked rows": _value(NORMALISER, token_weights=_mask((3, 9), (15, 20))),
    "mask uneven over chunks": Situation(
        lambda: case(rows=2100, hidden=8, vocab=64, token_weights=_mask((0, 900), (2090, 2100), rows=2100)),
        "the loss depends on how masked tokens are spread over the batch, or over chunks of it",
    ),
    "all rows masked": _value("a batch without a supervised token makes the run NaN", token_weights=_mask()),
    "no rows": _value("a rank without completion tokens stops the run, or makes it NaN", rows=0),
    "NaN in a masked row": _value(
        "padding that holds NaN spoils the gradients of all parameters",
        token_weights=_mask((0, 20)),
        edit=lambda c: [_fill(f"{side}_hidden", 22, math.nan)(c) for side in ("student", "teacher")],
    ),
    "weights per token": _value(WEIGHTS, token_weights=torch.linspace(0.0, 2.0, 24)),
    "sum of the rows": _value(WEIGHTS, reduction="sum"),
    "a loss per row": _value(WEIGHTS, reduction="none", upstream=torch.linspace(-1.0, 2.0, 24)),
    "count of items and masked rows": _value(
        "with gradient accumulation, batches of few tokens count as much as those of many",
        num_items=100,
        token_weights=_mask((3, 9), (15, 20)),
    ),
    "upstream gradient 2.5": _value("a factor on the loss does not reach the gradients", upstream=2.5),
    "backward twice over one graph": _value(ACCUMULATED, passes="twice", upstream=0.5),
    "two calls, gradients added": _value(ACCUMULATED, passes="accumulate"),
    "two forward passes, then two backward": _value(ACCUMULATED, passes="interleaved", upstream=0.5),
    "the same to the bit": _value("two equal runs differ", passes="repeated"),
    "without gradient": _value("evaluation under no_grad fails or has another loss", gradients=False),
    "frozen output layer": _value(
        "a frozen layer stops the run or changes the other gradients",
        edit=_set(student_weight=lambda c: c["student_weight"].detach()),
    ),
    "frozen body": _value(
        "frozen states stop the run or change the other gradients",
        edit=_set(student_hidden=lambda c: c["student_hidden"].detach()),
    ),
    "teacher that asks for a gradient": Situation(
        lambda: case(edit=_set(teacher_hidden=lambda c: _leaf(c["teacher_hidden"]))),
        "the teacher is trained towards the student",
        ("teacher", "target"),
    ),
    "one output layer for both": Situation(
        lambda: case(edit=_set(teacher_weight=lambda c: c["student_weight"])),
        "the shared output layer gets the teacher's gradient as well",
        ("teacher", "target"),
    ),
    "teacher of another width": _value("larger teachers cannot be used", teacher_size=24),
    "teacher in bfloat16": Situation(
        lambda: case(
            edit=_set(
                teacher_hidden=lambda c: c["teacher_hidden"].bfloat16(),
                teacher_weight=lambda c: c["teacher_weight"].bfloat16(),
            ),
            floor="bf16",
        ),
        "a teacher that is kept in bfloat16 cannot be used, or rounds the student",
    ),
    "every other row and column of memory": _value(
        "tensors that are views give other results",
        edit=_set(
            student_hidden=lambda c: _leaf(c["student_hidden"].detach().repeat_interleave(2, 0)[::2]),
            teacher_hidden=lambda c: c["teacher_hidden"].repeat_interleave(2, 1)[:, ::2],
            student_weight=lambda c: _leaf(c["student_weight"].detach().repeat_interleave(2, 0)[::2]),
        ),
    ),
    "expanded teacher": _value(
        "tensors that are views give other results",
        edit=_set(teacher_hidden=lambda c: c["teacher_hidden"][:1].expand(24, 16)),
    ),
    "one row": _value("batches of a single token fail", rows=1),
    "odd sizes": _value("sizes that are no powers of 2 give other results", rows=7, hidden=13, vocab=101),
    "vocabulary of 262,144": Situation(
        lambda: case(rows=4, hidden=8, vocab=262_144), "large vocabularies overflow", heavy=True
    ),
    "padded vocabulary": _value(
        "the rows that pad the output layer take part of the probability",
        vocab_size=100,
        edit=lambda c: [_fill(f"{side}_weight", slice(100, None), 3.0)(c) for side in ("student", "teacher")],
    ),
    "heads padded differently": _value(
        "models whose output layers end in paddings of different lengths cannot be compared",
        vocab_size=100,
        edit=_set(teacher_weight=lambda c: torch.cat([c["teacher_weight"][:100], torch.full((36, 16), 3.0)])),
    ),
    "temperature 2": _value("the temperature acts on one side only, or scales the loss", alpha=0.0, temperature=2.0),
    "teacher's temperature alone": _value(
        "the teacher is not sharpened", temperature=1.0, teacher_temperature=0.5, alpha=0.0
    ),
    "soft-cap and temperature": _value(SOFTCAP, softcap=4.0, temperature=2.0),
    "scale": _value(SOFTCAP, scale=0.25, alpha=0.0),
    "bias": _value(
        "output layers with a bias train towards another distribution",
        bias=torch.linspace(-2.0, 2.0, 120).requires_grad_(),
        teacher_bias=torch.linspace(1.0, -1.0, 120),
    ),
    "student's top-k and tail": _value(SUPPORT, alpha=1.0, topk=10),
    "teacher's top-k and tail": _value(SUPPORT, topk=10, topk_of="teacher", alpha=0.0),
    "top-k without tail": _value(SUPPORT, topk=10, tail=False),
    "top-k that holds nearly all mass": _value(
        "where the student is sure, the rest's probability is rounded or clamped away, and its gradient with it",
        topk=2,
        edit=_peaked,
    ),
    "teacher known by its top-k, tail": Situation(lambda: _known_teacher(10, 0.0), SUPPORT),
    "teacher known by its top-k, no tail": Situation(
        lambda: _known_teacher(10, 0.0, tail=False),
        "the listed tokens are neither renormalised nor given a rest: not a divergence, and negative at places",
    ),
    "teacher sure of one token": Situation(lambda: _hard_labels(), SUPPORT),
    "teacher sure of one token, masked rows": Situation(
        lambda: _hard_labels(token_weights=_mask((3, 9), (15, 20))), NORMALISER
    ),
    "sampled tokens": Situation(
        lambda: case(alpha=1.0, sampled=True, target_ids=torch.arange(24) * 5),
        "the score-function form of reverse KL is another",
    ),
    "importance weights": Situation(
        lambda: case(target_ids=torch.arange(24) * 5, old_logprobs=torch.linspace(-9.0, -1.0, 24), importance_clip=2.0),
        "off-policy tokens count for more or less than their ratio, or the ratio gets a gradient",
    ),
    "entry clip": _value("single tokens dominate, or the clip gets a gradient", entry_clip=0.02),
    "memory": Situation(
        lambda: case(rows=8192, hidden=16, vocab=8192, check="memory"),
        "the memory of a step grows by whole matrices of logits",
        heavy=True,
    ),
    "alpha 1.5": _refusal(SILENT, "alpha", "beta", alpha=1.5),
    "alpha NaN": _refusal(SILENT, "alpha", "beta", alpha=math.nan),
    "temperature 0": _refusal(SILENT, "temperature", temperature=0.0),
    "more teacher than student rows": _refusal(
        SILENT,
        "rows",
        "shape",
        "teacher_hidden",
        "batch_size",
        edit=_set(teacher_hidden=lambda c: c["teacher_hidden"].repeat(2, 1)),
    ),
    "teacher with a larger vocabulary": _refusal(
        SILENT,
        *("vocab", "shape", "teacher_weight", "vocabulary"),
        edit=_set(teacher_weight=lambda c: c["teacher_weight"].repeat(2, 1)),
    ),
    "one weight for many rows": _refusal(
        SILENT, "token_weights", "mask", "shape", "labels", token_weights=torch.ones(1)
    ),
    "top-k of 0": _refusal(SILENT, "topk", "top_k", "k ", topk=0),
}
