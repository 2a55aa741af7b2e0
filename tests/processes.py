"""Test cases that run in processes which talk to each other: started once, each leaves a file with its verdicts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def verdicts_of(
    work: Callable[..., None], folder: Path, *arguments: Any, ranks: int, seconds: float
) -> list[dict[str, str]]:
    """Run `work(rank, *arguments)` in as many processes; of each, what it left in `folder` as `{rank}.json`.

    That is "" for a case that is right, else why not. A case that was not reached in this time is missing: the ranks
    hung, or died.
    """
    context = mp.start_processes(work, args=arguments, nprocs=ranks, join=False, start_method="spawn")
    end = time.monotonic() + seconds
    try:
        for process in context.processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in context.processes:
            process.kill()
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]
