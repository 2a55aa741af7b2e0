"""Keeps the tiny models of these tests on the disk, where TRL reads its teachers from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a model of the module's `FAMILY`."""
    pytest.importorskip("trl")
    from tests.sdcore.integrations.trl_runs import save_model

    return save_model(tmp_path_factory.mktemp("model"), getattr(request.module, "FAMILY", "qwen2"))


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`make(kind, **changes)` constructs a trainer around the saved model, or around `model`."""
    from tests.sdcore.integrations.trl_runs import build, load_model

    def made(kind: Any, *, model: Any = None, **changes: Any) -> Any:
        return build(kind, load_model(folder) if model is None else model, tmp_path, **changes)

    return made
