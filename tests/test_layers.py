"""The import arrows: who may import whom, read from the source, and what an import may bring along.

Modules are listed from the bottom up: each imports only from its own row and the rows above it in the table.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"sdkernels": ROOT / "kernels", "sdcore": ROOT}
LAYERS: dict[str, list[set[str]]] = {
    "sdkernels": [
        {"types", "reference", "live_bytes"},
        {"tile"},
        {"vocab_parallel"},
        {"validation"},
        {"driver", "definition"},
        {"api"},
        {"testing", "compile_check", "__init__"},
        {"tuning"},
    ],
    "sdcore": [
        {"errors"},
        {"types", "progress"},
        {"heads", "models", "losses", "teachers", "targets"},
        {"prefix"},
        {"step_core"},
        {"step_rewards"},
        {"step"},
        {"data", "contexts", "rollouts", "diagnostics"},
        {"presets"},
        {"checkpoints", "config", "evaluation", "tally", "update"},
        {"collect", "construction", "samples", "watch"},
        {"trainer"},
        {"integrations"},
        {"__init__", "world"},
        {"solve", "dry_run", "memory", "report", "reproduce"},
        {"demo", "demo_report"},
        {"bench"},
        {"cli"},
        {"__main__"},
    ],
}
BACKENDS = {"sdkernels.tile.torch_backend", "sdkernels.tile.triton_backend"}


class Import(NamedTuple):
    """`importer`, a module of ours, names `target`, a module; both are dotted and absolute."""

    importer: str
    target: str


def modules(package: str) -> dict[str, Path]:
    """Dotted name → file, of every module of a package."""
    source_root = SOURCE_ROOTS[package]
    files = sorted((source_root / package).rglob("*.py"))
    return {".".join(f.relative_to(source_root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = {name: file for package in SOURCE_ROOTS for name, file in modules(package).items()}


def imports_of(name: str) -> list[Import]:
    """What a module imports, wherever in the file the statement stands, under TYPE_CHECKING too."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            found += [Import(name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from . import types` names a module, `from .types import TopK` something inside one.
            found += [
                Import(name, f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
                for alias in node.names
            ]
    return found


IMPORTS = [found for name in MODULES for found in imports_of(name)]


def part(module: str) -> str:
    """The name in the table: `sdkernels.tile.support` → `tile`, the package itself → `__init__`."""
    return [*module.split("."), "__init__"][1]


def layer(module: str) -> int:
    return next(i for i, parts in enumerate(LAYERS[module.split(".")[0]]) if part(module) in parts)


def of(package: str, found: Import) -> bool:
    return found.importer.split(".")[0] == package


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_layer(package: str) -> None:
    assert {part(name) for name in modules(package)} == set().union(*LAYERS[package]), "LAYERS is out of date"


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_downwards_only(package: str) -> None:
    ours = [f for f in IMPORTS if of(package, f) and f.target.split(".")[0] == package]
    assert [f for f in ours if layer(f.target) > layer(f.importer)] == []


def test_sdkernels_imports_only_torch_triton_and_the_standard_library() -> None:
    allowed = {"torch", "triton", "sdkernels"} | sys.stdlib_module_names
    assert [f for f in IMPORTS if of("sdkernels", f) and f.target.split(".")[0] not in allowed] == []


def test_only_the_triton_backend_and_its_compile_check_import_triton() -> None:
    importers = [f.importer for f in IMPORTS if f.target.split(".")[0] == "triton"]
    allowed = ("sdkernels.tile.triton_backend", "sdkernels.compile_check")
    assert [name for name in importers if not f"{name}.".startswith(tuple(f"{a}." for a in allowed))] == []


def test_the_reference_imports_nothing_of_ours() -> None:
    assert [f for f in imports_of("sdkernels.reference") if f.target.split(".")[0] in SOURCE_ROOTS] == []


def test_only_what_checks_others_imports_the_reference() -> None:
    def importers(module: str) -> set[str]:
        return {f.importer for f in IMPORTS if f.target == module}

    assert importers("sdkernels.reference") <= {"sdkernels.definition", "sdcore.bench.oracle"}
    # `backend="reference"` is the face's: no driver and no backend comes near it.
    assert importers("sdkernels.definition") <= {"sdkernels.api", "sdkernels.testing"}


def test_backends_never_import_each_other() -> None:
    def backend(module: str) -> str:
        return ".".join(module.split(".")[:3])

    between = [f for f in IMPORTS if {backend(f.importer), backend(f.target)} == BACKENDS]
    assert between == []


def test_a_checkout_has_no_package_called_kernels() -> None:
    """transformers imports the `kernels` of PyPI; a folder with an `__init__.py` of that name would hide it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_sdkernels_works_where_triton_transformers_and_sdcore_are_missing(run_python: Callable[..., str]) -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(["triton", "transformers", "sdcore"])  # an import of any of them raises ImportError
import torch
from sdkernels import linear_divergence
hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
out = linear_divergence(hidden, weight, torch.randn(3, 4), backend="torch")
out.loss.backward()
print(out.backend, bool(hidden.grad.isfinite().all()))
"""
    assert run_python(code).split() == ["torch", "True"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["demo", "--help"], ["bench", "--help"], ["bench", "trainer", "--help"]], ids=" ".join
)
def test_help_is_answered_without_importing_torch(run_python: Callable[..., str], arguments: list[str]) -> None:
    code = """
import json, runpy, sys
try:
    runpy.run_module("sdcore", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    status = stop.code
heavy = sorted({"torch", "transformers", "numpy", "matplotlib", "sdkernels"} & set(sys.modules))
print(json.dumps({"status": status, "heavy": heavy}))
"""
    shown, _, verdict = run_python(code, *arguments).strip().rpartition("\n")
    assert "Usage" in shown
    assert json.loads(verdict) == {"status": 0, "heavy": []}
