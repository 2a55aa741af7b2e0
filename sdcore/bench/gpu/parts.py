"""One part of a GPU run, in a process of its own: `python -m sdcore.bench.gpu.parts STEP PART --mode cuda --folder F`.

What a part writes lies in `F/STEP/PART`. On a CPU the sizes are tiny. Peers that are not installed keep a row that says
so; a suite that was stopped in the middle goes on where its rows end, if it is the output layer's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from sdkernels.tile import tuned

from .. import divergence, prefix, step
from ..options import Options
from ..passes import run_cases
from ..peers import at_workspace
from ..places import checkout
from ..report import Report, describe_machine, load, save
from ..running import publish, start
from ..shapes import GOAL_SHAPES, JSD, QUICK_SHAPE, REVERSE_KL, Group, groups
from ..step_cases import ONE, StepCase, StepContender, config_of, contenders, make_setup
from .curve import MEGABYTES, QUICK_MEGABYTES, workspace_rows
from .naive_step import NAIVE
from .plan import CUDA, MODES, TABLE
from .run import TABLES

KERNEL_TESTS: Final = "tests/sdkernels/test_triton_interpret.py"
QUICK_TESTS: Final = "empty_tile or forms_no_gradient or without_mass"
TEST_PROCESSES: Final = 8  # each compiles; they share the device
# Of the seconds that are left for all kernels, what one may take.
TUNING_SHARE: Final = 0.4
QUICK_TILES: Final = ((3, 600), (5, 600))
# Seconds for each row. A GPU's rows take milliseconds, so that this is `MOST_REPETITIONS` of them.
SECONDS, PASS_SECONDS = 1.0, 0.5
ALL_PEERS: Final[tuple[str, ...]] = ("naive", "trl", "liger", "orda", "fla")
FEW_PEERS: Final[tuple[str, ...]] = ("naive", "trl")
# By the names of parts: a model and its sizes, with which naive fits 78 GiB by `sdcore.prefix.cost`.
PREFIX_CASES: Final = {
    "qwen3-0.6b-p1024": ("qwen3-0.6b", "P=1024,C=256,R=128,G=8"),
    "qwen3-0.6b-p3072": ("qwen3-0.6b", "P=3072,C=256,R=128,G=8"),
    "qwen3-4b-p1024": ("qwen3-4b", "P=1024,C=256,R=128,G=8,L=12"),
    "qwen3-4b-p2048": ("qwen3-4b", "P=2048,C=256,R=128,G=8,L=12"),
}
STEP_CASES: Final = {
    "qwen3-0.6b": StepCase(
        model="qwen3-0.6b", prompt=1024, context=256, completion=256, completions=8, contexts=ONE, dtype="bf16"
    ),
    "qwen3-4b": StepCase(
        model="qwen3-4b", prompt=1024, context=256, completion=128, completions=4, contexts=ONE, dtype="bf16"
    ),
    "quick": StepCase(model="quick", prompt=48, context=12, completion=8, completions=3, topk=10, contexts=ONE),
}
OURS: Final = ("packed, live", "two_phase 2, live")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a part is asked for."""

    part: str
    mode: str
    run: Path  # the run's folder
    folder: Path  # the part's own
    seconds: float

    @property
    def on_gpu(self) -> bool:
        return self.mode == CUDA

    @property
    def device(self) -> torch.device:
        return torch.device(self.mode)

    def options(self, suite: str, **chosen: Any) -> Options:
        return Options(suite=suite, device=self.mode, output=self.folder, **chosen)


def tests(job: Job) -> int:
    """The exit code of pytest; `tests.json` has the numbers, and the names of what failed."""
    report = job.folder / "junit.xml"
    command = [sys.executable, "-m", "pytest", KERNEL_TESTS, "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}"]
    if not job.on_gpu:
        command += ["-k", QUICK_TESTS, "-p", "no:xdist"]
    elif find_spec("xdist"):
        command += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    status = subprocess.run(command, cwd=checkout(), check=False).returncode
    if report.exists():
        found = _counted(report)
        (job.folder / "tests.json").write_text(json.dumps({"machine": describe_machine(job.mode), **found}) + "\n")
    return status


def _counted(report: Path) -> dict[str, Any]:
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": bad}


def tune(job: Job) -> None:
    """The trials of one kernel, as `tuned.json`."""
    from sdkernels.tuning import SHAPES, as_json
    from sdkernels.tuning import tune as tune_kernel

    shapes = SHAPES if job.on_gpu else QUICK_TILES
    found = tune_kernel(job.part, shapes, job.device, seconds=TUNING_SHARE * job.seconds)
    (job.folder / "tuned.json").write_text(json.dumps(as_json(found), indent=1) + "\n")
    for row, gain in zip(found.chosen, found.gains, strict=True):
        _say(f"{job.part} V={row.vocab}: {row.block} entries, {row.warps} warps, {row.stages} stages, {gain:.2f}×")


def write_table(job: Job) -> None:
    """The table of what the parts before have found; on a GPU it goes into the package as well."""
    from sdkernels.tuning import chosen_of, merged

    trials = sorted(job.run.glob("tune/*/tuned.json"))
    report = Report(machine={}, speed=[row for path in _reports(job.run / "workspace") for row in load(path).speed])
    table = merged([chosen_of(json.loads(path.read_text())) for path in trials], workspace_rows(report), job.device)
    path = tuned.write(table, job.run / TABLES)
    tuned.read(path)
    _say(f"wrote {path}")
    if job.on_gpu:
        tuned.FOLDER.mkdir(exist_ok=True)
        _say(f"installed {shutil.copy(path, tuned.FOLDER)}")


def workspace(job: Job) -> None:
    """Ours at every size of the curve."""
    if job.on_gpu:
        planned = [group for group in goal_groups(job.part) if group.divergence in (REVERSE_KL, JSD)]
        sizes = MEGABYTES
    else:
        planned = [Group(QUICK_SHAPE, "bf16", REVERSE_KL, frozen) for frozen in (False, True)]
        sizes = QUICK_MEGABYTES
    options = job.options("divergence", quick=not job.on_gpu, seconds=SECONDS)
    divergence.run(options, planned=planned, contenders=[at_workspace(size) for size in sizes], resume=True)


def output_layer(job: Job) -> None:
    """The output layer beside its peers; `accuracy` is the table of errors."""
    if job.part == "accuracy":
        this = start(job.options("divergence", peers=FEW_PEERS), seconds=SECONDS)
        report = Report(machine=this.machine)
        divergence.measure_beyond_speed(this, report)
        save(report, this.path)
        return
    peers = ALL_PEERS
    if not job.on_gpu:
        planned, peers = groups("cpu", quick=True), FEW_PEERS
    elif job.part == "small":
        planned = [group for group in groups("cuda") if group.shape not in GOAL_SHAPES and group.dtype == "bf16"]
    else:
        frozen = job.part.endswith("frozen")
        planned = [group for group in goal_groups(job.part) if group.frozen_head == frozen]
        # What others make of a frozen head is the same work but for TRL.
        peers = FEW_PEERS if frozen else ALL_PEERS
    options = job.options("divergence", quick=not job.on_gpu, seconds=SECONDS, peers=peers)
    divergence.run(options, planned=planned, resume=True)


def goal_groups(part: str) -> list[Group]:
    """Those of the hidden size that a part is named after: `h4096`, `h4096-trained`."""
    hidden = int(part.partition("-")[0].removeprefix("h"))
    return [group for group in groups("cuda") if group.shape in GOAL_SHAPES and group.shape.hidden == hidden]


def shared_prefix(job: Job) -> None:
    """Passes and whole step of one model."""
    if not job.on_gpu:
        prefix.run(job.options("prefix", quick=True))
        return
    _without_older(job)
    model, shape = PREFIX_CASES[job.part]
    prefix.run(job.options("prefix", model=model, shapes=(shape,), seconds=PASS_SECONDS))


def memory(job: Job) -> None:
    """A training step with AdamW, by category."""
    from sdcore.memory import Load, Setting, measure
    from sdcore.memory.plot import as_json

    case = STEP_CASES[job.part]
    load_ = Load(
        prompt_tokens=case.prompt,
        context_tokens=case.context,
        completion_tokens=case.completion,
        completions=case.completions,
    )
    chosen = ("ours", "naive", "trl") if find_spec("trl") else ("ours", "naive")
    setting = Setting(dtype="bfloat16" if case.dtype == "bf16" else "float32")
    found = measure(config_of(case.model), load_, setting, contenders=chosen, device=job.device)
    about = {"machine": describe_machine(job.mode), "model": case.model, "load": vars(load_)}
    (job.folder / "memory.json").write_text(json.dumps(about | {"contenders": as_json(found)}) + "\n")


def sdpo_step(job: Job) -> None:
    """The update of one step of SDPO: whole logits and nothing shared, TRL if it is there, and ours."""
    _without_older(job)
    case = STEP_CASES[job.part]
    chosen: list[StepContender] = [NAIVE]
    chosen += [one for one in contenders(case) if one.name in ("TRL", *OURS)]
    this = start(job.options("step", seconds=PASS_SECONDS if job.on_gpu else 0.0), seconds=PASS_SECONDS)
    run_cases(this, [case], partial(_measured_step, chosen, this.device, this.seconds), title=str)
    report = step.load(this.path)
    tables = [step.case_table(one, rows) for one, rows in report.by_case().items()]
    publish(this, markdown=step.markdown(report), save_plots=list, tables=tables)


def _measured_step(chosen: Sequence[StepContender], device: str, seconds: float, case: StepCase) -> list[step.StepRow]:
    return step.measure_case(make_setup(case, device), chosen, seconds_per_row=seconds)


def machine(job: Job) -> None:
    """One line of JSON: what the figures of a run depend on."""
    about = describe_machine(job.mode)
    versions = {name: about["versions"][name] for name in ("torch", "triton")}
    _say(json.dumps({"device": about["name"], "python": about["python"], **versions}))


STEPS: Final[dict[str, Callable[[Job], int | None]]] = {
    "machine": machine,
    "tests": tests,
    "tune": tune,
    "workspace": workspace,
    "divergence": output_layer,
    "prefix": shared_prefix,
    "memory": memory,
    "step": sdpo_step,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdcore.bench.gpu.parts")
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("part")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args(arguments)
    if options.mode == CUDA and not torch.cuda.is_available():
        sys.exit("mode is cuda, but torch sees no CUDA device")
    job = Job(
        part=options.part,
        mode=options.mode,
        run=options.folder,
        folder=options.folder / options.step / options.part,
        seconds=options.seconds,
    )
    return (write_table if job.part == TABLE else STEPS[options.step])(job) or 0


def _without_older(job: Job) -> None:
    """A part that was stopped begins anew: what it had is not to be counted beside it."""
    for path in job.folder.glob("*.json"):
        path.unlink()


def _reports(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/divergence-*.json"))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
