"""Holds the suites, a module each, whose `SUITE` is what `sdcore bench` runs; `points` is a part of `scaling`."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def suite_named(name: str) -> Any:
    """Returns a suite, a `sdcore.bench.suite.Suite`, by its name; imports what it needs and nothing of the others."""
    return import_module(f"{__name__}.{name}").SUITE
