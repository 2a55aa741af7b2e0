"""Calls the public distillation losses, and ours, with the arguments of `cases.OPTIONS`.

An adapter takes the arguments that its peer offers and no others; what it has no argument for, or raises `NotOffered`
for, is no failure. A peer is called as its documentation says. Where it takes logits, they are made as a model's
forward pass makes them, in the dtype of the states; where it leaves the mean over tokens to its trainer, the trainer's
formula follows. `sdcore bench` times the same calls.
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

from .cases import arguments

IGNORED: Final = -100


class NotOffered(Exception):
    """Says what a peer does not have."""


@dataclass(frozen=True)
class Adapter:
    """Is a peer: the call, the package to look for, and how it is run."""

    call: Callable[..., Any]
    module: str = "torch"  # what must be importable
    package: str = "torch"  # whose version is written down
    needs: str = ""  # what else to install for it
    environment: Mapping[str, str] = field(default_factory=dict)
    logits: bool = False  # it is given logits, which all exist before it is called

    @property
    def interpreted(self) -> bool:
        return "TRITON_INTERPRET" in self.environment

    def missing(self) -> str:
        """Returns what to install, or nothing."""
        return "" if find_spec(self.module) else f"not installed: pip install {self.package}{self.needs}"


def ours(*tensors: Tensor, backend: str = "auto", **call: Any) -> Tensor:
    """Calls `linear_divergence`, with no `teacher_weight` where it is the student's."""
    given = arguments(*tensors, **call)
    weight, teacher_weight = given["student_weight"], given["teacher_weight"]
    if teacher_weight is not None and teacher_weight.data_ptr() == weight.data_ptr():
        given["teacher_weight"] = None
    loss = linear_divergence(**given, backend=backend).loss  # type: ignore[arg-type]
    return loss if call.get("num_items") is None else loss / call["num_items"]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _labels(token_weights: Tensor | None, rows: int) -> Tensor:
    """Returns a label a row, the mask as ids to ignore."""
    labels = torch.zeros(rows, dtype=torch.int64)
    if token_weights is None:
        return labels
    if not ((token_weights == 0) | (token_weights == 1)).all():
        raise NotOffered("masks tokens, does not weight them")
    return labels.masked_fill(token_weights == 0, IGNORED)


def _mean(rows: Tensor, token_weights: Tensor | None, reduction: str = "mean") -> Tensor:
    """Reduces as the self-distillation trainers of TRL and verl's `token-mean` do."""
    if reduction == "none":
        return rows
    if token_weights is None:
        return rows.sum() if reduction == "sum" else rows.mean()
    return (rows * token_weights).sum() / token_weights.sum().clamp(min=1.0)


def plain(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    upcast: bool = True,
) -> Tensor:
    """Computes it as tutorials write it: logits in the model's dtype, then float32 with `upcast`, and textbook sums."""
    logits = _logits(student_hidden, student_weight, bias, scale, softcap)
    with torch.no_grad():
        teacher_logits = _logits(teacher_hidden, teacher_weight, teacher_bias, scale, softcap)
    if upcast:
        logits, teacher_logits = logits.float(), teacher_logits.float()
    log_p = (logits / temperature).log_softmax(-1)
    log_q = (teacher_logits / (teacher_temperature or temperature)).log_softmax(-1)
    return _mean(textbook(log_p, log_q, alpha), token_weights, reduction)


def textbook(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """Returns the divergence of log-probabilities (..., V) by `kl_div`, (...)."""
    if alpha == 0:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if alpha == 1:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    weights = torch.tensor([1 - alpha, alpha], dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
    entries = alpha * F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return (entries + (1 - alpha) * F.kl_div(log_m, log_p, reduction="none", log_target=True)).sum(-1)


def torch_cross_entropy(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, alpha: float
) -> Tensor:
    """Adds the teacher's entropy to torch's fused cross-entropy with its probabilities: the forward KL."""
    if alpha != 0:
        raise NotOffered("the forward KL only")
    if not hasattr(F, "linear_cross_entropy"):
        raise NotOffered("needs torch 2.13")
    with torch.no_grad():
        log_q = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)  # (N, V)
        probabilities = log_q.exp()
        negative_entropy = (probabilities * log_q).sum(-1).mean()
    with warnings.catch_warnings():
        # Its chunks take ids alone (torch 2.13): with probabilities all logits are there.
        warnings.filterwarnings("ignore", "linear_cross_entropy: ``options`` ignored")
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(student_hidden, student_weight, probabilities, options=options)
    return loss + negative_entropy


def trl_chunked(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Calls what `DistillationTrainer` calls, on the rows that its mask keeps."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    keep = slice(None) if token_weights is None else _labels(token_weights, len(student_hidden)) != IGNORED
    sides = (student_hidden[keep], student_weight, bias, teacher_hidden[keep], teacher_weight, teacher_bias)
    rows = ChunkedDivergenceFunction.apply(*sides, alpha, temperature, scale, softcap, scale, softcap)[0]
    return rows.sum() / max(len(rows), 1) if reduction == "mean" else _mean(rows, None, reduction)


def trl_gkd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | None = None,
) -> Tensor:
    """Calls `GKDTrainer.generalized_jsd_loss` on one sequence."""
    from trl.experimental.gkd import GKDTrainer

    student = _logits(student_hidden, student_weight, bias, scale, softcap)[None]
    with torch.no_grad():
        teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, scale, softcap)[None]
    labels = _labels(token_weights, len(student_hidden))[None]
    items = {} if num_items is None else {"num_items_in_batch": num_items}
    if reduction == "none":
        raise NotOffered("has no loss per row")
    name = "batchmean" if reduction == "mean" else reduction
    return GKDTrainer.generalized_jsd_loss(student, teacher, labels, alpha, temperature, name, **items)


def trl_self_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    topk: int | None = None,
    tail: bool = True,
    sampled: bool = False,
    target_ids: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    importance_clip: float = 2.0,
) -> Tensor:
    """Calls the losses of `SDPOTrainer`; `SDFTTrainer` has the same file."""
    from trl.experimental.sdpo import loss_utils
    from trl.trainer.utils import selective_log_softmax

    student = _logits(student_hidden, student_weight, bias, scale, softcap) / temperature
    with torch.no_grad():
        teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, scale, softcap) / temperature
    if topk is not None:
        options = {"distillation_topk": topk, "distillation_alpha": alpha, "distillation_add_tail": tail}
        rows = loss_utils.compute_topk_self_distillation_loss(student, teacher, **options)
    elif sampled:
        sides = (student, teacher, target_ids)
        rows = loss_utils.compute_sampled_token_self_distillation_loss(*sides, distillation_alpha=alpha)
    else:
        rows = loss_utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    if old_logprobs is not None:
        now = selective_log_softmax(student, target_ids)
        rows = loss_utils.apply_importance_sampling_clipping(rows, now, old_logprobs, importance_clip)
    if token_weights is not None and not token_weights.any():
        return student.sum() * 0.0  # the trainer's own answer to it
    return _mean(rows, token_weights)


def liger_chunked(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk_size: int = 1024,
    compiled: bool = False,
) -> Tensor:
    """Calls the class with a pure soft loss (its default adds half a hard cross-entropy)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    own = {"beta": alpha, "temperature": temperature, "chunk_size": chunk_size, "compiled": compiled}
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, **own)
    labels = _labels(token_weights, len(student_hidden)).to(student_hidden.device)
    return module(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, bias, teacher_bias)


def liger_triton(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
) -> Tensor:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    labels = None if token_weights is None else _labels(token_weights, len(student_hidden))
    module = LigerFusedLinearJSD(jsd_beta=alpha, temperature=temperature)
    return module(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)


def verl_topk(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    alpha: float,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    tail: bool | None = None,
    num_items: int | None = None,
    chunked: bool = False,
) -> Tensor:
    """Calls `forward_kl_topk`; a teacher that is known as a whole lists all tokens of the vocabulary."""
    if alpha != 0:
        raise NotOffered("the forward KL only")
    if teacher_ids is not None and tail is not False and (teacher_logprobs is None or teacher_logprobs.any()):
        raise NotOffered("gives the tokens that are not listed no rest")
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.trainer.ppo.core_algos import agg_loss

    student = _logits(student_hidden, student_weight, bias, scale, softcap) / temperature
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, scale, softcap).detach().float() / temperature
        teacher_logprobs, teacher_ids = teacher.log_softmax(-1), torch.arange(teacher.shape[-1]).expand(teacher.shape)
    known = {"log_prob_min_clamp": None, "use_chunked_topk": chunked}
    nested = [torch.nested.nested_tensor([given], layout=torch.jagged) for given in (teacher_logprobs, teacher_ids)]
    config = SimpleNamespace(distillation_loss=SimpleNamespace(**known))
    rows = compute_forward_kl_topk(student[None], *nested, config, "thd")["distillation_losses"]
    rows = rows.clamp_min(0.0)  # as the registered loss does
    mask = torch.ones(rows.shape[-1]) if token_weights is None else token_weights
    return agg_loss(rows, mask[None], "token-mean", batch_num_tokens=num_items)


def orda(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    alpha: float,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "torch",
) -> Tensor:
    """Undoes its documented factor T²; its `kl_beta` is 1 - alpha."""
    from orda_kernel import SeparateTeacher, TiedTeacher, distillation_loss

    if reduction == "none":
        raise NotOffered("has no loss per row")
    variant = {0.0: "forward", 1.0: "reverse"}.get(alpha, "skew_js")
    tied = teacher_weight.data_ptr() == student_weight.data_ptr()
    teacher = TiedTeacher(hidden=teacher_hidden) if tied else SeparateTeacher(teacher_hidden, teacher_weight)
    options: dict[str, Any] = {
        "student_ce_weight": 0.0,
        "teacher_ce_weight": 0.0,
        "kl_weight": 1.0,
        "kl_temperature": temperature,
        "kl_teacher_temperature": teacher_temperature,
        "kl_divergence": variant,
        "kl_beta": 1 - alpha if variant == "skew_js" else None,
        "reduction": reduction,
        "backend": backend,
    }
    labels = _labels(token_weights, len(student_hidden)).to(student_hidden.device)
    loss = distillation_loss(student_hidden, student_weight, labels, teacher, **options).loss
    return loss if temperature == 1.0 else loss / temperature**2


def fla(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *, alpha: float
) -> Tensor:
    if alpha != 0:
        raise NotOffered("the forward KL only")
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return fused_kl_div_loss(student_hidden, teacher_hidden, student_weight, teacher_weight)


def cut_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    *,
    alpha: float,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Takes a teacher that is sure of one token a row, which is all that cross-entropy can be asked."""
    if alpha != 0 or teacher_ids.shape[1] != 1:
        raise NotOffered("the cross-entropy of one token a row only")
    from cut_cross_entropy import linear_cross_entropy

    targets = teacher_ids[:, 0].masked_fill(_labels(token_weights, len(student_hidden)) == IGNORED, IGNORED)
    own = {"softcap": softcap, "reduction": reduction, "impl": "torch_compile"}  # its choice without a GPU
    return linear_cross_entropy(student_hidden, student_weight, targets, **own)


_INTERPRETED: Final = {"TRITON_INTERPRET": "1"}
ADAPTERS: Final[dict[str, Adapter]] = {
    "sdcore, torch": Adapter(partial(ours, backend="torch"), "sdkernels", "sdcore"),
    "sdcore, native": Adapter(partial(ours, backend="native"), "sdkernels", "sdcore"),
    "sdcore, Triton": Adapter(partial(ours, backend="triton"), "triton", "triton", environment=_INTERPRETED),
    "plain torch": Adapter(plain, logits=True),
    "plain torch, no upcast": Adapter(partial(plain, upcast=False), logits=True),
    "torch linear_cross_entropy": Adapter(torch_cross_entropy, logits=True),
    "TRL chunked": Adapter(trl_chunked, "trl", "trl"),
    "TRL GKD": Adapter(trl_gkd, "trl", "trl", logits=True),
    "TRL SDPO, SDFT": Adapter(trl_self_distillation, "trl", "trl", logits=True),
    "Liger chunked": Adapter(liger_chunked, "liger_kernel", "liger-kernel"),
    "Liger chunked, compiled": Adapter(partial(liger_chunked, compiled=True), "liger_kernel", "liger-kernel"),
    "Liger FusedLinearJSD": Adapter(liger_triton, "liger_kernel", "liger-kernel", environment=_INTERPRETED),
    "verl forward_kl_topk": Adapter(verl_topk, "verl", "verl", " ray tensordict", logits=True),
    "verl, chunked top-k": Adapter(partial(verl_topk, chunked=True), "verl", "verl", logits=True),
    "orda-kernel": Adapter(orda, "orda_kernel", "orda-kernel"),
    "flash-linear-attention": Adapter(fla, "fla", "flash-linear-attention", environment=_INTERPRETED),
    "cut-cross-entropy": Adapter(cut_cross_entropy, "cut_cross_entropy", "cut-cross-entropy"),
}
OURS: Final = tuple(name for name in ADAPTERS if name.startswith("sdcore"))
