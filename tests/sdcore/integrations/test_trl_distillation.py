"""`FusedDistillationTrainer` beside TRL's `DistillationTrainer`, and both fused trainers on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.errors import ArgumentError
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.integrations.other_model_runs import (
    VOCAB,
    assert_same,
    distillation,
    gradients,
    logged,
    model,
    teacher,
    trained,
)

pytest.importorskip("trl")

from trl import DistillationTrainer

from sdcore.integrations.trl import patch
from sdcore.integrations.trl.distillation import FusedDistillationTrainer
from sdcore.integrations.trl.fused import FusedOptions

SECONDS = 240  # a hang is a failure within this time


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and theirs, of the same models."""
    student, other = model(1), teacher()
    folder = tmp_path_factory.mktemp("pair")
    return tuple(
        distillation(kind, folder, student=student, of=other)
        for kind in (FusedDistillationTrainer, DistillationTrainer)
    )  # type: ignore[return-value]


def batch(*, tools: bool = False, count: int | None = None, seed: int = 3) -> dict[str, Tensor]:
    """Prompts on the left, completions on the right; two prompts stand twice; one completion is empty."""
    draw = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCAB, (size,), generator=draw).tolist() for size in (9, 4, 6)]
    rows = [(0, 5), (1, 7), (0, 2), (1, 1), (2, 0)]
    found: dict[str, Any] = {"prompt_ids": [], "prompt_mask": [], "completion_ids": [], "completion_mask": []}
    for which, size in rows:
        pads = 9 - len(prompts[which])
        found["prompt_ids"].append([0] * pads + prompts[which])
        found["prompt_mask"].append([0] * pads + [1] * (9 - pads))
        found["completion_ids"].append(torch.randint(3, VOCAB, (size,), generator=draw).tolist() + [0] * (7 - size))
        found["completion_mask"].append([1] * size + [0] * (7 - size))
    found = {name: torch.tensor(values) for name, values in found.items()}
    if tools:
        found["tool_mask"] = torch.ones(5, 7, dtype=torch.int64)
        found["tool_mask"][0, 1:3] = found["tool_mask"][1, 5:] = 0
    if count is not None:
        found["num_items_in_batch"] = torch.tensor(count)
    return found


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("count", [None, 31])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_gradients_and_entropy_are_trls(
    pair: tuple[Any, Any], beta: float, temperature: float, count: int | None, tools: bool
) -> None:
    results = []
    for trainer in pair:
        trainer.beta, trainer.temperature = beta, temperature
        results.append(gradients(trainer, batch(tools=tools, count=count)))
    assert_same(*results, within=1e-4)
    entropies = [trainer._metrics["train"]["entropy"][-1] for trainer in pair]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)
    assert pair[0].compute_loss(pair[0].model, batch(), return_outputs=True)[1] is None


def test_equal_prompts_of_a_batch_are_read_once(pair: tuple[Any, Any]) -> None:
    given = batch()
    out = pair[0].distill(
        pair[0].model,
        *(given[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")),
        loss_mask=given["completion_mask"],
        alpha=0.5,
        temperature=1.0,
        normalizer=None,
    )
    # Each model reads prompts of 9 and 4 tokens once, and completions without their last token.
    for one in (out.report.student, out.report.teacher):
        assert one.naive_tokens == 2 * 9 + 2 * 4 + 4 + 1 + 6 + 0
        assert one.tokens == one.naive_tokens - 9 - 4


def test_no_tensor_of_tokens_times_vocabulary_exists(tmp_path: Path) -> None:
    # Room for one block of rows of the loss; below it is refused.
    trainer = distillation(FusedDistillationTrainer, tmp_path, extra={"fused": FusedOptions(workspace_mb=20)})
    gradients(trainer, batch())  # its check of first use is a pass of its own
    given = {name: values.repeat(4, 1) for name, values in batch().items()}
    given["completion_ids"] = given["completion_ids"].repeat(1, 9).clamp(min=3)
    given["completion_mask"] = torch.ones_like(given["completion_ids"])
    with LiveBytes() as probe:
        gradients(trainer, given)
    assert probe.largest_numel < given["completion_ids"].numel() * VOCAB // 2


def test_three_steps_have_trls_losses_and_entropies(tmp_path: Path) -> None:
    runs = [
        distillation(kind, tmp_path, seed=5, gradient_accumulation_steps=2, per_device_train_batch_size=3)
        for kind in (FusedDistillationTrainer, DistillationTrainer)
    ]
    for trainer in runs:
        trained(trainer)
    losses = [logged(trainer) for trainer in runs]
    assert len(losses[0]) == 3
    assert abs(losses[0][0] - losses[0][2]) > 1e-4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert logged(runs[0], "entropy") == pytest.approx(logged(runs[1], "entropy"), rel=1e-4)
    torch.manual_seed(1)
    found = runs[0].evaluate()
    torch.manual_seed(1)
    expected = runs[1].evaluate()
    for name in ("eval_loss", "eval_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "within"),
    [({"bf16": True}, 2e-3), ({"gradient_checkpointing": True}, 1e-4)],
    ids=["bf16", "checkpoints"],
)
def test_low_precision_and_checkpoints_change_nothing(options: Any, within: float, tmp_path: Path) -> None:
    runs = [
        trained(distillation(kind, tmp_path, **options)) for kind in (FusedDistillationTrainer, DistillationTrainer)
    ]
    assert len(logged(runs[0])) == 3
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=within)


def test_an_adapter_is_trained_as_trl_trains_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = [
        distillation(kind, tmp_path, extra={"peft_config": config})
        for kind in (FusedDistillationTrainer, DistillationTrainer)
    ]
    for trainer in runs:
        trained(trainer)
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)


def test_a_batch_with_images_is_left_to_trl_with_a_warning(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lambda *_: "TRL's")
    with pytest.warns(UserWarning, match="pixel_values are left to TRL"):
        assert pair[0].compute_loss(pair[0].model, batch() | {"pixel_values": torch.zeros(1)}) == "TRL's"


def test_options_that_have_no_effect_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="micro_batch must be left as it is for FusedDistillationTrainer"):
        distillation(FusedDistillationTrainer, tmp_path, extra={"fused": FusedOptions(micro_batch=2)})


def test_patch_makes_trls_trainer_ours_or_leaves_it_as_it_was(tmp_path: Path) -> None:
    trainer = distillation(DistillationTrainer, tmp_path)
    with pytest.raises(ArgumentError, match="micro_batch must be left as it is"):
        patch(trainer, micro_batch=2)
    assert type(trainer) is DistillationTrainer
    expected = gradients(trainer, batch())
    assert patch(trainer, workspace_mb=64) is trainer
    assert type(trainer) is FusedDistillationTrainer
    assert trainer.fused.workspace_mb == 64
    assert_same(gradients(trainer, batch()), expected, within=1e-4)
    trained(trainer)
    assert len(logged(trainer)) == 3


# Two ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output, root = tmp_path_factory.mktemp("ranks"), Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("other_model_runs.py")
    done = subprocess.run(
        [*command, str(script), str(output)],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=output,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["gkd", "distillation"])
def test_two_ranks_train_as_with_trl(name: str, ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        ours, theirs = found[f"{name} ours"], found[f"{name} theirs"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)
        assert ours["first"] == pytest.approx(theirs["first"], rel=1e-4, abs=1e-6)
    assert ranks[0][f"{name} ours"]["total"] == ranks[1][f"{name} ours"]["total"]


@pytest.mark.parametrize("name", ["gkd", "distillation"])
def test_a_loss_of_sharded_models_has_the_gradients_of_whole_ones(name: str, ranks: list[dict[str, Any]]) -> None:
    """FSDP2 of student and teacher; accelerate itself shards nothing on CPUs, so this is without its preparation."""
    for found in (one[f"{name} sharded"] for one in ranks):
        assert found["loss"] == pytest.approx(found["wanted"], rel=1e-5)
        assert found["error"] < 1e-4
