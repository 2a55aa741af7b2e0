"""Two processes train alike with TRL's trainer and with ours; a rank without anything to learn waits for nobody.

The processes run this file and leave the losses that the tests read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[3]
SECONDS = 200  # a hang is a failure within this time
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
METRICS = ("loss", "self_distillation/distillation_loss", "self_distillation/reward_mean", "grad_norm")


def sometimes(prompts: list[str], completion_ids: list[list[int]], **columns: object) -> list[float]:
    """No completion of half of the questions succeeds: on some ranks and steps nothing is active."""
    return [float("a" not in prompt) for prompt in prompts]


def main(output: Path, cases: list[str]) -> None:
    """What each of the processes runs."""
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
        trainer = runs.sdpo(trainer_class, runs.load_model(output / "qwen2"), output / "run", **options, **changes)
        trainer.train()
        if trainer.is_world_process_zero():
            lines = [{key: line[key] for key in METRICS} for line in trainer.state.log_history if "loss" in line]
            (output / f"{kind}_{name}.json").write_text(json.dumps(lines))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    # Now and then the interpreter's shutdown beside torch's threads aborts a process, when all is written.
    os._exit(0)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.sdcore.integrations import trl_runs as runs

    folder = tmp_path_factory.mktemp("ranks")
    runs.save_model(folder)
    cases = ["theirs dense", "ours dense", "bounded dense", "ours sparse", "bounded sparse"]
    process = subprocess.Popen(
        [sys.executable, "-m", *LAUNCH, __file__, str(folder), *cases],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "CI": "1",  # TRL sends no telemetry
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # the workers end with it
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        pytest.fail(f"hung: {said[-3000:]}")
    if process.returncode:
        pytest.fail(said[-6000:])
    return folder


def lines(output: Path, name: str) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((output / f"{name}.json").read_text())
    return found


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
    for one, other in zip(own, bounded, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
