"""What a trial chose once is chosen again, by other processes too; what is hardly faster is not chosen."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdkernels.live_bytes import LiveBytes
from sdkernels.tile import trials


def taking(seconds: float) -> trials.Way:
    return lambda: lambda: time.sleep(seconds)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SDKERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_fastest_is_kept_for_the_next_process(own_cache: Path) -> None:
    assert trials.fastest("work", {"slow": taking(0.02), "fast": taking(0.0)}) == "fast"
    assert len(list(own_cache.iterdir())) == 1
    assert trials.fastest("work", {"slow": taking(0.0), "fast": taking(0.02)}) == "fast"
    assert trials.fastest("other work", {"slow": taking(0.0), "fast": taking(0.02)}) == "slow"


def test_the_first_way_stays_where_another_is_hardly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 1.98] * trials.REPETITIONS)
    monkeypatch.setattr(trials.time, "perf_counter", lambda: next(clock))
    assert trials.fastest("work", {"first": lambda: lambda: None, "second": lambda: lambda: None}) == "first"


def test_no_probe_counts_a_trial() -> None:
    def way() -> Callable[[], object]:
        left = torch.ones(8, 8)
        return lambda: left @ torch.ones(8, 8)

    with LiveBytes() as probe:
        trials.fastest("work", {"one": way, "other": way})
    assert not probe.matmuls
    assert probe.peak_bytes == 0


def test_a_single_way_is_not_tried() -> None:
    assert trials.fastest("work", {"only": lambda: pytest.fail("tried")}) == "only"


def test_where_nothing_can_be_kept_it_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("SDKERNELS_CACHE", str(file / "cache"))
    assert trials.fastest("work", {"slow": taking(0.02), "fast": taking(0.0)}) == "fast"
