"""Makes the inputs of a situation, and says what is right: the float64 reference of the kernels' tests.

A case is one call of a loss, in keyword arguments that are the same for everybody; `OPTIONS` explains them. Every
function under test, an adapter or a user's own, takes those of them that it offers, and returns the loss: a tensor in
the graph, or an object whose `loss` is one.

N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal

import torch
from torch import Tensor

from sdkernels import ImportanceClip, LogitTransform, TopK, TopKLogprobs
from sdkernels.testing import make_inputs, run_reference

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS: Final = {
    "student_hidden": "(N, H) states that predict the completion tokens; get a gradient",
    "student_weight": "(V, H) output layer; gets a gradient",
    "teacher_hidden": "(N, Ht); no gradient",
    "teacher_weight": "(V, Ht), which may be student_weight itself; no gradient",
    "alpha": "0: KL(teacher‖student), 1: KL(student‖teacher), between them GKD's Jensen-Shannon divergence",
    "temperature": "divides both sides' logits; no factor T²",
    "teacher_temperature": "of the teacher, where it is another",
    "scale": "multiplies both sides' logits before the soft-cap",
    "softcap": "softcap·tanh(logits/softcap), before the temperature",
    "bias": "(V,) of the student's output layer; gets a gradient",
    "teacher_bias": "(V,) of the teacher's",
    "token_weights": "(N,) float; rows of weight 0 are masked; the mean is over the sum of the weights",
    "topk": "both sides restricted to the k likeliest tokens of `topk_of`",
    "topk_of": "'student' or 'teacher'",
    "tail": "with topk: the rest is one more token (True), or left out and both sides renormalised (False)",
    "teacher_ids": "(N, K) in place of teacher_hidden: the tokens that are known of the teacher",
    "teacher_logprobs": "(N, K) their log-probabilities; the rest as `tail` says",
    "target_ids": "(N,) the sampled tokens",
    "sampled": "True: sg(log p(y) - log q(y))·log p(y) on target_ids",
    "old_logprobs": "(N,) of target_ids when they were sampled: a row counts min(p(y)/p_old(y), importance_clip) times",
    "importance_clip": "see old_logprobs",
    "entry_clip": "the most that one token of the vocabulary adds to a row",
    "vocab_size": "columns from here on are padding",
    "reduction": "'mean', 'sum', or 'none' for (N,)",
    "num_items": "the sum of the rows is divided by this instead of by the weights of the call",
}
DEFAULTS: Final = {
    "temperature": 1.0,
    "scale": 1.0,
    "topk_of": "student",
    "tail": True,
    "importance_clip": 2.0,
    "reduction": "mean",
}
SIDES: Final = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
Check = Literal["value", "refusal", "sign", "memory"]
Passes = Literal["once", "twice", "accumulate", "interleaved", "repeated"]


@dataclass(frozen=True)
class Case:
    """Is one call, what is done with it, and what is asked."""

    call: dict[str, Any]
    dtype: str  # whose floor decides
    # value: loss and gradients. refusal: an error. sign: no row below 0. memory: no growth with N·V.
    check: Check = "value"
    # twice: backward twice over one graph. accumulate: two calls, their gradients added. interleaved: both forward
    # passes before the backward ones. repeated: two calls that must agree to the bit.
    passes: Passes = "once"
    upstream: Tensor | float | None = None
    autocast: bool = False
    gradients: bool = True  # False: called under no_grad


def case(
    *,
    rows: int = 24,
    hidden: int = 16,
    vocab: int = 120,
    dtype: str = "fp32",
    noise: float = 1.0,
    logit_std: float = 3.0,
    teacher_size: int | None = None,
    edit: Callable[[dict[str, Any]], object] | None = None,
    check: Check = "value",
    passes: Passes = "once",
    upstream: Tensor | float | None = None,
    autocast: bool = False,
    gradients: bool = True,
    floor: str | None = None,
    **options: Any,
) -> Case:
    """Makes a case of seeded inputs; `edit` changes the call's arguments, `options` included."""
    made = make_inputs(
        rows, hidden, vocab, teacher_size=teacher_size, noise=noise, logit_std=logit_std, dtype=DTYPES[dtype]
    )
    teacher_weight = made.student_weight.detach() if made.teacher_weight is None else made.teacher_weight
    call = {
        "student_hidden": made.student_hidden,
        "student_weight": made.student_weight,
        "teacher_hidden": made.teacher_hidden,
        "teacher_weight": teacher_weight,
        "alpha": 0.0,  # what every peer has
        **options,
    }
    if edit is not None:
        edit(call)
    return Case(call, floor or ("bf16" if autocast else dtype), check, passes, upstream, autocast, gradients)


def with_defaults(call: dict[str, Any]) -> Any:
    """Returns a call as attributes, `DEFAULTS` for what it does not say."""
    return SimpleNamespace(**dict.fromkeys(OPTIONS) | DEFAULTS | call)


def arguments(c: Any) -> dict[str, Any]:
    """Returns the arguments of `linear_divergence`, and of its reference, for a call with its defaults.

    `num_items` makes it a sum, which the caller divides.
    """
    own = {"bias": c.teacher_bias, "temperature": c.teacher_temperature}
    kept = ("alpha", "temperature", "token_weights", "target_ids", "entry_clip", "vocab_size")
    return {
        **{name: getattr(c, name) for name in (*SIDES, *kept)},
        "student_head": LogitTransform(bias=c.bias, scale=c.scale, softcap=c.softcap),
        "teacher_head": LogitTransform(scale=c.scale, softcap=c.softcap, **own),
        "support": "sampled" if c.sampled else None if c.topk is None else TopK(c.topk, c.topk_of, c.tail),
        "teacher": None if c.teacher_ids is None else TopKLogprobs(c.teacher_ids, c.teacher_logprobs),
        "importance": None if c.old_logprobs is None else ImportanceClip(c.old_logprobs, c.importance_clip),
        "reduction": c.reduction if c.num_items is None else "sum",
    }


def truth(case: Case) -> dict[str, Tensor]:
    """Returns loss and gradients in float64, as `runner.measured` names them."""
    count = case.call.get("num_items")
    upstream = torch.as_tensor(1.0 if case.upstream is None else case.upstream, dtype=torch.float64)
    run = run_reference(**arguments(with_defaults(case.call)), upstream=upstream / (count or 1))
    factor = 2 if case.passes in ("twice", "accumulate", "interleaved") else 1
    exact = {"loss": run.output.loss / (count or 1)}
    if case.gradients:
        named = {"hidden": run.hidden_gradient, "weight": run.weight_gradient, "bias": run.bias_gradient}
        exact |= {name: factor * gradient for name, gradient in named.items() if gradient is not None}
    return exact
