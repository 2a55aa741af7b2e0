"""Shares work among several threads: those that torch has for its own operators.

Threads of an OpenMP team wait for the next parallel region in a busy loop, for some 20 ms; others, started beside them,
would share the cores with that waiting. So the work is handed to the same team, through the entry point that compilers
use for `#pragma omp parallel`. Where torch runs on something else there are plain threads.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
# Smaller memory comes from what the process has already.
LEAST_FRESH_BYTES = 1 << 25
PAGE_BYTES = 4096
POPULATE_WRITE = 23  # of madvise, from Linux 5.14 on


def together(work: Callable[[], None], threads: int) -> None:
    """Calls `work` on as many threads at once, and waits for all; an exception of any of them is raised."""
    if threads == 1:
        work()
        return
    parallel = _openmp()
    if parallel is None:
        for result in [_pool(threads).submit(work) for _ in range(threads)]:
            result.result()
        return
    failures: list[BaseException] = []

    def one(_: int | None) -> None:
        try:
            work()
        except BaseException as failure:  # ctypes would print it and go on
            failures.append(failure)

    parallel(WORK(one), None, threads, 0)
    if failures:
        raise failures[0]


def run_all(call: Callable[[int], object], count: int) -> None:
    """Calls `call(0)` to `call(count - 1)`, on torch's threads if there are more than one."""
    left = iter(range(count))

    def work() -> None:
        for i in left:
            call(i)

    # All of the threads: a team that changes its size is started anew.
    together(work, torch.get_num_threads() if count > 1 else 1)


def shares(count: int, *, step: int = 1, most: int) -> list[tuple[int, int]]:
    """(start, stop) of at most `most` shares of `range(count)`, and of no more than torch has threads; they start at
    multiples of `step`."""
    steps = -(-count // step)
    parts = max(1, min(torch.get_num_threads(), steps, most))
    bounds = [min(count, steps * i // parts * step) for i in range(parts + 1)]
    return list(pairwise(bounds))


def populated(memory: Tensor) -> Tensor:
    """Returns `memory`, just allocated and about to be written; all threads at once ask for its pages.

    Left to the first writes, it is 4 KiB at a time, amid the products: of a step at N=1024, V=32000, H=1024 that was
    3 %. Does nothing where the system does not know how.
    """
    if memory.device.type == "cpu" and memory.nbytes >= LEAST_FRESH_BYTES and sys.platform == "linux":
        start = -(-memory.data_ptr() // PAGE_BYTES)
        pages = (memory.data_ptr() + memory.untyped_storage().nbytes()) // PAGE_BYTES - start
        parts = shares(pages, most=pages)

        def populate(share: int) -> None:
            first, last = parts[share]
            _madvise()((start + first) * PAGE_BYTES, (last - first) * PAGE_BYTES, POPULATE_WRITE)

        run_all(populate, len(parts))
    return memory


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


@cache
def _openmp() -> Any | None:
    """Returns `GOMP_parallel` of the OpenMP library that torch is linked with; LLVM's and Intel's have it too."""
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [WORK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="sdkernels")


def _after_fork() -> None:
    """Forgets the threads: a forked process has none of its parent's and would wait for them for ever."""
    global _openmp
    _pool.cache_clear()
    _openmp = cache(lambda: None)  # OpenMP's do not come back


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
