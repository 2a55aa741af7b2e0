"""Makes TRL's trainers, and ours of the same arguments, around a model that is there, for a case's objective.

Teachers: of SDPO and SDFT a copy of the student, which is what TRL's "ema" and "base" have (it reads them from the disk
by the model's name, hence is given one); GKD's and Distillation's is another model. Nothing is sampled or loaded here.
"""

from __future__ import annotations

import copy
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoTokenizer

from .. import world
from ..models.names import checkpointing_option
from .cases import Case, Setup
from .peers import require

SDPO, SDFT, GKD, DISTILLATION = "SDPO", "SDFT", "GKD", "Distillation"
TRAINERS: Final = (SDPO, SDFT, GKD, DISTILLATION)
ALPHA: Final = 0.5
IGNORED: Final = -100  # a label


def has_context(name: str) -> bool:
    """True for the trainers whose teacher reads more than the student."""
    return name in (SDPO, SDFT)


def trl_trainer(setup: Setup, name: str, other: Any = None) -> Any:
    """Makes TRL's own trainer; `other` is the teacher of GKD and Distillation. Raises `Unavailable` without TRL."""
    require("trl", "trl")
    trainer = make_trainer(setup, name, _of_trl(name, "Trainer"), other=other)
    if has_context(name):
        # It was constructed with a live one.
        trainer.teacher_model = copy.deepcopy(setup.model).requires_grad_(False).eval()
    return trainer


def make_trainer(setup: Setup, name: str, kind: Any, *, teacher: str = "live", other: Any = None, **more: Any) -> Any:
    """Makes a trainer of the class `kind`, TRL's or ours, with the case's objective."""
    from datasets import Dataset  # type: ignore[import-untyped, unused-ignore]

    count = setup.case.completions
    columns: dict[str, Any] = {"prompt": ["x"] * count}
    if name == SDFT:
        columns["privileged_context"] = ["y"] * count
    elif name == GKD:
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        columns = {"messages": [said] * count}
    if name == SDPO:
        more["reward_funcs"] = _no_reward
    if not has_context(name):
        more["teacher_model"] = other
    with tempfile.TemporaryDirectory() as folder:
        return kind(
            model=setup.model,
            args=_config(setup, name, teacher, folder),
            train_dataset=Dataset.from_dict(columns),
            # The bundled world's: a trainer wants one, and reads nothing with it here.
            processing_class=AutoTokenizer.from_pretrained(Path(world.__file__).parent / "checkpoint"),
            **more,
        )


def _config(setup: Setup, name: str, teacher: str, folder: str) -> Any:
    case: Case = setup.case
    chosen: dict[str, Any] = {
        "output_dir": folder,
        "report_to": "none",
        "use_cpu": setup.device.type == "cpu",
        "bf16": False,  # the weights have the case's dtype
        "per_device_train_batch_size": case.completions,
        "max_new_tokens" if name == GKD else "max_completion_length": case.completion,
    }
    if has_context(name):
        chosen |= {
            "num_generations": case.completions if name == SDPO else 1,
            "distillation_alpha": ALPHA,
            "distillation_mode": "full_logits" if case.topk is None else "topk_logits",
            "distillation_topk": case.topk,
            "distillation_add_tail": case.topk is not None,
            "teacher_model_kind": teacher,
        }
    else:
        chosen["beta"] = ALPHA
    kind = _of_trl(name, "Config")
    chosen[checkpointing_option(kind)] = False
    own: dict[str, dict[str, Any]] = {SDFT: {"num_loss_tokens_to_skip": 0}, GKD: {"lmbda": 0.0}}  # 0: never on policy
    return kind(**chosen, **own.get(name, {}))


def _of_trl(name: str, kind: str) -> Any:
    """Imports the trainer or the configuration of a name."""
    module = "trl" if name == DISTILLATION else f"trl.experimental.{name.lower()}"
    return getattr(import_module(module), name + kind)


def _no_reward(prompts: list[str], **columns: object) -> list[float]:
    """Rewards nothing: TRL wants a reward function; nothing is sampled here."""
    return [0.0] * len(prompts)


def trl_batch(setup: Setup, name: str) -> dict[str, Tensor]:
    """Returns what the trainer's `_prepare_inputs` (GKD: its collator) gives, of one generation step."""
    completion_ids = torch.stack(setup.completions)  # (G, R)
    count = len(completion_ids)
    prompt_ids = setup.prompt.expand(count, -1)
    sampled = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
    }
    if name == DISTILLATION:
        return sampled
    if name == GKD:
        input_ids = torch.cat([prompt_ids, completion_ids], dim=1)
        labels = input_ids.clone()
        labels[:, : setup.case.prompt] = IGNORED
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    teacher_prompts = torch.stack(setup.teacher_prompts).expand(count, -1)
    teacher_ids = torch.cat([teacher_prompts, completion_ids], dim=1)
    batch = sampled | {"teacher_input_ids": teacher_ids, "teacher_attention_mask": torch.ones_like(teacher_ids)}
    return batch | ({"self_distillation_mask": torch.ones(count, device=setup.device)} if name == SDPO else {})
