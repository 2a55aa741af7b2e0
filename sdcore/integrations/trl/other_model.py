"""What the fused trainers have in common whose teacher is another model: one divergence over a padded batch.

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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...losses import FusedLinearDivergence
from ...models import find_body, head_of
from ...step import StepOutput, distill_step
from ...teachers import Frozen, Live
from .fused import FusedOptions, check_model, checked_options
from .guard import require_methods
from .padded import plan_padded

# The rest of FusedOptions is for trainers whose teacher is made of the student.
HONOURED = frozenset({"strategy", "verify", "workspace_mb"})


class OtherModelMixin:
    """Before TRL's trainer among the bases."""

    CALLS: ClassVar[tuple[str, ...]]  # of TRL's trainer, what is overridden or called
    fused: FusedOptions
    teacher_model: Any

    def __init__(self, *args: Any, fused: FusedOptions | None = None, **kwargs: Any) -> None:
        self.check_trl()
        options = _honoured(type(self), fused)
        super().__init__(*args, **kwargs)
        self.adopt(options)

    @classmethod
    def check_trl(cls) -> None:
        """Raises `ImportError` where the installed TRL's trainer lacks what is overridden or called."""
        require_methods(cls.__mro__[cls.__mro__.index(OtherModelMixin) + 1], cls.CALLS)

    def adopt(self, fused: FusedOptions | None) -> None:
        """Be set up as by the constructor, for a trainer that was TRL's own; see `patch`."""
        self.fused = _honoured(type(self), fused)
        check_model(self)
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
        """The step over a batch as `plan_padded` takes it; `normalizer` None: the tokens in `loss_mask` (B, C)."""
        # Equal prompts become neighbours, which are one group. The loss is a sum, so nothing has to be put back.
        order = _by_prompt(prompt_ids, prompt_mask)
        prompt_ids, prompt_mask, completion_ids, completion_mask, loss_mask = (
            one[order] for one in (prompt_ids, prompt_mask, completion_ids, completion_mask, loss_mask)
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


def _honoured(kind: type, fused: FusedOptions | None) -> FusedOptions:
    options = checked_options(fused)
    ignored = [
        one.name for one in fields(options) if one.name not in HONOURED and getattr(options, one.name) != one.default
    ]
    if ignored or options.bounded:
        named = ignored[0] if ignored else "strategy"
        raise ArgumentError(
            f"{named} must be left as it is for {kind.__name__}, which honours {', '.join(sorted(HONOURED))} and needs "
            f"all completions in flight, got {getattr(options, named)!r}"
        )
    return options


def _by_prompt(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """(B,) an order of the rows in which equal prompts are neighbours."""
    keys = torch.where(prompt_mask != 0, prompt_ids, -1)
    return keys.unique(dim=0, return_inverse=True)[1].argsort(stable=True)


__all__ = ["HONOURED", "OtherModelMixin"]
