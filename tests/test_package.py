"""What the wheel brings: our two import packages, their data files, and nothing that gets in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "sdcore", "kernels"]


class Distributions(NamedTuple):
    sdist: Path
    wheel: Path


def run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The source distribution, and the wheel built from it: a file missing there is missing here.

    Built from a copy, because setuptools keeps a list of earlier files in the folder that it builds in, and with the
    installed setuptools, because an isolated build would download one.
    """
    pytest.importorskip("build")
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (pytestconfig.rootpath / name).is_dir():
            shutil.copytree(
                pytestconfig.rootpath / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
            )
        else:
            shutil.copy(pytestconfig.rootpath / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    return Distributions(sdist=next(out.glob("*.tar.gz")), wheel=next(out.glob("*.whl")))


@pytest.fixture(scope="module")
def installed(built: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel, and nothing else, was installed."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, built.wheel)
    return target


def test_the_wheel_contains_our_two_packages_and_nothing_else(built: Distributions) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        top_level = {PurePosixPath(name).parts[0] for name in wheel.namelist()}
    version = built.wheel.name.split("-")[1]
    assert top_level == {"sdcore", "sdkernels", f"sdcore-{version}.dist-info"}


def test_the_wheel_contains_every_source_and_data_file(built: Distributions, pytestconfig: pytest.Config) -> None:
    def files(folder: Path) -> set[str]:
        relative = {f.relative_to(folder.parent) for f in folder.rglob("*") if f.is_file()}
        return {f.as_posix() for f in relative if not any(p == "__pycache__" or p.startswith(".") for p in f.parts)}

    with zipfile.ZipFile(built.wheel) as wheel:
        contained = {name for name in wheel.namelist() if ".dist-info/" not in name}
    root = pytestconfig.rootpath
    assert contained == files(root / "sdcore") | files(root / "kernels" / "sdkernels")


def test_the_source_distribution_contains_no_tests_and_no_outputs(built: Distributions) -> None:
    with tarfile.open(built.sdist) as sdist:
        top_level = {PurePosixPath(name).parts[1] for name in sdist.getnames() if "/" in name}
    assert top_level == {*SOURCES, "PKG-INFO", "setup.cfg", "sdcore.egg-info"}


def test_the_installed_wheel_leaves_transformers_importable(installed: Path, run_python: Callable[..., str]) -> None:
    code = """
from transformers import AutoModelForCausalLM
import sdcore, sdkernels
import importlib.util
print(sdcore.__file__, sdkernels.__file__, sep="\\n")
"""
    assert run_python(code, path=installed).split() == [
        str(installed / package / "__init__.py") for package in ("sdcore", "sdkernels")
    ]


def test_both_packages_say_that_they_are_typed(installed: Path) -> None:
    assert [(installed / package / "py.typed").is_file() for package in ("sdcore", "sdkernels")] == [True, True]


def test_the_console_script_leads_to_the_command_line(installed: Path, run_python: Callable[..., str]) -> None:
    code = """
from importlib.metadata import distribution
import sys
(script,) = distribution("sdcore").entry_points.select(group="console_scripts", name="sdcore")
sys.argv = ["sdcore", "--help"]
script.load()()
"""
    assert "Usage: sdcore" in run_python(code, path=installed)


def test_the_installed_benchmark_suite_writes_beside_whoever_runs_it(
    installed: Path, run_python: Callable[..., str], tmp_path: Path
) -> None:
    code = """
import sys
from sdcore.bench.options import checkout
from sdcore.cli.main import app
assert checkout() is None
app(["bench", "--quick", "--device", "cpu", "--threads", "1", "--peers", "naive"], prog_name="sdcore")
"""
    assert "four bare matrix products" in run_python(code, path=installed)
    assert len(list(tmp_path.glob("sdcore-bench/*/quick/*.json"))) == 1


def test_constraints_pin_every_dependency_to_a_version_within_its_bounds(pytestconfig: pytest.Config) -> None:
    """Otherwise two runs of `make test` test different things."""
    root = pytestconfig.rootpath
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = map(Requirement, [*project["dependencies"], *extras["dev"], *extras["bench"], *extras["plot"]])
    lines = [
        line for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    pinned = dict(line.split("==") for line in lines)
    unmet = {str(r) for r in asked if r.name != "sdcore" and not r.specifier.contains(pinned.get(r.name, "0"))}
    assert unmet == set()
