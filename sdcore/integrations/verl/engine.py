"""Gives verl's engine what it calls around a model's forward: logits processor, fused forward, the loss's collector.

    undo = patch_forward(model, loss=FusedLinearDivergence(alpha=0.0))           # hidden states, no logits
    register("forward_kl_topk_tail")                                             # loss_mode, in every worker

What differs from the obvious: in a packed batch the teacher's last row of each sequence says nothing. verl fills it
with one id repeated; such rows are left out. With K = 1 they look like all others, which does no harm: no response
token is there, so their gradient is 0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sdkernels import TopKLogprobs, linear_logprobs, logit_divergence

from ...errors import ArgumentError
from ...losses import FusedLinearDivergence
from ...models import find_body, head_of
from ...models.heads import logits_at
from .layout import Scored, flat, responses_of


def compute_forward_kl_topk(
    student_logits: Tensor,
    teacher_topk_log_probs: Tensor,
    teacher_topk_ids: Tensor,
    config: Any = None,
    data_format: str = "thd",
) -> dict[str, Tensor]:
    """Is verl's logits processor of that name, with the tail: takes (1, total, V) logits to forward KL, (1, total).

    `teacher_topk_log_probs` and `teacher_topk_ids` are nested (B, j, K), as verl's `left_right_2_no_padding` leaves
    them. `config` and `data_format` are verl's, and not read: nothing is clamped, and both formats have these shapes.
    """
    del config, data_format
    scored = _scored_rows(Scored(teacher_topk_ids, teacher_topk_log_probs))
    logits = flat("student_logits", student_logits, 1)
    out = logit_divergence(
        logits,
        alpha=0.0,
        teacher=scored.rows,
        token_weights=scored.weights,
        target_ids=scored.rows.ids[:, 0],
        reduction="none",
    )
    listed = logits.detach().gather(1, scored.rows.ids)
    shape = student_logits.shape[:2]
    return {
        "distillation_losses": out.loss.view(shape),
        "student_mass": _mass(listed, listed[:, 0], cast(Tensor, out.student_logprobs), scored).view(shape),
        "teacher_mass": scored.mass().view(shape),
    }


# Both are `ModelOutput`s, whose tensors FSDP2 finds: its backward starts from them.
@dataclass
class FusedAux(ModelOutput):
    """Is the `fused_linear_aux` of a forward that was given a teacher's rows, each (1, total)."""

    distillation_losses: Tensor | None = None  # in the graph
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None


@dataclass
class FusedOutput(ModelOutput):
    """Holds what a patched forward returns, by the names that verl's engines read."""

    log_probs: Tensor | None = None  # (1, total)
    entropy: Tensor | None = None  # (1, total)
    fused_linear_aux: FusedAux | None = None


def patch_forward(
    model: nn.Module, *, loss: FusedLinearDivergence | None = None, policy: bool = True
) -> Callable[[], None]:
    """Gives a Hugging Face causal language model the forward that verl calls with `use_fused_kernels`.

    The output has `log_probs` and `entropy` (1, total) of `shift_labels` at `temperature`. Given `teacher_topk_ids` and
    `teacher_topk_log_probs` (1, total, K), it also has `fused_linear_aux` with the distillation losses; VeOmni's engine
    passes these two, FSDP's has to be told to. No logits are computed. `loss` None is forward KL with the tail. With
    `policy=False` log-probabilities and entropy carry no gradient and come with the distillation for nothing.

    Returns what undoes it. Raises `UnsupportedModelError` for models whose logits `models.head_of` does not understand.
    """
    body = find_body(model)
    causal_lm = body.causal_lm
    head_of(body)  # raises where its logits are not understood
    loss = FusedLinearDivergence(alpha=0.0) if loss is None else loss
    if loss.importance_clip is not None:
        raise ArgumentError(f"loss must have no importance_clip in a forward, got {loss.importance_clip}")

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        teacher_topk_ids: Tensor | None = None,
        teacher_topk_log_probs: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> FusedOutput:
        del return_dict
        states = self.base_model(input_ids=input_ids, **inputs).last_hidden_state
        given = next((ids for ids in (shift_labels, labels, input_ids) if ids is not None), None)
        if given is None:
            raise ArgumentError("input_ids, labels or shift_labels must be given, got none of them")
        shifted = given if shift_labels is not None else torch.roll(given, -1, dims=-1)
        head, shape = head_of(body), states.shape[:2]
        hidden, targets = states.flatten(0, 1), shifted.reshape(-1)
        aux = by_products = None
        if teacher_topk_ids is not None and teacher_topk_log_probs is not None:
            scored = _scored_rows(Scored(teacher_topk_ids, teacher_topk_log_probs))
            out = FusedLinearDivergence(**vars(replace(loss.options, temperature=temperature)))(
                hidden,
                head.weight,
                student_head=head.transform,
                teacher=scored.rows,
                token_weights=scored.weights,
                target_ids=targets,
                reduction="none",
            )
            listed = logits_at(hidden, head, scored.rows.ids, temperature)
            sampled = logits_at(hidden, head, targets[:, None], temperature)
            mass = _mass(listed, sampled[:, 0], out.student_logprobs, scored)
            aux = FusedAux(out.loss.view(shape), mass.view(shape), scored.mass().view(shape))
            by_products = out.student_logprobs, out.student_entropy
        if policy or by_products is None:
            by_products = linear_logprobs(hidden, head.weight, targets, head=head.transform, temperature=temperature)
        logprobs, entropy = by_products
        return FusedOutput(
            log_probs=cast(Tensor, logprobs).view(shape), entropy=entropy.view(shape), fused_linear_aux=aux
        )

    before = vars(causal_lm).get("forward")
    causal_lm.forward = MethodType(forward, causal_lm)

    def undo() -> None:
        if before is None:
            vars(causal_lm).pop("forward", None)
        else:
            causal_lm.forward = before

    return undo


def collect(
    config: Any, distillation_config: Any, model_output: Mapping[str, Any], data: Any
) -> tuple[Tensor, dict[str, float]]:
    """Is a `DistillationLossFn`: returns the losses (B, T) that `compute_forward_kl_topk` or a patched forward left.

    `model_output` has `distillation_losses`, `student_mass` and `teacher_mass`, nested (B, j); `data` is verl's
    micro-batch, of which prompts, responses, response_mask and, where they are not nested, attention_mask are read.
    """
    del config, distillation_config
    responses = responses_of(data)
    rows = {name: flat(name, model_output[name], 0)[responses.rows] for name in FusedAux.__dataclass_fields__}
    mask = responses.take("response_mask", data["response_mask"]).bool()
    metrics: dict[str, float] = {}
    for name in ("student_mass", "teacher_mass"):
        mass = rows[name].detach()[mask]
        if mass.numel():
            metrics |= {
                f"distillation/{name}": float(mass.mean()),
                f"distillation/{name}_min": float(mass.min()),
                f"distillation/{name}_max": float(mass.max()),
            }
    return responses.pad(rows["distillation_losses"]), metrics


def register(name: str = "forward_kl_topk_tail") -> None:
    """Registers `collect` with verl as a `loss_mode`, and replaces its logits processor `compute_forward_kl_topk`.

    To be called in every worker; name a module that does in `actor_rollout_ref.model.external_lib`. Raises
    `ImportError` where verl, or its `trainer.distillation`, is missing.
    """
    try:
        losses: Any = importlib.import_module("verl.trainer.distillation.losses")
        fsdp: Any = importlib.import_module("verl.trainer.distillation.fsdp.losses")
    except ImportError as error:
        raise ImportError("register needs verl with verl.trainer.distillation: pip install 'verl>=0.9'") from error
    settings = losses.DistillationLossSettings(names=[name], use_topk=True)
    losses.register_distillation_loss(settings)(collect)
    fsdp.compute_forward_kl_topk = compute_forward_kl_topk


class _Rows(NamedTuple):
    """Holds a teacher's rows of a packed batch."""

    rows: TopKLogprobs  # (total, K), fillers replaced by something harmless
    weights: Tensor  # (total,) 0 for fillers, else 1

    def mass(self) -> Tensor:
        """Returns, (total,), the teacher's probability of its k tokens."""
        return self.rows.logprobs.exp().sum(-1) * self.weights


def _scored_rows(teacher: Scored) -> _Rows:
    """Returns all rows of a packed batch; fillers, which repeat an id, get weight 0."""
    ids, logprobs = (flat("teacher_topk", tensor, 1) for tensor in teacher)
    ids = ids.long()
    ordered = ids.sort(dim=-1).values
    filler = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    if ids.shape[1] > 1:
        ids = torch.where(filler[:, None], torch.arange(ids.shape[1], device=ids.device), ids)
        logprobs = torch.where(filler[:, None], -float(ids.shape[1]), logprobs)
    return _Rows(TopKLogprobs(ids, logprobs.float()), (~filler).float())


def _mass(listed: Tensor, known: Tensor, its_logprob: Tensor, scored: _Rows) -> Tensor:
    """Returns, (total,), the student's probability of tokens with logits (total, K).

    A known logit and its log-probability, both (total,), tell the normaliser.
    """
    return (listed.float() - (known.float() - its_logprob)[:, None]).exp().sum(-1) * scored.weights
