"""Lets a test be the first use of a strategy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sdcore.prefix import choice
from sdcore.prefix.verification import forget


@pytest.fixture
def first_use() -> Iterator[None]:
    """Nothing was verified and nobody warned."""
    forget()
    choice._WARNED.clear()
    yield
    forget()
