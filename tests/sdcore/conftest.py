"""Runs the tests of sdcore on one thread, or on several ranks, and lets them run in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import verdicts_of
from tests.sdcore.prefix.models import double_precision


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Two threads wait for each other after every operator of models this small, long on a busy machine."""


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Runs the module's `work` in `RANKS` processes, once for all tests of it: of each rank what it found."""
    folder, module = tmp_path_factory.mktemp("ranks"), request.module
    return verdicts_of(module.work, folder, str(folder), ranks=module.RANKS, seconds=module.SECONDS)


@pytest.fixture
def in_double_precision() -> Iterator[None]:
    """Makes float32 float64; not for tests of bfloat16, since while it is entered there is no float32."""
    with double_precision():
        yield
