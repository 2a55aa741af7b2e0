"""Tests the studies: what counts as reproduced, what is kept and made again, and a quick subset of the claims."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from reproduce import records, schedule, sdft, sdpo, table, tilt
from reproduce.__main__ import app
from reproduce.experiment import base, draw_tasks, exam_of
from reproduce.records import Arm, Point, compare, estimate, final, matched, needed
from sdcore.errors import ArgumentError
from sdcore.world.episodes import Episode
from tests.processes import ROOT

Runs = list[tuple[str, float, int]]  # arm, rate, seed
pytestmark = pytest.mark.usefixtures("one_thread")


# What counts as reproduced


def results(**values: list[float | None]) -> records.Results:
    """Makes runs whose only point has the quantity "x", or not."""

    def record(arm: str, seed: int, value: Any) -> records.Record:
        job = records.Job(study="s", arm=arm, learning_rate=1.0, seed=seed, settings={})
        return records.Record(job=job, points=[{"x": value}])

    runs = {arm: {seed: record(arm, seed, x) for seed, x in enumerate(numbers)} for arm, numbers in values.items()}
    return records.Results(runs, resolution=0.01)


def test_a_standard_error_is_the_sample_deviation_over_the_root_of_n() -> None:
    known = estimate([1.0, 2.0, None, 6.0])
    assert known is not None
    assert known.mean == pytest.approx(3.0)
    assert known.error == pytest.approx((14 / 2) ** 0.5 / 3**0.5)
    assert (known.seeds, known.of) == (3, 4)
    assert estimate([None]) is None


@pytest.mark.parametrize(
    ("a", "b", "margin", "outcome"),
    [
        # Arms are compared seed by seed: seeds differ by 10 here, the arms by 1 in each.
        ([1.0, 11.0, 21.05], [0.0, 10.0, 20.0], 0.0, "reproduced"),
        ([0.0, 10.0, 20.0], [1.0, 11.0, 21.05], 0.0, "opposite"),
        # Three standard errors are enough: 1 and 2 give 1.5 ± 0.5, which is exactly three; 1 and 2.1 are 2.8.
        ([1.0, 2.0], [0.0, 0.0], 0.0, "reproduced"),
        ([1.0, 2.1], [0.0, 0.0], 0.0, "not reproduced"),
        # An effect within the margin is none.
        ([0.4, 0.4], [0.0, 0.0], 0.3, "reproduced"),
        ([0.4, 0.4], [0.0, 0.0], 0.5, "not reproduced"),
        # Equal differences are not known better than one answer.
        ([0.02, 0.02], [0.0, 0.0], 0.0, "not reproduced"),
        ([0.04, 0.04], [0.0, 0.0], 0.0, "reproduced"),
        # Arms without common seeds cannot be compared.
        ([1.0, None], [None, 0.0], 0.0, "undecided"),
    ],
)
def test_a_difference_is_judged_by_its_standard_error(
    a: list[float | None], b: list[float | None], margin: float, outcome: str
) -> None:
    assert compare(results(a=a, b=b), "", "a", "b", final("x"), margin=margin).outcome == outcome


def test_matched_reads_the_first_checkpoint_at_the_level() -> None:
    points: list[Point] = [{"new": 0.2, "samples": 1.0}, {"new": 0.9, "samples": 2.0}, {"new": 0.5, "samples": 3.0}]
    assert matched("samples", "new", 0.9)(points) == 2.0
    assert matched("samples", "new", 0.95)(points) is None
    assert needed("new", 0.95)(points) == 3.0
    assert final("new")(points) == 0.5


def test_rates_are_chosen_as_the_rules_say() -> None:
    def path(*rows: tuple[float, float, float]) -> list[Point]:
        return [{"samples": samples, "new": new, "kept": kept} for samples, new, kept in rows]

    sparing, fastest = records.sparing("new", 0.9, ("kept",)), records.fastest("new", 0.9)
    runs = {
        0.1: path((10, 0.95, 0.30), (20, 1.0, 0.1)),
        0.2: path((10, 0.5, 0.9), (20, 0.95, 0.895)),
        0.3: path((10, 0.5, 0.9), (20, 0.5, 0.9), (30, 0.95, 0.90)),
        0.4: path((10, 0.1, 1.0)),
    }
    assert (sparing(runs), fastest(runs)) == (0.2, 0.1)
    unreached = {0.1: path((10, 0.3, 0.0)), 0.2: path((10, 0.4, 0.0))}
    assert sparing(unreached) == fastest(unreached) == 0.2


# What is run, kept and made again


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    episodes: int = 100


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The runs that were made of a study that takes no time. The score is ±rate."""
    runs: Runs = []

    def make(arm: Arm, settings: FakeSettings, rate: float, seed: int) -> list[Point]:
        runs.append((arm.name, rate, seed))
        sign = -1.0 if arm.name == "low" else 1.0
        return [
            {"step": 0.0, "samples": 0.0, "tokens": 0.0, "new": 0.0},
            {"step": 1.0, "samples": 32.0, "tokens": 9.0, "new": sign * rate + 0.001 * seed},
        ]

    study = records.Study(
        name="fake",
        claim="fake",
        title="A fake study",
        claimed="High is higher than low.",
        arms=(
            Arm(name="high", title="high", learning_rates=(0.1, 0.3), quick_rate=0.2),
            Arm(name="low", title="low", learning_rates=(0.1, 0.3)),
            Arm(name="control", title="control", rate_of="fake/high"),
        ),
        full=FakeSettings(),
        quick=FakeSettings(episodes=1),
        run=make,
        rule="the highest",
        choose=lambda paths: max(paths, key=lambda rate: paths[rate][-1]["new"]),
        columns=(records.Column("new", final("new")),),
        panels=(records.Panel("new", "new"),),
        judge=lambda reported: [
            compare(reported, "High is higher than low", "high", "low", final("new")),
            compare(reported, "Low is higher than high", "low", "high", final("new")),
        ],
    )
    monkeypatch.setattr(schedule, "STUDIES", {"fake": study})
    return runs


def reproduce(output: Path, **options: Any) -> list[table.Finding]:
    return table.run(output, **({"seeds": 2, "workers": 1, "console": Console(quiet=True)} | options))


def test_rates_are_chosen_on_a_seed_that_is_not_reported(made: Runs, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    reproduce(tmp_path)
    assert made[:4] == [(arm, rate, records.TUNING_SEED) for arm in ("high", "low") for rate in (0.1, 0.3)]
    chosen = {"control": 0.3, "high": 0.3, "low": 0.1}
    assert sorted(made[4:]) == [(arm, rate, seed) for arm, rate in chosen.items() for seed in (0, 1)]
    assert torch.get_num_threads() == threads  # left alone


def test_an_interrupted_reproduction_goes_on_where_it_was(made: Runs, tmp_path: Path) -> None:
    reproduce(tmp_path)
    whole = (tmp_path / "README.md").read_text()
    lines = (tmp_path / "fake.jsonl").read_text()
    # Killed while it wrote its last line.
    (tmp_path / "fake.jsonl").write_text(lines[:-10])
    made.clear()
    reproduce(tmp_path)
    assert len(made) == 1
    assert (tmp_path / "fake.jsonl").read_text() == lines
    assert (tmp_path / "README.md").read_text() == whole
    made.clear()
    reproduce(tmp_path)
    assert made == []
    reproduce(tmp_path, resume=False)
    assert len(made) == 10


def test_more_seeds_keep_those_that_are_there(made: Runs, tmp_path: Path) -> None:
    reproduce(tmp_path)
    made.clear()
    reproduce(tmp_path, seeds=3)
    assert sorted(made) == [("control", 0.3, 2), ("high", 0.3, 2), ("low", 0.1, 2)]


def test_runs_with_other_settings_are_not_reused(made: Runs, tmp_path: Path) -> None:
    reproduce(tmp_path, quick=True)
    assert made == [("high", 0.2, 0), ("high", 0.2, 1)]
    made.clear()
    reproduce(tmp_path)
    assert len(made) == 10


def test_a_run_keeps_what_is_not_its_own(made: Runs, tmp_path: Path) -> None:
    reproduce(tmp_path, seeds=3)
    lines = (tmp_path / "fake.jsonl").read_text()
    page = (tmp_path / "README.md").read_text()
    for options in ({"seeds": 2}, {"quick": True}, {"quick": True, "resume": False}):
        reproduce(tmp_path, **options)
        assert set(lines.splitlines()) <= set((tmp_path / "fake.jsonl").read_text().splitlines())
    made.clear()
    reproduce(tmp_path, seeds=3)
    assert made == []
    assert (tmp_path / "fake.jsonl").read_text().startswith(lines)
    assert (tmp_path / "README.md").read_text() == page  # minutes are of the runs that it shows
    reproduce(tmp_path, seeds=2, resume=False)
    assert {seed for _, _, seed in made} == {0, 1, records.TUNING_SEED}


def test_runs_at_a_rate_that_is_no_longer_chosen_are_dropped(
    made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reproduce(tmp_path)
    study = schedule.STUDIES["fake"]
    monkeypatch.setitem(schedule.STUDIES, "fake", replace(study, choose=min))
    reproduce(tmp_path)
    jobs = [record.job for record in records.Archive(tmp_path).records.values()]
    assert {job.learning_rate for job in jobs if job.seed != records.TUNING_SEED} == {0.1}


WAITING = """
import os, time
from reproduce.schedule import _runner

class Job:
    def __reduce__(self):  # a worker calls this function when it reads the job
        return wait, ()

def wait():
    print(os.getpid(), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    with _runner(2, 0) as make:
        list(make([Job(), Job()], False))
"""


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_command_that_is_killed(sign: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    command = subprocess.Popen([sys.executable, str(tmp_path / "waiting.py")], env=env, stdout=subprocess.PIPE)
    assert command.stdout is not None
    workers = [int(command.stdout.readline()) for _ in range(2)]
    command.send_signal(sign)
    try:
        command.communicate(timeout=30)  # until nobody has the other end of its output any more
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_runs_of_another_study_are_made_once_and_kept_there(
    made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = schedule.STUDIES["fake"]
    arms = (replace(first.arm("high"), runs_of="fake"), Arm(name="new", title="new", rate_of="fake/high"))
    second = replace(first, name="second", title="The second", claim="second", arms=arms, judge=lambda reported: [])
    monkeypatch.setitem(schedule.STUDIES, "second", second)
    reproduce(tmp_path, studies=["second"])
    assert sorted(made) == [
        *(("high", rate, seed) for rate, seed in ((0.1, 1000), (0.3, 0), (0.3, 1), (0.3, 1000))),
        *(("new", 0.3, seed) for seed in (0, 1)),
    ]
    assert len((tmp_path / "fake.jsonl").read_text().splitlines()) == 4
    assert len((tmp_path / "second.jsonl").read_text().splitlines()) == 2
    made.clear()
    findings = reproduce(tmp_path)
    assert {arm for arm, _, _ in made} == {"low", "control"}
    assert [*findings[1].results.records] == ["high", "new"]
    made.clear()
    reproduce(tmp_path, studies=["second"])
    assert made == []
    assert len((tmp_path / "fake.jsonl").read_text().splitlines()) == 10


def test_a_page_has_its_own_studies_alone(made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(schedule.STUDIES["fake"], name="other", title="Elsewhere", claim="other", group="real")
    monkeypatch.setitem(schedule.STUDIES, "other", other)
    reproduce(tmp_path)
    assert "Elsewhere" not in (tmp_path / "README.md").read_text()
    assert len(made) == 10
    reproduce(tmp_path, group="real")
    assert "A fake study" not in (tmp_path / "real.md").read_text()
    with pytest.raises(ArgumentError, match="studies must be among other, got fake"):
        reproduce(tmp_path, group="real", studies=["fake"])


def test_a_study_is_found_in_either_group_and_has_its_groups_seeds(
    made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(schedule.STUDIES["fake"], name="other", claim="other", group="real")
    monkeypatch.setitem(schedule.STUDIES, "other", other)
    findings = reproduce(tmp_path, studies=["other"], seeds=None)
    assert [finding.scope.seeds for finding in findings] == [(0, 1, 2)]
    assert not (tmp_path / "README.md").exists()
    findings = reproduce(tmp_path, studies=["other", "fake"], seeds=None)
    assert {finding.study.name: len(finding.scope.seeds) for finding in findings} == {"fake": 5, "other": 3}
    assert {study.name for study in schedule.studies_of(["fake", "other"])} == {"fake", "other"}
    assert [study.name for study in schedule.studies_of(None)] == ["fake"]


def test_what_was_done_is_kept_when_a_run_fails(made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = schedule.STUDIES["fake"]

    def fail(arm: Arm, settings: Any, rate: float, seed: int) -> list[Point]:
        if arm.name == "low":
            raise RuntimeError("no such luck")
        return study.run(arm, settings, rate, seed)

    monkeypatch.setitem(schedule.STUDIES, "fake", replace(study, run=fail))
    with pytest.raises(RuntimeError, match="no such luck"):
        reproduce(tmp_path)
    assert len(records.Archive(tmp_path).records) == 2


def test_what_did_not_reproduce_comes_first(made: Runs, tmp_path: Path) -> None:
    findings = reproduce(tmp_path)
    assert [verdict.outcome for verdict in findings[0].verdicts] == ["reproduced", "opposite"]
    text = (tmp_path / "README.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## The opposite was found", "## Reproduced", "## How it was measured", "## A fake study"]
    assert "| high | 0.3 | 0.30 ± 0.00 |" in text
    assert "| low | 0.1 | 0.90 | ✓ |" in text  # on the tuning seed
    assert (tmp_path / "fake.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"studies": ["sdft", "magic"]}, "studies must be among sdft, sdft_sequence, sdpo, .*, got magic"),
        ({"seeds": 1}, r"seeds must be in \[2, 1000\), a standard error needs two, got 1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"nice": -1}, r"nice must be in \[0, 19\], got -1"),
    ],
)
def test_arguments_without_meaning_are_refused_before_any_work(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        reproduce(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_hands_its_options_on_and_names_a_bad_one_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = CliRunner().invoke(app, ["--study", "alchemy"])
    assert refused.exit_code == 2
    assert refused.output.startswith("reproduce: ")
    assert "alchemy" in refused.output
    assert refused.output.count("\n") == 1
    got: dict[str, Any] = {}
    monkeypatch.setattr(table, "run", lambda output, **options: got.update(options, output=output))
    words = "--quick --group small --study sdft --study tilt --seeds 2 --no-resume --output here"
    assert CliRunner().invoke(app, words.split()).exit_code == 0
    assert (got["output"], got["studies"], got["seeds"]) == (Path("here"), ["sdft", "tilt"], 2)
    assert (got["quick"], got["resume"], got["group"]) == (True, False, "small")
    assert CliRunner().invoke(app, ["--group", "huge"]).exit_code == 2


def test_help_teaches_and_imports_no_torch(run_python: Callable[..., str]) -> None:
    code = """
import sys
from reproduce.__main__ import app
app(["--help"], standalone_mode=False)
print(sorted({"torch", "transformers", "numpy", "matplotlib", "datasets", "sdkernels"} & set(sys.modules)))
"""
    shown, _, heavy = run_python(code).strip().rpartition("\n")
    assert "\n    python -m reproduce --" in shown  # an example to copy
    assert heavy == "[]"


def test_every_arm_has_a_rate_and_a_name_of_its_own() -> None:
    for name, study in schedule.STUDIES.items():
        assert study.name == name
        assert len({arm.name for arm in study.arms}) == len(study.arms)
        for arm in study.arms:
            assert arm.learning_rates
            if arm.rate_of is not None:
                other, _, wanted = arm.rate_of.partition("/")
                assert schedule.STUDIES[other].arm(wanted).rate_of is None


# The arms do what they say


@pytest.fixture
def episode() -> Episode:
    return Episode(task="luma", letters=tuple("abcde"), answer=("a1", "b2", "c3", "d4", "e5"))


def test_feedback_confirms_right_pairs_and_corrects_the_first_wrong_ones(episode: Episode) -> None:
    tried = sdpo.attempt("a1 b9 c9 d9 e5 <eos>", episode)
    assert tried.right == (True, False, False, False, True)
    assert (tried.share, tried.exact) == (0.4, False)
    assert sdpo.feedback(episode, tried, corrections=0) == ("a1", "e5")
    assert sdpo.feedback(episode, tried, corrections=2) == ("a1", "b2", "c3", "e5")
    assert sdpo.feedback(episode, tried, corrections=2, digits="9876543210") == ("a9", "b8", "c7", "e5")
    solved = sdpo.attempt("H a1 H b2 H c3 H d4 H e5 <eos>", episode)
    assert solved.exact
    assert sdpo.feedback(episode, solved, corrections=2) == ()
    assert sdpo.attempt("a1 b2 c3 d4 e5", episode).share == 0.0  # unfinished
    assert not sdpo.attempt("a1 b2 c3 d4 e5 e5 <eos>", episode).exact


def test_a_successful_attempt_of_another_goes_before_feedback(episode: Episode) -> None:
    right, wrong = (sdpo.attempt(text, episode) for text in ("a1 b2 c3 d4 e5 <eos>", "a1 b9 c9 d9 e9 <eos>"))
    arm = sdpo.SdpoArm(name="", title="")

    def seen(arm: sdpo.SdpoArm, index: int, *group: sdpo.Attempt) -> tuple[str, ...]:
        return sdpo.shown(arm, episode, group, index, wrong_digits="9999999999")

    assert seen(arm, 1, right, wrong) == episode.answer
    assert seen(arm, 0, right, wrong) == ()  # its own success is not shown to it, and there is no feedback
    assert seen(arm, 0, right, right) == episode.answer
    assert seen(arm, 1, wrong, wrong) == ("a1", "b2", "c3")
    assert seen(replace(arm, solution=False), 1, right, wrong) == ("a1", "b2", "c3")
    assert seen(replace(arm, feedback=False), 1, wrong, wrong) == ()
    assert seen(replace(arm, wrong=True), 1, wrong, wrong) == ("a9", "b9", "c9")


def test_a_pairs_advantage_is_over_the_same_place_in_the_group(episode: Episode) -> None:
    texts = ["a1 b9 c3 d9 e9 <eos>", "a9 b9 c3 d9 e9 <eos>", "H a1 <eos>"]
    tried = [sdpo.attempt(text, episode) for text in texts]
    ids = base().tokenizer(texts, add_special_tokens=False)["input_ids"]
    first, second, third = sdpo.pairwise_advantages([ids], [tried]).split([6, 6, 3])
    assert first[0] > 0 > second[0]
    assert first[[1, 3, 4, 5]].tolist() == [0.0] * 4  # all wrong alike, and the end of the sequence
    assert third.tolist() == [0.0] * 3


def test_a_wrong_map_is_wrong_at_every_letter() -> None:
    for task in draw_tasks(random.Random(0), 5):
        assert all(right != wrong for right, wrong in zip(task.digits, task.wrong, strict=True))
    exam = exam_of(0, episodes=3)
    for question in exam.new[0]:
        assert not set(sdft.with_map(question, exam.task.wrong).hints) & set(question.answer)
        assert sdft.with_map(question, exam.task.digits).hints == question.answer


def test_the_same_seed_gives_the_same_run() -> None:
    arm, settings = sdpo.SdpoArm(name="", title=""), sdpo.Settings(half_learned=False, steps=2, episodes=4)
    torch.manual_seed(1)
    first = sdpo.run(arm, settings, 1e-3, 0)
    torch.manual_seed(2)
    assert sdpo.run(arm, settings, 1e-3, 0) == first
    assert [point["samples"] for point in first] == [0.0, 64.0]


@pytest.mark.parametrize("arm", sdpo.arms("sdpo_base"), ids=lambda arm: arm.name)
def test_every_arm_of_sdpo_takes_a_step(arm: sdpo.SdpoArm) -> None:
    points = sdpo.run(arm, sdpo.Settings(half_learned=False, steps=1, episodes=2), 1e-3, 0)
    assert points[-1]["tokens"] > 0


@pytest.mark.parametrize("study", tilt.STUDIES, ids=lambda study: study.name)
def test_every_tilt_estimator_starts_at_the_reference(study: records.Study) -> None:
    starts = {arm.name: study.run(arm, replace(study.quick, steps=1), 1e-3, 0)[0]["kl"] for arm in study.arms}
    assert len(set(starts.values())) == 1
    assert min(starts.values()) > 0.5


# The claims, in a quick subset with two seeds. Thresholds are several standard errors from what was measured.


def quickly(claim: str, output: Path) -> Callable[[str, str, str], float]:
    """`read(study, arm, name)`: the mean over the seeds of a quantity at the end, of one claim's quick subset."""
    findings = {finding.study.name: finding for finding in reproduce(output, studies=[claim], quick=True)}

    def read(study: str, arm: str, name: str) -> float:
        value = findings[study].results.estimate(arm, final(name))
        assert value is not None
        return value.mean

    return read


def test_sdft_learns_the_task_and_keeps_in_context_ability_which_sft_loses(tmp_path: Path) -> None:
    end = partial(quickly("sdft", tmp_path), "sdft")
    assert end("reverse-frozen", "new_strict") > 0.8
    assert end("reverse-frozen", "in_context") > 0.6
    assert end("sft", "new") > 0.6
    assert end("sft", "in_context") < 0.3
    assert end("wrong", "new") < 0.1


def test_sdpo_needs_fewer_samples_than_grpo_from_a_half_learned_start(tmp_path: Path) -> None:
    end = partial(quickly("sdpo", tmp_path), "sdpo_half")
    assert end("ema", "new") > 0.75
    assert end("ema", "new") > end("grpo", "new") + 0.2
    assert end("wrong", "new") < 0.1


def test_the_group_variance_comes_closer_to_p_star_than_the_mean_reward(tmp_path: Path) -> None:
    end = partial(quickly("tilt", tmp_path), name="kl")
    assert end("tilt_toy", "group_var") < 0.01
    assert end("tilt_toy", "mean_reward") > end("tilt_toy", "group_var") + 0.003
    assert end("tilt_model", "group_var") < 0.4


def test_training_on_a_question_finds_what_sampling_does_not(tmp_path: Path) -> None:
    end = partial(quickly("discovery", tmp_path), "discovery")
    assert end("best", "solved") == 0.0
    assert end("forward", "solved") >= 0.5


def test_an_instruction_is_distilled_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    end = partial(quickly("context", tmp_path), "context")
    assert end("reverse", "new_strict") > 0.7
    assert end("wrong", "new") < 0.1
