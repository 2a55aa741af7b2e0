"""Names what goes into the fused operations and what comes out, beyond plain tensors.

The public part is what a caller writes (`TopK(20)`, `LogitTransform(softcap=30.0)`) and gets back
(`DivergenceOutput`). `Options` and `Operands` are what the face hands to the driver: the call as it was written and its
tensors. `Objective`, `TileRows` and `RowValues` are the seam between the driver, which walks over chunks of rows and
does the matrix products, and a backend, which turns one tile of logits into row values and a gradient tile. `Objective`
and `Setting` hold scalars only, so that they can cross a `torch.library` operator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple, cast

import torch

Backend = Literal["auto", "torch", "native", "triton"]
Gradient = Literal["auto", "in_forward", "recompute"]
Nonfinite = Literal["propagate", "raise"]
Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """Leads from a projection `x = h W^T` to the logits: `softcap·tanh(scale·(x + bias)/softcap) / temperature`.

    `bias` is a (V,) tensor or None. `scale` multiplies (Cohere's `logit_scale`, the inverse of Granite's
    `logits_scaling`); `softcap` is Gemma's `final_logit_softcapping`, None for none. `temperature` None means the
    `temperature` argument of the call.
    """

    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class TopK:
    """Restricts both distributions to the k most likely ids of one side (SDPO, arXiv:2601.20802).

    With `tail` the remaining mass of each side becomes one more bucket, which keeps the result a divergence.
    Without it both sides are renormalised over the k ids.
    """

    k: int
    of: Literal["student", "teacher"] = "student"
    tail: bool = True


@dataclass(frozen=True)
class TeacherMix:
    """Mixes in a second teacher; logits become `(1 - share)·teacher + share·this one` (trust region, SDPO).

    `hidden` is (N, Hm). `weight` is (V, Hm), or None for the weight that the first teacher uses. Both teachers go
    through the teacher's `LogitTransform` before they are mixed.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None = None
    share: float = 0.5


@dataclass(frozen=True)
class TopKLogprobs:
    """Stands for a teacher's hidden states: log-probabilities of K ids per row, as a serving engine returns them.

    `ids` is (N, K) int64 without repetition in a row; `logprobs` is (N, K), the log-probabilities under the full
    vocabulary, so that a row's probabilities add up to at most 1.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class ImportanceClip:
    """Multiplies a token's loss by `min(exp(log p(y) - old_logprob), clip)`, without gradient (SDPO's IS clip).

    `old_logprobs` is (N,): the log-probability of `target_ids` under the policy that sampled them.
    """

    old_logprobs: torch.Tensor
    clip: float = 2.0


class DivergenceOutput(NamedTuple):
    """What a divergence returns. Everything but the loss is detached (see `per_token`)."""

    loss: torch.Tensor  # () float32 (float64 for float64 inputs); (N,) with reduction="none"
    per_token: torch.Tensor  # (N,) divergence times token weight and importance; 0 where the weight is 0
    student_logprobs: torch.Tensor | None  # (N,) log p(target); None without target_ids; 0 where the weight is 0
    teacher_logprobs: torch.Tensor | None  # (N,) log q(target); None also where the teacher is TopKLogprobs
    student_entropy: torch.Tensor  # (N,) nats, over the full vocabulary; 0 where the weight is 0
    teacher_entropy: torch.Tensor | None  # (N,) nats; None where the teacher is TopKLogprobs
    active_tokens: torch.Tensor  # () int64, rows with a weight other than 0
    gradient_error: torch.Tensor | None  # (2,) estimated, of hidden states and of head; None without gradient_tolerance
    backend: str  # "torch", "native" or "triton"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a caller wrote beside the tensors of student and teacher, each as `linear_divergence` explains it."""

    alpha: float = 1.0
    normalize: bool = False
    temperature: float = 1.0
    student_head: LogitTransform | None = None
    teacher_head: LogitTransform | None = None
    support: TopK | str | None = None
    teacher: TeacherMix | TopKLogprobs | None = None
    importance: ImportanceClip | None = None
    entry_clip: float | None = None
    vocab_size: int | None = None
    reduction: str = "mean"
    backend: str = "auto"
    gradient: str = "auto"
    gradient_tolerance: float | None = None
    workspace_mb: float | None = None
    on_nonfinite: str = "propagate"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Holds every scalar that says what is computed for a row. Reference: `reference.py`, function by function."""

    alpha: float = 1.0
    normalize: bool = False
    support: Literal["full", "topk", "sampled"] = "full"
    topk: int = 0
    topk_of: Literal["student", "teacher"] = "student"
    tail: bool = True
    entry_clip: float | None = None
    importance_clip: float = math.inf
    mix_share: float = 0.0
    # (scale, softcap, temperature) of each side; the biases are tensors and travel beside this.
    student: tuple[float, float | None, float] = (1.0, None, 1.0)
    teacher: tuple[float, float | None, float] = (1.0, None, 1.0)
    vocab_size: int = 0  # 0: the head's own

    def encode(self) -> tuple[str, list[float], list[int]]:
        """Returns words, floats and ints, as operators take them; torch.compile's symbols keep the last two apart."""
        words = [self.support, self.topk_of, "tail" if self.tail else "", "normalize" if self.normalize else ""]
        entry_clip = math.inf if self.entry_clip is None else self.entry_clip
        numbers = [self.alpha, entry_clip, self.importance_clip, self.mix_share]
        for scale, softcap, temperature in (self.student, self.teacher):
            numbers += [scale, math.inf if softcap is None else softcap, temperature]
        return ",".join(words), numbers, [self.topk, self.vocab_size]

    @staticmethod
    def decode(words: str, numbers: list[float], counts: list[int]) -> Objective:
        """Returns what was encoded."""

        def side(scale: float, softcap: float, temperature: float) -> tuple[float, float | None, float]:
            return scale, None if math.isinf(softcap) else softcap, temperature

        support, topk_of, tail, normalize = words.split(",")
        alpha, entry_clip, importance_clip, mix_share = numbers[:4]
        return Objective(
            alpha=alpha,
            normalize=bool(normalize),
            support=cast(Literal["full", "topk", "sampled"], support),
            topk=counts[0],
            topk_of=cast(Literal["student", "teacher"], topk_of),
            tail=bool(tail),
            entry_clip=None if math.isinf(entry_clip) else entry_clip,
            importance_clip=importance_clip,
            mix_share=mix_share,
            student=side(*numbers[4:7]),
            teacher=side(*numbers[7:10]),
            vocab_size=counts[1],
        )


class Operands(NamedTuple):
    """Holds a call's tensors. A teacher weight of None is the student's, a mixed-in teacher's None is the teacher's.

    Without a `student_weight`, what stands for hidden states are logits (N, V).
    """

    student_hidden: torch.Tensor  # (N, H)
    student_weight: torch.Tensor | None = None  # (V, H)
    student_bias: torch.Tensor | None = None  # (V,)
    teacher_hidden: torch.Tensor | None = None  # (N, Ht)
    teacher_weight: torch.Tensor | None = None  # (V, Ht)
    teacher_bias: torch.Tensor | None = None  # (V,)
    mix_hidden: torch.Tensor | None = None  # (N, Hm)
    mix_weight: torch.Tensor | None = None  # (V, Hm)
    token_weights: torch.Tensor | None = None  # (N,)
    target_ids: torch.Tensor | None = None  # (N,)
    old_logprobs: torch.Tensor | None = None  # (N,)
    teacher_ids: torch.Tensor | None = None  # (N, K)
    teacher_logprobs: torch.Tensor | None = None  # (N, K)

    @property
    def dtype(self) -> torch.dtype:
        """Is the dtype of the logits and of every row value: float64 if any factor has it, else float32."""
        hidden = (self.student_hidden, self.teacher_hidden, self.mix_hidden)
        factors = (*hidden, self.student_weight, self.teacher_weight, self.mix_weight)
        wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in factors)
        return torch.float64 if wide else torch.float32

    @property
    def vocab(self) -> int:
        """Counts the columns of the logits, padding included."""
        return self.student_hidden.shape[1] if self.student_weight is None else self.student_weight.shape[0]

    @property
    def weight(self) -> torch.Tensor:
        """Is the student's head, which logits do not have."""
        if self.student_weight is None:
            raise TypeError("these operands are logits: they have no head")
        return self.student_weight

    def sides(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns (hidden, weight) of each distribution: student, teacher, mixed-in teacher."""
        teacher_weight = self.teacher_weight
        if teacher_weight is None or is_same(teacher_weight, self.weight):
            teacher_weight = self.weight
        mix_weight = teacher_weight if self.mix_weight is None else self.mix_weight
        sides = [(self.student_hidden, self.weight)]
        if self.teacher_hidden is not None:
            sides.append((self.teacher_hidden, teacher_weight))
        if self.mix_hidden is not None:
            sides.append((self.mix_hidden, mix_weight))
        return sides


class Setting(NamedTuple):
    """Says how a call is run, as opposed to what it computes, in the order in which an operator takes it."""

    backend: str = "torch"
    workspace_bytes: int = 0
    process_group: str = ""  # name of the group over which the head is sharded; "" where it is not
    shards: Sequence[int] = ()  # rows of the head that each of its ranks holds
    reduction: str = "mean"
    normalizer: float = 0.0  # what a mean divides by; 0: the sum of the weights
    raise_on_nonfinite: bool = False
    gradient_tolerance: float = 0.0  # relative error that the formed gradients may have; 0: none


class Gradients(NamedTuple):
    """What a pass forms, in the shapes and dtypes of the inputs; None where it is not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class TileRows:
    """What a backend needs beside the logits of a tile of C rows; None where the objective does not use it.

    Kernels take addresses and no strides, so what is not contiguous is copied here.
    """

    student_bias: torch.Tensor | None = None  # (V,)
    teacher_bias: torch.Tensor | None = None  # (V,)
    target_ids: torch.Tensor | None = None  # (C,) int64
    teacher_ids: torch.Tensor | None = None  # (C, K) int64: the teacher is cached and teacher_logits is None
    teacher_logprobs: torch.Tensor | None = None  # (C, K) in the compute dtype
    # Both sides go through one head without soft-cap, and teacher_logits hold the projection of the difference of their
    # hidden states, teacher minus student: rounded like itself, not like the logits.
    teacher_is_gap: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                object.__setattr__(self, name, value.contiguous())

    def part(self, block: slice) -> TileRows:
        """Returns what belongs to a block of the tile's rows."""

        def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[block]

        return replace(
            self,
            target_ids=part(self.target_ids),
            teacher_ids=part(self.teacher_ids),
            teacher_logprobs=part(self.teacher_logprobs),
        )


class RowValues(NamedTuple):
    """What a backend returns for a tile, each (C,) in the compute dtype; None where it does not apply."""

    loss: torch.Tensor  # the divergence, before token weight and importance
    student_logprobs: torch.Tensor | None
    teacher_logprobs: torch.Tensor | None
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor | None


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns that of a gradient that waits for its upstream gradient, in which a loss scale may be.

    float16 would have lost before what the scale is there to save.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in float64: on its device, or, where that has no such dtype, as Apple's GPUs, on the CPU."""
    # In two steps, since a cast on the way would be the device's.
    return tensor.to(float64_device(tensor.device)).double()


def float64_device(device: torch.device) -> torch.device:
    """Returns where what is on a device can be had in float64: see `in_float64`."""
    return device if device.type in ("cpu", "cuda") or _has_float64(device) else torch.device("cpu")


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones((), device=device).double()
    except (TypeError, RuntimeError):
        return False
    return True


class Weighed(NamedTuple):
    """What the weights of a call's rows say, as numbers of the host."""

    active: int  # rows whose weight is not 0
    total: float  # sum of all weights

    @classmethod
    def of(cls, token_weights: torch.Tensor) -> Weighed:
        active, total = on_host(cls.to_read(token_weights))
        return cls(int(active), total)

    @staticmethod
    def to_read(token_weights: torch.Tensor) -> list[torch.Tensor]:
        """Returns what is to be read of a device, in the order of the fields."""
        return [(token_weights != 0).sum(), in_float64(token_weights).sum()]


def on_host(numbers: Sequence[torch.Tensor]) -> list[float]:
    """Reads tensors () together: a GPU is waited for once."""
    return torch.stack([in_float64(number) for number in numbers]).tolist() if numbers else []


def is_same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """True where both are absent or lie in one memory: a detached bias is its original."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr()
