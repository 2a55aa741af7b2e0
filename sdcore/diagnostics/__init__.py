"""Records what a run says about itself: its log, the metrics of a step, and probes that cost an extra pass.

`RunLog` writes the files, `KEYS` says what each metric means, `metrics` counts what a step already knows, and
`overlap`, `drift` and `leak` run the model once more on a few completions.

The metrics and the probes are looked up when they are used: `RunLog` and `KEYS` need no torch, which a report should
not wait for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .keys import KEYS, Key, key_of
from .runlog import RunData, RunLog, RunLogError, read_run

if TYPE_CHECKING:
    from .measures import metrics
    from .probes import drift, leak, overlap, topk_overlap

_HOMES = {"drift": "probes", "leak": "probes", "metrics": "measures", "overlap": "probes", "topk_overlap": "probes"}

__all__ = [
    "KEYS",
    "Key",
    "RunData",
    "RunLog",
    "RunLogError",
    "drift",
    "key_of",
    "leak",
    "metrics",
    "overlap",
    "read_run",
    "topk_overlap",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
