"""Runs each suite once, quickly, for the tests that look at what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sdcore.bench.options import Options
from sdcore.bench.suite import run
from sdcore.bench.suites import suite_named


@pytest.fixture(scope="package")
def quick_json(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file that a quick run of a suite writes; each suite runs once."""

    @cache
    def path(suite: str) -> Path:
        output = tmp_path_factory.mktemp(suite)
        return run(suite_named(suite), Options(suite=suite, quick=True, device="cpu", output=output))

    return path
