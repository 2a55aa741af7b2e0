"""The update of an SDPO step as written without either trick, for where TRL is not installed.

Every completion is a sequence with its own prompt, in one batch; all logits of the completions exist, in the model's
dtype and in float32. The teacher is the student itself, without a gradient, on the prompt with the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models import find_body
from ..passes import Outcome, Step, gradients_of
from ..peers import plain_loss
from ..shapes import Divergence
from ..step_cases import ALPHA, StepContender, StepSetup, training


def build(setup: StepSetup) -> Step:
    """Loss and gradients of the case's objective."""
    body, case, batch = find_body(setup.model), setup.case, setup.batch()
    divergence = Divergence(case.objective, ALPHA, case.topk)
    student_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)  # (G, P + R)

    def states(ids: Tensor) -> Tensor:  # (G, L) -> (G·R, H), those that predict a completion's tokens
        hidden = body.base(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[:, -case.completion - 1 : -1].flatten(0, 1)

    def step() -> Outcome:
        setup.model.zero_grad()
        with training(setup.model, checkpointing=False):
            student = states(student_ids)
            with torch.no_grad():
                teacher = states(batch["teacher_input_ids"])
            weight = body.causal_lm.get_output_embeddings().weight
            loss = plain_loss(student, weight, teacher, divergence, upcast=True)
            loss.backward()
        return Outcome(loss.detach(), gradients_of(setup.model))

    return step


NAIVE = StepContender("naive", build, ours=False)

__all__ = ["NAIVE", "build"]
