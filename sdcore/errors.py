"""The errors that sdcore raises. Each is also the standard library's type for what went wrong.

So `except ValueError` keeps working, and `except SdcoreError` catches what is ours and nothing else.
"""

from __future__ import annotations


class SdcoreError(Exception):
    """What every error of sdcore is; never raised itself."""


class PlanError(SdcoreError, ValueError):
    """Token ids that no pass can be planned for, or that do not fit the model."""


class PlanTypeError(SdcoreError, TypeError):
    """A prompt or completion that is not token ids at all: floats, text, a batch."""


class ArgumentError(SdcoreError, ValueError):
    """An option outside of what it may be."""


class UnsupportedModelError(SdcoreError, NotImplementedError):
    """A model that a function cannot treat exactly, and therefore refuses."""


class DataError(SdcoreError, ValueError):
    """A row of data that is not what the methods need; says where it stands: `train.jsonl:12`."""


class ContextError(SdcoreError, ValueError):
    """A prompt that cannot be rendered with its privileged context, or that is too long with it."""
