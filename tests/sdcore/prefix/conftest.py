"""Tiny models run on one thread: two wait for each other after every operator, long on a busy machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sdcore.prefix import choice
from sdcore.prefix.verification import forget


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def first_use() -> Iterator[None]:
    """Nothing was verified and nobody warned."""
    forget()
    choice._WARNED.clear()
    yield
    forget()
