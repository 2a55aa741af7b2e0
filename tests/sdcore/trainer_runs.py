"""Small runs of the trainer that several tests look at from different sides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sdcore.presets import SDPO, Method, SDFTAsRun
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer
from sdcore.world import CHECKPOINT
from sdcore.world.data import Kind, rows

# Contexts in the world's own language: it knows no words.
SHOW = "{{ prompt }} {{ privileged_context }}"
SHOW_ATTEMPT = "{{ prompt }} {{ attempt or feedback }}"
SDFT_METHOD = SDFTAsRun(template=SHOW, skip_first_tokens=0)
SDPO_METHOD = SDPO(template=SHOW_ATTEMPT, num_generations=4)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def world_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)


def config(output_dir: Path | str, **changes: Any) -> SelfDistillationConfig:
    """Small and quiet; no checkpoints unless they are asked for."""
    options: dict[str, Any] = {
        "max_completion_length": 8,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "reward_timeout": None,
        "leak_probe_every": 0,
        "overlap_probe_every": 0,
        "log_completions_every": 1,
    }
    return SelfDistillationConfig(output_dir=str(output_dir), **(options | changes))


def trainer(
    output_dir: Path | str,
    *,
    method: Method = SDFT_METHOD,
    kind: Kind = "sdft",
    count: int = 24,
    model: Any = None,
    reward_funcs: Sequence[Any] = (),
    train_dataset: Any = None,
    eval_dataset: Any = None,
    callbacks: Any = None,
    sampler: Any = None,
    peft_config: Any = None,
    processing_class: Any = None,
    environment_factory: Any = None,
    **changes: Any,
) -> SelfDistillationTrainer:
    made = SelfDistillationTrainer(
        world_model() if model is None else model,
        config(output_dir, **changes),
        method=method,
        train_dataset=rows(kind, task="luma", count=count, seed=0) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class or tokenizer(),
        reward_funcs=reward_funcs,
        callbacks=callbacks,
        sampler=sampler,
        peft_config=peft_config,
        environment_factory=environment_factory,
    )
    return made


def lines(output_dir: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(output_dir) / name).read_text().splitlines()]


def losses(output_dir: Path | str) -> list[tuple[int, float]]:
    """(step, loss), with every digit."""
    return [(line["step"], line["loss"]) for line in lines(output_dir) if "loss" in line]
