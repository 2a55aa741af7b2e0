"""Computes the divergence from another model over a padded batch, for the GKD and Distillation trainers.

    out = self.distill(model, prompt_ids, prompt_mask, completion_ids, completion_mask, loss_mask=mask,
                       alpha=self.beta, temperature=1.0, normalizer=count)
    out.loss                                     # in the graph: the sum over the tokens in `mask`, divided by `count`

Student and teacher read the same ids. A prompt that stands several times in the batch, anywhere in it, is computed once
by each of the two.

What differs from the obvious: a teacher that is the student's own module, as TRL's arguments allow, reads the student's
states of the prompt.

Not covered: bounded memory (`FusedOptions(micro_batch=...)`), since TRL's training step goes backward once, by itself.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...losses import FusedLinearDivergence
from ...models import find_body, head_of
from ...step import StepOutput, distill_step
from ...teachers import Frozen, Live
from .fused import FusedOptions, FusedTrainer
from .padded import plan_padded

# The rest of FusedOptions is for trainers whose teacher is made of the student.
HONOURED = frozenset({"strategy", "verify", "workspace_mb"})


class OtherModelMixin(FusedTrainer):
    """Gives a trainer whose teacher is another model its loss, `distill`."""

    @classmethod
    def checked(cls, fused: FusedOptions | None) -> FusedOptions:
        options = super().checked(fused)
        ignored = [
            field.name
            for field in fields(options)
            if field.name not in HONOURED and getattr(options, field.name) != field.default
        ]
        if ignored or options.bounded:
            named = ignored[0] if ignored else "strategy"
            raise ArgumentError(
                f"{named} must be left as it is for {cls.__name__}, which honours {', '.join(sorted(HONOURED))} and "
                f"needs all completions in flight, got {getattr(options, named)!r}"
            )
        return options

    def _set_up(self) -> None:
        self.check_model()
        head_of(self.teacher_model)

    def distill(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        *,
        loss_mask: Tensor,
        alpha: float,
        temperature: float,
        normalizer: float | None,
    ) -> StepOutput:
        """Makes the step over a batch as `plan_padded` takes it.

        `normalizer` None divides by the number of tokens in `loss_mask` (B, C).
        """
        # Equal prompts become neighbours, which are one group. The loss is a sum, so nothing has to be put back.
        order = _by_prompt(prompt_ids, prompt_mask)
        prompt_ids, prompt_mask, completion_ids, completion_mask, loss_mask = (
            rows[order] for rows in (prompt_ids, prompt_mask, completion_ids, completion_mask, loss_mask)
        )
        padded = plan_padded(
            prompt_ids,
            prompt_mask,
            completion_ids,
            completion_mask,
            loss_mask=loss_mask,
            teacher_input_ids=torch.cat([prompt_ids, completion_ids], dim=1),
            teacher_attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
        )
        same = find_body(self.teacher_model).causal_lm is find_body(model).causal_lm
        return distill_step(
            model,
            padded.plan,
            loss=FusedLinearDivergence(alpha=alpha, temperature=temperature, workspace_mb=self.fused.workspace_mb),
            teacher=Live() if same else Frozen(self.teacher_model),
            token_weights=padded.gather(loss_mask != 0).to(torch.float32),
            strategy=self.fused.strategy,
            verify=self.fused.verify,
            backward=None,
            normalizer=normalizer,
        )


def _by_prompt(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """Returns an order (B,) of the rows in which equal prompts are neighbours."""
    keys = torch.where(prompt_mask != 0, prompt_ids, -1)
    return keys.unique(dim=0, return_inverse=True)[1].argsort(stable=True)
