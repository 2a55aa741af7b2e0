"""`sdcore conform`: our own loss is right in every situation until a fault is planted; the page is of one run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sdcore.cli.main import app
from sdcore.conform.adapters import ADAPTERS, OURS
from sdcore.conform.cases import OPTIONS
from sdcore.conform.runner import ABSENT, CLEAR, CRASHED, FLOORS, OFF, RIGHT, Result, judge, results
from sdcore.conform.situations import SITUATIONS
from sdcore.conform.table import rendered
from sdkernels import linear_divergence
from sdkernels.tile import torch_backend
from sdkernels.tile.elementwise import Sums

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMITTED = json.loads((DOCS / "conformance.json").read_text(encoding="utf-8"))
Patch = Callable[[pytest.MonkeyPatch], None]


def first_red() -> str | None:
    """The first situation in which our torch backend gives a wrong number."""
    light = (name for name, situation in SITUATIONS.items() if not situation.heavy)
    return next((name for name in light if judge(ADAPTERS["sdcore, torch"], SITUATIONS[name]).kind == OFF), None)


@pytest.mark.parametrize("name", ["sdcore, torch", "sdcore, native"])
def test_our_own_rows_are_right_or_refused_clearly(name: str) -> None:
    found = {situation: judge(ADAPTERS[name], SITUATIONS[situation]) for situation in SITUATIONS}
    assert {situation: result for situation, result in found.items() if result.kind not in (RIGHT, CLEAR)} == {}


def wrapped(name: str, change: Callable[..., Any]) -> Patch:
    """A mutation: `change` is given the function of this name of the torch backend, and its arguments."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(torch_backend, name)
        monkeypatch.setattr(torch_backend, name, lambda *a, **k: change(original, *a, **k))

    return patch


def shifted_teacher(original: Any, student: Tensor, teacher: Tensor | None, *args: Any, **options: Any) -> Any:
    return original(student, None if teacher is None else teacher.roll(1, 0), *args, **options)


def objective_without(**changes: Any) -> Patch:
    def change(original: Any, student: Tensor, teacher: Any, rows: Any, objective: Any, **options: Any) -> Any:
        return original(student, teacher, rows, replace(objective, **changes), **options)

    return wrapped("divergence_tile", change)


MUTATIONS: dict[str, Patch] = {
    "teacher shifted by one row": wrapped("divergence_tile", shifted_teacher),
    "the other direction": wrapped(
        "divergence_terms", lambda f, z, u, t, s, alpha, n: f(z, u, t, s, {0.0: 1.0, 1.0: 0.0}.get(alpha, alpha), n)
    ),
    "mixture weight turned round": wrapped("divergence_terms", lambda f, z, u, t, s, a, n: f(z, u, t, s, 1 - a, n)),
    "gradient without its centre": wrapped("centre_", lambda f, *args: None),
    "gradient without scale and temperature": wrapped("chain_", lambda f, *args: None),
    "gradient without the soft-cap": wrapped("finalise_", lambda f, *args: (f(*args), None)[1]),
    "bias left out": wrapped("finalise_", lambda f, z, head, bias: f(z, head, None)),
    "tail left out": objective_without(tail=False),
    "entry clip left out": objective_without(entry_clip=None),
    "the student's top-k for the teacher's": objective_without(topk_of="student"),
    "sampled tokens' sign": wrapped("_sampled", lambda f, student, log_p, gap, *rest: f(student, log_p, -gap, *rest)),
    "no shift to the maximum": wrapped(
        "exponential_sums",
        lambda f, z, e, spare: Sums(torch.exp(z, out=e).sum(-1, True), torch.mul(e, z, out=spare).sum(-1, True), None),
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_fault_turns_a_situation_red(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    assert first_red() is not None


def test_every_situation_is_described_and_its_arguments_are() -> None:
    assert len(SITUATIONS) >= 50
    assert all(situation.symptom for situation in SITUATIONS.values())
    assert {name for situation in SITUATIONS.values() for name in situation.make().call} <= OPTIONS.keys()
    assert {word for adapter in ADAPTERS.values() for word in adapter.offers.split()} <= OPTIONS.keys()


def test_the_page_is_what_the_results_render_to() -> None:
    assert (DOCS / "conformance.md").read_text(encoding="utf-8") == rendered(COMMITTED)


def test_the_committed_results_are_of_these_situations_and_peers() -> None:
    assert {*COMMITTED["peers"], *COMMITTED["missing"]} == ADAPTERS.keys()
    assert all(found.keys() == SITUATIONS.keys() for found in COMMITTED["peers"].values())
    assert COMMITTED["floors"] == FLOORS


def test_floors_leave_plain_code_room() -> None:
    """Four times what textbook code is off by where it is right: nobody is called wrong for rounding."""
    for name, (kind, off, _) in COMMITTED["peers"]["plain torch"].items():
        if kind == RIGHT and off is not None and SITUATIONS[name].make().check == "value":
            assert 4 * off <= FLOORS[SITUATIONS[name].make().dtype], name


def test_a_loss_of_ones_own_is_asked_what_it_offers() -> None:
    def loss(*, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, alpha: float, **_: Any) -> Any:
        return linear_divergence(student_hidden, student_weight, teacher_hidden, alpha=alpha)

    def narrow(
        *, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Any, teacher_weight: Any, alpha: Any
    ) -> Any:
        return loss(
            student_hidden=student_hidden, student_weight=student_weight, teacher_hidden=teacher_hidden, alpha=alpha
        )

    assert judge(loss, SITUATIONS["forward KL"]).kind == RIGHT
    assert judge(narrow, SITUATIONS["scale"]) == Result(ABSENT, note="has no scale")
    assert judge(loss, SITUATIONS["scale"]).kind == OFF
    assert judge(narrow, SITUATIONS["alpha 1.5"]).kind == CLEAR
    assert judge(lambda **call: loss(**call).loss * 1.5, SITUATIONS["forward KL"]).kind == OFF


MINE = """
import os, time
from sdkernels import linear_divergence

def dies(student_hidden, student_weight, teacher_hidden, teacher_weight, alpha, reduction="mean"):
    print("on stdout")
    if reduction == "sum":
        os._exit(3)
    sides = student_hidden, student_weight, teacher_hidden, teacher_weight
    return linear_divergence(*sides, alpha=alpha, reduction=reduction)

def sleeps(**call):
    time.sleep(600)

def without_alpha(student_hidden, student_weight):
    return 0

number = 1
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_losses.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{DOCS.parent}:{DOCS.parent / 'kernels'}")
    return "my_losses"


def test_a_loss_that_kills_its_process_has_crashed_there_alone(my_module: str) -> None:
    found = CliRunner().invoke(app, ["conform", f"{my_module}:dies"])
    assert found.exit_code == 1
    failed = [line for line in found.output.splitlines() if line.startswith("  ")]
    assert failed == ["  sum of the rows: crashed the process ended with 3"]


def test_a_loss_that_does_not_answer_has_crashed(my_module: str) -> None:
    running = results(f"{my_module}:sleeps", seconds=0.2)
    assert next(running) == ("forward KL", Result(CRASHED, note="no answer in 0.2 s"))
    running.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my_losses:without_alpha"], "must take alpha (0: KL(teacher‖student)"),
        (["my_losses:number"], "my_losses:number must be a function, got"),
        (["my_losses:nothing"], "my_losses has no function 'nothing'"),
        (["no_such_module:loss"], "there is no module 'no_such_module'"),
        (["my_losses"], "expected MODULE:FUNCTION, FILE.py:FUNCTION or one of sdcore, torch"),
        ([], "give either MODULE:FUNCTION or --all"),
        (["my_losses:dies", "--all"], "give either MODULE:FUNCTION or --all"),
        (["my_losses:dies", "--output", "x"], "output is for --all"),
        (["my_losses:dies", "--seconds", "0"], "seconds must be above 0, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_run_is_refused_by_name(my_module: str, words: list[str], said: str) -> None:
    refused = CliRunner().invoke(app, ["conform", *words])
    assert refused.exit_code == 2
    assert said in refused.output


def test_ours_are_all_there() -> None:
    assert OURS == ("sdcore, torch", "sdcore, native", "sdcore, Triton")
