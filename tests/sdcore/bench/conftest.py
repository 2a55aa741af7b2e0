"""One thread: two of a model this small wait for each other most of the time, on a busy machine for seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from sdcore.bench.options import Options
from sdcore.bench.suite import run
from sdcore.bench.suites import suite_named


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file that a quick run of a suite writes; each suite runs once."""

    @cache
    def path(suite: str) -> Path:
        output = tmp_path_factory.mktemp(suite)
        return run(suite_named(suite), Options(suite=suite, quick=True, device="cpu", output=output))

    return path
