"""A GPU run does each part once, ends in time, says what it did not reach, and judges goals by rows of a GPU only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sdcore.bench.gpu import goals, parts, run
from sdcore.bench.gpu.curve import MEGABYTES, Head, curves, recommended, workspace_rows
from sdcore.bench.gpu.goals import DOCS, IN_PART, MEASURED, MET, MISSED, NOT_MEASURED, Results, goals_table, read
from sdcore.bench.gpu.naive_step import NAIVE
from sdcore.bench.gpu.plan import CPU, CUDA, MODES, SECONDS, STEPS, Step, chosen_steps
from sdcore.bench.gpu.run import Settings, listed, show
from sdcore.bench.live_memory import MemoryRow
from sdcore.bench.measure import AccuracyRow
from sdcore.bench.oracle import Errors
from sdcore.bench.places import checkout
from sdcore.bench.prefix import PrefixRow
from sdcore.bench.prefix_cases import WORKS, Case
from sdcore.bench.report import Report, save
from sdcore.bench.shapes import FORWARD_KL, FULL_VOCABULARY, GOAL_SHAPES, JSD, REVERSE_KL, Group
from sdcore.bench.step import measure_case
from sdcore.bench.step_cases import contenders, make_setup
from sdcore.bench.timing import SpeedRow
from sdcore.errors import ArgumentError
from sdkernels.tile.tuned import KERNELS, WorkspaceRow

ROOT = Path(__file__).resolve().parents[3]
TINY = Step("one", "about it", 9, 9, (), ("first", "second", "table"))
OTHER = Step("two", "about that", 9, 9, (), ("third",))
# Stands for `parts`: what a part does is the text of the file of its name in the folder that the script lies in.
PART = """
import json, pathlib, sys, time
step, name = sys.argv[1:3]
if step == "machine":
    print(json.dumps({"device": (pathlib.Path(__file__).parent / "device").read_text()}))
else:
    folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
    with (folder / "order.txt").open("a") as order:
        order.write(name + "\\n")
    file = pathlib.Path(__file__).parent / name
    if file.exists():
        exec(file.read_text())
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a run whose parts do nothing, and whose least time is short; `said` beside its folder has what it said."""
    monkeypatch.setattr(run, "LEAST_SECONDS", 0.3)
    (tmp_path / "part.py").write_text(PART)
    (tmp_path / "device").write_text("this device")

    def say(text: str) -> None:
        with (tmp_path / "said").open("a") as said:
            said.write(text + "\n")

    command = [sys.executable, "-S", str(tmp_path / "part.py")]
    return Settings(mode=CPU, folder=tmp_path / "run", seconds=60.0, command=command, out=tmp_path / "out", say=say)


def order(settings: Settings) -> list[str]:
    """The parts that were started since the last look."""
    file = settings.folder / "order.txt"
    names = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return names


def states(found: list[run.Part]) -> dict[str, str]:
    return {part.name: part.state for part in found}


def test_the_steps_of_a_gpu_come_to_half_an_hour_and_none_is_longer_than_one_command_may_be() -> None:
    assert SECONDS[CUDA] == 1800
    assert all(step.seconds < 600 for step in STEPS)


def test_every_part_of_the_plan_is_one_that_can_be_run() -> None:
    for mode in MODES:
        for step in STEPS:
            for part in step.parts_in(mode):
                assert step.name in parts.STEPS
                if step.name == "tune" and part != "table":
                    assert part in KERNELS
                if step.name in ("step", "memory"):
                    assert part in parts.STEP_CASES
                if step.name == "prefix" and mode == CUDA:
                    assert part in parts.PREFIX_CASES


@pytest.mark.parametrize("hidden", [1024, 2560, 4096])
def test_the_parts_of_the_output_layer_have_every_group_of_the_goals(hidden: int) -> None:
    expected = {(divergence, frozen) for divergence in FULL_VOCABULARY for frozen in (False, True)}
    for part in (f"h{hidden}", f"h{hidden}-trained"):
        found = parts.goal_groups(part)
        assert {group.shape for group in found} == {(8192, 151936, hidden)}
        assert {(group.divergence, group.frozen_head) for group in found} >= expected
        assert {group.divergence.topk for group in found} == {None, 100}
        assert {group.dtype for group in found} == {"bf16"}


def test_the_script_lists_its_steps_without_torch_or_a_device(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    done = tmp_path / "run" / "tests" / "quick"
    done.mkdir(parents=True)
    (done / "done.json").write_text('{"seconds": 7.0}')
    found = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_run.sh"), "--cpu", "--list", "tests", "step"],
        env=os.environ
        | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "GPU_RUN_FOLDER": str(tmp_path / "run")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert f"tests, {chosen_steps(['tests'])[0].cpu_seconds} s: the kernels" in found.stdout
    assert "done        quick (7 s)" in found.stdout
    assert "not reached: 1 – step/quick" in found.stdout
    assert "prefix" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "more", "message"),
    [(["tests", "walk"], {}, "a step must be one of tests, tune, .* got walk"), ([], {"GPU_RUN_SECONDS": "x"}, "'x'")],
)
def test_what_the_script_cannot_do_is_said(arguments: list[str], more: dict[str, str], message: str) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "sdcore.bench.gpu", "--list", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | more,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 2
    assert re.search(message, found.stderr)


def test_a_second_start_does_what_is_not_done_and_tries_again_what_failed(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "second").write_text("print('bad luck'); sys.exit(3)")
    found = run.run([TINY, OTHER], settings)
    assert order(settings) == ["first", "second", "table", "third"]
    assert states(found) == {"first": "done", "second": "failed", "table": "done", "third": "done"}
    assert "bad luck" in (tmp_path / "said").read_text()
    lines = show([TINY, OTHER], settings)
    assert any(line.startswith("  failed      second (exit 3 after") for line in lines)
    assert lines[-3:] == ["done: 3", "failed: 1 – one/second", "not reached: 0"]
    (tmp_path / "second").unlink()
    assert set(states(run.run([TINY, OTHER], settings)).values()) == {"done"}
    assert order(settings) == ["second", "table"]  # what sums up a step is done again after its other parts
    run.run([TINY, OTHER], settings)
    assert order(settings) == []


def test_a_part_is_stopped_at_the_end_of_its_step_and_the_next_step_runs(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "first").write_text("time.sleep(60)")
    began = time.monotonic()
    found = run.run([TINY._replace(cpu_seconds=2), OTHER], settings)
    assert time.monotonic() - began < 30
    assert states(found) == {
        "first": "not reached",
        "second": "not reached",
        "table": "not reached",
        "third": "done",
    }
    assert "one/first: stopped after" in (tmp_path / "said").read_text()
    assert "one/second: not started, 0 s are left" in (tmp_path / "said").read_text()


def test_nothing_starts_after_the_seconds_of_the_run(settings: Settings) -> None:
    found = run.run([TINY, OTHER], replace(settings, seconds=0.1))
    assert order(settings) == []
    assert set(states(found).values()) == {"not reached"}


def test_an_interrupted_run_says_what_it_has_and_goes_on(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "second").write_text("import os, signal; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    handler = signal.getsignal(signal.SIGTERM)
    found = run.run([TINY, OTHER], settings)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert order(settings) == ["first", "second"]
    assert states(found)["first"] == "done"
    assert states(found)["second"] == states(found)["third"] == "not reached"
    (tmp_path / "second").unlink()
    assert set(states(run.run([TINY, OTHER], settings)).values()) == {"done"}
    assert order(settings) == ["second", "table", "third"]


def test_a_run_of_another_device_is_refused(settings: Settings, tmp_path: Path) -> None:
    run.run([OTHER], settings)
    (tmp_path / "device").write_text("another")
    with pytest.raises(ArgumentError, match=r"folder must be of this device, another, or new; .* is of this device"):
        run.run([OTHER], settings)


def test_the_whole_run_is_one_file_for_a_machine_that_gives_few_back(settings: Settings, tmp_path: Path) -> None:
    run.run([OTHER], settings)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu-run.tar.gz"]
    with tarfile.open(tmp_path / "out" / "gpu-run.tar.gz") as packed:
        packed.extractall(tmp_path / "again", filter="data")
    again = replace(settings, folder=tmp_path / "again" / "run")
    assert states(listed([OTHER], again)) == {"third": "done"}


# Rows of a run, made by hand.
MACHINE = {
    "kind": "cuda",
    "name": "NVIDIA H200",
    "threads": 16,
    "date": "2026-01-02",
    "python": "3.12.3",
    "versions": {"torch": "2.11.0"},
}
FINE = Errors(1e-5, 2e-3, 1e-3)


def speed(group: Group, times: dict[str, float], setting: str = "workspace 256 MB") -> list[SpeedRow]:
    floor = SpeedRow(group=group, contender="three matmuls bf16" if group.frozen_head else "four matmuls bf16")
    floor.seconds = [0.05]
    rows = [
        SpeedRow(group=group, contender=name, seconds=[time], errors=FINE, setting=setting)
        for name, time in times.items()
    ]
    return [floor, *rows]


def results(rows: list[SpeedRow], **more: object) -> Results:
    return Results(machine=MACHINE, divergence=Report(machine=MACHINE, speed=rows), **more)  # type: ignore[arg-type]


def verdicts(found: Results) -> dict[str, goals.Verdict]:
    return {goal.name: goal.judge(found) for goal in goals.goals()}


def test_nothing_measured_leaves_every_goal_open() -> None:
    assert {verdict.status for verdict in verdicts(Results()).values()} == {NOT_MEASURED}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_share_of_the_matmuls_is_met_by_all_three_divergences_within_the_workspace(frozen: bool) -> None:
    name = f"{'frozen' if frozen else 'trained'} head, H=2560"

    def verdict(times: list[float], setting: str = "workspace 256 MB") -> goals.Verdict:
        pairs = zip(FULL_VOCABULARY, times, strict=False)
        rows = [
            row
            for divergence, time in pairs
            for row in speed(Group(GOAL_SHAPES[1], "bf16", divergence, frozen), {"sdcore": time}, setting)
        ]
        return next(found for goal, found in verdicts(results(rows)).items() if goal.startswith(name))

    assert verdict([0.06, 0.06, 0.0625]) == (MET, "forward KL 83%, reverse KL 83%, JSD 80% (workspace 256 MB)")
    assert verdict([0.06, 0.06, 0.063]).status == MISSED
    assert verdict([0.06, 0.06]).status == IN_PART
    assert verdict([0.06, 0.06, 0.06], "workspace 2048 MB").status == MISSED
    assert verdict([0.06, 0.06, 0.06], "workspace 778 MB").status == (MISSED if frozen else MET)


def test_peers_are_beaten_at_every_hidden_size_or_not_at_all() -> None:
    def found(last: float) -> dict[str, goals.Verdict]:
        rows = []
        for shape in GOAL_SHAPES:
            trl = last if shape == GOAL_SHAPES[-1] else 0.12
            for divergence in FULL_VOCABULARY:
                rows += speed(
                    Group(shape, "bf16", divergence), {"sdcore": 0.06, "TRL chunked": trl, "Liger chunked": 0.18}
                )
        return verdicts(results(rows))

    good = found(0.12)
    assert [good[f"{name} TRL's chunked kernel"].status for name in ("KL: 1.5×", "JSD: 2×")] == [MET, MET]
    assert good["3× Liger's chunked loss"].status == MET
    bad = found(0.1)
    assert [bad[f"{name} TRL's chunked kernel"].status for name in ("KL: 1.5×", "JSD: 2×")] == [MET, MISSED]


def test_one_less_accurate_case_misses_the_goal_and_is_named() -> None:
    rows = speed(Group(GOAL_SHAPES[0], "bf16", JSD), {"sdcore": 0.06, "TRL chunked": 0.1})
    found = results(rows)
    name = "never less accurate than TRL's kernel"
    assert verdicts(found)[name] == (MET, "1 of 1 cases")
    errors = {"sdcore": FINE._replace(loss=2e-5), "TRL chunked": FINE}
    found.divergence.accuracy = [
        AccuracyRow(shape=GOAL_SHAPES[0], dtype="bf16", divergence=JSD, noise=0.03, contender=who, errors=error)
        for who, error in errors.items()
    ]
    assert verdicts(found)[name].status == MISSED
    assert "JSD noise 0.03" in verdicts(found)[name].measured


def curve_report(multiples: dict[int, float], frozen: bool = False) -> Report:
    rows = []
    for divergence in (REVERSE_KL, JSD):
        group = Group(GOAL_SHAPES[0], "bf16", divergence, frozen)
        rows += speed(group, {f"sdcore, {size} MB": 0.05 * multiple for size, multiple in multiples.items()})
    return Report(machine=MACHINE, speed=rows)


def test_the_recommended_workspace_is_the_smallest_that_is_about_as_fast_as_any_within_the_bound() -> None:
    points = {128: 2.0, 256: 1.5, 512: 1.215, 1024: 1.2, 1536: 1.2, 2048: 1.0}
    assert recommended(points) == 512
    assert recommended({2048: 1.0}) is None
    report = curve_report(points)
    assert curves(report)[Head(GOAL_SHAPES[0], False)] == pytest.approx(points)
    assert workspace_rows(report) == [WorkspaceRow(151936, 4096, 512)]
    assert workspace_rows(curve_report(points, frozen=True)) == []


def test_a_size_that_failed_at_one_divergence_is_no_point() -> None:
    report = curve_report({256: 1.5, 512: 1.2})
    broken = next(row for row in report.speed if row.contender == "sdcore, 512 MB")
    broken.reason, broken.seconds = "out of memory", []
    assert set(curves(report)[Head(GOAL_SHAPES[0], False)]) == {256}


def test_a_curve_is_measured_when_all_of_its_points_are() -> None:
    name = "speed against workspace, 128 MB to 2 GB, both heads, all H"
    found = results([], workspace=curve_report(dict.fromkeys(MEGABYTES, 1.2)))
    assert verdicts(found)[name] == (IN_PART, "H=4096, trained: 128 MB is enough")
    rows = [
        replace(row, group=row.group._replace(shape=shape, frozen_head=frozen))
        for shape in GOAL_SHAPES
        for frozen in (False, True)
        for row in found.workspace.speed
    ]
    assert verdicts(results([], workspace=Report(machine=MACHINE, speed=rows)))[name].status == MEASURED


def test_failed_kernel_tests_are_a_missed_goal() -> None:
    def verdict(**counts: object) -> goals.Verdict:
        return verdicts(results([], tests=[{"passed": 3, "failed": [], **counts}]))["the kernel tests pass, compiled"]

    assert verdict() == (MET, "3 passed")
    assert verdict(failed=["test_a"]) == (MISSED, "3 passed, 1 failed: test_a")
    assert verdict(passed=0).status == MISSED


def write_run(folder: Path, kind: str) -> None:
    report = results(speed(Group(GOAL_SHAPES[0], "bf16", FORWARD_KL), {"sdcore": 0.06})).divergence
    report.machine = MACHINE | {"kind": kind}
    report.memory = [MemoryRow(group=report.speed[1].group, contender="sdcore", live_bytes=3 << 30)]
    save(report, folder / "divergence" / "h4096-trained" / "divergence-2026-01-02.json")
    (folder / "divergence" / "h4096-trained" / "done.json").write_text('{"seconds": 1.0}')


def test_rows_of_a_cpu_are_no_answer_to_a_goal(tmp_path: Path) -> None:
    write_run(tmp_path / "cpu", "cpu")
    assert goals_table(read(tmp_path / "cpu")) == goals_table(Results())
    write_run(tmp_path / "cuda", "cuda")
    found = read(tmp_path / "cuda")
    assert "| forward KL 83% (workspace 256 MB) | missed |" in goals_table(found)


def test_a_row_has_its_time_its_bytes_its_share_of_the_matmuls_and_its_error(tmp_path: Path) -> None:
    write_run(tmp_path, "cuda")
    page = goals.results_page(read(tmp_path))
    case = "N=8192 V=151936 H=4096 bf16 forward KL"
    assert f"| {case} | sdcore (workspace 256 MB) | 60.00 | 3.00 | 1.20× | 0.20 % |" in page
    assert f"| {case} | four matmuls bf16 | 50.00 | – | 1.00× | – |" in page


def test_the_docs_have_the_goals_of_the_newest_committed_run() -> None:
    root = checkout()
    assert root is not None
    text = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    again = DOCS.renewed(text, root / "benchmarks" / "results", root)
    assert text == again, "run `python -m sdcore.bench.gpu --docs`"


def test_a_committed_run_is_found_by_its_date(tmp_path: Path) -> None:
    assert goals.newest_committed(tmp_path) is None
    for device, date in (("a", "2026-01-02"), ("b", "2026-01-01")):
        write_run(tmp_path / device / "gpu", "cuda")
        file = tmp_path / device / "gpu" / "divergence" / "h4096-trained" / "divergence-2026-01-02.json"
        file.write_text(file.read_text().replace("2026-01-02", date))
    assert goals.newest_committed(tmp_path) == tmp_path / "a" / "gpu"
    block = DOCS.renewed(f"{DOCS.begin}{DOCS.end}", tmp_path, tmp_path)
    assert "[all of it](../a/gpu)" in block
    assert "forward KL 83%" in block


@pytest.mark.parametrize("topk", [None, 10])
def test_the_naive_step_computes_what_ours_does(topk: int | None) -> None:
    case = replace(parts.STEP_CASES["quick"], topk=topk)
    ours = [one for one in contenders(case) if one.name in parts.OURS]
    assert len(ours) == len(parts.OURS)
    naive, *rows = measure_case(make_setup(case, "cpu"), [NAIVE, *ours], seconds_per_row=0.0)
    assert naive.reason is None
    for row in rows[: len(ours)]:
        assert row.reason is None
        assert row.loss_error < 1e-5
        assert row.gradient_error < 1e-5


def test_a_tables_part_sums_up_what_the_others_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    trial = tmp_path / "tune" / "divergence"
    trial.mkdir(parents=True)
    row = {"vocab": 600, "block": 128, "warps": 4, "stages": 1}
    (trial / "tuned.json").write_text(json.dumps({"kernel": "divergence", "chosen": [row], "gains": [1.1]}))
    save(curve_report({256: 1.2}), tmp_path / "workspace" / "h4096" / "divergence-2026-01-02.json")
    assert parts.main(["tune", "table", "--mode", "cpu", "--folder", str(tmp_path)]) == 0
    table = parts.tuned.read(tmp_path / "tables" / "interpreter.json")
    assert [list(chosen) for chosen in table.kernels["divergence"]] == [list(row.values())]
    assert table.workspace == (WorkspaceRow(151936, 4096, 256),)


def test_a_shared_prefix_is_judged_by_the_best_of_ours_in_every_case() -> None:
    def verdict(cases: list[Case], packed: float) -> goals.Verdict:
        rows = [
            PrefixRow(group=case, contender=name, seconds=[seconds], allowed=allowed)
            for case in cases
            for name, seconds, allowed in (("naive batch", 1.0, 1.0), ("cached", 0.6, 2.0), ("packed", packed, 2.0))
        ]
        found = verdicts(Results(machine=MACHINE, prefix=rows))
        return next(found[name] for name in found if name.startswith("shared prefix"))

    case = Case(model="qwen3-4b", prompt=8, completion=8, completions=8, dtype="bf16")
    cases = [replace(case, prompt=8 * i, work=work) for i in range(len(parts.PREFIX_CASES)) for work in WORKS]
    assert verdict(cases, 1 / 1.8) == (
        MET,
        f"90% to 90% in {len(cases)} cases; least: {case.work}, {replace(case, prompt=0)}",
    )
    assert verdict(cases[:3], 1 / 1.8).status == IN_PART
    assert verdict(cases[:3], 1 / 1.6).status == MISSED


def test_a_file_that_was_cut_off_is_no_result(tmp_path: Path) -> None:
    write_run(tmp_path, "cuda")
    (tmp_path / "prefix" / "one").mkdir(parents=True)
    (tmp_path / "prefix" / "one" / "prefix-2026-01-02.json").write_text('{"machine": {"kind"')
    assert read(tmp_path).divergence.speed
    assert not read(tmp_path).prefix
