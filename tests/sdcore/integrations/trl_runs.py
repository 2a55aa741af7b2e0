"""Builds TRL's trainers and ours around the same tiny models and data, for the tests that compare them."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, Qwen2Config
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from sdcore.integrations.trl import FusedOptions
from sdcore.integrations.trl.sdft import FusedSDFTTrainer
from sdcore.integrations.trl.sdpo import FusedSDPOTrainer
from sdcore.teachers import Frozen
from sdcore.world import CHECKPOINT

SDPO, SDFT = (SDPOTrainer, FusedSDPOTrainer), (SDFTTrainer, FusedSDFTTrainer)  # theirs, ours
VOCAB = 134  # of the world's tokenizer
QUESTIONS = ["luma a c c f b", "sort d a", "reverse f e d c", "pi a b"]
HINTS = ["H a3 H c7", "H a1", "H c2 H d3 H e4", "H b1"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig}
QUIET: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "learning_rate": 3e-3,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "max_steps": 3,
    "seed": 5,
    "max_completion_length": 6,
    "temperature": 0.9,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
}
SDFT_ARGS: dict[str, Any] = {"teacher_prompt_template": "{prompt} {privileged_context}"}
SDPO_ARGS: dict[str, Any] = {
    "reprompt_template": "{prompt}{solution}{feedback}",
    "solution_template": " H {successful_previous_attempt}",
    "feedback_template": " H {feedback_raw}",
}
MODES: dict[str, dict[str, Any]] = {
    "full reverse": {"distillation_mode": "full_logits", "distillation_alpha": 1.0},
    "full forward": {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    "full jsd": {"distillation_mode": "full_logits", "distillation_alpha": 0.3},
    "topk tail": {
        "distillation_mode": "topk_logits",
        "distillation_alpha": 0.5,
        "distillation_topk": 5,
        "distillation_add_tail": True,
    },
    "topk no tail": {
        "distillation_mode": "topk_logits",
        "distillation_alpha": 1.0,
        "distillation_topk": 5,
        "distillation_add_tail": False,
    },
    "sampled": {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
}


def save_model(folder: Path, family: str = "qwen2") -> Path:
    """Puts a model on the disk, where TRL reads its teacher from, with a tokenizer beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # norms and biases
                weight.add_(0.3 * torch.randn_like(weight))
    path = folder / family
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")


def data() -> Dataset:
    return Dataset.from_dict({"prompt": QUESTIONS, "privileged_context": HINTS})


def parity(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Rewards what was sampled: about half of the completions succeed."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def build(
    kind: Any, model: Any, output: Path, *, fused: FusedOptions | None = None, callbacks: Any = None, **changes: Any
) -> Any:
    """Constructs a trainer of TRL's SDPO or SDFT, or of ours, with these changes of its configuration."""
    own: dict[str, Any] = {"peft_config": changes.pop("peft_config", None), "callbacks": callbacks}
    if issubclass(kind, SDPOTrainer):
        own["reward_funcs"] = changes.pop("reward_funcs", parity)
    if fused is not None:
        own["fused"] = fused
    config, arguments = (SDPOConfig, SDPO_ARGS) if issubclass(kind, SDPOTrainer) else (SDFTConfig, SDFT_ARGS)
    return kind(
        model=model,
        args=config(output_dir=str(output), **(QUIET | arguments | changes)),
        train_dataset=data(),
        eval_dataset=data(),
        processing_class=tokenizer(),
        **own,
    )


def same_teacher(kinds: tuple[type, type], folder: Path, output: Path) -> tuple[Any, Any]:
    """Constructs TRL's trainer and ours, of one float64 model each and the same teacher of other weights."""
    with torch.random.fork_rng():
        theirs, ours = (
            build(kind, load_model(folder, torch.float64), output, teacher_model_kind="live") for kind in kinds
        )
        teacher = copy.deepcopy(theirs.model).requires_grad_(False).eval()
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    theirs.teacher_model, ours.teacher = teacher, Frozen(teacher)
    for trainer in (theirs, ours):
        trainer.current_gradient_accumulation_steps = 1
    return theirs, ours


def logged(trainer: Any, name: str = "loss") -> list[float]:
    """Returns a metric over the steps."""
    return [line[name] for line in trainer.state.log_history if name in line]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return logged(trainer)


def batch(
    *, lengths: tuple[int, ...] = (5, 3, 6, 2), prompts: tuple[int, ...] = (4, 4, 6, 3), seed: int = 0
) -> dict[str, Tensor]:
    """Makes what TRL's `_prepare_inputs` gives: rows 0 and 1 are samples of one prompt if their lengths are equal."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (length,), generator=generator)

    prompts_B = [ids(length) for length in prompts]
    if prompts[0] == prompts[1]:
        prompts_B[1] = prompts_B[0]
    completions_B = [ids(length) for length in lengths]
    teachers_B = [torch.cat([prompt[:-1], ids(2 + row), prompt[-1:]]) for row, prompt in enumerate(prompts_B)]
    prompt_ids, prompt_mask = padded(prompts_B, left=True)
    completion_ids, completion_mask = padded(completions_B, left=False)
    teacher_ids, teacher_mask = padded(teachers_B, left=True)
    old = -5 + torch.randn(completion_ids.shape, generator=generator)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([teacher_ids, completion_ids], dim=1),
        "teacher_attention_mask": torch.cat([teacher_mask, completion_mask], dim=1),
        "self_distillation_mask": torch.tensor([1.0] * (len(lengths) - 1) + [0.0]),
        "old_per_token_logps": old,
        "advantages": torch.randn(len(lengths), generator=generator),
    }


def batch_with_tools() -> dict[str, Tensor]:
    """Makes a batch of which two completions have a tool's output: tokens that are read and carry no loss."""
    rows = batch()
    holes = torch.zeros_like(rows["completion_mask"])
    holes[0, 1:3] = holes[2, 0] = holes[2, 3:5] = 1
    rows["completion_mask"] = rows["completion_mask"] * (1 - holes)
    rows["teacher_attention_mask"] = torch.cat([rows["teacher_attention_mask"][:, :-6], rows["completion_mask"]], dim=1)
    return rows


def reading_holes(trainer: Any) -> Any:
    """Returns a `_forward_logits` of TRL's own trainer that reads the holes of a completion's mask.

    TRL uses one mask for the loss and for attention, so that a tool's output would be hidden from what follows it.
    """
    forward = trainer._forward_logits

    def read(model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
        prompts, completions = attention_mask[:, :-logits_to_keep], attention_mask[:, -logits_to_keep:]
        mask = torch.cat([prompts, completions.flip(1).cummax(1).values.flip(1)], dim=1)
        return forward(model, input_ids, mask, logits_to_keep)

    return read


def padded(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask
