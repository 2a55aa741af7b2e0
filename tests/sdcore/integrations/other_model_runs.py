"""Builds tiny students, teachers and data for TRL's trainers whose teacher is another model; when run, on two ranks.

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
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from sdcore.integrations.trl import FusedDistillationTrainer, FusedGKDTrainer
from sdcore.world import CHECKPOINT
from tests.processes import leave
from tests.sdcore.integrations.trl_runs import logged

# Ours and TRL's.
TRAINERS = {"gkd": (FusedGKDTrainer, GKDTrainer), "distillation": (FusedDistillationTrainer, DistillationTrainer)}
# More than ids of the tokenizer, and more than any other dimension.
VOCAB = 523
QUESTIONS = ["tiko a e g d f", "luma b b c", "tiko a e g d f", "pi h i j a", "luma b b c", "reverse e f g h a"]
ANSWERS = ["a3 e1 g7 d2 f0", "b4 b4", "a3 e1", "h0 i2 j8 a1", "b4 b4 c9", "a3"]


COMMON: dict[str, Any] = {
    "max_steps": 3, "learning_rate": 5e-2, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
    "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def model(seed: int, *, hidden: int = 16) -> PreTrainedModel:
    """Makes a model with weights so large that positions and masks matter."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def teacher(seed: int = 9) -> PreTrainedModel:
    """Makes a model of another width."""
    return model(seed, hidden=24)


def messages() -> Any:
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return Dataset.from_dict({"messages": turns * 4})


def prompts() -> Any:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in QUESTIONS * 4]})


def build(kind: Any, output: Path, *, student: Any = None, of: Any = None, extra: Any = None, **options: Any) -> Any:
    """Constructs a trainer of TRL's, or of ours, with `extra` arguments of its constructor."""
    is_gkd = issubclass(kind, GKDTrainer)
    config = GKDConfig if is_gkd else DistillationConfig
    own = {"lmbda": 0.0, "max_length": 64, "max_new_tokens": 8} if is_gkd else {"max_completion_length": 8}
    rows = messages() if is_gkd else prompts()
    return kind(
        model(1) if student is None else student,
        teacher_model=teacher() if of is None else of,
        args=config(output_dir=str(output), **(COMMON | own | options)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(CHECKPOINT),
        **(extra or {}),
    )


def labelled_batch(padding: str = "left", *, seed: int = 0) -> dict[str, Tensor]:
    """Makes a batch in which two prompts stand twice, apart; labels have holes, and one row has none."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=draw).tolist()

    long, short = ids(9), ids(4)
    rows = [(long, ids(5)), (short, ids(7)), (long, ids(2)), (short, ids(1)), (ids(6), ids(3))]
    length = 17
    fields: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for number, (prompt, completion) in enumerate(rows):
        labels = [-100] * len(prompt) + completion
        if number == 1:
            labels[len(prompt) + 2] = labels[len(prompt) + 3] = labels[-1] = -100
        if number == 4:
            labels = [-100] * len(labels)
        # What `generate` leaves: prompts padded on the left to one width, completions on the right.
        left = {"left": length - len(labels), "right": 0, "both": 9 - len(prompt)}[padding]
        right = length - len(labels) - left
        for name, values, filler in (
            ("input_ids", prompt + completion, 0),
            ("attention_mask", [1] * len(labels), 0),
            ("labels", labels, -100),
        ):
            fields[name].append([filler] * left + values + [filler] * right)
    return {name: torch.tensor(values) for name, values in fields.items()}


def prompted_batch(*, tools: bool = False, count: int | None = None, seed: int = 3) -> dict[str, Tensor]:
    """Pads prompts on the left, completions on the right; two prompts stand twice; one completion is empty."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCAB, (size,), generator=draw).tolist() for size in (9, 4, 6)]
    rows = [(0, 5), (1, 7), (0, 2), (1, 1), (2, 0)]
    fields: dict[str, Any] = {"prompt_ids": [], "prompt_mask": [], "completion_ids": [], "completion_mask": []}
    for which, size in rows:
        pads = 9 - len(prompts[which])
        fields["prompt_ids"].append([0] * pads + prompts[which])
        fields["prompt_mask"].append([0] * pads + [1] * (9 - pads))
        fields["completion_ids"].append(torch.randint(3, VOCAB, (size,), generator=draw).tolist() + [0] * (7 - size))
        fields["completion_mask"].append([1] * size + [0] * (7 - size))
    fields = {name: torch.tensor(values) for name, values in fields.items()}
    if tools:
        fields["tool_mask"] = torch.ones(5, 7, dtype=torch.int64)
        fields["tool_mask"][0, 1:3] = fields["tool_mask"][1, 5:] = 0
    if count is not None:
        fields["num_items_in_batch"] = torch.tensor(count)
    return fields


def trained(trainer: Any) -> Any:
    """Trains from the same random state, whatever ran before."""
    set_seed(5)
    trainer.train()
    return trainer


def gradients(trainer: Any, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of a batch, and what it gives the student's parameters."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs), **options)
    loss.backward()
    return loss.detach(), {
        name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.grad is not None
    }


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]], *, within: float
) -> None:
    """Compares loss and every gradient, relative to their size."""
    assert float(ours[0]) == float(theirs[0]) or abs(1 - float(ours[0] / theirs[0])) < within
    assert ours[1].keys() == theirs[1].keys()
    errors = {name: float((ours[1][name] - grad).norm() / grad.norm()) for name, grad in theirs[1].items()}
    assert {name: error for name, error in errors.items() if not error < within} == {}


def shard(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def steps(kind: Any, output: Path) -> dict[str, Any]:
    """Makes three steps, accumulated over two batches, on two ranks with their own rows."""
    trainer = trained(build(kind, output, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    weights = [weight.detach().double() for weight in trainer.model.parameters()]
    return {
        "losses": logged(trainer),
        "entropy": logged(trainer, "entropy"),
        "total": float(sum(weight.abs().sum() for weight in weights)),
        "first": weights[0].flatten()[:50].tolist(),
    }


def sharded(kind: Any, batches: list[Any], output: Path) -> dict[str, Any]:
    """Makes one loss of each rank under FSDP2; says how far its gradients are from the mean of whole models'."""
    trainer = build(kind, output)
    whole = [gradients(trainer, batch) for batch in batches]
    wanted = {name: sum(grads[name] for _, grads in whole) / len(whole) for name in whole[0][1]}
    trainer.model.zero_grad()
    shard(trainer.model)
    shard(trainer.teacher_model)
    loss, shards = gradients(trainer, batches[dist.get_rank()])
    errors = [float((shards[name].full_tensor() - grad).norm() / grad.norm()) for name, grad in wanted.items()]
    return {"loss": float(loss), "wanted": float(whole[dist.get_rank()][0]), "error": max(errors)}


def main(output: Path) -> None:
    """Trains with TRL's trainers and ours on two ranks, and makes a loss of ours with models that are sharded."""
    torch.set_num_threads(1)
    batches = {
        "gkd": [labelled_batch(seed=rank) for rank in range(2)],
        "distillation": [prompted_batch(seed=rank) for rank in range(2)],
    }
    results: dict[str, Any] = {}
    for name, (ours, theirs) in TRAINERS.items():
        results[f"{name} theirs"] = steps(theirs, output / name)
        results[f"{name} ours"] = steps(ours, output / name)
        results[f"{name} sharded"] = sharded(ours, batches[name], output / name)
    (output / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
