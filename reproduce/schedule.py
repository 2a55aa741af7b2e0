"""Decides which runs a reproduction needs and in which order, and makes and keeps them.

First each arm runs with every learning rate of its grid on the tuning seed; then, with the chosen rate, on the reported
seeds. A run that the archive has, with the same settings, is not made again, so that an interrupted reproduction goes
on where it was. Runs are independent processes with one torch thread each, which is fastest for a model this small.

Not covered: what changes in the code do to runs that are kept. `resume=False` makes them all anew.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context, parent_process
from threading import Thread

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from sdcore.errors import ArgumentError

from . import context, discovery, real_context, real_feedback, real_sdft, sdft, sdpo, tilt, turns
from .records import TUNING_SEED, Archive, Arm, Job, Record, Study

STUDIES: dict[str, Study] = {
    study.name: study
    for claim in (sdft, sdpo, tilt, discovery, context, turns, real_context, real_feedback, real_sdft)
    for study in claim.STUDIES
}


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Says what is to be run."""

    studies: tuple[Study, ...]
    seeds: tuple[int, ...]
    quick: bool  # smaller settings, some arms, no grid

    def settings(self, study: Study) -> dict[str, object]:
        return asdict(study.quick if self.quick else study.full)

    def arms(self, study: Study) -> list[Arm]:
        return [arm for arm in study.arms if arm.quick_rate is not None] if self.quick else list(study.arms)

    def origin(self, study: Study, arm: Arm) -> tuple[Study, Arm]:
        """Returns the study and the arm in it whose runs these are."""
        if arm.runs_of is None:
            return study, arm
        return STUDIES[arm.runs_of], STUDIES[arm.runs_of].arm(arm.name)

    def tuned(self, study: Study, arm: Arm) -> tuple[Study, Arm]:
        """Returns the study and the arm in it on whose grid the rate is chosen."""
        study, arm = self.origin(study, arm)
        if arm.rate_of is None:
            return study, arm
        other, _, name = arm.rate_of.partition("/")
        return self.tuned(STUDIES[other], STUDIES[other].arm(name))

    def job(self, study: Study, arm: Arm, rate: float, seed: int) -> Job:
        study = self.origin(study, arm)[0]
        return Job(study=study.name, arm=arm.name, learning_rate=rate, seed=seed, settings=self.settings(study))

    def grid(self, study: Study, arm: Arm) -> list[Job]:
        """Lists the tuning runs of an arm: none where there is nothing to choose, or another study has chosen."""
        if self.quick or arm.runs_of is not None or arm.rate_of is not None or len(arm.learning_rates) == 1:
            return []
        return [self.job(study, arm, rate, TUNING_SEED) for rate in arm.learning_rates]

    def tuning(self) -> list[Job]:
        arms = [self.tuned(study, arm) for study in self.studies for arm in self.arms(study)]
        return [job for study, arm in arms for job in self.grid(study, arm)]

    def rate(self, study: Study, arm: Arm, records: Mapping[str, Record]) -> float:
        """Returns the rate that an arm is reported with."""
        if self.quick and arm.quick_rate is not None:
            return arm.quick_rate
        study, arm = self.tuned(study, arm)
        if len(arm.learning_rates) == 1:
            return arm.learning_rates[0]
        return study.choose({job.learning_rate: records[job.key].points for job in self.grid(study, arm)})

    def reported(self, records: Mapping[str, Record]) -> list[Job]:
        return [
            self.job(study, arm, self.rate(study, arm, records), seed)
            for study in self.studies
            for seed in self.seeds
            for arm in self.arms(study)
        ]

    def jobs(self, records: Mapping[str, Record]) -> list[Job]:
        return [*self.tuning(), *self.reported(records)]

    def owns(self, job: Job) -> bool:
        """Is true of a run that is this scope's to make or to drop, at whatever rate: other seeds and settings are not.

        So a quick run leaves the whole one alone, and one of fewer seeds the others.
        """
        seeds, studies = (*self.seeds, TUNING_SEED), {study.name: study for study in self.studies}
        if job.study not in studies or job.seed not in seeds:
            return False
        return replace(job, settings=self.settings(studies[job.study])).key == job.key


def studies_of(names: Sequence[str] | None, group: str | None = None) -> tuple[Study, ...]:
    """Returns the studies of these names or claims: None, all of the group. A group of None is that of the names.

    Raises `ArgumentError` for a name that is not there.
    """
    if names is None:
        return tuple(study for study in STUDIES.values() if study.group == (group or "small"))
    there = [study for study in STUDIES.values() if group in (None, study.group)]
    known = dict.fromkeys(name for study in there for name in (study.claim, study.name))
    if unknown := [name for name in names if name not in known]:
        raise ArgumentError(f"studies must be among {', '.join(known)}, got {', '.join(unknown)}")
    return tuple(study for study in there if study.claim in names or study.name in names)


def execute(job: Job, quick: bool) -> Record:
    """Makes one run, in this process."""
    study = STUDIES[job.study]
    started = time.process_time()
    points = study.run(study.arm(job.arm), study.quick if quick else study.full, job.learning_rate, job.seed)
    return Record(job=job, points=points, cpu_seconds=time.process_time() - started)


def work(scope: Scope, archive: Archive, *, workers: int, nice: int, console: Console) -> None:
    """Makes the runs that the archive lacks, and adds each to it as soon as it is done."""
    columns = (
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress, _runner(workers, nice) as make:
        for stage in ("rates", "seeds"):
            jobs = scope.tuning() if stage == "rates" else scope.reported(archive.records)
            # Studies may have runs in common.
            missing = {job.key: job for job in jobs if job.key not in archive.records}
            bars = {
                study: progress.add_task(f"{study} {stage}", total=count)
                for study, count in Counter(job.study for job in missing.values()).items()
            }
            for record in make([*missing.values()], scope.quick):
                archive.add(record)
                progress.advance(bars[record.job.study])


@contextmanager
def _runner(workers: int, nice: int) -> Iterator[Callable[[Sequence[Job], bool], Iterator[Record]]]:
    """Gives a function from jobs to their records, as they come."""
    if workers == 1:
        threads = torch.get_num_threads()
        _prepare(nice)
        try:
            yield _here
        finally:
            torch.set_num_threads(threads)
        return
    # Spawned: a fork of a process that has used torch's threads may hang.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(nice,))
    try:

        def pooled(jobs: Sequence[Job], quick: bool) -> Iterator[Record]:
            for future in as_completed([pool.submit(execute, job, quick) for job in jobs]):
                yield future.result()

        yield pooled
    finally:
        # What was running when something failed or was interrupted is finished but not kept; the rest is not begun.
        pool.shutdown(cancel_futures=True)


def _here(jobs: Sequence[Job], quick: bool) -> Iterator[Record]:
    for job in jobs:
        yield execute(job, quick)


def _begin(nice: int) -> None:
    """Prepares a worker. It ends with its parent: a run that nobody keeps would go on for an hour."""
    Thread(target=_end_with_parent, daemon=True).start()
    _prepare(nice)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare(nice: int) -> None:
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # a bar for loading 30 tensors
    if nice:
        os.nice(nice)
