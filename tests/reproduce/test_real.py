"""Tests the studies on real models: their rows, judges and matching, and a run of each on a random model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from reproduce import real_context, real_exam, real_feedback, real_model, real_sdft, records, schedule, table, teachers
from reproduce.book import DATA, Handbook, has_words, question_of
from reproduce.prediction import correlation, ranks
from reproduce.records import Point, crossing, exceeds, final, matched, sparing
from tests.reproduce.test_reproduce import results
from tests.sdcore.contexts.chats import chat_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
BOOK = Handbook()
ROOT = Path(__file__).parents[2]


# What is read from a run


def path(*rows: tuple[float, float, float]) -> list[Point]:
    return [{"samples": samples, "right": right, "kept": kept} for samples, right, kept in rows]


def test_between_two_checkpoints_a_quantity_is_read_on_the_line() -> None:
    points = path((0, 0.0, 1.0), (80, 0.2, 0.9), (160, 0.6, 0.5), (240, 0.3, 0.0))
    assert crossing(points, "right", 0.3) == pytest.approx({"samples": 100, "right": 0.3, "kept": 0.8})
    assert matched("kept", "right", 0.2, at=crossing)(points) == pytest.approx(0.9)
    assert crossing(points, "right", 0.7) is None
    assert crossing(points, "right", 0.0) == points[0]
    # What only one of the two has cannot be between them.
    points[2] = points[2] | {"fact 00": 1.0}
    assert "fact 00" not in (crossing(points, "right", 0.3) or {})


def test_a_rate_is_chosen_by_what_is_kept_between_checkpoints() -> None:
    fast = path((0, 0.0, 1.0), (80, 0.8, 0.6))  # 0.85 where it is at 0.3, 0.6 at its first checkpoint beyond
    slow = path((0, 0.0, 1.0), (80, 0.1, 0.9), (160, 0.3, 0.8))
    assert sparing("right", 0.3, ("kept",), at=crossing)({1.0: fast, 0.1: slow}) == 1.0
    assert sparing("right", 0.3, ("kept",))({1.0: fast, 0.1: slow}) == 0.1


@pytest.mark.parametrize(
    ("values", "outcome"),
    [([0.61, 0.62, 0.63], "reproduced"), ([0.4, 0.6, 0.8], "not reproduced"), ([0.31, 0.32, 0.33], "opposite")],
)
def test_a_level_is_exceeded_by_three_standard_errors(values: list[float | None], outcome: str) -> None:
    assert exceeds(results(a=values), "", "a", final("x"), 0.5).outcome == outcome


def test_ranks_share_places_and_a_correlation_has_its_chance() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    up = correlation(range(10), [x**3 for x in range(10)], permutations=2000)
    assert up.rho == pytest.approx(1.0)
    assert up.chance < 0.002
    assert correlation(range(10), [-x for x in range(10)], permutations=10).rho == pytest.approx(-1.0)
    assert correlation([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == (0.0, 1.0)
    # Of three values there are six orders, two of them as far from 0.
    assert correlation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], permutations=3000).chance == pytest.approx(1 / 3, abs=0.05)


def of_facts(gains: list[float], learned: list[float]) -> records.Results:
    job = records.Job(study="s", arm="forward", learning_rate=1.0, seed=0, settings={})
    first = {f"gain {i:02d}": gain for i, gain in enumerate(gains)}
    last = {f"fact {i:02d}": share for i, share in enumerate(learned)}
    return records.Results({"forward": {0: records.Record(job=job, points=[first, last])}}, resolution=0.01)


@pytest.mark.parametrize(
    ("learned", "outcome"),
    [
        ([float(i) for i in range(10)], "reproduced"),
        ([-float(i) for i in range(10)], "opposite"),
        ([0.0, 1.0] * 5, "not reproduced"),
        ([1.0] * 10, "undecided"),
    ],
)
def test_a_prediction_is_judged_by_its_chance(learned: list[float], outcome: str) -> None:
    judged = of_facts([float(i) for i in range(10)], learned)
    assert real_context.predicted(judged, "forward").outcome == outcome


# What is shown and learned


def test_a_split_holds_out_two_questions_of_each_fact_and_loses_none() -> None:
    other, again = Handbook(split=1), Handbook(split=1)
    assert [*map(question_of, other.train)] == [*map(question_of, again.train)]
    assert {*map(question_of, other.held_out)} != {*map(question_of, BOOK.held_out)}
    for book in (BOOK, other):
        asked = [*map(question_of, [*book.train, *book.held_out])]
        assert len({*asked}) == len(asked) == 240
        assert [row["fact"] for row in book.held_out] == [i for i in range(30) for _ in range(2)]
    data = json.loads(DATA.read_text())
    given = [question for section in data["sections"] for fact in section["facts"] for question in fact["held_out"]]
    assert [*map(question_of, BOOK.held_out)] == given
    assert len(Handbook(split=1, facts=3).train) == 18


def test_a_wrong_handbook_has_every_fact_wrong_and_in_its_place() -> None:
    for row in BOOK.held_out:
        right, wrong, other, none = (
            real_exam.shown_to(BOOK, row, shown)["privileged_context"] for shown in ("right", "wrong", "other", "none")
        )
        assert right == row["privileged_context"]
        said = real_exam.wrong_sentence(BOOK, row["fact"])
        assert said in wrong
        assert said != row["sentence"]
        assert not has_words(said, row["words"])
        assert has_words(said, real_exam.SWAPPED[row["fact"]][1:])
        assert len(wrong.splitlines()) == len(right.splitlines())
        assert row["sentence"] not in other + none
        assert none.splitlines()[0] == right.splitlines()[0]


def test_every_word_that_is_scored_stands_in_its_sentence() -> None:
    tokenizer = chat_tokenizer("qwen")
    for row in BOOK.held_out:
        ids = tokenizer(row["sentence"], add_special_tokens=False)["input_ids"]
        counted = real_model.word_tokens(tokenizer, ids, row["sentence"], row["words"])
        text = tokenizer.decode([token for token, is_counted in zip(ids, counted, strict=True) if is_counted])
        assert any(word in text for word in row["words"])
        assert len(text) < len(row["sentence"])


def test_fifty_demonstrations_have_every_fact() -> None:
    rows = real_sdft.demonstrations(BOOK, 50, seed=3)
    assert len({question_of(row) for row in rows}) == len(rows) == 50
    assert {row["fact"] for row in rows} == set(range(30))
    assert rows != real_sdft.demonstrations(BOOK, 50, seed=4)


def test_a_line_of_a_base_model_ends_at_any_number_of_newlines() -> None:
    tokenizer = chat_tokenizer("qwen")
    (one,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert real_model.ends_of_line(tokenizer) == [one]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["\n\n", "\n x"])
    assert real_model.ends_of_line(tokenizer) == sorted([one, tokenizer.convert_tokens_to_ids("\n\n")])


# From a command to a page


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A random model of one layer in the place of SmolLM2."""
    tokenizer = chat_tokenizer("qwen")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, _ in real_model.MODELS.values():
        monkeypatch.setenv(name, str(tmp_path / "model"))
    monkeypatch.setattr(real_model, "CACHE", tmp_path / "cache")
    for module in ("book", "real_model"):
        monkeypatch.setattr(f"reproduce.{module}.MOST_TOKENS", 3)
    real_model.subject_of.cache_clear()
    yield real_model.subject_of("smollm2")
    real_model.subject_of.cache_clear()


def test_a_study_runs_to_its_page_and_goes_on_where_it_was(subject: Any, tmp_path: Path) -> None:
    def reproduce() -> None:
        options: dict[str, Any] = {"quick": True, "workers": 1, "console": Console(quiet=True)}
        table.run(tmp_path, seeds=2, studies=["real_context"], **options)

    reproduce()
    text = (tmp_path / "real.md").read_text()
    assert schedule.STUDIES["real_context"].title in text
    assert "On the small world" not in text
    lines = (tmp_path / "real_context.jsonl").read_text()
    (tmp_path / "real_context.jsonl").write_text(lines[:-10])  # killed as it wrote
    reproduce()
    after = (tmp_path / "real_context.jsonl").read_text()
    for one, other in zip(lines.splitlines(), after.splitlines(), strict=True):
        assert records.Record.from_json(one) == records.Record.from_json(other)
    record = records.Record.from_json(lines.splitlines()[0])
    assert [point["step"] for point in record.points] == [0.0, 1.0, 2.0]
    assert {"gain 00", "view 00", "taught 00", "ceiling"} <= record.points[0].keys()
    assert "fact 02" in record.points[-1]
    assert "fact 02" not in record.points[1]


def test_every_arm_runs(subject: Any) -> None:
    for study in schedule.studies_of(None, "real"):
        for arm in study.arms:
            if arm.runs_of is None and study.name != "real_gemma":
                points = study.run(arm, study.quick, 1e-3, 0)
                assert points[-1]["step"] == 2.0, arm.name
                assert 0 < points[-1]["kept"] < 2, arm.name


def test_the_teachers_are_asked_before_training(subject: Any, tmp_path: Path, capsys: Any) -> None:
    teachers.main(tmp_path / "teachers.json", seed=0, most=2)
    found = json.loads((tmp_path / "teachers.json").read_text())["teachers"]
    assert capsys.readouterr().out.count("±") == 2 * len(found) == 8
    # A random model has no sum right, so all of a question's answers have feedback.
    assert [row["metrics"]["asked_again"] for row in found] == [2, 2, 2, 8]
    assert all(row["metrics"]["with_context_reward_mean"] == 0 for row in found)
    committed = json.loads((ROOT / "docs/reproduction/teachers.json").read_text())["teachers"]
    assert [row["reads"] for row in committed] == [row["reads"] for row in found]


# Feedback


@pytest.mark.parametrize(
    ("answer", "reward", "feedback"),
    [
        ("7 + 5 = 12", 1.0, None),
        (" 7 + 5 = 12, of course", 1.0, None),
        ("7 + 5 = 13", 0.0, "is 12 and not 13"),
        ("7 + 5 = 120", 0.0, "not 120"),
        ("The sum: 7 + 5 = 12", 0.0, "begins with: 7 + 5 ="),
        ("12", 0.0, "begins with: 7 + 5 ="),
        ("", 0.0, "begins with: 7 + 5 ="),
    ],
)
def test_the_verifier_says_what_was_wrong(answer: str, reward: float, feedback: str | None) -> None:
    got, said = real_feedback.about_it(answer, [7, 5])
    assert got == real_feedback.right_sum(answer, [7, 5]) == reward
    assert said is None if feedback is None else feedback in str(said)
    other = real_feedback.about_another(answer, [7, 5], [2, 9])
    assert other[0] == reward
    assert other[1] is None if feedback is None else "2 + 9 =" in str(other[1])


def test_sums_that_are_held_out_are_not_learned_from() -> None:
    rows, held_out = real_feedback.sums(3, 48)
    pairs = [tuple(row["pair"]) for row in [*rows, *held_out]]
    assert len(held_out) == 48
    assert len({*pairs}) == len(pairs) == 144
    assert all(row["pair"] != row["another"] for row in [*rows, *held_out])
    assert real_feedback.sums(3, 48) == (rows, held_out) != real_feedback.sums(4, 48)
