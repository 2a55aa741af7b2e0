"""The two backends that a CPU has: a compiled one is what `backend="auto"` takes, and hides the other."""

from __future__ import annotations

import pytest

from sdkernels.tile import native_backend


@pytest.fixture(scope="module", params=["torch", "native"])
def each_cpu_backend(request: pytest.FixtureRequest) -> None:
    """The test runs once with either."""
    if request.param == "torch":
        request.getfixturevalue("torch_backend")
    elif not native_backend.is_available():
        pytest.skip("this machine has no C compiler")
