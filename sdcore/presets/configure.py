"""Reads a flat YAML file, and `key=value` on top of it, as a method and arguments of a run; and writes them back.

    method: sdpo              # a preset; without it, a Method of its own
    topk: 20                  # a field of the method
    learning_rate: 1e-5       # an argument of SelfDistillationConfig

    method, arguments = load_config("run.yaml", ["alpha=1.0"], trainer_fields=types_of(SelfDistillationConfig))

A key goes where a field of its name is; there are no sections, so that a name means the same in Python, in YAML and on
the command line. Values are checked by the field's annotation; what nobody knows is refused, with the nearest name.

What differs from the obvious: the trainer's fields are an argument, because presets are below the trainer. Not covered:
models, data and rewards, which the command line has of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from ..errors import ArgumentError
from .fields import closest, read_yaml, typed, typed_text, yaml_of
from .method import Method, field_types
from .methods import preset

METHOD = "method"
# Never written to a file.
SECRET = ("hub_token",)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, trainer_fields: Mapping[str, Any]
) -> tuple[Method, dict[str, Any]]:
    """Returns the method and the arguments of a run; those that nobody gave are left out.

    Args:
        path: the YAML file; None: the overrides alone.
        overrides: `key=value`, over what the file says.
        trainer_fields: name → type of the arguments of a run, from `types_of`.

    Raises `ArgumentError`, which names the file or the override, and what opening a file raises.
    """
    both = sorted(set(trainer_fields) & {METHOD, *field_types()})
    if both:
        raise ArgumentError(f"trainer_fields must not have the names of a method's fields, got {', '.join(both)}")
    known = {METHOD: str, **field_types(), **trainer_fields}
    values: dict[str, Any] = {}
    for name, value in ({} if path is None else read_yaml(path)).items():
        if name not in known:
            raise ArgumentError(f"{path}: {name} is no field of a method or a run{closest(str(name), known)}")
        values[name] = typed(f"{path}: {name}", value, known[name])
    values |= overridden(overrides, known, "a method or a run")
    chosen = values.pop(METHOD, None)
    changes = {name: values.pop(name) for name in list(values) if name in field_types()}
    method = Method(**changes) if chosen is None else preset(chosen, **changes)
    return method, values


def overridden(overrides: Sequence[str], known: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Returns the values of `key=value`. Raises `ArgumentError` for a key that is no field of `what`: not `known`."""
    values = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ArgumentError(f"overrides must be of the form key=value, got {override!r}")
        if name not in known:
            raise ArgumentError(f"{name} is no field of {what}{closest(name, known)}")
        values[name] = typed_text(name, text, known[name])
    return values


def dump_config(method: Method, arguments: Mapping[str, Any], path: str | Path | None = None) -> str:
    """Returns the text that `load_config` reads as the same again, preset and changes; writes it where `path` says.

    Tokens are left out. Raises `ArgumentError` for an argument that is no plain data.
    """
    chosen = {} if method.name is None else {METHOD: method.name}
    told = {name: _plain(name, value) for name, value in arguments.items() if name not in SECRET}
    values = chosen | method.changes() | told
    text = yaml_of(values)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def types_of(configuration: type) -> dict[str, Any]:
    """Returns name → type of every argument of a dataclass."""
    hints = get_type_hints(configuration)
    return {f.name: hints[f.name] for f in dataclasses.fields(configuration) if f.init}


def _plain(name: str, value: Any) -> Any:
    """Returns the value as YAML has it."""
    if isinstance(value, Enum):
        return _plain(name, value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(name, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArgumentError(f"{name} must be plain data to be written as YAML, got {type(value).__name__}")
