"""Two processes train alike with TRL's trainer and with ours; a rank without anything to learn waits for nobody.

The processes run this file and leave the losses that the tests read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import launch, leave

pytest.importorskip("trl")

SECONDS = 200  # a hang is a failure within this time
METRICS = ("loss", "self_distillation/distillation_loss", "self_distillation/reward_mean", "grad_norm")


def sometimes(prompts: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """Lets no completion of half of the questions succeed: on some ranks and steps nothing is active."""
    return [float("a" not in prompt) for prompt in prompts]


def main(output: Path, cases: list[str]) -> None:
    """Is what each of the processes runs."""
    import torch

    from sdcore.integrations.trl import FusedOptions
    from tests.sdcore.integrations import trl_runs as runs

    torch.set_num_threads(1)
    fused: dict[str, tuple[Any, dict[str, Any]]] = {
        "theirs": (runs.SDPOTrainer, {}),
        "ours": (runs.FusedSDPOTrainer, {}),
        "bounded": (runs.FusedSDPOTrainer, {"fused": FusedOptions(micro_batch=1)}),
    }
    for case in cases:
        kind, name = case.split()
        trainer_class, options = fused[kind]
        changes: dict[str, Any] = {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "reward_funcs": sometimes if name == "sparse" else runs.parity,
            "dont_reprompt_on_self_success": False,
            **runs.MODES["full jsd"],
        }
        trainer = runs.build(trainer_class, runs.load_model(output / "qwen2"), output / "run", **options, **changes)
        trainer.train()
        if trainer.is_world_process_zero():
            lines = [{key: line[key] for key in METRICS} for line in trainer.state.log_history if "loss" in line]
            (output / f"{kind}_{name}.json").write_text(json.dumps(lines))
    leave()


@pytest.fixture(scope="module")
def output(folder: Path) -> Path:
    cases = ["theirs dense", "ours dense", "bounded dense", "ours sparse", "bounded sparse"]
    launch(__file__, folder.parent, *cases, ranks=2, seconds=SECONDS)
    return folder.parent


def lines(output: Path, name: str) -> list[dict[str, float]]:
    return json.loads((output / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["ours_dense", "bounded_dense"])
def test_two_processes_have_trls_losses_and_gradients(output: Path, ours: str) -> None:
    for own, theirs in zip(lines(output, ours), lines(output, "theirs_dense"), strict=True):
        assert own == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_a_rank_without_an_active_sample_trains_on(output: Path) -> None:
    own, bounded = lines(output, "ours_sparse"), lines(output, "bounded_sparse")
    assert len(own) == 3
    assert any(line["loss"] > 0 for line in own)
    for whole, in_parts in zip(own, bounded, strict=True):
        assert whole == pytest.approx(in_parts, abs=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
