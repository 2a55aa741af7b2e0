"""Two processes on CPU give the losses of one: DDP and FSDP2, started as users start them.

The processes run this file, all cases one after the other, and leave the logs that the tests read. One process has the
same batches by accumulation, with the same numbers and therefore the same seeds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdcore.presets.methods import GRPO, SFT, Method, RLTilt
from sdcore.world.data import fraction, rows, with_feedback
from tests.sdcore.trainer_runs import SDFT_METHOD, SDPO_METHOD, lines, losses, one_thread, trainer

__all__ = ["one_thread"]  # a fixture, for every test here

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # a hang is a failure within this time
RANKS = 2
STEPS = 3
LAUNCHERS = {
    # For accelerate several processes are `--multi_gpu`; that they use CPUs is said by the arguments.
    "ddp": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    "fsdp": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}  # fmt: skip
# Every case under one of the two at least; what may hang, or be divided wrongly, under both.
RUN = {"ddp": ("sdpo", "sparse", "sft", "grpo", "reused"), "fsdp": ("sdft", "sparse", "sft", "tilt", "reused")}


def ragged() -> list[dict[str, Any]]:
    """Completions of different lengths, so that ranks have different numbers of tokens."""
    found = rows("sft", task="luma", count=24, seed=0)
    return [row | {"completion": " ".join(row["completion"].split()[: 1 + 3 * i % 10])} for i, row in enumerate(found)]


def sometimes(*, answer: str, **columns: Any) -> tuple[float, str | None]:
    """Half of the questions have feedback: on some ranks and steps nothing is active, on others all."""
    return (0.0, answer) if int(answer[1]) % 2 else (0.0, None)


CASES: dict[str, tuple[Method, dict[str, Any]]] = {
    "sdft": (SDFT_METHOD, {"kind": "sdft"}),
    "sdpo": (SDPO_METHOD, {"kind": "sdpo", "reward_funcs": [with_feedback]}),
    # One group of a rank: often nothing of it is active.
    "sparse": (
        SDPO_METHOD,
        {"kind": "sdpo", "reward_funcs": [sometimes], "per_device_train_batch_size": 1, "drift_probe_every": 2},
    ),
    "sft": (SFT(), {"train_dataset": ragged(), "max_completion_length": 11}),
    "grpo": (replace(GRPO(num_generations=4), aggregation="token-mean"), {"kind": "rl", "reward_funcs": [fraction]}),
    "tilt": (RLTilt(num_generations=4), {"kind": "rl", "reward_funcs": [fraction]}),
    "reused": (GRPO(num_generations=4), {"kind": "rl", "reward_funcs": [fraction], "num_iterations": 2}),
}


def run(case: str, output: Path, *, resume: bool = False, **changes: Any) -> None:
    method, options = CASES[case]
    common: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "eval_dataset": rows("rl", task="pi", count=10, seed=0),
        "per_device_eval_batch_size": 4,
        "leak_probe_every": 2,
        "overlap_probe_every": 2,
    }
    trainer(output, method=method, **(common | options | changes)).train(resume_from_checkpoint=resume)


def resumed(output: Path, **changes: Any) -> None:
    """Stopped after the first step, between two uses of the same completions, and gone on from there."""
    saved = changes | {"save_strategy": "steps", "save_steps": 1}
    run("reused", output / "resumed", **saved | {"max_steps": 1})
    run("reused", output / "resumed", resume=True, **saved)


def main(kind: str, output: Path) -> None:
    """What each of the processes runs."""
    import torch

    torch.set_num_threads(1)
    changes: dict[str, Any] = {}
    if kind == "fsdp":
        changes["fsdp"] = True
        changes["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    for case in RUN[kind]:
        run(case, output / case, **changes)
    run("sdft", output / "evaluated", eval_strategy="steps", eval_steps=3, reward_funcs=[fraction], **changes)
    resumed(output, **changes)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is written. A process that ends with gloo work in flight is aborted at the interpreter's shutdown ("terminate
    # called without an active exception": gloo's threads free tensors that Python owns; pytorch/pytorch#179291).
    sys.stdout.flush()
    os._exit(0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    for case in CASES:
        run(case, output / case, gradient_accumulation_steps=RANKS)
    changes: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "reward_funcs": [fraction]}
    run("sdft", output / "evaluated", gradient_accumulation_steps=RANKS, **changes)
    return output


@pytest.fixture(scope="module", params=LAUNCHERS)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(request.param)
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", *LAUNCHERS[request.param], __file__, request.param, str(output)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
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
        pytest.fail(f"{request.param} hung: {said[-3000:]}")
    if process.returncode:
        pytest.fail(said[-6000:])
    return output


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(alone: Path, together: Path) -> None:
    cases = [case for case in CASES if (together / case).exists()]
    assert len(cases) == 5
    for case in cases:
        found, wanted = losses(together / case), losses(alone / case)
        assert [step for step, _ in found] == list(range(1, STEPS + 1)), case
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], rel=2e-4, abs=1e-6), case
        for line, other in zip(lines(together / case), lines(alone / case), strict=True):
            for name in ("samples", "tokens", "completions/count", "completions/without_loss", "loss/active_tokens"):
                assert line[name] == other[name], (case, name)
            for name in ("grad_norm", "self_distillation/distillation_loss", "completions/mean_length"):
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (case, name)


@pytest.mark.slow
def test_two_processes_share_an_evaluation(alone: Path, together: Path) -> None:
    found, wanted = (
        [line for line in lines(path / "evaluated") if "eval_reward_mean" in line] for path in (together, alone)
    )
    assert len(found) == len(wanted) == 1
    for name in ("eval_questions", "eval_reward_mean", "eval_reward_stderr", "eval_mean_length"):
        assert found[0][name] == pytest.approx(wanted[0][name]), name


@pytest.mark.slow
def test_two_processes_that_were_stopped_and_resumed_give_the_same_losses(together: Path) -> None:
    assert losses(together / "resumed") == losses(together / "reused")
    assert len(list((together / "resumed").glob("checkpoint-1/rollouts-*.json"))) == RANKS


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
