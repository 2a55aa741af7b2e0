"""Calls the public distillation losses, and ours, with the arguments of `cases.OPTIONS`.

An adapter names the arguments that its peer offers; what it does not name, or raises `NotOffered` for, is no failure. A
peer is called as its documentation says. Where it takes logits, they are made as a model's forward pass makes them, in
the dtype of the states; where it leaves the mean over tokens to its trainer, the trainer's formula follows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sdkernels import linear_divergence

from .cases import OPTIONS, arguments, with_defaults

IGNORED: Final = -100
SIDES: Final = "student_hidden student_weight teacher_hidden teacher_weight alpha"
HEAD: Final = "bias teacher_bias scale softcap temperature"  # what a model or its trainer does to logits


class NotOffered(Exception):
    """Says what a peer does not have."""


@dataclass(frozen=True)
class Adapter:
    """Is a peer: the call, what of a case it takes, and what must be installed."""

    body: Callable[[Any], Any]  # given a case's arguments as attributes
    offers: str
    package: str = "torch"
    module: str = "torch"
    environment: Mapping[str, str] = field(default_factory=dict)
    all_logits: str = ""  # why all logits exist, as documented

    def __call__(self, **call: Any) -> Any:
        return self.body(with_defaults(call))

    def missing(self) -> str:
        """Returns what to install, or nothing."""
        return "" if find_spec(self.module) else f"not installed: pip install {self.package}"


def _ours(c: Any, backend: str) -> Tensor:
    given = arguments(c)
    if c.teacher_weight is not None and c.teacher_weight.data_ptr() == c.student_weight.data_ptr():
        given["teacher_weight"] = None
    loss = linear_divergence(**given, backend=backend).loss  # type: ignore[arg-type]
    return loss if c.num_items is None else loss / c.num_items


def _logits(c: Any, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns both sides' logits (N, V) as their models have them."""

    def side(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(hidden, weight, bias) * c.scale
        return (logits if c.softcap is None else torch.tanh(logits / c.softcap) * c.softcap) / temperature

    with torch.no_grad():
        teacher = side(c.teacher_hidden, c.teacher_weight, c.teacher_bias)
    return side(c.student_hidden, c.student_weight, c.bias), teacher


def _mask(c: Any) -> Tensor:
    """Returns the mask (N,) of a peer that has no weights; one of another shape is its trainer's business."""
    if c.token_weights is None:
        return c.student_hidden.new_ones(len(c.student_hidden), dtype=torch.float32)
    mask = c.token_weights
    if len(mask) != len(c.student_hidden) or not ((mask == 0) | (mask == 1)).all():
        raise NotOffered("masks tokens, does not weight them")
    return mask


def _labels(c: Any) -> Tensor:
    return torch.where(_mask(c) == 0, IGNORED, 0)


def _mean(rows: Tensor, c: Any) -> Tensor:
    """Reduces as TRL's self-distillation trainers do."""
    if c.reduction != "mean" and c.token_weights is None:
        return rows if c.reduction == "none" else rows.sum()
    mask = _mask(c)
    return (rows * mask).sum() / mask.sum().clamp(min=1.0)


def _plain(c: Any, upcast: bool = True) -> Tensor:
    """Computes it as tutorials write it: all logits, float32 with `upcast`, and textbook sums."""
    student, teacher = _logits(c)
    if upcast:
        student, teacher = student.float(), teacher.float()
    log_p = (student / c.temperature).log_softmax(-1)
    log_q = (teacher / (c.teacher_temperature or c.temperature)).log_softmax(-1)
    return _mean(textbook(log_p, log_q, c.alpha), c)


def textbook(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Returns the divergence of log-probabilities (..., V) as trainers write it, with `kl_div`, (...)."""
    if alpha == 0:
        entries = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    elif alpha == 1:
        entries = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        weights = torch.tensor([1 - alpha, alpha], dtype=log_p.dtype, device=log_p.device).log()
        log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
        entries = alpha * F.kl_div(log_m, log_q, reduction="none", log_target=True)
        entries = entries + (1 - alpha) * F.kl_div(log_m, log_p, reduction="none", log_target=True)
    return entries.sum(-1)


def _forward_only(c: Any) -> None:
    if c.alpha != 0:
        raise NotOffered("the forward KL only")


def _torch(c: Any) -> Tensor:
    """Adds the teacher's entropy to torch's fused cross-entropy with its probabilities: the forward KL."""
    _forward_only(c)
    with torch.no_grad():
        log_q = (c.teacher_hidden @ c.teacher_weight.T).float().log_softmax(-1)  # (N, V)
    with warnings.catch_warnings():
        # Its chunks take ids alone (torch 2.13): with probabilities all logits are there.
        warnings.filterwarnings("ignore", "linear_cross_entropy: ``options`` ignored")
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(c.student_hidden, c.student_weight, log_q.exp(), options=options)
    return loss + (log_q.exp() * log_q).sum() / max(len(log_q), 1)


def _trl_checks(alpha: float) -> None:
    """Asks a trainer's configuration, which is where TRL checks `beta`; distillation's says the same."""
    if not 0 <= alpha <= 1:
        from trl.experimental.gkd import GKDConfig

        GKDConfig(beta=alpha, bf16=False)


def _trl_chunked(c: Any) -> Tensor:
    """Calls what `DistillationTrainer` calls, on the rows that its mask keeps."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    _trl_checks(c.alpha)
    keep = slice(None) if c.token_weights is None else _mask(c) != 0
    sides = (c.student_hidden[keep], c.student_weight, c.bias, c.teacher_hidden[keep], c.teacher_weight, c.teacher_bias)
    heads = (c.scale, c.softcap, c.scale, c.softcap)
    rows = ChunkedDivergenceFunction.apply(*sides, c.alpha, c.temperature, *heads)[0]
    return rows if c.reduction == "none" else rows.sum() / (max(len(rows), 1) if c.reduction == "mean" else 1)


def _trl_gkd(c: Any) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    _trl_checks(c.alpha)
    if c.reduction == "none":
        raise NotOffered("has no loss per row")
    student, teacher = _logits(c)
    reduction = "batchmean" if c.reduction == "mean" else c.reduction
    sequence = (student[None], teacher[None], _labels(c)[None])
    return GKDTrainer.generalized_jsd_loss(*sequence, c.alpha, c.temperature, reduction, c.num_items)


def _trl_self_distillation(c: Any) -> Tensor:
    """Calls the losses of `SDPOTrainer`; `SDFTTrainer` has the same file."""
    from trl.experimental.sdpo import loss_utils
    from trl.trainer.utils import selective_log_softmax

    if c.temperature <= 0:
        raise NotOffered("has its logits from its trainer, which divides them")
    student, teacher = _logits(c, c.temperature)
    if c.topk is not None:
        options = {"distillation_topk": c.topk, "distillation_alpha": c.alpha, "distillation_add_tail": c.tail}
        rows = loss_utils.compute_topk_self_distillation_loss(student, teacher, **options)
    else:
        name, ids = ("sampled_token", (c.target_ids,)) if c.sampled else ("full_logit", ())
        loss: Any = getattr(loss_utils, f"compute_{name}_self_distillation_loss")
        rows = loss(student, teacher, *ids, distillation_alpha=c.alpha)
    if c.old_logprobs is not None:
        now = selective_log_softmax(student, c.target_ids)
        rows = loss_utils.apply_importance_sampling_clipping(rows, now, c.old_logprobs, c.importance_clip)
    # The trainer's own answer to a batch without tokens.
    return student.sum() * 0.0 if not _mask(c).any() else _mean(rows, c)


def _liger_chunked(c: Any, compiled: bool, chunk_size: int = 1024) -> Tensor:
    """Calls the class with a pure soft loss (its default adds half a hard cross-entropy)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    own = {"beta": c.alpha, "temperature": c.temperature, "compiled": compiled, "chunk_size": chunk_size}
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **own)
    sides = (c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight)
    return module(*sides, _labels(c), c.bias, c.teacher_bias)


def _liger_triton(c: Any) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=c.alpha, temperature=c.temperature)
    sides = (c.student_hidden, c.student_weight, c.teacher_hidden, c.teacher_weight)
    return module(*sides, None if c.token_weights is None else _labels(c))


def _verl(c: Any, chunked: bool) -> Tensor:
    """Calls `forward_kl_topk`; a teacher that is known as a whole lists all tokens of the vocabulary."""
    _forward_only(c)
    if c.teacher_ids is not None and c.tail and c.teacher_logprobs.any():
        raise NotOffered("gives the tokens that are not listed no rest")
    if c.temperature <= 0:
        raise NotOffered("has its logits from its engine, which divides them")
    if c.teacher_ids is None and not len(c.student_weight) == len(c.teacher_weight) <= 1024:
        raise NotOffered("lists a teacher's tokens, not a whole vocabulary of this size")
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.trainer.ppo.core_algos import agg_loss

    ids, logprobs, mask = c.teacher_ids, c.teacher_logprobs, _mask(c)
    if ids is None:
        student, teacher = _logits(c, c.temperature)
        ids, logprobs = torch.arange(teacher.shape[-1]).expand(teacher.shape), teacher.float().log_softmax(-1)
    else:  # the teacher's logits are not there
        states = {"teacher_hidden": c.student_hidden, "teacher_weight": c.student_weight}
        student, _ = _logits(SimpleNamespace(**vars(c) | states), c.temperature)
    nested = [torch.nested.nested_tensor([given], layout=torch.jagged) for given in (logprobs, ids)]
    config = SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=chunked)
    losses = compute_forward_kl_topk(student[None], *nested, SimpleNamespace(distillation_loss=config), "thd")
    # Its trainer counts tokens over all ranks, where some are always left; the clamp is the registered loss's.
    count = mask.sum().clamp(min=1.0) if c.num_items is None else c.num_items
    return agg_loss(losses["distillation_losses"].clamp_min(0.0), mask[None], "token-mean", batch_num_tokens=count)


def _orda(c: Any, backend: str = "torch") -> Tensor:
    """Undoes its documented factor T²; its `kl_beta` is 1 - alpha."""
    from orda_kernel import SeparateTeacher, TiedTeacher, distillation_loss

    if c.reduction == "none":
        raise NotOffered("has no loss per row")
    tied = c.teacher_weight.data_ptr() == c.student_weight.data_ptr()
    options: dict[str, Any] = {
        "student_ce_weight": 0.0,
        "teacher_ce_weight": 0.0,
        "kl_weight": 1.0,
        "kl_temperature": c.temperature,
        "kl_teacher_temperature": c.teacher_temperature,
        "kl_divergence": {0.0: "forward", 1.0: "reverse"}.get(c.alpha, "skew_js"),
        "kl_beta": None if c.alpha in (0, 1) else 1 - c.alpha,
        "reduction": c.reduction,
        "backend": backend,
    }
    teacher = TiedTeacher(hidden=c.teacher_hidden) if tied else SeparateTeacher(c.teacher_hidden, c.teacher_weight)
    return distillation_loss(c.student_hidden, c.student_weight, _labels(c), teacher, **options).loss / c.temperature**2


def _fla(c: Any) -> Tensor:
    _forward_only(c)
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return fused_kl_div_loss(c.student_hidden, c.teacher_hidden, c.student_weight, c.teacher_weight)


def _cut_cross_entropy(c: Any) -> Tensor:
    """Takes a teacher that is sure of one token a row, which is all that cross-entropy can be asked."""
    _forward_only(c)
    if c.teacher_ids is None or c.teacher_ids.shape[1] != 1:
        raise NotOffered("the cross-entropy of one token a row only")
    from cut_cross_entropy import linear_cross_entropy

    targets = torch.where(_mask(c) == 0, IGNORED, c.teacher_ids[:, 0])
    options = {"softcap": c.softcap, "reduction": c.reduction, "impl": "torch_compile"}  # its choice without a GPU
    return linear_cross_entropy(c.student_hidden, c.student_weight, targets, **options)


_ALL: Final = " ".join(OPTIONS)
_KNOWN: Final = "teacher_ids teacher_logprobs"
_INTERPRETED: Final = {"TRITON_INTERPRET": "1"}
_GIVEN: Final = "is given all logits"
_SDPO: Final = "token_weights topk tail sampled target_ids old_logprobs importance_clip"
_PLAIN: Final = f"{SIDES} {HEAD} teacher_temperature token_weights reduction"
_LIGER: Final = f"{SIDES} temperature token_weights"
_VERL: Final = f"{SIDES} {HEAD} token_weights {_KNOWN} tail num_items"
ADAPTERS: Final[dict[str, Adapter]] = {
    "sdcore, torch": Adapter(partial(_ours, backend="torch"), _ALL),
    "sdcore, native": Adapter(partial(_ours, backend="native"), _ALL),
    "sdcore, Triton": Adapter(partial(_ours, backend="triton"), _ALL, "triton", "triton", _INTERPRETED),
    "plain torch": Adapter(_plain, _PLAIN, all_logits=_GIVEN),
    "plain torch, no upcast": Adapter(partial(_plain, upcast=False), _PLAIN, all_logits=_GIVEN),
    "torch linear_cross_entropy": Adapter(_torch, SIDES, all_logits=_GIVEN),
    "TRL chunked": Adapter(_trl_chunked, f"{SIDES} {HEAD} token_weights reduction", "trl", "trl"),
    "TRL GKD": Adapter(_trl_gkd, f"{SIDES} {HEAD} token_weights reduction num_items", "trl", "trl", {}, _GIVEN),
    "TRL SDPO, SDFT": Adapter(_trl_self_distillation, f"{SIDES} {HEAD} {_SDPO}", "trl", "trl", {}, _GIVEN),
    "Liger chunked": Adapter(
        partial(_liger_chunked, compiled=False), f"{_LIGER} bias teacher_bias", "liger-kernel", "liger_kernel"
    ),
    "Liger chunked, compiled": Adapter(
        partial(_liger_chunked, compiled=True), f"{_LIGER} bias teacher_bias", "liger-kernel", "liger_kernel"
    ),
    "Liger FusedLinearJSD": Adapter(_liger_triton, _LIGER, "liger-kernel", "liger_kernel", _INTERPRETED),
    "verl forward_kl_topk": Adapter(partial(_verl, chunked=False), _VERL, "verl", "verl", {}, _GIVEN),
    "verl, chunked top-k": Adapter(partial(_verl, chunked=True), _VERL, "verl", "verl", {}, _GIVEN),
    "orda-kernel": Adapter(
        *(_orda, f"{_LIGER} teacher_temperature reduction", "orda-kernel", "orda_kernel", {}),
        "documented to hold all logits without a GPU",
    ),
    "flash-linear-attention": Adapter(_fla, SIDES, "flash-linear-attention", "fla", _INTERPRETED),
    "cut-cross-entropy": Adapter(
        _cut_cross_entropy,
        f"{SIDES} {_KNOWN} softcap token_weights reduction",
        "cut-cross-entropy",
        "cut_cross_entropy",
    ),
}
OURS: Final = tuple(name for name in ADAPTERS if name.startswith("sdcore"))
