"""Checks what a field of a method may be, and turns text into its value: both by the field's annotation.

The same for Python, YAML and the command line. What differs from the obvious: True is no number here. YAML is read as
its version 1.2 has it, where `1e-5` is a number and `off` a word, and a key that stands twice in a mapping is refused.

Not covered: annotations other than text, numbers, True and False, choices, lists, mappings and None; values for those
are taken as YAML has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml  # type: ignore[import-untyped, unused-ignore]

from ..errors import ArgumentError

# (least, most, whether the least itself is out) of each number.
RANGES: dict[str, tuple[float, float, bool]] = {
    "max_teacher_prompt_length": (1, math.inf, False),
    "success_threshold": (-math.inf, math.inf, True),
    "update_rate": (0, 1, False),
    "sync_every": (1, math.inf, False),
    "trust_share": (0, 1, False),
    "alpha": (0, 1, False),
    "temperature": (0, math.inf, True),
    "topk": (1, math.inf, False),
    "importance_clip": (0, math.inf, True),
    "entry_clip": (0, math.inf, True),
    "gradient_tolerance": (0, 1, True),
    "inv_temperature": (0, math.inf, True),
    "distillation_weight": (0, 1, False),
    "clip_low": (0, math.inf, True),
    "clip_high": (0, math.inf, True),
    "kl_anchor": (0, math.inf, False),
    "skip_first_tokens": (0, math.inf, False),
    "num_generations": (1, math.inf, False),
    "teacher_samples": (0, 1, False),
}


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    list: "a list",
    dict: "a mapping",
    NoneType: "None",
}


def check_field(name: str, value: object, annotation: Any) -> None:
    """Raises `ArgumentError` by the field's type, and where it is a number by its range."""
    kinds = kinds_of(annotation)
    if not any(_fits(value, kind) for kind in kinds):
        raise ArgumentError(f"{name} must be {_expected(kinds)}, got {value!r}")
    if name in RANGES and isinstance(value, int | float):
        least, most, above = RANGES[name]
        if not (least < value if above else least <= value) or not value <= most or math.isinf(value):
            interval = f"{'(' if above else '['}{least:g}, {most:g}{')' if math.isinf(most) else ']'}"
            raise ArgumentError(f"{name} must be in {interval}{' or None' if NoneType in kinds else ''}, got {value!r}")


def typed(name: str, value: Any, annotation: Any) -> Any:
    """Returns a value of YAML as the annotation has it: 1 is 1.0 for a float, 1e3 is 1000 for a whole number.

    Raises `ArgumentError` where it is none.
    """
    kinds = kinds_of(annotation)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value)
    known = [kind for kind in kinds if get_origin(kind) is Literal or (get_origin(kind) or kind) in WORDS]
    if len(known) == len(kinds) and not any(_fits(value, kind) for kind in kinds):
        raise ArgumentError(f"{name} must be {_expected(kinds)}, got {value!r}")
    return value


def typed_text(name: str, text: str, annotation: Any) -> Any:
    """Reads the text behind `name=` on a command line: YAML, except that expected text need not be quoted."""
    kinds = kinds_of(annotation)
    if set(kinds) - {NoneType} == {str}:
        return None if NoneType in kinds and text in ("null", "None", "") else text
    value = None if NoneType in kinds and text == "None" else parse_yaml(text, name)
    if str in kinds and not any(_fits(value, kind) for kind in kinds):
        value = text
    return typed(name, value, annotation)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Returns the types of a union, or the one."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _fits(value: object, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if origin in (int, float):
        return isinstance(value, (int, float) if origin is float else int) and not isinstance(value, bool)
    return isinstance(origin, type) and isinstance(value, origin)


def _expected(kinds: tuple[Any, ...]) -> str:
    words = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            words.append(f"one of {', '.join(map(repr, get_args(kind)))}")
        else:
            words.append(WORDS.get(get_origin(kind) or kind, str(kind)))
    return " or ".join(words)


class _Loader(yaml.SafeLoader):
    """Reads numbers and truth values as in YAML 1.2, and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _TRUTH, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes what either version would read as something else than text."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def yaml_of(values: Mapping[str, Any]) -> str:
    """Writes plain data as `parse_yaml` reads it."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_yaml(text: str, source: str) -> Any:
    """Returns plain data; raises `ArgumentError`, which names the source and the line."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ArgumentError(f"{source} must be YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> Mapping[str, Any]:
    """Reads a mapping, an empty one of an empty file. Raises `ArgumentError`, and what opening a file does."""
    values = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    if not isinstance(values, Mapping | None):
        raise ArgumentError(f"{path} must be a mapping, `key: value`, got {type(values).__name__}")
    return values or {}


def closest(name: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean 'alpha'?"`, or nothing."""
    nearest = get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
