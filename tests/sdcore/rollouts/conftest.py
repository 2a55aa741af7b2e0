"""Lets functions that hang end with their test."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from sdcore.rollouts import calls


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Hung functions wait for it, so that they end with the test."""
    event = threading.Event()
    yield event
    event.set()
    for thread in list(calls._ABANDONED):
        thread.join(5)
