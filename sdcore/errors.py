"""Defines the errors that sdcore raises. Each is also the standard library's type for what went wrong.

So `except ValueError` keeps working, and `except SdcoreError` catches what is ours and nothing else.
"""

from __future__ import annotations


class SdcoreError(Exception):
    """Is what every error of sdcore is; never raised itself."""


class PlanError(SdcoreError, ValueError):
    """Refuses token ids that no pass can be planned for, or that do not fit the model."""


class PlanTypeError(SdcoreError, TypeError):
    """Refuses a prompt or completion that is not token ids at all: floats, text, a batch."""


class ArgumentError(SdcoreError, ValueError):
    """Refuses an option outside of what it may be."""


class UnsupportedModelError(SdcoreError, NotImplementedError):
    """Refuses a model that a function cannot treat exactly."""


class DataError(SdcoreError, ValueError):
    """Refuses a row of data that is not what the methods need; says where it stands: `train.jsonl:12`."""


class ContextError(SdcoreError, ValueError):
    """Refuses a prompt that cannot be rendered with its privileged context, or that is too long with it."""


class NotFiniteError(SdcoreError, FloatingPointError):
    """Says that a step's gradient is no number, before it is written into the weights."""


def require_positive(**counts: int | None) -> None:
    """Raises `ArgumentError` for the first of these options that is given and below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ArgumentError(f"{name} must be at least 1, got {count}")
