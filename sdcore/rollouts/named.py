"""Loads functions and classes that are given by name: "module:function", or "path/to/file.py:function".

    exact = load("my_rewards:exact")          # of a module, installed or in the working directory
    exact = load("rewards.py:exact")          # of a file
    tools = load_tools(["tools.py"])          # all public functions that a file, or a module, defines

Loading runs the module, which is code of whoever wrote it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ArgumentError


def load(name: str) -> Callable[..., Any]:
    """Returns the function of "module:function" or "file.py:function"; the working directory is searched too.

    Runs the module, which is code. Raises `ArgumentError`, which says what is missing.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ArgumentError(f"a function must be given as module:function or file.py:function, got {name!r}")
    module = _module(place, name)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            named = _own(module) or _public(module)
            raise ArgumentError(f"{place} has no function {attribute!r}; it has {', '.join(named) or 'none at all'}")
        value = getattr(value, part)
    if not callable(value):
        raise ArgumentError(f"{name} must be a function, got {type(value).__name__}")
    return value


def load_tools(tools: Sequence[Callable[..., Any] | str]) -> list[Callable[..., Any]]:
    """Returns functions as they are, those that are named, and of a file or module alone all public ones it defines.

    Raises `ArgumentError`, as `load`.
    """
    if isinstance(tools, str) or callable(tools):
        raise ArgumentError(f"tools must be a list, got {tools!r:.80}")
    loaded: list[Callable[..., Any]] = []
    for tool in tools:
        if not isinstance(tool, str) or ":" in tool:
            loaded.append(load(tool) if isinstance(tool, str) else tool)
            continue
        module = _module(tool, tool)
        own = [value for value in _own(module).values() if inspect.isfunction(value)]
        if not own:
            raise ArgumentError(f"tools must be functions, or a file or module that defines some, got {tool}")
        loaded += own
    return loaded


def _public(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Returns what can be called of a module's public names."""
    return {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}


def _own(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Returns of these what the module defines itself."""
    return {
        name: value for name, value in _public(module).items() if getattr(value, "__module__", None) == module.__name__
    }


def _module(place: str, name: str) -> ModuleType:
    return _from_file(place, name) if place.endswith(".py") else _from_module(place, name)


def _from_module(place: str, name: str) -> ModuleType:
    # The working directory first, which a console script, unlike `python -m`, does not search.
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(error.name + ".")):
            raise ArgumentError(
                f"{name} could not be loaded: {place} imports {error.name}, which is missing"
            ) from error
        raise ArgumentError(
            f"{name} could not be loaded: there is no module {error.name!r}, neither installed nor in {here}"
        ) from error
    except Exception as error:
        raise ArgumentError(f"{name} could not be loaded: {place} raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _from_file(place: str, name: str) -> ModuleType:
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ArgumentError(f"{name} could not be loaded: there is no file {path.resolve()}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ArgumentError(f"{name} could not be loaded, {type(error).__name__}: {error}") from error
    return module
