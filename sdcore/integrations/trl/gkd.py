"""Gives TRL's `GKDTrainer` a loss from hidden states: it makes no logits, and equal prompts are read once.

    trainer = FusedGKDTrainer(model, teacher_model=teacher, args=GKDConfig(...), ...)       # TRL's own arguments

`compute_loss` is what is replaced. Data, sampling on and off policy, logging and the training step are TRL's.

What differs from the obvious: the number is TRL's, and TRL 1.16 gives its divergence no temperature: `args.temperature`
is what completions are sampled with. `num_items_in_batch`, too, is TRL's, which counts the labels of the batch before
it samples on policy.

Not covered: `compute_metrics`, which needs logits.

Letters: B rows of the batch, L their padded length, P prompt, C completion.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from trl.experimental.gkd import GKDTrainer

from ...errors import ArgumentError, PlanError
from .other_model import OtherModelMixin
from .padded import require_none

IGNORED = -100


class FusedGKDTrainer(OtherModelMixin, GKDTrainer):
    """Takes `GKDTrainer`'s arguments, and `fused`: strategy, verification and workspace of `FusedOptions`.

    The loss and its gradients are those of TRL's `generalized_jsd_loss` with `args.beta`. Raises `ArgumentError` for
    models and options that cannot be treated exactly.
    """

    REPLACES: ClassVar[tuple[str, ...]] = ("generalized_jsd_loss",)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Returns the sum over labels, divided by `num_items_in_batch`, or by how many there are where that is None."""
        if return_outputs:
            raise ArgumentError(
                "return_outputs must be False: FusedGKDTrainer has no logits to return. Evaluate without "
                "compute_metrics, or with prediction_loss_only=True"
            )
        batch = split_labels(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        return self.distill(
            model,
            batch.prompt_ids,
            batch.prompt_mask,
            batch.completion_ids,
            batch.completion_mask,
            loss_mask=batch.loss_mask,
            alpha=self.beta,
            temperature=1.0,
            normalizer=None if num_items_in_batch is None else float(num_items_in_batch),
        ).loss


class SplitBatch(NamedTuple):
    """Holds prompts (B, P), padded on the left, and completions (B, C), padded on the right, as for `plan_padded`."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor  # (B, C) within completion_mask


def split_labels(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SplitBatch:
    """Cuts each row before its first label.

    All three are (B, L); a row is one run of tokens with padding on either side or both. Its prompt is what precedes
    the first label, its completion reaches to the last one, and tokens between them without a label are read and carry
    no loss. A row without labels is a prompt with an empty completion. A label of the row's first token has no loss,
    since nothing predicts it. Raises `PlanError`, with the row, for other masks, and for labels of padding.
    """
    for name, given in (("attention_mask", attention_mask), ("labels", labels)):
        if input_ids.dim() != 2 or given.shape != input_ids.shape:
            raise PlanError(
                f"{name} must be (B, L) as input_ids is, {tuple(input_ids.shape)}, got {tuple(given.shape)}"
            )
    length = input_ids.shape[1]
    positions = torch.arange(length, device=input_ids.device)
    on = attention_mask != 0
    starts, ends = _first(on), length - _first(on.flip(1))  # (B,)
    labelled = labels != IGNORED
    require_none("attention_mask", (positions >= starts[:, None]) & (positions < ends[:, None]) & ~on, "have no holes")
    require_none("labels", labelled & ~on, f"be {IGNORED} on padding")
    # The state before the row is that of padding, or of nothing.
    labelled = labelled & (positions > starts[:, None])
    some = labelled.any(dim=1)
    firsts = torch.where(some, _first(labelled), ends)
    lasts = torch.where(some, length - _first(labelled.flip(1)), ends)  # one past the last label
    widths = torch.stack([firsts - starts, lasts - firsts]).amax(dim=1).tolist()
    read = firsts[:, None] + torch.arange(-widths[0], 0, device=input_ids.device)  # (B, P) positions
    written = firsts[:, None] + torch.arange(widths[1], device=input_ids.device)  # (B, C)
    completion_mask = written < lasts[:, None]
    written = written.clamp(max=length - 1)
    return SplitBatch(
        prompt_ids=input_ids.gather(1, read.clamp(min=0)),
        prompt_mask=read >= starts[:, None],
        completion_ids=input_ids.gather(1, written),
        completion_mask=completion_mask,
        loss_mask=labelled.gather(1, written) & completion_mask,
    )


def _first(on: Tensor) -> Tensor:
    """Returns, (B,), the first position of each row that is on; L where none is."""
    return torch.where(on.any(dim=1), on.to(torch.uint8).argmax(dim=1), on.shape[1])
