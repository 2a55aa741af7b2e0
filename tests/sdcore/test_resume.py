"""A run that was killed and resumed gives the same numbers, to the last digit, as one that was not."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager

from sdcore.presets import GRPO, Method, SDFTPaper
from sdcore.training.checkpoints import CheckpointError, to_resume, whole
from sdcore.world.data import fraction, rows, with_feedback
from tests.sdcore.trainer_runs import SDFT_METHOD, SDPO_METHOD, SHOW, lines, losses, trainer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
# Name → method, kind of data, reward functions, and other arguments.
CASES: dict[str, tuple[Method, str, list[Any], dict[str, Any]]] = {
    # Three epochs of two steps, so the order of the data is resumed within a later one.
    "sdft": (SDFT_METHOD, "sdft", [], {"count": 8}),
    "sdpo accumulated": (SDPO_METHOD, "sdpo", [with_feedback], {"count": 20, "gradient_accumulation_steps": 2}),
    # Half of the teacher is new at every step, and so is who draws.
    "teacher's samples": (
        replace(SDFT_METHOD, teacher_samples=0.4, update_rate=0.5),
        "sdft",
        [],
        {"count": 20, "num_iterations": 3},
    ),
    # Checkpoints are written after 4 and 8 steps, between two uses of the same completions.
    "grpo reused": (GRPO(num_generations=4), "rl", [fraction], {"count": 8, "num_iterations": 3}),
}


class Killed(RuntimeError):
    pass


class Kill(TrainerCallback):
    """In the middle of a step, or outright."""

    def __init__(self, step: int, *, outright: bool = False) -> None:
        self.step, self.outright = step, outright

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.outright:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Killed


def run(case: str, output: Path, *, resume: bool = False, callbacks: Any = None, **changes: Any) -> Any:
    method, kind, rewards, options = CASES[case]
    made = trainer(
        output,
        method=method,
        kind=kind,  # type: ignore[arg-type]
        reward_funcs=rewards,
        callbacks=callbacks,
        **({"max_steps": STEPS, "save_strategy": "steps", "save_steps": 4} | options | changes),
    )
    # What the process did before must not matter.
    torch.manual_seed(torch.seed())
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_and_resumed_gives_the_same_losses_to_the_last_digit(case: str, tmp_path: Path) -> None:
    whole_run = run(case, tmp_path / "whole")
    with pytest.raises(Killed):
        run(case, tmp_path / "killed", callbacks=[Kill(5)])
    assert losses(tmp_path / "killed")[-1][0] == 5
    resumed = run(case, tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len({loss for _, loss in losses(tmp_path / "whole")}) == STEPS
    for name, weight in whole_run.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert lines(tmp_path / "killed", "samples.jsonl") == lines(tmp_path / "whole", "samples.jsonl")
    last = [lines(tmp_path / name)[-1] for name in ("whole", "killed")]
    assert last[0]["samples"] == last[1]["samples"] > 0
    assert last[0]["tokens"] == last[1]["tokens"] > 0


def test_a_run_killed_by_sigkill_resumes_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.sdcore.test_resume import Kill, run; import torch\n"
        "torch.set_num_threads(1); torch.use_deterministic_algorithms(True)\n"
        "run('sdpo accumulated', Path(sys.argv[1]), callbacks=[Kill(5, outright=True)])"
    )
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "killed")],
        env=os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    run("sdpo accumulated", tmp_path / "whole")
    run("sdpo accumulated", tmp_path / "killed", resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_the_teachers_state_is_saved_as_safetensors_and_restored(tmp_path: Path) -> None:
    made = run("sdft", tmp_path, max_steps=4)
    saved = load_file(tmp_path / "checkpoint-4" / "teacher" / "teacher.safetensors")
    student = made.model.state_dict()
    assert any(not torch.equal(saved[name], student[name]) for name in saved if name in student)
    again = run("sdft", tmp_path, resume=True, max_steps=4)  # nothing left to do
    assert again.state.global_step == 4
    for name, kept in again.teacher._kept.items():
        assert torch.equal(kept.value, saved[name]), name


@pytest.mark.parametrize(("count", "done"), [(20, 4), (8, 4), (20, 5)])
def test_a_finished_run_that_is_resumed_does_nothing_and_says_so(count: int, done: int, tmp_path: Path) -> None:
    """Within an epoch, of five steps, as at the end of one; and where fewer steps are asked for than were done."""
    first = run("sdft", tmp_path, count=count, max_steps=done, save_steps=1)
    before = lines(tmp_path), lines(tmp_path, "samples.jsonl")
    with pytest.warns(UserWarning, match=f"checkpoint-{done} has all 4 steps of this run: there is nothing to train"):
        again = run("sdft", tmp_path, count=count, max_steps=4, save_steps=1, resume=True)
    assert again.state.global_step == done
    assert (lines(tmp_path), lines(tmp_path, "samples.jsonl")) == before
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i + 1}" for i in range(done)]
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    run("sdft", tmp_path, save_steps=2)
    torn = tmp_path / "checkpoint-6"
    (torn / "trainer_state.json").write_text('{"global_step": 6, "ep')  # killed while it was written
    assert not whole(torn)
    assert to_resume(tmp_path, True) == tmp_path / "checkpoint-4"
    before = losses(tmp_path)
    run("sdft", tmp_path, resume=True, save_steps=2)
    assert losses(tmp_path) == before
    assert whole(torn)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("size", [None, 100])
def test_a_checkpoint_that_has_lost_a_file_or_part_of_one_is_passed_over(
    name: str, size: int | None, first_of_three: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would go on without the optimizer's or the schedule's, and without a word."""
    shutil.copytree(first_of_three, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-2"
    assert to_resume(folder.parent, True) == folder
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if size is not None:
        (folder / name).write_bytes(content[:size])
    assert to_resume(folder.parent, True) == folder.with_name("checkpoint-1")
    assert f"passed over {folder} (lacks all or some of {name})" in caplog.text
    with pytest.raises(CheckpointError, match=rf"checkpoint-2, which lacks all or some of {re.escape(name)}"):
        to_resume(folder.parent, folder)


class Signalled(TrainerCallback):
    """Has the checkpoint written that transformers writes at a SIGTERM."""

    manager: CheckpointManager

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.manager.execute_jit_checkpoint()


def test_a_checkpoint_that_a_signal_asked_for_is_whole(tmp_path: Path) -> None:
    callback = Signalled()
    made = trainer(tmp_path, method=SDFT_METHOD, count=8, max_steps=4, save_strategy="no", callbacks=[callback])
    callback.manager = CheckpointManager(made)
    made.train()
    assert to_resume(tmp_path, True) == tmp_path / "checkpoint-3"


def test_resuming_without_a_whole_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none there"):
        run("sdft", tmp_path, resume=True)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(CheckpointError, match="only torn ones"):
        run("sdft", tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="lacks all or some of trainer_state"):
        to_resume(tmp_path, tmp_path / "checkpoint-3")


def test_a_checkpoint_without_the_model_before_training_says_how_to_go_on(tmp_path: Path) -> None:
    """Checkpoints of LoRA runs had none while the drift was measured from the model without its adapter."""
    run("sdft", tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match=r"no state of the run's origin.*drift_probe_every=0 goes on"):
        run("sdft", tmp_path, resume=True, drift_probe_every=1)
    run("sdft", tmp_path, resume=True, drift_probe_every=0)
    assert losses(tmp_path)[-1][0] == STEPS


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what writing to a full disk is like, for every library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullDisk(TrainerCallback):
    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, hard))


# Where it is the model's file that cannot be written, where the optimizer's, and where our own.
@pytest.mark.parametrize("size", [100_000, 900_000])
def test_a_full_disk_at_a_checkpoint_is_a_clear_error_and_the_previous_one_is_usable(size: int, tmp_path: Path) -> None:
    run("sdft", tmp_path / "whole", save_steps=2)
    with files_of_at_most(-1), pytest.raises(CheckpointError, match=r"could not write .*checkpoint-4.*checkpoint-2"):
        run("sdft", tmp_path / "full", save_steps=2, save_total_limit=1, callbacks=[FullDisk(4, size)])
    assert not (tmp_path / "full" / "checkpoint-4").exists()
    run("sdft", tmp_path / "full", resume=True, save_steps=2)
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def test_other_errors_while_saving_keep_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*args: object) -> None:
        raise RuntimeError("a bug")

    made = trainer(tmp_path, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(made.teacher, "save", bad)
    with pytest.raises(RuntimeError, match="a bug") as caught:
        made.train()
    assert not isinstance(caught.value, CheckpointError)


def test_rollouts_in_use_can_only_be_resumed_with_the_same_batches(tmp_path: Path) -> None:
    run("grpo reused", tmp_path, max_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "sdcore.json").read_text())
    assert state["num_iterations"] == 3
    with pytest.raises(CheckpointError, match="num_iterations=3"):
        run("grpo reused", tmp_path, resume=True, num_iterations=5)


# Whose checkpoints they are.


def sdft(output: Path, *, resume: Any = None, **changes: Any) -> Any:
    """Two steps, each with a checkpoint, on rows of which a step takes four."""
    options: dict[str, Any] = {"count": 16, "max_steps": 2, "save_strategy": "steps", "save_steps": 1} | changes
    made = trainer(output, **options)
    made.train(resume_from_checkpoint=resume)
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_in_the_folder_of_one_that_has_checkpoints_is_refused(tmp_path: Path) -> None:
    sdft(tmp_path)
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match=r"output_dir must have no checkpoints .*, got .*checkpoint-2"):
        sdft(tmp_path, max_steps=1)
    assert files(tmp_path) == before
    sdft(tmp_path / "another", max_steps=1)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sdft(tmp_path, save_steps=2, callbacks=[Kill(1)])
    torn = tmp_path / "checkpoint-2"
    torn.mkdir()  # killed while it was written
    (torn / "sdcore.json").write_text("{}")
    sdft(tmp_path)
    assert len(losses(tmp_path)) == 2
    assert (tmp_path / "metrics.jsonl.1").exists()
    assert whole(torn)


ROWS = rows("sdft", task="luma", count=16, seed=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": replace(SDFT_METHOD, alpha=1.0)}, r"alpha=1.0 \(was 0.0\)"),
        (
            {"method": SDFTPaper(template=SHOW, skip_first_tokens=0)},
            r"alpha=1.0 .*method='SDFTPaper' \(was 'SDFTAsRun'",
        ),
        ({"seed": 4}, r"seed=4 \(was 3\), data_seed=4 \(was 3\)"),
        ({"train_dataset": rows("sdft", task="luma", count=16, seed=1)}, "data='"),
        ({"train_dataset": ROWS[:8]}, "data='"),
        ({"train_dataset": [ROWS[1], ROWS[0], *ROWS[2:]]}, "data='"),
        ({"train_dataset": [*ROWS[:-1], ROWS[-1] | {"answer": "another"}]}, "data='"),
        # What optimizer and scheduler would take from the checkpoint, whatever is asked.
        ({"learning_rate": 1e-2}, r"learning_rate=0.01 \(was 0.001\)"),
        ({"weight_decay": 0.1, "adam_beta2": 0.9}, r"weight_decay=0.1 \(was 0.0\), adam_beta2=0.9"),
        ({"optim": "adafactor"}, "optim='adafactor'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(
    changes: dict[str, Any], named: str, first_of_three: Path, tmp_path: Path
) -> None:
    shutil.copytree(first_of_three, tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"checkpoint-2 is of a run with another .*{named}.*: resume with the"):
        sdft(tmp_path / "run", resume=True, **changes | {"max_steps": 3})
    assert files(tmp_path / "run") == before


@pytest.fixture(scope="module")
def first_of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    sdft(folder)
    return folder


def test_what_may_change_is_said(first_of_three: Path, tmp_path: Path) -> None:
    shutil.copytree(first_of_three, tmp_path / "run")
    with pytest.warns(
        match=r"is gone on from with .*per_device_train_batch_size=2 \(was 4\), max_steps=3 \(was 2\)"
    ) as said:
        sdft(tmp_path / "run", resume=True, max_steps=3, per_device_train_batch_size=2)
    assert "output_dir" not in str(said[0].message)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize("noted", ["less", "nothing"])
def test_a_checkpoint_of_an_earlier_version_noted_less_of_its_run(
    noted: str, first_of_three: Path, tmp_path: Path
) -> None:
    shutil.copytree(first_of_three, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-2" / "sdcore.json"
    record = json.loads(path.read_text())
    del record["run"]["teacher_samples"]
    if noted == "nothing":
        del record["run"], record["files"]
    path.write_text(json.dumps(record))
    sdft(tmp_path / "run", resume=True, max_steps=3)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]


def test_other_rows_are_taken_from_the_first_where_that_is_asked(first_of_three: Path, tmp_path: Path) -> None:
    shutil.copytree(first_of_three, tmp_path / "run")
    others = rows("sdft", task="luma", count=16, seed=1)
    sdft(tmp_path / "run", resume=True, max_steps=3, train_dataset=others, ignore_data_skip=True)
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]


def test_a_checkpoint_without_the_optimizer_cannot_be_gone_on_from(tmp_path: Path) -> None:
    sdft(tmp_path, save_only_model=True)
    with pytest.raises(CheckpointError, match="no optimizer's state, it was written with save_only_model=True"):
        sdft(tmp_path, resume=True, max_steps=3)


def test_an_earlier_checkpoint_is_gone_on_from_once_later_ones_are_away(first_of_three: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(first_of_three, run_dir)
    with pytest.raises(CheckpointError, match=r"no checkpoints beyond the start of this run, got .*checkpoint-2"):
        sdft(run_dir, resume=str(run_dir / "checkpoint-1"))
    shutil.rmtree(run_dir / "checkpoint-2")
    made = sdft(run_dir, resume=str(run_dir / "checkpoint-1"))
    assert made.state.global_step == 2
    assert losses(run_dir) == losses(first_of_three)


def test_a_checkpoint_of_another_folder_begins_a_log_of_its_own(first_of_three: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        sdft(tmp_path, save_steps=2, callbacks=[Kill(1)])  # logs of a run that has nothing to do with it
    logged = (tmp_path / "metrics.jsonl").read_bytes()
    sdft(tmp_path, resume=str(first_of_three / "checkpoint-1"))
    assert [step for step, _ in losses(tmp_path)] == [2]
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == logged
    with pytest.raises(CheckpointError, match="no checkpoints beyond the start of this run"):
        sdft(tmp_path, resume=str(first_of_three / "checkpoint-1"))


def test_the_arguments_may_say_where_to_go_on(first_of_three: Path, tmp_path: Path) -> None:
    made = sdft(tmp_path, max_steps=3, resume_from_checkpoint=str(first_of_three / "checkpoint-2"))
    assert [step for step, _ in losses(tmp_path)] == [3]
    assert made.state.global_step == 3
