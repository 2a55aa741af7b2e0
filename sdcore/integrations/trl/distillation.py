"""Gives TRL's `DistillationTrainer` a loss that reads each prompt once and is computed by `sdkernels`.

    trainer = FusedDistillationTrainer(model, teacher_model=teacher, args=DistillationConfig(...), ...)

`compute_loss` is what is replaced. Data, sampling, tools, logging, the entropy metric and the training step are TRL's.

What differs from the obvious: TRL's own loss makes no logits either. What is gained here: a prompt that stands several
times in a batch is read once by each model, no padding is computed, and nothing after a row's last token with a loss.
Both models are called through their wrappers, so TRL's forward redirection is not needed.

Not covered: batches with images, which TRL's own loss does, after one warning.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor, nn
from trl import DistillationTrainer

from .other_model import OtherModelMixin

READ = frozenset({"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask", "num_items_in_batch"})


class FusedDistillationTrainer(OtherModelMixin, DistillationTrainer):
    """Takes `DistillationTrainer`'s arguments, and `fused`: strategy, verification, workspace of `FusedOptions`.

    The loss and its gradients are TRL's, for every `beta` and `temperature`. Raises `ArgumentError` for models and
    options that cannot be treated exactly.
    """

    REPLACES: ClassVar[tuple[str, ...]] = ("_compute_loss",)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the sum over the completions' tokens, divided as TRL divides it; `(loss, None)` for outputs."""
        if others := sorted(set(inputs) - READ):
            warnings.warn(
                f"batches with {', '.join(others)} are left to TRL's own loss: only ids and masks are planned for",
                stacklevel=2,
            )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training
        if training and inputs.get("num_items_in_batch") is not None:
            # TRL's count of all ranks' completions; DistributedDataParallel takes the mean over the ranks.
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        loss_mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            loss_mask = loss_mask * inputs["tool_mask"]
        out = self.distill(
            model,
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            inputs["completion_mask"],
            loss_mask=loss_mask,
            alpha=self.beta,
            temperature=self.temperature,
            normalizer=None if num_items_in_batch is None else float(num_items_in_batch),
        )
        self._log_entropy(out.rows["student_entropy"].sum(), loss_mask.sum(), "train" if training else "eval")
        return (out.loss, None) if return_outputs else out.loss

    def _log_entropy(self, entropy: Tensor, count: Tensor, mode: str) -> None:
        """Logs the mean over the tokens of all ranks."""
        tokens, total = (self.accelerator.gather_for_metrics(values).sum() for values in (count, entropy))
        self._metrics[mode]["entropy"].append(float(total / tokens) if tokens > 0 else 0.0)
