"""One bad row: it is found before the first step, named, and left out where that is asked for, by every rank alike."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sdcore.contexts import Custom, Demonstration
from sdcore.data import read_examples
from sdcore.diagnostics import leak, read_run
from sdcore.errors import ArgumentError, ContextError, DataError, SdcoreError
from sdcore.models import find_body
from sdcore.presets import SFT
from sdcore.report.notes import notes_of
from sdcore.rollouts.samplers import SampledCompletion
from sdcore.training.collect import Collector
from sdcore.training.evaluation import evaluate
from sdcore.training.rows import Rows
from sdcore.types import Example, Group
from sdcore.world.data import exact, rows, with_feedback
from tests.sdcore.trainer_runs import SDFT_METHOD, SDPO_METHOD, SHOW, lines, tokenizer, trainer, world_model

BAD = 9  # of twelve
LONG = " ".join(["a"] * 160)  # the world's model has 128 positions
REFUSAL = "{% if m.role != 'user' %}{{ raise_exception('only users') }}{% endif %}"
NO_SYSTEM = f"{{% for m in messages %}}{REFUSAL}{{{{ m.content }}}}{{% endfor %}}"
NO_B = NO_SYSTEM.replace("m.role != 'user'", "'b' == m.content")


def data(kind: Any = "sdft", **columns: Any) -> list[dict[str, Any]]:
    """Twelve rows, of which one has other columns."""
    made = [dict(row) for row in rows(kind, task="luma", count=12, seed=0)]
    if "prompt" in columns:
        del made[BAD]["messages"]
    made[BAD] |= columns
    return made


def speaking(template: str) -> Any:
    made = tokenizer()
    made.chat_template = template
    return made


def with_a_new_word() -> Any:
    made = tokenizer()
    made.add_tokens(["zork"])
    return made


SHORT = replace(SDFT_METHOD, max_teacher_prompt_length=30)
SYSTEM = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "luma a b"}]
CASES: dict[str, tuple[list[dict[str, Any]], Callable[[], dict[str, Any]], str]] = {
    "prompt": (data(prompt=LONG), dict, "at most 128 tokens, what the model has positions for, got 160"),
    "room": (data(prompt=LONG[:246]), dict, "max_completion_length must be at most 6, .* of 123 tokens, got 8"),
    "limit": (data(prompt=LONG[:80]), lambda: {"max_prompt_length": 20}, "max_prompt_length=20 tokens, got 40"),
    "context": (data(privileged_context=LONG), dict, "the teacher's prompt: a prompt must have at most 128 tokens"),
    "context's limit": (data(privileged_context=LONG[:80]), lambda: {"method": SHORT}, "max_teacher_prompt_length=30"),
    "a column": (
        [row | {"hint": "b"} for row in data()[:BAD]] + data()[BAD:],
        lambda: {"method": replace(SDFT_METHOD, template=SHOW + "{{ hint }}")},
        "the template reads what there is none of: 'hint' is undefined",
    ),
    "tools": (data(tools=[{"name": "f"}]), dict, "column `tools` would have to change the prompt"),
    "documents": (data(documents=[{"title": "a", "text": "b"}]), dict, "column `documents` would have to change"),
    "a list": (data(tools={"name": "f"}), dict, "column `tools` must be a list"),
    "system": (data(messages=SYSTEM), lambda: {"processing_class": speaking(NO_SYSTEM)}, "conversation: only"),
    "vocabulary": (data(prompt="luma zork"), lambda: {"processing_class": with_a_new_word()}, r"V=134\).*got 134"),
    "no answer": (data("sft", completion=None), lambda: {"method": SFT()}, "expected a text in column `completion`"),
    "a long answer": (
        data("sft", completion=LONG),
        lambda: {"method": SFT(), "max_completion_length": 200},
        "tokens of the completion must be at most 121",
    ),
    "a refused answer": (
        data("sft", completion="b"),
        lambda: {"method": SFT(), "processing_class": speaking(NO_B)},
        "the chat template refused the completion: only users",
    ),
    "question and feedback": (
        data("sdpo", prompt=LONG[:80]),
        lambda: {"method": replace(SDPO_METHOD, max_teacher_prompt_length=30), "reward_funcs": [with_feedback]},
        "got 40 without any context, and the question is never cut",
    ),
    "an image": (data(image="x.png"), dict, "`image` would have to go to the model"),
    "no question": (data(prompt=" "), dict, "expected a question, got ' '"),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Not trained by any test that takes it."""
    return world_model()


@pytest.mark.parametrize("case", CASES)
def test_a_row_that_cannot_be_used_is_named_before_the_first_step_or_left_out(
    case: str, model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, options, message = CASES[case]
    with pytest.raises(SdcoreError, match=message) as raised:
        trainer(tmp_path, model=model, train_dataset=given, **options())
    assert f"rows, row {BAD}" in str(raised.value)
    assert not list(tmp_path.iterdir())
    made = trainer(tmp_path, model=model, train_dataset=given, on_bad_row="skip", **options())
    places = [f"rows, row {i}" for i in range(12)]
    expected = places[:BAD] if case == "a column" else [*places[:BAD], *places[BAD + 1 :]]
    assert [row.source for row in made.train_dataset or ()] == expected
    assert f"train_dataset: {12 - len(expected)} rows are left out" in caplog.text
    assert places[BAD] in caplog.text


def test_a_run_writes_down_what_it_left_out(tmp_path: Path) -> None:
    given = read_examples(data(prompt=LONG))
    given[2] = replace(given[2], columns={"tools": 7}, source="")
    trainer(tmp_path, train_dataset=given, on_bad_row="skip").train()
    description = json.loads((tmp_path / "run.json").read_text())
    (name, skipped), *others = description["skipped_rows"].items()
    assert (name, skipped["rows"], description["examples"], others) == ("train_dataset", 2, 10, [])
    assert [text.split(":")[0] for text in skipped["first"]] == ["rows, row 2", f"rows, row {BAD}, the prompt"]
    (note,) = [note for note in notes_of(read_run(tmp_path)) if "skipped" in note]
    assert note.startswith("Rows of train_dataset that could not be used and were skipped: 2, as rows, row 2")


def test_where_no_row_is_left_the_first_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"train_dataset must have a row .*, got 12, 12 that cannot; the first: rows, row 0"
    ):
        trainer(tmp_path, train_dataset=data(), max_prompt_length=2, on_bad_row="skip")


class Ranks:
    """Two ranks in threads, which wait for each other in `gather`."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        self.parts: list[list[Any]] = [[], []]

    def usable(self, rank: int, made: Rows, examples: Sequence[Example]) -> Any:
        def gather(own: list[Any]) -> list[Any]:
            self.parts[rank] = own
            self.barrier.wait()
            return [*self.parts[0], *self.parts[1]]

        try:
            return replace(made, rank=rank, world_size=2, gather=gather, skipped={}).usable(examples, "data")
        except SdcoreError as error:
            return type(error), str(error)


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_ranks_that_share_the_rows_come_to_the_same_decision(on_bad_row: str) -> None:
    examples = read_examples([row | ({"tools": 7} if i in (4, 9) else {}) for i, row in enumerate(data())])
    checked: list[str] = []

    class Watched(Collector):
        def prompt(self, example: Example) -> torch.Tensor:
            checked.append(example.source)
            return super().prompt(example)

    collector = Watched(tokenizer=tokenizer())
    made = Rows(collector=collector, body=None, on_bad_row=on_bad_row)  # type: ignore[arg-type]
    ranks = Ranks()
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: ranks.usable(rank, made, examples), range(2))
    assert first == second
    assert len(checked) == len(set(checked))
    if on_bad_row == "raise":
        assert first[0] is ContextError
        assert "rows, row 4" in first[1]  # the first of the data, whoever has it
    else:
        assert [example.source[-1] for example in first] == ["0", "1", "2", "3", "5", "6", "7", "8", "0", "1"]


# What is known after sampling alone.

FEEDBACK = replace(SDPO_METHOD, max_teacher_prompt_length=40)


def wordy(*, prompt: Any, completion: str, **columns: Any) -> tuple[float, str]:
    """Feedback that is too long for one row."""
    del completion, columns
    return 0.0, LONG if prompt == "luma zoo" else "no"


@pytest.mark.parametrize("limit", [40, None])
def test_feedback_that_is_too_long_is_named_by_row_or_skipped_and_counted(limit: int | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "train_dataset": data("sdpo", prompt="luma zoo"),
        "method": replace(FEEDBACK, max_teacher_prompt_length=limit),
        "reward_funcs": [wordy],
        "max_steps": 3,
        "leak_probe_every": 1,
        "train_sampling_strategy": "sequential",
    }
    made = trainer(tmp_path / "raise", **options)
    with pytest.raises(SdcoreError, match=rf"rows, row {BAD}.*, got 1\d\d.* \(the row asks 'luma zoo'\)"):
        made.train()
    assert made.state.global_step == 2
    trainer(tmp_path / "skip", on_bad_row="skip", **options).train()
    assert [line["context/skipped"] for line in lines(tmp_path / "skip") if "loss" in line] == [0, 0, 4]
    assert "Contexts that were refused and skipped: 4." in notes_of(read_run(tmp_path / "skip"))


def test_a_context_function_that_raises_is_named_by_row(tmp_path: Path) -> None:
    def words(group: Group) -> list[str]:
        return [group.example.columns["hint"]]

    made = trainer(tmp_path)
    made.rows = replace(made.rows, context=Custom(words))
    with pytest.raises(ContextError, match=r"rows, row \d+: the context function raised KeyError: 'hint' \(the"):
        made.train()


def test_the_leak_probe_leaves_out_a_context_that_is_too_long_for_another_question() -> None:
    builder, tok, model = Demonstration(template=SHOW), tokenizer(), world_model()
    given = {LONG[:120]: "a b", "b": LONG[:200]}
    examples = read_examples([{"prompt": prompt, "privileged_context": context} for prompt, context in given.items()])
    collector = Collector(tokenizer=tok, max_completion_length=4)
    assert Rows(collector=collector, body=find_body(model), context=builder).usable(examples, "data") == examples
    groups = collector.draw(model, examples, seed=0)
    assert set(leak(model, groups, builder, tok)) > {"teacher/leak_kl"}  # the other way round there is room


# Evaluation.


class NotAsked:
    def sample(self, *arguments: Any, **options: Any) -> list[list[SampledCompletion]]:
        raise AssertionError("something was sampled")


@pytest.mark.parametrize("name", ["eval_dataset", "eval_dataset['b']"])
def test_questions_are_measured_before_the_first_step_too(name: str, tmp_path: Path) -> None:
    given: Any = data("rl", prompt=LONG) if name == "eval_dataset" else {"a": data("rl"), "b": data("rl", prompt=LONG)}
    with pytest.raises(ArgumentError, match=rf"rows, row {BAD}, the prompt"):
        trainer(tmp_path, eval_dataset=given)
    made = trainer(tmp_path, eval_dataset=given, on_bad_row="skip", max_steps=1, reward_funcs=[exact])
    made.train()
    assert json.loads((tmp_path / "run.json").read_text())["skipped_rows"][name]["rows"] == 1
    measured = made.evaluate()
    assert all(math.isfinite(value) for value in measured.values())
    assert {value for key, value in measured.items() if key.endswith("questions")} <= {11.0, 12.0}


def test_nothing_is_sampled_before_every_question_was_measured() -> None:
    model, questions = world_model(), read_examples(data("rl", prompt=LONG))
    options: dict[str, Any] = {"max_completion_length": 8, "batch_size": 2}
    with pytest.raises(ArgumentError, match=rf"rows, row {BAD}, the prompt: a prompt must have at most 128 tokens"):
        evaluate(model, tokenizer(), questions, [exact], **options)
    assert evaluate(model, tokenizer(), questions, [exact], on_bad_row="skip", **options).metrics["questions"] == 11
    odd = read_examples(data("rl", tools={"name": "f"}))
    with pytest.raises(ContextError, match=rf"rows, row {BAD}: column `tools` must be a list"):
        evaluate(torch.nn.Identity(), tokenizer(), odd, sampler=NotAsked(), **options)


@pytest.mark.parametrize(
    ("count", "changes", "least"),
    [
        (2, {}, 4),
        (2, {"max_steps": -1, "num_train_epochs": 1}, 4),
        (3, {"gradient_accumulation_steps": 2}, 4),
        (7, {"gradient_accumulation_steps": 2, "num_iterations": 2}, 8),
    ],
)
def test_data_of_which_no_batch_is_whole_is_refused_where_only_such_are_used(
    count: int, changes: dict[str, Any], least: int, tmp_path: Path
) -> None:
    given = rows("sdft", task="luma", count=count, seed=0)
    with pytest.raises(
        DataError, match=rf"train_dataset must have {least} rows \(dataloader_drop_last\).* got {count}$"
    ):
        trainer(tmp_path, train_dataset=given, dataloader_drop_last=True, **changes)
    trainer(tmp_path, train_dataset=given, eval_dataset=given[:1], **changes).train()
    assert [line["step"] for line in lines(tmp_path) if "loss" in line][:1] == [1]


def test_rows_that_are_left_out_count_for_a_whole_batch(tmp_path: Path) -> None:
    given = [*rows("sdft", task="luma", count=3, seed=0), {"prompt": LONG, "privileged_context": "a"}]
    with pytest.raises(DataError, match=r"must have 4 rows .* got 4, 1 that cannot; the first: rows, row 3"):
        trainer(tmp_path, train_dataset=given, dataloader_drop_last=True, on_bad_row="skip")


def test_plain_prompts_beside_a_chat_template_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, train_dataset=data())
    assert "plain text" not in caplog.text
    trainer(tmp_path, train_dataset=data(prompt="luma a b"))
    assert "train_dataset: 1 prompts are plain text" in caplog.text
