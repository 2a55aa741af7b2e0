"""One step of self-distillation against plain full logits, on a tiny random model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sdcore.step import completion_states, distill_step, head_weight, imitate_step, require_plain_head

PROMPTS = [[1, 7, 8], [1, 9], [1, 5, 6, 7, 8]]
CONTEXTS = [[1, 7, 8, 3, 3], [1, 9, 4], [1, 5, 6, 7, 8, 2, 2, 2]]
COMPLETIONS = [[10, 11, 2], [2], [12, 13]]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    # Weights as large as these let a state that is off by one position show.
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double().eval()


def full_logprobs(model: LlamaForCausalLM, prompts: list[list[int]]) -> torch.Tensor:
    """(N, V): one unpadded forward per sequence, logits of the positions before each completion token."""
    rows = []
    for prompt, completion in zip(prompts, COMPLETIONS, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.cat(rows).log_softmax(-1)


def gradients(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_distilling_is_the_divergence_of_the_full_distributions(alpha: float) -> None:
    student, teacher = tiny(0), tiny(1)
    plain = copy.deepcopy(student)
    out = distill_step(student, teacher, PROMPTS, CONTEXTS, COMPLETIONS, alpha=alpha)

    p = full_logprobs(plain, PROMPTS)
    q = full_logprobs(teacher, CONTEXTS).detach()
    if alpha == 0.5:
        m = (0.5 * p.exp() + 0.5 * q.exp()).log()
        rows = 0.5 * (q.exp() * (q - m)).sum(-1) + 0.5 * (p.exp() * (p - m)).sum(-1)
    else:
        rows = (p.exp() * (p - q)).sum(-1) if alpha == 1.0 else (q.exp() * (q - p)).sum(-1)
    rows.mean().backward()
    assert rows.shape == (6,)
    torch.testing.assert_close(out.loss, rows.mean().detach())
    torch.testing.assert_close(gradients(student), gradients(plain))
    torch.testing.assert_close(out.entropy, -(p.exp() * p).sum(-1).mean().detach())


def test_imitating_is_the_cross_entropy_of_the_completions() -> None:
    student = tiny(0)
    plain = copy.deepcopy(student)
    out = imitate_step(student, PROMPTS, COMPLETIONS)
    targets = torch.tensor([token for completion in COMPLETIONS for token in completion])
    loss = -full_logprobs(plain, PROMPTS).gather(1, targets[:, None]).mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss.detach())
    torch.testing.assert_close(gradients(student), gradients(plain))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = tiny(0), tiny(1)
    distill_step(student, teacher, PROMPTS, CONTEXTS, COMPLETIONS)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_that_is_the_student_gets_the_students_gradient_only() -> None:
    live, frozen = tiny(0), tiny(0)
    out = distill_step(live, live, PROMPTS, CONTEXTS, COMPLETIONS)
    other = distill_step(frozen, tiny(0), PROMPTS, CONTEXTS, COMPLETIONS)
    torch.testing.assert_close(out.loss, other.loss)
    torch.testing.assert_close(gradients(live), gradients(frozen))


def test_the_models_own_output_layer_is_never_run() -> None:
    student, teacher = tiny(0), tiny(1)

    def refuse(*_: Any) -> None:
        raise AssertionError("lm_head was run")

    student.lm_head.register_forward_pre_hook(refuse)
    teacher.lm_head.register_forward_pre_hook(refuse)
    distill_step(student, teacher, PROMPTS, CONTEXTS, COMPLETIONS)
    imitate_step(student, PROMPTS, COMPLETIONS)


def test_the_first_completion_token_is_predicted_by_the_last_prompt_token() -> None:
    model = tiny(0)
    states = completion_states(model, [[1, 7, 8]], [[10, 11]])
    alone = model.base_model(input_ids=torch.tensor([[1, 7, 8]])).last_hidden_state[0, -1]
    torch.testing.assert_close(states[0], alone)


@pytest.mark.parametrize("lists", [(PROMPTS[:2], CONTEXTS), (PROMPTS, CONTEXTS[:2])])
def test_lists_of_unequal_lengths_are_refused(lists: tuple[list[list[int]], list[list[int]]]) -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        distill_step(tiny(0), tiny(1), *lists, COMPLETIONS)


def test_a_model_that_changes_its_logits_is_refused() -> None:
    model = tiny(0)
    require_plain_head(model, [1, 2, 3])
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 3.0 * torch.tanh(logits / 3.0))
    with pytest.raises(ValueError, match="model must have logits equal to hidden states times the lm_head weight"):
        require_plain_head(model, [1, 2, 3])


def test_the_head_weight_is_a_parameter_of_the_model() -> None:
    model = tiny(0)
    assert head_weight(model) is model.lm_head.weight
