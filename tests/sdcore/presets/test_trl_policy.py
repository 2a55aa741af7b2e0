"""The policy part of TRL's SDPO trainer is the same here: loss and gradients of a translated configuration."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdcore.presets import from_trl
from sdcore.training.update import Batch, update
from sdcore.types import Conditioned, Example, Group, Trajectory
from tests.sdcore.prefix.models import VOCAB, double_precision, tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sdpo = pytest.importorskip("trl.experimental.sdpo")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LENGTHS = (3, 1, 6, 4)


def judged_groups() -> list[Group]:
    """Two, with prompts of different lengths, whose completions a slightly different policy has sampled."""
    generator = torch.Generator().manual_seed(4)

    def rollout(length: int, reward: float) -> Trajectory:
        ids = torch.randint(VOCAB, (length,), generator=generator)
        logprobs = torch.randn(length, generator=generator).mul(0.3) - 4
        return Trajectory.answer(completion_ids=ids, logprobs=logprobs, text="", finished=True, reward=reward)

    return [
        Group(
            example=Example(prompt="How?"),
            prompt_ids=torch.randint(VOCAB, (length,), generator=generator),
            rollouts=tuple(rollout(*one) for one in zip(LENGTHS, rewards, strict=True)),
        )
        for length, rewards in ((5, (1.0, 0.0, 0.5, 0.0)), (8, (0.0, 0.2, 1.0, 1.0)))
    ]


def trls_policy_loss(model: Any, groups: list[Group], config: Any) -> Tensor:
    """By the trainer's own method, from whole logits."""
    logits, ids, masks, old, advantages = [], [], [], [], []
    for group in groups:
        rewards = torch.tensor([rollout.reward for rollout in group.rollouts])
        centred = rewards - rewards.mean()
        advantages.append(centred / (rewards.std() + 1e-4) if config.scale_rewards == "group" else centred)
        for rollout in group.rollouts:
            whole, count = torch.cat([group.prompt_ids, rollout.completion_ids]), len(rollout.completion_ids)
            logits.append(model(input_ids=whole[None], use_cache=False).logits[0, -count - 1 : -1] / config.temperature)
            ids.append(rollout.completion_ids)
            masks.append(torch.ones(count))
            old.append(rollout.logprobs)
    inputs = {
        "completion_ids": pad_sequence(ids, batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
        "old_per_token_logps": pad_sequence(old, batch_first=True),
        "advantages": torch.cat(advantages),
    }
    trainer = SimpleNamespace(
        importance_sampling_level=config.importance_sampling_level,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        loss_type=config.loss_type,
        max_completion_length=config.max_completion_length,
        model=model,
        accelerator=SimpleNamespace(gather=lambda loss: loss),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return sdpo.SDPOTrainer._compute_policy_loss(trainer, inputs, pad_sequence(logits, batch_first=True))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "given",
    [
        {"distillation_weight": 0.0, "loss_type": "grpo"},
        {
            "distillation_weight": 0.0,
            "loss_type": "grpo",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        {"distillation_weight": 0.0, "loss_type": "dapo", "epsilon_high": 0.1},
        {"distillation_weight": 0.0, "loss_type": "dr_grpo", "scale_rewards": "none"},
        {"distillation_weight": 0.4, "loss_type": "grpo", "distillation_mode": "full_logits"},
    ],
    ids=lambda given: " ".join(str(value) for value in given.values()),
)
def test_policy_losses_and_gradients_are_trls(given: dict[str, Any], level: str, tmp_path: Path) -> None:
    common = {"num_generations": 4, "temperature": 0.8, "epsilon": 0.05, "importance_sampling_level": level}
    size = {"per_device_train_batch_size": 4}
    config = sdpo.SDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **size | common | given)
    method, arguments = from_trl(config)
    groups, model = judged_groups(), tiny("llama")
    # A teacher that is the student, and reads the same: of a mixture the policy's share of the loss is left.
    seen = [Conditioned(teacher_prompts=(group.prompt_ids,) * 4, active=(True,) * 4) for group in groups]
    batch = Batch.of(groups, seen, method, norm_length=arguments["max_completion_length"])
    with double_precision():
        out = update(
            model,
            batch,
            method,
            teacher=method.build_teacher(model) if method.has_teacher else None,
            off_policy=True,
            sampling_temperature=arguments["sampling_temperature"],
            micro_batch=arguments.get("micro_batch"),
        )
        gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        model.zero_grad()
        expected = (1 - config.distillation_weight) * trls_policy_loss(model, groups, config)
        expected.backward()
    assert 0 < float(out.metrics["policy/clipped_fraction"]) < 1
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-6, atol=0)
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-5, atol=1e-8)
