"""Tries once which way to the same result is the fastest on this machine, and remembers it for the next process.

    fastest("bfloat16 products", {"torch": by_torch, "pairs": by_pairs})      # "pairs"; by_torch() makes what is timed

What is chosen decides how results are rounded, so that a run that goes on must choose as it did before: the answer is
kept in the cache folder, under a name made of processor, torch and number of threads, and the first to write it wins.
Delete the file, or set `$SDKERNELS_CACHE`, to have it tried anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch

REPETITIONS = 5
# Another way than the first has to be so much faster: less is noise.
GAIN = 0.97
Way: TypeAlias = Callable[[], Callable[[], object]]


def cache_folder() -> Path:
    """Returns where libraries and trials are kept; made if need be, for its owner alone: what lies there is run."""
    chosen = os.environ.get("SDKERNELS_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "sdkernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@cache
def processor() -> tuple[str, ...]:
    """Returns what tells this machine's processor from others."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return (platform.processor(),)
    return tuple(sorted({line for line in lines if line.startswith(("model", "fl"))}))


def fastest(name: str, ways: Mapping[str, Way]) -> str:
    """Returns the key of the fastest way; the first one's unless another is clearly faster.

    A way makes its operands and returns what is timed. It is asked only where the answer is not known yet.
    """
    if len(ways) == 1:
        return next(iter(ways))
    known = repr((name, list(ways), processor(), torch.__version__, torch.get_num_threads()))
    try:
        file = cache_folder() / f"trial-{hashlib.sha256(known.encode()).hexdigest()[:16]}.txt"
        if not file.exists():
            made = file.with_suffix(f".{os.getpid()}")
            made.write_text(_tried(ways))
            try:
                os.link(made, file)  # whole, and not over another's
            finally:
                made.unlink()
    except FileExistsError:
        pass
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return _tried(ways)
    chosen = file.read_text()
    return chosen if chosen in ways else next(iter(ways))


def _tried(ways: Mapping[str, Way]) -> str:
    # In a thread of its own, where no probe counts it and no autocast or inference mode of the caller changes it.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_measured, ways).result()


def _measured(ways: Mapping[str, Way]) -> str:
    calls = {key: way() for key, way in ways.items()}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(REPETITIONS):  # in turns, so that a disturbance hits all alike
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[key] = min(seconds[key], time.perf_counter() - start)
    first = next(iter(ways))
    best = min(seconds, key=lambda key: seconds[key])
    return best if seconds[best] < GAIN * seconds[first] else first
