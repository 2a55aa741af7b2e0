"""One step of self-distillation, from token ids to gradients. The file to read first.

The student sees `prompt + completion`. The teacher sees `prompt with privileged context + the same completion`. Both
give one hidden state per completion token, the divergence between the two next-token distributions is the loss, and
the gradient reaches the student only:

    student_states = completion_states(student, prompts, completions)             # (N, H), with gradient
    teacher_states = completion_states(teacher, contexts, completions)            # (N, H), without
    linear_divergence(student_states, student_head, teacher_states, teacher_head).loss.backward()

`linear_divergence` applies the output layer in small tiles, so the (N, V) logits never exist. The first completion
token is supervised too: the state that predicts it is the last prompt token's.

Not covered yet: each pass computes its whole prompt anew (a shared-prefix scheme will replace `completion_states`),
and heads that soft-cap or scale their logits (see `require_plain_head`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sdkernels import linear_divergence, linear_logprobs

TokenIds = Sequence[int]


class StepOutput(NamedTuple):
    """What a step reports; the gradients are already in the student's `.grad`."""

    loss: Tensor  # () detached, mean over the completion tokens
    entropy: Tensor  # () detached, the student's mean entropy over them, in nats


def distill_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts_B: Sequence[TokenIds],
    contexts_B: Sequence[TokenIds],
    completions_B: Sequence[TokenIds],
    *,
    alpha: float = 1.0,
) -> StepOutput:
    """Teach the student, on its own completions, what the teacher would say with the context in view.

    `prompts_B` are the student's prompts, `contexts_B` the teacher's (the same with privileged context inside),
    `completions_B` what the student sampled; token ids, one entry per sequence. `alpha` 0 is forward KL, 1 reverse KL,
    between them the generalised Jensen-Shannon divergence. `teacher` may be `student`: then it is a live teacher.
    Accumulates gradients into the student's parameters. Raises `ValueError` for lists of unequal lengths.
    """
    with torch.no_grad():
        teacher_states = completion_states(teacher, contexts_B, completions_B)  # (N, H)
    student_states = completion_states(student, prompts_B, completions_B)  # (N, H)
    out = linear_divergence(
        student_states,
        head_weight(student),
        teacher_states,
        head_weight(teacher).detach(),
        alpha=alpha,
    )
    out.loss.backward()
    return StepOutput(out.loss.detach(), out.student_entropy.mean())


def imitate_step(
    student: PreTrainedModel, prompts_B: Sequence[TokenIds], completions_B: Sequence[TokenIds]
) -> StepOutput:
    """Supervised fine-tuning, the baseline: cross-entropy of given completions, mean over their tokens.

    Accumulates gradients into the student's parameters. Raises `ValueError` for lists of unequal lengths.
    """
    targets = torch.tensor([token for completion in completions_B for token in completion], device=student.device)
    states = completion_states(student, prompts_B, completions_B)  # (N, H)
    logprobs, entropy = linear_logprobs(states, head_weight(student), targets)
    loss = -cast(Tensor, logprobs).mean()  # None only without targets
    loss.backward()
    return StepOutput(loss.detach(), entropy.detach().mean())


def completion_states(
    model: PreTrainedModel, prompts_B: Sequence[TokenIds], completions_B: Sequence[TokenIds]
) -> Tensor:
    """The (N, H) hidden states that predict each completion token, in the order of sequences and positions.

    Runs the base model only: the output layer is never applied here. N is the number of completion tokens. Raises
    `ValueError` when the lists are of unequal lengths.
    """
    # The last completion token is predicted, never read.
    inputs = [
        torch.tensor([*prompt, *completion[:-1]]) for prompt, completion in zip(prompts_B, completions_B, strict=True)
    ]
    input_ids = pad_sequence(inputs, batch_first=True)  # (B, T), padded on the right
    mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True)
    states = model.base_model(
        input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).last_hidden_state  # (B, T, H)
    return torch.cat(
        [
            states[row, len(prompt) - 1 : len(prompt) - 1 + len(completion)]
            for row, (prompt, completion) in enumerate(zip(prompts_B, completions_B, strict=True))
        ]
    )


def head_weight(model: PreTrainedModel) -> Tensor:
    """The (V, H) weight of the model's output layer."""
    return model.get_output_embeddings().weight


@torch.no_grad()
def require_plain_head(model: PreTrainedModel, prompt: TokenIds) -> None:
    """Check on one prompt that the model's logits are its hidden states times `head_weight`, and nothing more.

    Raises `ValueError` for models that soft-cap, scale or shift their logits: the steps above would train them on
    other distributions than they sample from.
    """
    input_ids = torch.tensor([list(prompt)], device=model.device)
    expected = model(input_ids=input_ids, use_cache=False).logits.float()
    states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    error = (torch.nn.functional.linear(states, head_weight(model)).float() - expected).abs().max().item()
    if error > 1e-2 * expected.abs().max().item():
        raise ValueError(
            f"model must have logits equal to hidden states times the lm_head weight, got {type(model).__name__} "
            f"whose logits differ by up to {error:.3g}"
        )
