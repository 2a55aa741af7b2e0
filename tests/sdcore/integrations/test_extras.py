"""Without optional dependencies all else imports, and what needs one of them says what to install."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

OPTIONAL = (
    "bitsandbytes",
    "deepspeed",
    "fla",
    "kernels",
    "liger_kernel",
    "matplotlib",
    "openai",
    "openenv",
    "orda_kernel",
    "peft",
    "requests",
    "triton",
    "trl",
    "verifiers",
    "verl",
    "vllm",
)
# Those that our dependencies cannot do without.
REQUIRED_BY_OTHERS = {"requests"}
# Modules that are one dependency's alone, and fail without it; who asks for them says what to install.
ITS_OWN = {
    "trl": ("sdcore.integrations.trl.",),
    "triton": ("sdkernels.tile.triton_backend", "sdkernels.tuning", "sdkernels.compile_check"),
}

# What uses a dependency, and what its error must say without.
USES: dict[str, list[tuple[str, str]]] = {
    "liger_kernel": [
        ("from sdcore.memory.measured import _liger_divergence as f; f(*[None] * 4)", 'pip install "sdcore[liger]"')
    ],
    "matplotlib": [
        ("from sdcore.demo import DemoConfig, run_demo as f; f(DemoConfig(), None)", 'pip install "sdcore[plot]"'),
        ("from sdcore.memory.plot import save_plot as f; f({}, 'x.png')", 'pip install "sdcore[plot]"'),
        ("from sdcore.report import write_report as f; f('run', format='markdown')", 'pip install "sdcore[plot]"'),
        ("from sdcore.report import write_report as f; f('run')", 'pip install "sdcore[plot]"'),
        ("from reproduce.table import run as f; f('output', console=None)", 'pip install "sdcore[plot]"'),
    ],
    "openenv": [
        (
            "from sdcore.integrations.environments import OpenEnvEnvironment as f; f(None)",
            'pip install "sdcore[openenv]"',
        )
    ],
    "peft": [
        (
            "from sdcore import SelfDistillationConfig as C; from sdcore.training.prepare import loaded as f; "
            "f(0, 0, C(), object())",
            'pip install "sdcore[peft]"',
        ),
        ("from sdcore.cli.running import lora_config as f; f(4)", 'pip install "sdcore[peft]"'),
    ],
    "triton": [
        (
            "import torch; from sdkernels import linear_topk as f; "
            "f(torch.ones(1, 1), torch.ones(2, 1), 1, backend='triton')",
            "pip install triton",
        )
    ],
    "trl": [
        ("from sdcore.presets import from_trl as f; f({}, kind='sdpo')", 'pip install "sdcore[trl]"'),
        ("from sdcore.integrations.trl import patch as f; f(object())", 'pip install "sdcore[trl]"'),
        ("from sdcore.integrations.trl import FusedGKDTrainer", 'pip install "sdcore[trl]"'),
    ],
    "verifiers": [
        (
            "from sdcore.integrations.environments import VerifiersEnvironment as f; f(None, [])",
            'pip install "sdcore[verifiers]"',
        )
    ],
    "verl": [("from sdcore.integrations.verl import register as f; f()", 'pip install "verl')],
    "vllm": [("from sdcore.rollouts.vllm import VLLMColocated as f; f('model')", 'pip install "sdcore[vllm]"')],
}

CODE = """
import importlib, json, os, pkgutil, sys, warnings

blocked, uses = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.modules |= dict.fromkeys(blocked)             # an import of any of them raises, and none of them is found
os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")
import sdcore, sdkernels

imported, failed = [], {}
for package in (sdkernels, sdcore):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda name: None):
        if module.name.endswith("__main__"):      # importing it runs a command
            continue
        try:
            importlib.import_module(module.name)
            imported.append(module.name)
        except ImportError as error:
            failed[module.name] = f"{type(error).__name__}: {error}"

words = []
for use in uses:
    try:
        exec(use)
        words.append("no error")
    except Exception as error:
        words.append(f"{type(error).__name__}: {error}")
print(json.dumps({"imported": imported, "failed": failed, "words": words}))
"""


def without(names: list[str], run_python: Callable[..., str]) -> dict[str, Any]:
    uses = [use for name in names for use, _ in USES.get(name, [])]
    return json.loads(run_python(CODE, json.dumps(names), json.dumps(uses)).splitlines()[-1])


def check(names: list[str], report: dict[str, Any]) -> None:
    own = tuple(module for name in names for module in ITS_OWN.get(name, ()))
    assert {name: error for name, error in report["failed"].items() if not name.startswith(own)} == {}
    wanted = [words for name in names for _, words in USES.get(name, [])]
    for said, want in zip(report["words"], wanted, strict=True):
        kind, _, message = said.replace("'", '"').partition(": ")
        assert kind in ("ImportError", "ModuleNotFoundError"), said
        assert want in message
    for name in (
        "sdcore.training.trainer",
        "sdcore.step",
        "sdcore.integrations.servers",
        "sdcore.integrations.verl",
        "sdkernels.api",
    ):
        assert name in report["imported"]


def test_with_none_of_them_all_else_imports_and_each_use_names_what_to_install(run_python: Callable[..., str]) -> None:
    """So it does without one that is not installed here: nothing is there that could miss it."""
    names = [name for name in OPTIONAL if name not in REQUIRED_BY_OTHERS]
    check(names, without(names, run_python))


@pytest.mark.parametrize("name", ["liger_kernel", "matplotlib", "peft", "trl"])
def test_without_one_all_else_imports_and_its_uses_name_what_to_install(
    name: str, run_python: Callable[..., str]
) -> None:
    """The others, which may ask for it, are there."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: see the test without all")
    report = without([name], run_python)
    check([name], report)
    if name != "trl" and importlib.util.find_spec("trl"):
        assert any(module.startswith("sdcore.integrations.trl.") for module in report["imported"])
