"""The import arrows: who may import whom, read from the source, and what an import may bring along.

Modules are listed from the bottom up: each imports only from its own row and the rows above it in the table.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"sdkernels": ROOT / "kernels", "sdcore": ROOT, "reproduce": ROOT}
LAYERS: dict[str, list[set[str]]] = {
    "sdkernels": [
        {"types", "reference", "live_bytes"},
        {"tile"},
        {"vocab_parallel"},
        {"validation"},
        {"driver", "reference_call"},
        {"api"},
        {"testing", "compile_check", "__init__"},
        {"tuning"},
    ],
    "sdcore": [
        {"errors", "charts"},
        {"types"},
        {"models", "losses", "teachers"},
        {"prefix"},
        {"step"},
        {"data", "contexts", "rollouts", "diagnostics"},
        {"presets"},
        {"memory", "report"},
        {"training"},
        {"integrations"},
        {"__init__", "world"},
        {"demo"},
        {"conform"},
        {"bench"},
        {"cli"},
        {"__main__"},
    ],
    "reproduce": [
        {"records", "book"},
        {"experiment", "prediction", "real_model", "topk"},
        {"real_exam"},
        {"context", "sdft", "sdpo", "tilt", "turns", "real_context", "real_feedback", "real_sdft"},
        {"discovery"},
        {"schedule"},
        {"table"},
        {"__init__", "__main__", "columns", "commands", "handbook", "teachers"},
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
    imports = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), filename=str(file))):
        if isinstance(node, ast.Import):
            imports += [Import(name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from . import types` names a module, `from .types import TopK` something inside one.
            imports += [
                Import(name, f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base)
                for alias in node.names
            ]
    return imports


IMPORTS = [statement for name in MODULES for statement in imports_of(name)]
PACKAGES = [name for name, file in MODULES.items() if file.name == "__init__.py"]
# Modules of less than 60 lines that stay alone, each with its reason.
SHORT = {
    "sdcore.errors": "raised from every folder; its neighbour types.py imports torch, which `--help` must not",
    "sdcore.cli.main": "the list of commands, which imports them all",
    "sdcore.cli.demo": "one file a command",
    "sdcore.cli.report": "one file a command",
    "sdkernels.tile.triton_backend.scale": "a kernel of its own",
}


def part(module: str) -> str:
    """The name in the table: `sdkernels.tile.head` → `tile`, the package itself → `__init__`."""
    return [*module.split("."), "__init__"][1]


def layer(module: str) -> int:
    return next(i for i, parts in enumerate(LAYERS[module.split(".")[0]]) if part(module) in parts)


def of(package: str, statement: Import) -> bool:
    return statement.importer.split(".")[0] == package


def inside(package: str, module: str) -> str | None:
    """The child of a package that a module belongs to: itself, a folder, or `__init__`; None for modules elsewhere."""
    if module == package:
        return "__init__"
    return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else None


def require_no_circle(names: list[str], pairs: list[tuple[str | None, str | None]]) -> None:
    """Raises graphlib's `CycleError`, which names the circle."""
    graph: dict[str, set[str]] = {name: set() for name in names}
    for importer, target in pairs:
        if importer is not None and target in graph and importer != target:
            graph[importer].add(target)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_layer(package: str) -> None:
    assert {part(name) for name in modules(package)} == set().union(*LAYERS[package]), "LAYERS is out of date"


@pytest.mark.parametrize("package", LAYERS)
def test_modules_import_downwards_only(package: str) -> None:
    ours = [f for f in IMPORTS if of(package, f) and f.target.split(".")[0] == package]
    assert [f for f in ours if layer(f.target) > layer(f.importer)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    require_no_circle([*MODULES], [(f.importer, f.target) for f in IMPORTS])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_children_of_a_package_import_each_other_in_a_circle(package: str) -> None:
    """A folder counts as one: what it imports as a whole must not import it back."""
    children = sorted({child for name in MODULES if (child := inside(package, name)) is not None})
    require_no_circle(children, [(inside(package, f.importer), inside(package, f.target)) for f in IMPORTS])


def test_modules_are_neither_long_nor_short() -> None:
    lengths = {name: len(file.read_text().splitlines()) for name, file in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}
    faces = {"__init__.py", "__main__.py"}
    short = {name for name, lines in lengths.items() if lines < 60 and MODULES[name].name not in faces}
    assert short == SHORT.keys(), "a module of less than 60 lines joins a neighbour, or says here why it does not"


def test_what_is_installed_does_not_import_what_stays_in_the_repository() -> None:
    assert [f for f in IMPORTS if of("sdcore", f) and f.target.split(".")[0] == "reproduce"] == []


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

    assert importers("sdkernels.reference") <= {"sdkernels.reference_call", "sdcore.bench.oracle"}
    # `backend="reference"` is the face's: no driver and no backend comes near it.
    assert importers("sdkernels.reference_call") <= {"sdkernels.api", "sdkernels.testing"}


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
