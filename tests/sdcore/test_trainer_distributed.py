"""Two processes on CPU give the losses of one: DDP and FSDP2, started as users start them, by `accelerate launch`.

The processes run this file, all cases one after the other, and leave the logs that the tests read. One process has the
same batches by accumulation, with the same numbers and therefore the same seeds.

Under FSDP2 all that shards is accelerate's and transformers' own: the launcher's flags or `TrainingArguments.fsdp`,
accelerate's plugin, its `prepare` (`fully_shard` of every layer, the optimizer's weights exchanged for the shards),
clipping, checkpoints and whole state dicts. One thing is not: accelerate looks for a plugin only where it found GPUs or
the like, and runs DDP, without a word, where it found CPUs. `shard_on_cpus` is the shim, in these processes alone: once
accelerate has chosen gloo and the CPU, it takes the processes for ones with GPUs. That the models really are sharded is
tested for every case, since it is what no loss would show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped, unused-ignore]
from accelerate.utils import DistributedType  # type: ignore[import-untyped, unused-ignore]
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sdcore.errors import UnsupportedModelError
from sdcore.presets import GRPO, SFT, Method, RLTilt
from sdcore.rollouts.environments import Reply
from sdcore.training.prepare import check_engine
from sdcore.training.trainer import SelfDistillationTrainer
from sdcore.types import Example
from sdcore.world import CHECKPOINT
from sdcore.world.data import fraction, rows, with_feedback
from tests.sdcore.trainer_runs import SDFT_METHOD, SDPO_METHOD, lines, losses, trainer

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240  # a hang is a failure within this time
RANKS = 2
STEPS = 3
COMMON = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
          "--main_process_port", "0"]  # fmt: skip
LAUNCHERS = {
    # For accelerate several processes are `--multi_gpu`; that they use CPUs is said by the arguments.
    "ddp": ["--multi_gpu", *COMMON],
    # All else is accelerate's default, such as checkpoints of shards.
    "fsdp": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", *COMMON],
}
# Every case under one of the two at least; what may hang, or be divided wrongly, under both.
RUN = {
    "ddp": ("sdpo", "sparse", "sft", "grpo", "ema", "reused", "by teacher", "turns"),
    "fsdp": ("sdft", "sparse", "sft", "tilt", "parted", "ema", "reused", "by live teacher", "turns"),
}
RESUMED = ("ema", "reused")
COUNTED = ("count", "without_loss", "by_teacher")
# FSDP2 as transformers has it by default if its arguments ask for it: with whole checkpoints.
BY_ARGUMENTS = {"fsdp": True, "fsdp_config": {"version": 2}}


def ragged() -> list[dict[str, Any]]:
    """Completions of different lengths, so that ranks have different numbers of tokens."""
    whole_rows = rows("sft", task="luma", count=24, seed=0)
    return [
        row | {"completion": " ".join(row["completion"].split()[: 1 + 3 * i % 10])} for i, row in enumerate(whole_rows)
    ]


def sometimes(*, answer: str, **columns: Any) -> tuple[float, str | None]:
    """Half of the questions have feedback: on some ranks and steps nothing is active, on others all."""
    return (0.0, answer) if int(answer[1]) % 2 else (0.0, None)


class Hints:
    """Some trajectories have one turn and some three, so that ranks have trees of different depths, or no teacher."""

    def reset(self, example: Example) -> None:
        self.turns = 0

    def step(self, message: dict[str, Any]) -> Reply | None:
        self.turns += 1
        if len(message["content"]) % 2 or self.turns == 3:
            return None
        return Reply("H a9 H e1", reward=float(self.turns), feedback="H g0")


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
    # Half of the teacher is new at every step. A model by its name is loaded where processes know of each other.
    "ema": (
        replace(SDFT_METHOD, update_rate=0.5),
        {"kind": "sdft", "model": str(CHECKPOINT), "strategy": "cached", "gradient_accumulation_steps": 2},
    ),
    "parted": (
        SDPO_METHOD,
        {"kind": "sdpo", "reward_funcs": [with_feedback], "strategy": "two_phase", "micro_batch": 2},
    ),
    "reused": (GRPO(num_generations=4), {"kind": "rl", "reward_funcs": [fraction], "num_iterations": 2}),
    "by teacher": (replace(SDFT_METHOD, update_rate=0.5, teacher_samples=0.5), {"kind": "sdft"}),
    "turns": (
        Method(context="turn_feedback", num_generations=2, teacher="ema", template="{{ prompt }} {{ feedback }}"),
        {"kind": "rl", "environment_factory": Hints, "per_device_train_batch_size": 1, "max_completion_length": 6},
    ),
    "by live teacher": (replace(SDFT_METHOD, teacher="live", update_rate=0.05, teacher_samples=0.5), {"kind": "sdft"}),
}


def shard_on_cpus() -> None:
    """The shim: accelerate takes this process, whose CPU and gloo group it has found, for one that it shards for."""
    build = AcceleratorState.__init__

    def as_if_of_gpus(state: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        shared_state = PartialState._shared_state
        if shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            shared_state["distributed_type"] = DistributedType.MULTI_GPU
        build(state, *args, **kwargs)

    AcceleratorState.__init__ = as_if_of_gpus


def run(case: str, output: Path, *, resume: bool = False, **changes: Any) -> None:
    """One case, whose weights and wrapping are left beside its logs."""
    method, options = CASES[case]
    common: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "eval_dataset": rows("rl", task="pi", count=10, seed=0),
        "per_device_eval_batch_size": 4,
        "leak_probe_every": 2,
        "overlap_probe_every": 2,
        # Above the gradients' entries: below it, Adam makes a whole step of the rounding of an entry that is nearly 0.
        "adam_epsilon": 1e-2,
    }
    made = trainer(output, method=method, **(common | options | changes))
    made.train(resume_from_checkpoint=resume)
    made.save_model(str(output / "model"))
    (output / f"wrapping-{made.args.process_index}.json").write_text(json.dumps(wrapping(made)))


def wrapping(made: SelfDistillationTrainer) -> dict[str, Any]:
    """What accelerate made of the model, on this rank."""
    model: Any = made.model_wrapped
    weights = list(model.parameters())
    own = sum(weight.to_local().numel() if isinstance(weight, DTensor) else weight.numel() for weight in weights)
    return {
        "distributed_type": made.accelerator.distributed_type.value,
        "is_ddp": isinstance(model, DistributedDataParallel),
        "layers_sharded": [
            isinstance(one, FSDPModule) for one in model.modules() if isinstance(one, LlamaDecoderLayer)
        ],
        "weights_sharded": [isinstance(weight, DTensor) for weight in weights],
        "share": own / sum(weight.numel() for weight in weights),
    }


def asked(kind: str, case: str) -> dict[str, Any]:
    """By the arguments, once; else it is the launcher that asks for FSDP2."""
    return BY_ARGUMENTS if (kind, case) == ("fsdp", "reused") else {}


def resumed(case: str, output: Path, **changes: Any) -> None:
    """Stopped after the first step, which for "reused" is between two uses of the same completions, and gone on."""
    saved = changes | {"save_strategy": "steps", "save_steps": 1}
    run(case, output, **saved | {"max_steps": 1})
    run(case, output, resume=True, **saved)


def main(kind: str, output: Path) -> None:
    """What each of the processes runs."""
    torch.set_num_threads(1)
    if kind == "fsdp":
        shard_on_cpus()
    run("sdft", output / "evaluated", eval_strategy="steps", eval_steps=3, reward_funcs=[fraction])
    for case in RUN[kind]:
        run(case, output / case, **asked(kind, case))
        if case in RESUMED:
            resumed(case, output / "resumed" / case, **asked(kind, case))
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
        accumulated = RANKS * CASES[case][1].get("gradient_accumulation_steps", 1)
        run(case, output / case, gradient_accumulation_steps=accumulated)
    changes: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3, "reward_funcs": [fraction]}
    run("sdft", output / "evaluated", gradient_accumulation_steps=RANKS, **changes)
    return output


@pytest.fixture(scope="module", params=LAUNCHERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def together(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(kind)
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *LAUNCHERS[kind], __file__, kind, str(output)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher, which ends its workers: they are in sessions of their own
        said, _ = process.communicate(timeout=60)
        pytest.fail(f"{kind} hung: {said[-3000:]}")
    if process.returncode:
        pytest.fail(said[-6000:])
    return output


def weights(output: Path) -> list[torch.Tensor]:
    """Of the model that was saved at the end, as users load it."""
    return [weight.detach() for weight in AutoModelForCausalLM.from_pretrained(output / "model").parameters()]


@pytest.mark.slow
def test_ddp_is_ddp_and_fsdp_is_sharded(kind: str, together: Path) -> None:
    for case in RUN[kind]:
        shares = 0.0
        for rank in range(RANKS):
            wrapping = json.loads((together / case / f"wrapping-{rank}.json").read_text())
            sharded = kind == "fsdp"
            assert wrapping["distributed_type"] == {"ddp": "MULTI_CPU", "fsdp": "FSDP"}[kind], case
            assert wrapping["is_ddp"] == (not sharded), case
            for name in ("layers_sharded", "weights_sharded"):
                assert set(wrapping[name]) == {sharded}, (case, name)
            shares += wrapping["share"]
        assert shares == (1 if sharded else RANKS), case


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(kind: str, alone: Path, together: Path) -> None:
    for case in RUN[kind]:
        curve, wanted = losses(together / case), losses(alone / case)
        assert [step for step, _ in curve] == list(range(1, STEPS + 1)), case
        assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in wanted], rel=2e-4, abs=1e-6), case
        for line, other in zip(lines(together / case), lines(alone / case), strict=True):
            for name in ("samples", "tokens", "loss/active_tokens", *(f"completions/{one}" for one in COUNTED)):
                assert line[name] == other[name], (case, name)
            for name in ("grad_norm", "self_distillation/distillation_loss", "completions/mean_length"):
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (case, name)


@pytest.mark.slow
def test_two_processes_share_an_evaluation(alone: Path, together: Path) -> None:
    log, wanted = (
        [line for line in lines(path / "evaluated") if "eval_reward_mean" in line] for path in (together, alone)
    )
    assert len(log) == len(wanted) == 1
    for name in ("eval_questions", "eval_reward_mean", "eval_reward_stderr", "eval_mean_length"):
        assert log[0][name] == pytest.approx(wanted[0][name]), name


@pytest.mark.slow
def test_two_processes_that_were_stopped_and_resumed_give_the_same_losses_and_weights(together: Path) -> None:
    for case in RESUMED:
        resumed, wanted = together / "resumed" / case, together / case
        assert losses(resumed) == losses(wanted), case
        assert all(torch.equal(one, other) for one, other in zip(weights(resumed), weights(wanted), strict=True)), case
    assert len(list((together / "resumed" / "reused").glob("checkpoint-1/rollouts-*.json"))) == RANKS


@pytest.mark.slow
def test_two_processes_save_the_whole_weights_of_one(kind: str, alone: Path, together: Path) -> None:
    start = [weight.detach() for weight in AutoModelForCausalLM.from_pretrained(CHECKPOINT).parameters()]
    for case in RUN[kind]:
        for weight, wanted, before in zip(weights(together / case), weights(alone / case), start, strict=True):
            assert (weight - wanted).norm() <= 1e-4 * (wanted - before).norm(), case


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "args must not ask for FSDP1"),
        ({"deepspeed_plugin": object()}, "args must not ask for DeepSpeed"),
    ],
)
def test_fsdp1_and_deepspeed_are_refused_by_name(state: dict[str, Any], message: str) -> None:
    check_engine(SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)))
    with pytest.raises(UnsupportedModelError, match=message):
        check_engine(SimpleNamespace(**state))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
