"""Measures how to launch the kernels on this device, for the table that `tuned` reads.

    tuning = tune("divergence", SHAPES, torch.device("cuda"), seconds=60)
    tuned.write(merged([tuning], [], torch.device("cuda")), tuned.FOLDER)

A candidate (block, warps, stages) is timed only if it compiles without stack and spills in every variant of its kernel
(`compile_check`, in processes of its own), and if its results are those of the present launch. Candidates are tried
from the present one outwards; `seconds` bounds how long, and what was not reached says so. A launch takes the present
one's place at a V only if it is faster by `LEAST_GAIN` over all chunks of that V.

In the interpreter (CPU tensors, TRITON_INTERPRET=1) nothing is compiled and the times mean nothing: there it shows that
the way from candidates to a table works. Not covered: the kernels of a top-k support, whose launches are fixed.
"""

from __future__ import annotations

import math
import os
import statistics as numbers
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .compile_check import CHIPS, check, launched_by
from .tile.tiling import gradient_view, tile_columns
from .tile.triton_backend.configs import TABLE, Config
from .tile.triton_backend.divergence import full_divergence
from .tile.triton_backend.softmax_gradient import softmax_gradient
from .tile.triton_backend.statistics import row_statistics
from .tile.tuned import KERNELS, KernelRow, Table, WorkspaceRow, architecture, chip, using
from .types import Objective, TileRows

# (rows of a chunk, V): the chunks of a small and of a large workspace; first the V where the kernels weigh more. One V
# is odd: its kernels are programs of their own.
SHAPES: Final = ((512, 151_936), (2048, 151_936), (1024, 32_000), (4096, 32_000), (2048, 50_257))
BLOCKS, WARPS = (1024, 2048, 4096, 8192), (4, 8, 16)
# Vocabulary entries of a block in a lane's registers: fewer leave loads narrow, more spill.
ENTRIES_PER_LANE: Final = (4, 16)
# The others hold a barrier, before which nothing is prefetched: any number of stages is the same program.
STAGES: Final = {"row_statistics": (1, 2, 3)}
OTHER_STAGES: Final = (2,)
INTERPRETED: Final = (Config(256, 4, 1), Config(128, 4, 1), Config(512, 4, 1))
# Relative to the norm: results of float32, and of a gradient in 16 bits.
EQUAL, EQUAL_16_BITS = 1e-5, 2.0**-8
LEAST_GAIN: Final = 0.02
WARM_UP, REPETITIONS = 2, 9
# About a millisecond, in which the host gets ahead: a launch takes it longer than the kernel takes the device.
HEAD_START_CYCLES: Final = 2_000_000

Launch = Callable[[Tensor], tuple[Tensor, ...]]


class Trial(NamedTuple):
    """Records a launch at one shape: its time, or why there is none."""

    rows: int
    vocab: int
    config: Config
    seconds: float = math.nan
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What trying launches of a kernel said."""

    kernel: str
    chosen: tuple[KernelRow, ...]  # per V
    gains: tuple[float, ...]  # the present launch's time over the chosen one's, per V
    trials: tuple[Trial, ...]


def candidates(kernel: str, device: torch.device) -> list[Config]:
    """Returns the present launch first, then those that differ least from it."""
    if architecture(device) not in CHIPS:
        others = list(INTERPRETED) if device.type == "cpu" else []
        return list(dict.fromkeys([TABLE[architecture(device)][kernel], *others]))
    present = TABLE[architecture(device)][kernel]
    least, most = ENTRIES_PER_LANE
    configs = [
        Config(block, warps, stages)
        for block in BLOCKS
        for warps in WARPS
        for stages in STAGES.get(kernel, OTHER_STAGES)
        if least <= block // (32 * warps) <= most
    ]
    return sorted({present, *configs}, key=lambda config: (config != present, _distance(config, present), config))


def tune(
    kernel: str,
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    *,
    tried: Sequence[Config] | None = None,
    seconds: float = math.inf,
    jobs: int | None = None,
) -> Tuning:
    """Tries the candidates (`tried`, or all) at every (C, V); no other starts after `seconds`. `jobs` compile.

    Compiling takes at most half of the time: what it has not reached is not tried.

    Raises `ValueError` for a kernel that has no row in the tables of launches.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    began = time.perf_counter()
    tried = list(tried) if tried is not None else candidates(kernel, device)
    refused = problems(kernel, tried, architecture(device), jobs, seconds / 2)
    present = tried[0]
    trials = []
    for rows, vocab in shapes:
        work = _Work(kernel, rows, vocab, device)
        expected = work.results(present)
        for config in tried:
            trial = Trial(rows, vocab, config)
            if refused[config]:
                trial = trial._replace(problem=refused[config])
            elif config != present and time.perf_counter() - began > seconds:
                trial = trial._replace(problem="not reached")
            else:
                trial = work.tried(trial, expected)
            trials.append(trial)
    rows_, gains = choose(trials, present)
    return Tuning(kernel=kernel, chosen=rows_, gains=gains, trials=tuple(trials))


def choose(trials: Sequence[Trial], present: Config) -> tuple[tuple[KernelRow, ...], tuple[float, ...]]:
    """Picks per V the launch that takes least over its chunks, in relation to the present one; says by how much."""
    chosen, gains = [], []
    for vocab in dict.fromkeys(trial.vocab for trial in trials):
        of_vocab = [trial for trial in trials if trial.vocab == vocab]
        base = {trial.rows: trial.seconds for trial in of_vocab if trial.config == present}
        best, gain = present, 1.0
        for config in dict.fromkeys(trial.config for trial in of_vocab):
            ratios = [base[trial.rows] / trial.seconds for trial in of_vocab if trial.config == config]
            # A NaN, of a shape at which it was not timed, fails the comparison.
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            if mean > max(gain, 1 + LEAST_GAIN):
                best, gain = config, mean
        chosen.append(KernelRow(vocab, *best))
        gains.append(gain)
    return tuple(chosen), tuple(gains)


def merged(
    kernels: Iterable[tuple[str, tuple[KernelRow, ...]]], workspace: Iterable[WorkspaceRow], device: torch.device
) -> Table:
    """Makes a table of this device, of today."""
    return Table(
        architecture=chip(device),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter",
        torch=torch.__version__,
        triton=_version("triton"),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        kernels=dict(kernels),
        workspace=tuple(workspace),
    )


def problems(
    kernel: str, tried: Sequence[Config], arch: str, jobs: int | None = None, seconds: float = math.inf
) -> dict[Config, str]:
    """Says why a launch is not to be tried, by what the compiler says of all variants.

    Empty where nothing speaks against it, and where nothing is compiled. After `seconds` only the first, which is the
    present one, is waited for.
    """
    deadline = time.perf_counter() + seconds
    if arch not in CHIPS:
        return dict.fromkeys(tried, "")
    work = [
        (config, case)
        for config in tried
        for case in launched_by(TABLE[arch] | {kernel: config})
        if case.entry == kernel
    ]
    # Not forked: the parent holds threads of torch, and perhaps a CUDA context.
    with ProcessPoolExecutor(jobs or max(1, (os.cpu_count() or 2) - 2), mp_context=get_context("spawn")) as pool:
        reasons = dict.fromkeys(tried, "")
        for (config, case), future in [(item, pool.submit(check, arch, item[1])) for item in work]:
            left = max(deadline - time.perf_counter(), 0.0)
            try:
                result = future.result(None if config == tried[0] or math.isinf(left) else left)
            except TimeoutError:
                future.cancel()
                reasons[config] = reasons[config] or "not reached"
                continue
            if result.problems and not reasons[config]:
                reasons[config] = f"{case.variant}: {'; '.join(result.problems)}"
    return reasons


def padded(tile: Tensor) -> Tensor:
    """Returns a copy (C, V) whose rows begin where the driver's do."""
    columns = tile_columns(tile.shape[1], tile.device.type)
    return tile.new_zeros(tile.shape[0], columns)[:, : tile.shape[1]].copy_(tile)


class _Work:
    """What one kernel does with a tile (C, V), in the dtypes of a pass with a 16-bit head."""

    def __init__(self, kernel: str, rows: int, vocab: int, device: torch.device) -> None:
        self.kernel, self.device = kernel, device
        generator = torch.Generator(device).manual_seed(0)
        self.student = padded(3 * torch.randn(rows, vocab, generator=generator, device=device))
        self.teacher = padded(self.student + torch.randn(rows, vocab, generator=generator, device=device))
        ids = torch.randint(vocab, (rows,), generator=generator, device=device)
        self.rows = TileRows(target_ids=ids)
        self.statistics, _ = row_statistics(self.student, self.teacher, self.rows, Objective())

    def launches(self) -> dict[str, Launch]:
        """Returns launches by name; each destroys the student's logits that it is given."""
        if self.kernel == "row_statistics":
            return {"both sides": self._statistics}
        if self.kernel == "softmax_gradient":
            return {"sampled": self._softmax_gradient}
        clip = 0.01 if self.kernel == "divergence_clipped" else None
        objectives = {"forward KL": Objective(alpha=0.0), "JSD": Objective(alpha=0.5)}
        return {
            name: partial(self._divergence, objective=replace(objective, entry_clip=clip))
            for name, objective in objectives.items()
        }

    def results(self, launched: Config) -> list[tuple[Tensor, ...]]:
        with using(self._table(launched)):
            return [launch(padded(self.student)) for launch in self.launches().values()]

    def tried(self, trial: Trial, expected: list[tuple[Tensor, ...]]) -> Trial:
        """Returns the trial with its time, or with what is wrong with its results."""
        try:
            for actual, right in zip(self.results(trial.config), expected, strict=True):
                for result, wanted in zip(actual, right, strict=True):
                    error = _relative_error(result, wanted)
                    if not error <= (EQUAL if result.dtype == torch.float32 else EQUAL_16_BITS):
                        return trial._replace(problem=f"its results differ by {error:.1e}")
            with using(self._table(trial.config)):
                return trial._replace(seconds=sum(self._seconds(launch) for launch in self.launches().values()))
        except Exception as error:
            return trial._replace(problem=f"{type(error).__name__}: {str(error)[:120]}")

    def _seconds(self, launch: Launch) -> float:
        """Times a launch (median), over and over on the same memory: what is in it does not change the time."""
        student = padded(self.student)
        if self.device.type != "cuda":
            began = time.perf_counter()
            launch(student)
            return time.perf_counter() - began
        times = []
        for number in range(WARM_UP + REPETITIONS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HEAD_START_CYCLES)
            start.record()
            launch(student)
            end.record()
            end.synchronize()
            if number >= WARM_UP:
                times.append(start.elapsed_time(end) / 1e3)
        return numbers.median(times)

    def _table(self, launched: Config) -> Table:
        return merged([(self.kernel, (KernelRow(self.student.shape[1], *launched),))], [], self.device)

    def _statistics(self, student: Tensor) -> tuple[Tensor, ...]:
        statistics, _ = row_statistics(student, self.teacher, self.rows, Objective())
        return statistics.array.unbind()

    def _divergence(self, student: Tensor, objective: Objective) -> tuple[Tensor, ...]:
        gradient = gradient_view(student, torch.bfloat16)
        loss = full_divergence(student, self.teacher, self.rows, objective, self.statistics, gradient)
        return loss, gradient

    def _softmax_gradient(self, student: Tensor) -> tuple[Tensor, ...]:
        gradient = gradient_view(student, torch.bfloat16)
        softmax_gradient(
            student,
            None,
            (1.0, None, 1.0),
            gradient,
            normalizer=self.statistics.lse_student,
            peak=self.statistics.target_gap,
            target_ids=self.rows.target_ids,
        )
        return (gradient,)


def as_json(tuning: Tuning) -> dict[str, Any]:
    """Describes every trial, for a file beside the table."""
    return {
        "kernel": tuning.kernel,
        "chosen": [row._asdict() for row in tuning.chosen],
        "gains": list(tuning.gains),
        "trials": [
            {
                "rows": trial.rows,
                "vocab": trial.vocab,
                **trial.config._asdict(),
                "seconds": None if math.isnan(trial.seconds) else trial.seconds,
                "problem": trial.problem,
            }
            for trial in tuning.trials
        ],
    }


def chosen_of(stored: Mapping[str, Any]) -> tuple[str, tuple[KernelRow, ...]]:
    """Reads what `as_json` wrote, for `merged`."""
    return stored["kernel"], tuple(KernelRow(**row) for row in stored["chosen"])


def _relative_error(actual: Tensor, right: Tensor) -> float:
    distance = torch.linalg.vector_norm((actual - right).float())
    return (distance / torch.linalg.vector_norm(right.float())).item()


def _distance(one: Config, other: Config) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(one, other, strict=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
