"""Tiny students, teachers and data for TRL's trainers whose teacher is another model; two ranks of them, when run.

python -m torch.distributed.run --standalone --nproc_per_node 2 other_model_runs.py OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

import sdcore.world

# More than ids of the tokenizer, and more than any other dimension.
VOCAB = 523
QUESTIONS = ["tiko a e g d f", "luma b b c", "tiko a e g d f", "pi h i j a", "luma b b c", "reverse e f g h a"]
ANSWERS = ["a3 e1 g7 d2 f0", "b4 b4", "a3 e1", "h0 i2 j8 a1", "b4 b4 c9", "a3"]


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(sdcore.world.__file__).parent / "checkpoint")


def model(seed: int, *, hidden: int = 16) -> PreTrainedModel:
    """Weights large enough that positions and masks matter."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def teacher(seed: int = 9) -> PreTrainedModel:
    """Of another width."""
    return model(seed, hidden=24)


def messages() -> Any:
    from datasets import Dataset

    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return Dataset.from_dict({"messages": turns * 4})


def prompts() -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in QUESTIONS * 4]})


def arguments(config: Any, output: Path, **options: Any) -> Any:
    common: dict[str, Any] = {
        "max_steps": 3, "learning_rate": 5e-2, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    return config(output_dir=str(output), **(common | options))


def gkd(kind: Any, output: Path, *, student: Any = None, of: Any = None, extra: Any = None, **options: Any) -> Any:
    """A `GKDTrainer` of this kind, with `extra` arguments of its constructor."""
    from trl.experimental.gkd import GKDConfig

    options = {"lmbda": 0.0, "max_length": 64, "max_new_tokens": 8} | options
    return kind(
        model(1) if student is None else student,
        teacher_model=teacher() if of is None else of,
        args=arguments(GKDConfig, output, **options),
        train_dataset=messages(),
        eval_dataset=messages(),
        processing_class=tokenizer(),
        **(extra or {}),
    )


def distillation(
    kind: Any, output: Path, *, student: Any = None, of: Any = None, extra: Any = None, **options: Any
) -> Any:
    from trl import DistillationConfig

    return kind(
        model(1) if student is None else student,
        teacher_model=teacher() if of is None else of,
        args=arguments(DistillationConfig, output, **({"max_completion_length": 8} | options)),
        train_dataset=prompts(),
        eval_dataset=prompts(),
        processing_class=tokenizer(),
        **(extra or {}),
    )


def trained(trainer: Any) -> Any:
    """From the same random state, whatever ran before."""
    set_seed(5)
    trainer.train()
    return trainer


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def gradients(trainer: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and what it gives the student's parameters."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs), **options)
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None
    }


def assert_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], *, within: float
) -> None:
    """Loss and every gradient, relative to their size."""
    assert float(found[0]) == float(expected[0]) or abs(1 - float(found[0] / expected[0])) < within
    assert found[1].keys() == expected[1].keys()
    errors = {name: float((found[1][name] - grad).norm() / grad.norm()) for name, grad in expected[1].items()}
    assert {name: error for name, error in errors.items() if not error < within} == {}


def shard(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def steps(kind: Any, build: Any, output: Path) -> dict[str, Any]:
    """Three steps, accumulated over two batches, on two ranks with their own rows."""
    trainer = trained(build(kind, output, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    weights = [weight.detach().double() for weight in trainer.model.parameters()]
    return {
        "losses": logged(trainer),
        "entropy": logged(trainer, "entropy"),
        "total": float(sum(weight.abs().sum() for weight in weights)),
        "first": weights[0].flatten()[:50].tolist(),
    }


def sharded(kind: Any, build: Any, batches: list[Any], output: Path) -> dict[str, Any]:
    """One loss of each rank under FSDP2, and how far its gradients are from the mean of those of whole models."""
    trainer = build(kind, output)
    found = [gradients(trainer, batch) for batch in batches]
    wanted = {name: sum(grads[name] for _, grads in found) / len(found) for name in found[0][1]}
    trainer.model.zero_grad()
    shard(trainer.model)
    shard(trainer.teacher_model)
    loss, grads = gradients(trainer, batches[dist.get_rank()])
    whole = {name: grad.full_tensor() for name, grad in grads.items()}
    errors = [float((whole[name] - grad).norm() / grad.norm()) for name, grad in wanted.items()]
    return {"loss": float(loss), "wanted": float(found[dist.get_rank()][0]), "error": max(errors)}


def main(output: Path) -> None:
    """Of each trainer, TRL's and ours, steps on two ranks; and of ours, one with models that are sharded."""
    from trl import DistillationTrainer
    from trl.experimental.gkd import GKDTrainer

    from sdcore.integrations.trl import FusedDistillationTrainer, FusedGKDTrainer
    from tests.sdcore.integrations import test_trl_distillation, test_trl_gkd

    torch.set_num_threads(1)
    batches = {
        "gkd": [test_trl_gkd.batch("left", seed=rank) for rank in range(2)],
        "distillation": [test_trl_distillation.batch(seed=rank) for rank in range(2)],
    }
    found: dict[str, Any] = {}
    for name, build, theirs, ours in (
        ("gkd", gkd, GKDTrainer, FusedGKDTrainer),
        ("distillation", distillation, DistillationTrainer, FusedDistillationTrainer),
    ):
        found[f"{name} theirs"] = steps(theirs, build, output / name)
        found[f"{name} ours"] = steps(ours, build, output / name)
        found[f"{name} sharded"] = sharded(ours, build, batches[name], output / name)
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # All is written; the interpreter's shutdown beside torch's threads aborts a process now and then.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
