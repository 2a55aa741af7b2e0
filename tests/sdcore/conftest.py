"""Runs the tests of sdcore on one thread: two wait for each other after every operator, long on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.sdcore.prefix.models import double_precision


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_double_precision() -> Iterator[None]:
    """Makes float32 float64; not for tests of bfloat16, since while it is entered there is no float32."""
    with double_precision():
        yield
