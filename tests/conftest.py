"""What holds for every test: uninitialised memory is NaN, random numbers are seeded, examples fixed, threads few.

`torch.empty` returns whatever the memory held, often zeros, and code that forgets to write an element then passes.
Under `use_deterministic_algorithms` torch fills it with NaN (the largest value for integers), and refuses operations
whose result depends on the order of threads.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

# cuBLAS is deterministic only with a fixed workspace, which it reads once, when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Nothing in the tests may download.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy
import pytest
import torch

# A test takes its number of examples from the profile: a number of its own would hold in the random profile too.
# How long an example takes is the machine's affair, and fails no test.
COMMON = hypothesis.settings(
    deadline=None, database=None, print_blob=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("fixed", COMMON, derandomize=True, max_examples=100)
hypothesis.settings.register_profile("random", COMMON, derandomize=False, max_examples=1000)
hypothesis.settings.load_profile("fixed")  # --hypothesis-profile=random comes after it


class TorchRandom:
    """Lets hypothesis seed torch's generator before each example, as it seeds Python's and NumPy's."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis holds it weakly
hypothesis.register_random(TORCH_RANDOM)


def seed_everything() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Seeds before what several tests share, which would depend on the test that happens to come first."""
    if fixturedef.scope != "function":
        seed_everything()


@pytest.fixture(scope="session", autouse=True)
def deterministic_torch() -> Iterator[None]:
    """The state of the process; xdist workers share the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan(), "this version of torch does not fill uninitialised memory"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed that the global generators have at the start of every test."""
    seed_everything()
    return 0


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Gives torch a single thread, which is faster than two for small matrices and adds in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def torch_backend() -> Iterator[None]:
    """As on a machine without a C compiler, where `backend="auto"` on a CPU is "torch"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdkernels.driver.backends._can_compile", lambda: False)
        yield


def is_ours(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith(("sdcore.", "sdkernels."))


def handed_on(frame: FrameType) -> bool:
    """True for a frame that only hands a call on: torch's call of a module, transformers' and a wrapper's around it."""
    module = frame.f_globals.get("__name__", "")
    return module.startswith(("torch.", "transformers.utils.", "accelerate.")) or (
        module.startswith("peft.") and frame.f_code.co_name == "forward"
    )


@pytest.fixture(autouse=True)
def warnings_of_our_calls() -> Iterator[None]:
    """Attributes what a library calls obsolete to who called it, so that the filters of pyproject.toml see our calls.

    To Python the warning is of the library itself, or of torch, which calls a model's `forward`.
    """
    inner = warnings.warn

    def warn(message: Any, category: Any = None, stacklevel: int = 1, *more: Any, **options: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        warns = sys._getframe(1)
        caller = warns.f_back
        while caller is not None and handed_on(caller):
            caller = caller.f_back
        obsolete = issubclass(kind, DeprecationWarning | FutureWarning)
        if not obsolete or caller is None or is_ours(warns) or not is_ours(caller):
            return inner(message, category, stacklevel + 1, *more, **options)
        place = caller.f_code.co_filename, caller.f_lineno, caller.f_globals["__name__"]
        return warnings.warn_explicit(message, kind, *place)

    with mock.patch.object(warnings, "warn", warn):
        yield


@pytest.fixture
def run_python(tmp_path: Path, pytestconfig: pytest.Config) -> Callable[..., str]:
    """`run_python(code, *arguments)` runs code in a new interpreter, in an empty folder, and returns what it printed.

    The checkout is on its path, or, with `path=`, only that folder and what is installed.
    """

    def run(code: str, *arguments: str, path: Path | None = None) -> str:
        root = pytestconfig.rootpath
        search = [path] if path else [root, root / "kernels"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
