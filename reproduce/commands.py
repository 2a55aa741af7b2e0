"""Runs every method as it is typed: from a data file by `sdcore train` to a checkpoint, by `sdcore eval` to a number.

    python -m reproduce.commands --output docs/reproduction/commands.md

Each case writes its rows and its configuration with `python -m sdcore.world.data`, trains the bundled model on them,
and measures the checkpoint on questions that are in no training row, beside the model before. The table says what was
typed; the exit code is 1 where a goal is missed. Nothing is called but the commands, each in a process of its own.

What differs from the obvious: the goals say that a method works, with room for another machine's rounding, not how well
it does; that, with controls and five seeds, is `python -m reproduce`. A seed is of the task's map, of the questions and
of everything sampled.

Not covered: real models, and several processes that train one model.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Final

import typer

from sdcore.errors import SdcoreError
from sdcore.world.data import ROOM

ROWS: Final = 2000  # to learn from
QUESTIONS: Final = 200  # to be measured on: a standard error of 0.03 at most
MOST_ANSWERS: Final = 80  # of the search on one question
SEARCHED: Final = 3  # questions that are searched on, per seed
REWARDS: Final = "sdcore.world.data"
CHECK: Final = """import sys
right, got = {answer!r}.split(), sys.stdin.read().split()
if got == right:
    sys.exit(0)
wrong = [pair for i, pair in enumerate(right) if got[i : i + 1] != [pair]]
print(*(f"H {{pair}}" for pair in wrong or right))
sys.exit(1)
"""


class CommandFailed(SdcoreError, RuntimeError):
    """Is raised for a command that did not end well, with what it said."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Names a method, its rows, what it is told beside the world's own settings, and what it must reach."""

    method: str
    kind: str  # of rows
    steps: int
    reward: str | None = None  # that it learns from
    settings: bool = True  # the world's own, of this kind of rows
    changes: tuple[str, ...] = ()
    judge: str = "exact"  # of the answers; "share of pairs": the environment
    environment: str | None = None  # of several turns, which the second bundled model has read
    goal: float

    @property
    def base(self) -> str:
        """Is the model before training."""
        return "world" if self.environment is None else "world-talks"


CASES: Final = (
    Case(method="sdft_paper", kind="sdft", steps=40, goal=0.75),
    Case(method="sdft_as_run", kind="sdft", steps=40, goal=0.75),
    Case(method="sdpo", kind="sdpo", steps=60, reward="with_feedback", goal=0.6),
    Case(method="sdpo_code", kind="sdpo", steps=60, reward="with_feedback", goal=0.6),
    Case(method="opsd", kind="opsd", steps=60, judge="lenient", goal=0.5),
    Case(method="context_distillation", kind="context_distillation", steps=60, goal=0.6),
    Case(method="rl_tilt", kind="rl", steps=60, reward="fraction", judge="fraction", goal=0.8),
    Case(
        method="grpo",
        kind="rl",
        steps=60,
        reward="fraction",
        judge="fraction",
        settings=False,  # which are a tilt's
        changes=(f"max_completion_length={ROOM}", "per_device_train_batch_size=4", "learning_rate=1e-3"),
        goal=0.8,
    ),
    Case(method="sft", kind="sft", steps=60, judge="lenient", changes=("learning_rate=3e-3",), goal=0.75),
    Case(
        method="turn_hindsight",
        kind="quiz",
        steps=60,
        environment="sdcore.world.talks:Quiz",
        judge="share of pairs",
        goal=0.85,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Says what a case came to."""

    label: str
    typed: str  # the training, or the search
    judge: str
    before: float
    after: tuple[float, ...]  # one per seed
    goal: float

    @property
    def met(self) -> bool:
        return mean(self.after) >= self.goal


def run_case(case: Case, seeds: range, folder: Path) -> Reached:
    """Trains and measures, seed by seed. Raises `CommandFailed`."""
    before, after, typed = [], [], ""
    for seed in seeds:
        here = folder / f"{case.method}-{seed}"
        here.mkdir()
        rows = ("-m", "sdcore.world.data", "--kind", case.kind, "--seed", seed)
        _python(here, *rows, "--rows", ROWS, "--output", "train.jsonl", "--config", "world.yaml")
        _python(here, *rows, "--rows", QUESTIONS, "--split", "eval", "--output", "eval.jsonl")
        words: list[object] = ["train", "--method", case.method, "--data", "train.jsonl"]
        words += ["--config", "world.yaml"] if case.settings else []
        if case.reward is not None:
            words += ["--reward", f"{REWARDS}:{case.reward}"]
        if case.environment is not None:
            words += ["--model", case.base, "--environment", case.environment]
        words += ["--output", "run", f"max_steps={case.steps}", *case.changes, "save_strategy=no"]
        typed = shlex.join(["sdcore", *map(str, words)])
        _python(here, "-m", "sdcore", *words, f"seed={seed}")
        after.append(_measured(here, "run", case))
        before.append(_measured(here, case.base, case))
    return Reached(
        label=case.method,
        typed=typed,
        judge=case.judge,
        before=mean(before),
        after=tuple(after),
        goal=case.goal,
    )


def run_search(seeds: range, folder: Path) -> Reached:
    """Measures test-time discovery: the share of questions solved, beside best-of-k with as many answers."""
    before: list[float] = []
    after: list[float] = []
    typed = "sdcore solve --question-file question.jsonl --verifier 'python -S check.py' --config world.yaml"
    for seed in seeds:
        for update, shares in ((True, after), (False, before)):
            solved = 0
            for number in range(SEARCHED):
                here = folder / f"solve-{seed}-{number}-{update}"
                here.mkdir()
                rows = ("--kind", "sdpo", "--seed", seed, "--rows", SEARCHED, "--output", "rows.jsonl")
                _python(here, "-m", "sdcore.world.data", *rows, "--config", "world.yaml")
                row = (here / "rows.jsonl").read_text(encoding="utf-8").splitlines()[number]
                (here / "question.jsonl").write_text(row + "\n", encoding="utf-8")
                check = here / "check.py"
                check.write_text(CHECK.format(answer=json.loads(row)["answer"]), encoding="utf-8")
                words: list[object] = ["solve", "--question-file", "question.jsonl", "--config", "world.yaml"]
                words += ["--verifier", shlex.join([sys.executable, "-S", str(check)]), "--max-samples", MOST_ANSWERS]
                words += ["--learning-rate", 1e-3, "--seed", seed, "--output", "found.json"]
                _python(here, "-m", "sdcore", *words, *([] if update else ["--no-update"]), may_fail=True)
                solved += json.loads((here / "found.json").read_text(encoding="utf-8"))["solved"]
            shares.append(solved / SEARCHED)
    return Reached(
        label="solve",
        typed=typed,
        judge=f"solved within {MOST_ANSWERS} answers",
        before=mean(before),
        after=tuple(after),
        goal=0.6,
    )


def _measured(here: Path, model: str, case: Case) -> float:
    judge = ("--reward", f"{REWARDS}:{case.judge}") if case.environment is None else ("--environment", case.environment)
    words = ("eval", "--model", model, "--data", "eval.jsonl", *judge)
    _python(here, "-m", "sdcore", *words, "--max-completion-length", ROOM, "--output", f"{model}.json")
    return float(json.loads((here / f"{model}.json").read_text(encoding="utf-8"))["metrics"]["reward_mean"])


def _python(here: Path, *words: object, may_fail: bool = False) -> None:
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise CommandFailed(f"{shlex.join(command[1:])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def table(reached: list[Reached], seeds: int, processor_minutes: float) -> Iterator[str]:
    """Yields the lines of the page, in Markdown."""
    yield "# The methods from the command line\n"
    yield (
        f"Made by `make methods` (`python -m reproduce.commands`): {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{QUESTIONS} questions that are in no training row, {processor_minutes:.1f} processor minutes. "
        "Before is a bundled model, for `solve` best-of-k with as many answers. A goal says that the method works; "
        "how well it does, with controls, is in [README.md](README.md).\n"
    )
    yield "| method | judged by | before | after | goal |\n| --- | --- | --- | --- | --- |"
    for case in reached:
        spread = f" ± {stdev(case.after) / len(case.after) ** 0.5:.2f}" if len(case.after) > 1 else ""
        missed = "" if case.met else " **missed**"
        after = f"{mean(case.after):.2f}{spread}"
        yield f"| `{case.label}` | {case.judge} | {case.before:.2f} | {after} | {case.goal:g}{missed} |"
    yield f"\nWhat was typed, after `python -m sdcore.world.data --kind KIND --rows {ROWS} --output train.jsonl"
    yield "--config world.yaml`:\n\n```sh"
    yield from (case.typed for case in reached)
    yield f"sdcore eval --model run --data eval.jsonl --reward {REWARDS}:JUDGE --max-completion-length {ROOM}"
    yield "```\n\nWith `--environment` in the place of `--reward` where there is one.\n"


def main(
    output: Annotated[Path | None, typer.Option(help="Markdown file for the table.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Only this method; may be given several times.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time, one thread each.")] = 2,
) -> None:
    """Train with every method from the command line and compare with a goal: 5 processor minutes a seed."""
    cases = [case for case in CASES if only is None or case.method in only]
    searches = only is None or "solve" in only
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as pool:
        # The longest first.
        search = pool.submit(run_search, range(seeds), Path(name)) if searches else None
        runs = [pool.submit(run_case, case, range(seeds), Path(name)) for case in cases]
        reached = []
        for future in (*runs, *([search] if search else [])):
            case = future.result()
            reached.append(case)
            typer.echo(f"{case.label}: {case.before:.2f} -> {', '.join(f'{share:.2f}' for share in case.after)}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = "\n".join(table(reached, seeds, (used.ru_utime + used.ru_stime) / 60))
    typer.echo(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    if not all(case.met for case in reached):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
