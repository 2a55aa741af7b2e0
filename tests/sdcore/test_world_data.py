"""Tests rows of the small world: what each kind holds, that train and eval are strangers, what the rewards say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from sdcore.errors import ArgumentError
from sdcore.presets import load_config, types_of
from sdcore.training.config import SelfDistillationConfig
from sdcore.world import data
from sdcore.world.data import Kind, exact, fraction, lenient, map_of, rows, settings, with_feedback

ANSWER = "a3 c7 c7 f0 b9"


def write(path: Path, *options: str) -> list[dict[str, Any]]:
    app = typer.Typer()
    app.command()(data.main)
    result = CliRunner().invoke(app, ["--output", str(path), *options])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", [kind for kind in get_args(Kind) if kind != "quiz"])  # see test_world_talks
def test_a_row_has_a_question_its_answer_and_what_the_kind_needs(kind: Kind, tmp_path: Path) -> None:
    written = write(tmp_path / "train.jsonl", "--kind", kind, "--rows", "20")
    assert len(written) == 20
    digits = map_of("luma", 0)
    for row in written:
        ((role, question),) = [(turn["role"], turn["content"].split()) for turn in row["messages"]]
        assert role == "user"
        assert question[0] == "luma"
        right = [letter + digits["abcdefghij".index(letter)] for letter in question[1:]]
        assert row["answer"].split() == right
        demonstration = " ".join(f"H {pair}" for pair in right)
        instruction = " ".join(f"H {letter}{digit}" for letter, digit in zip("abcdefghij", digits, strict=True))
        more = {
            "sdft": {"privileged_context": demonstration},
            "context_distillation": {"privileged_context": instruction},
            "opsd": {"solution": demonstration},
            "sft": {"completion": demonstration},
        }.get(kind, {})
        assert {name: value for name, value in row.items() if name not in ("messages", "answer")} == more


def test_the_same_seed_writes_the_same_file_and_another_one_another_task(tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / "a.jsonl", "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again
    assert len(first) == 500
    assert map_of("luma", 3) != map_of("luma", 4)
    assert [row["answer"] for row in first] != [row["answer"] for row in other]


def test_no_question_is_in_both_files() -> None:
    questions = [
        {row["messages"][0]["content"] for row in rows("rl", task="luma", count=400, seed=0, split=split)}
        for split in ("train", "eval")
    ]
    assert min(map(len, questions)) > 300
    assert not questions[0] & questions[1]


def test_prior_tasks_and_hinted_questions_show_what_was_kept() -> None:
    assert rows("rl", task="pi", count=1, seed=5)[0]["messages"][0]["content"].startswith("pi ")
    assert map_of("pi", 5) == "3141592653"
    assert len({row["messages"][0]["content"].split()[0] for row in rows("rl", task="prior", count=50, seed=0)}) > 3
    assert all(" H " in row["messages"][0]["content"] for row in rows("rl", task="in_context", count=20, seed=0))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_settings_for_this_world_are_written_as_a_configuration(kind: Kind, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "--kind", kind, "--rows", "2", "--config", str(tmp_path / "world.yaml"))
    known = types_of(SelfDistillationConfig)
    assert load_config(tmp_path / "world.yaml", trainer_fields=known) == settings(kind)
    method, arguments = settings(kind)
    assert arguments["per_device_train_batch_size"] * method.num_generations == 32
    assert (method.template is None) == (method.context == "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sdfft"}, "kind must be one of sdft, sft, .* got 'sdfft'"),
        ({"task": "lima"}, "task must be one of kodo, luma, .* got 'lima'"),
        ({"split": "test"}, "split must be 'train' or 'eval', got 'test'"),
        ({"count": 0}, "rows must be at least 1, got 0"),
        ({"kind": "context_distillation", "task": "prior"}, "no map to tell"),
    ],
)
def test_names_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rows(**{"kind": "rl", "task": "luma", "count": 3, "seed": 0} | options)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (ANSWER, (1.0, 1.0, 1.0)),
        ("H a3 H c7 H c7 H f0 H b9", (0.0, 1.0, 0.0)),
        ("a3 c7 c7 f0 b8", (0.0, 0.0, 0.8)),
        ("a3 c7", (0.0, 0.0, 0.4)),
        ("", (0.0, 0.0, 0.0)),
        (f"{ANSWER} {ANSWER}", (0.0, 0.0, 0.5)),
    ],
)
def test_rewards_are_exact_lenient_and_a_fraction(completion: str, expected: tuple[float, ...]) -> None:
    columns = {"prompt": "q", "completion": completion, "answer": ANSWER, "more": 1}
    assert (exact(**columns), lenient(**columns), fraction(**columns)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (ANSWER, (1.0, None)),
        ("a3 c7 c1 f0 b8", (0.0, "H c7 H b9")),
        ("H a4 H c7 H c7 H f0 H b9", (0.0, "H a3")),
        ("a3 c7", (0.0, "H c7 H f0 H b9")),
        ("H a3 H c7 H c7 H f0 H b9", (0.0, "H a3 H c7 H c7 H f0 H b9")),
    ],
)
def test_feedback_is_the_right_pairs_of_the_wrong_letters(completion: str, expected: tuple[float, str | None]) -> None:
    assert with_feedback(prompt="q", completion=completion, answer=ANSWER) == expected


def test_a_row_without_an_answer_is_named() -> None:
    with pytest.raises(ArgumentError, match="column 'answer' must be a text, got None"):
        exact(prompt="q", completion="a3")
