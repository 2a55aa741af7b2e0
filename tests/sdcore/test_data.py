"""Reading rows: what becomes an example, and what the error says of a row that cannot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pandas  # type: ignore[import-untyped, unused-ignore]
import pyarrow  # type: ignore[import-untyped, unused-ignore]
import pytest

from sdcore.contexts.templates import render
from sdcore.data import example_of, read_examples
from sdcore.errors import ArgumentError, DataError, SdcoreError

CHAT = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "What is 3 + 4?"}]
ROWS = [
    {"prompt": "What is 3 + 4?", "privileged_context": "7", "level": 1},
    {"messages": CHAT, "solution": "7", "level": 2},
]


def write_lines(path: Path, *lines: str | Mapping[str, Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_a_row_of_json_lines_knows_its_line_although_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", ROWS[0], "", ROWS[1])
    first, second = read_examples(path)
    assert (first.prompt, first.privileged_context, dict(first.columns)) == ("What is 3 + 4?", "7", {"level": 1})
    assert first.source == f"{path}:1"
    assert second.prompt == tuple(CHAT)
    assert second.source == f"{path}:3"


def test_every_kind_of_source_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "privileged_context": f"hint {i}", "answer": i} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    write_lines(tmp_path / "rows.jsonl", *rows)
    sources: dict[str, Any] = {
        str(tmp_path / "rows.parquet"): f"{tmp_path}/rows.parquet, row 2",
        str(tmp_path / "rows.json"): f"{tmp_path}/rows.json, row 2",
        str(tmp_path / "rows.jsonl"): f"{tmp_path}/rows.jsonl:3",
        str(tmp_path / "saved"): f"{tmp_path}/saved (train), row 2",
        str(tmp_path / "splits"): f"{tmp_path}/splits (train), row 2",
    }
    examples_of = {name: read_examples(name) for name in sources}
    examples_of |= {"rows": read_examples(rows), "data set": read_examples(dataset)}
    sources |= {"rows": "rows, row 2", "data set": "rows, row 2"}
    for name, examples in examples_of.items():
        seen = [(e.prompt, e.privileged_context, dict(e.columns)) for e in examples]
        assert seen == [(f"question {i}", f"hint {i}", {"answer": i}) for i in range(3)], name
        assert examples[-1].source == sources[name]


ODD_ROWS = [
    {
        "prompt": "a",
        "messages": None,
        "privileged_context": "x",
        "answer": "1",
        "n": 3,
        "tests": [1, 2],
        "extra": {"a": [1]},
    },
    {"prompt": None, "messages": CHAT, "privileged_context": None, "answer": "2", "n": 4, "tests": [], "extra": None},
]


@pytest.mark.parametrize(
    "form", ["numpy", "torch", "arrow", "pandas", "stream", "frame", "table", "splits", "saved", None]
)
def test_rows_are_pythons_own_objects_whatever_form_a_data_set_or_a_table_gives_them(
    form: str | None, tmp_path: Path
) -> None:
    dataset = datasets.Dataset.from_list(ODD_ROWS)
    source: Any = {
        "stream": lambda: dataset.to_iterable_dataset().with_format("numpy"),
        "frame": lambda: pandas.DataFrame(ODD_ROWS),
        "table": lambda: pyarrow.Table.from_pylist(ODD_ROWS),
        "splits": lambda: datasets.DatasetDict(train=dataset.with_format("numpy")),
        "saved": lambda: dataset.with_format("numpy").save_to_disk(tmp_path / "saved") or tmp_path / "saved",
    }.get(str(form), lambda: dataset.with_format(form))()
    plain = read_examples(ODD_ROWS)
    for example, expected in zip(read_examples(source), plain, strict=True):
        assert (example.prompt, example.privileged_context) == (expected.prompt, expected.privileged_context)
        assert repr(example.columns) == repr(expected.columns)
    assert render("{{ answer }} {{ n + 1 }} {{ tests[0] }}", {}, read_examples(source)[0].columns, source="") == "1 4 1"


def test_what_a_data_set_hides_or_computes_stays_so() -> None:
    dataset = datasets.Dataset.from_list([{"prompt": "a", "answer": "1"}])
    hidden = read_examples(dataset.with_format("numpy", columns=["prompt"]))[0]
    computed = read_examples(dataset.with_transform(lambda rows: {"prompt": [text + "?" for text in rows["prompt"]]}))[
        0
    ]
    assert (hidden.prompt, dict(hidden.columns)) == ("a", {})
    assert (computed.prompt, dict(computed.columns)) == ("a?", {})


def test_a_data_frame_of_mixed_columns_or_a_dict_of_columns_is_a_clear_error() -> None:
    with pytest.raises(DataError, match=r"expected columns of one type each, got an error: .* column level"):
        read_examples(pandas.DataFrame({"prompt": ["a", "b"], "level": [1, "two"]}))
    for source in ({"prompt": ["a", "b"], "level": [1, 2]}, ROWS[0]):
        with pytest.raises(DataError, match=r"got a dict of columns: a row goes into a list, .*Dataset.from_dict"):
            read_examples(source)


def test_a_split_is_asked_for_by_name() -> None:
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:1]), test=datasets.Dataset.from_list([{"prompt": "another"}])
    )
    assert [e.prompt for e in read_examples(splits, split="test")] == ["another"]
    with pytest.raises(DataError, match=r"split must be one of those of the data set, train, test, got 'dev'"):
        read_examples(splits, split="dev")


def test_a_folder_of_data_files_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"prompt": "one"}, {"prompt": "two"})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert [e.prompt for e in read_examples(folder)] == ["one", "two"]


def test_a_hub_id_may_name_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([{"prompt": "one"}]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_examples("owner/name:main")[0].source == "owner/name:main (train), row 0"
    assert read_examples("owner/name")[0].prompt == "one"
    assert asked == [("owner/name", "main"), ("owner/name", None)]


def test_a_hub_id_that_cannot_be_loaded_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'owner/nothing'.*no such file or folder here.*ConnectionError: no network"):
        read_examples("owner/nothing")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", *ROWS, "this is not JSON")
    assert len(read_examples(path, limit=2)) == 2
    with pytest.raises(ArgumentError, match="limit must be at least 1"):
        read_examples(path, limit=0)


@pytest.mark.parametrize("name", ["privileged_context", "teacher_prompt", "solution"])
def test_privileged_context_has_three_names(name: str) -> None:
    assert example_of({"prompt": "q", name: "hint"}, "here").privileged_context == "hint"


def test_a_solution_is_read_by_reward_functions_too_and_other_names_are_not() -> None:
    assert dict(example_of({"prompt": "q", "solution": "7"}, "here").columns) == {"solution": "7"}
    assert dict(example_of({"prompt": "q", "teacher_prompt": "7"}, "here").columns) == {}


def test_a_null_is_no_value_and_a_blank_context_is_no_context() -> None:
    row = {"prompt": "q", "messages": None, "privileged_context": None, "solution": "7", "note": None}
    example = example_of(row, "here")
    assert (example.prompt, example.privileged_context) == ("q", "7")
    assert dict(example.columns) == {"solution": "7", "note": None}
    assert example_of({"prompt": "q", "privileged_context": " \n"}, "here").privileged_context is None


def test_a_conversation_as_privileged_context_is_the_text_of_its_turns() -> None:
    turns = [{"role": "user", "content": "a hint"}, {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    assert example_of({"prompt": "q", "teacher_prompt": turns}, "here").privileged_context == "a hint\nmore"


def test_prompt_may_be_a_conversation_and_keeps_its_images_and_tool_calls() -> None:
    turns = [
        {
            "role": "user",
            "content": [{"type": "image", "image": "cat.png", "text": None}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "a cat", "name": None},
        {"role": "user", "content": "And now?"},
    ]
    prompt = example_of({"prompt": turns}, "here").prompt
    assert prompt == (
        {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "tool_calls": [{"name": "look"}]},
        {"role": "tool", "content": "a cat"},
        {"role": "user", "content": "And now?"},
    )


def test_a_conversation_from_parquet_has_no_keys_that_only_other_rows_have(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "Who?", "name": "ann"}]
    datasets.Dataset.from_list([{"messages": CHAT}, {"messages": other}]).to_parquet(tmp_path / "rows.parquet")
    first, second = read_examples(tmp_path / "rows.parquet")
    assert (first.prompt, second.prompt) == (tuple(CHAT), tuple(other))


SYSTEM_ONLY = {"role": "system", "content": "s"}
WRONG = {
    "no prompt": ({"answer": 7}, r"expected a column `prompt` or `messages`, got `answer`"),
    "instruction": ({"instruction": "q", "output": "a"}, r"got `instruction`, `output` \(rename `instruction`\?\)$"),
    "conversations": ({"conversations": CHAT}, r"got `conversations` \(rename `conversations`\?\)$"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        r"got `conversations` \(rename `conversations`\?\); ShareGPT's `from` and `value` are `role`",
    ),
    "ShareGPT under our name": (
        {"messages": [{"from": "human", "value": "q"}]},
        "message 0: expected a `role` that is text, got none, only 'from', 'value'; ShareGPT's `from` and `value` are",
    ),
    "another name": ({"question": "q"}, r"got `question` \(rename `question`\?\)"),
    "null prompt": ({"prompt": None}, r"got null in `prompt`"),
    "no columns": ({}, r"got a row without columns"),
    "two prompts": ({"prompt": "q", "messages": CHAT}, r"which mean the same, got `prompt` and `messages`"),
    "two contexts": (
        {"prompt": "q", "privileged_context": "a", "solution": "b"},
        r"got `privileged_context` and `solution` \(rename",
    ),
    "blank prompt": ({"prompt": " \n"}, r"column `prompt`: expected a question, got ' \\n'"),
    "number": ({"prompt": 3}, r"column `prompt`: expected text or a list of messages, got int 3"),
    "text as messages": ({"messages": "q"}, r"column `messages`: expected a list of messages, got str 'q'"),
    "one message": ({"messages": CHAT[1]}, r"column `messages`: expected a list of messages, got dict"),
    "no messages": ({"messages": []}, r"expected at least one message, got an empty list"),
    "message is text": ({"messages": ["q"]}, r'message 0: expected \{"role": ..., "content": ...\}, got str \'q\''),
    "no role": (
        {"messages": [{"content": "q"}]},
        r"message 0: expected a `role` that is text, got none, only 'content'",
    ),
    "no content": ({"messages": [{"role": "user"}]}, r"message 0: expected a `content`.*got none, only 'role'"),
    "content is a number": ({"messages": [{"role": "user", "content": 3}]}, r"message 0: expected a `content`.*int 3"),
    "part without type": ({"messages": [{"role": "user", "content": [{"text": "q"}]}]}, r"message 0, part 0: expected"),
    "part without text": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"expected a `text`"),
    "answered": (
        {"messages": [*CHAT, {"role": "assistant", "content": "7"}]},
        r"the last turn must be the user's, got one of 'assistant' \(an answer",
    ),
    "system only": ({"messages": [SYSTEM_ONLY]}, r"the last turn must be the user's, got one of 'system'"),
    "empty question": ({"messages": [{"role": "user", "content": "  "}]}, r"expected a question in the last turn"),
    "no parts": ({"messages": [{"role": "user", "content": []}]}, r"expected a question in the last turn"),
    "context is a number": ({"prompt": "q", "solution": 7}, r"column `solution`: expected text or.*got int 7"),
    "half a character": ({"prompt": "q\ud83d"}, r"column `prompt`: expected Unicode text, got half a surrogate pair"),
    "half a character in a part": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
        r"column `messages`: expected Unicode text, got half a surrogate pair, '\\ud83d'",
    ),
    "context is an image": (
        {"prompt": "q", "teacher_prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        r"column `teacher_prompt`: expected text, .* got 'image'",
    ),
}


@pytest.mark.parametrize(("row", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_row_is_named_with_file_line_and_what_was_expected(
    row: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "train.jsonl", ROWS[0], row)
    with pytest.raises(DataError, match=rf"train\.jsonl:2[:,].*{said}"):
        read_examples(path)


def test_unicode_line_separators_do_not_end_a_line_and_a_mark_at_the_start_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\r\n', encoding="utf-8", newline="")
    assert [(e.prompt, e.source[-2:]) for e in read_examples(path)] == [("a\u2028b", ":1"), ("c", ":2")]


GOOD = json.dumps(ROWS[0]).encode() + b"\n"
FILES = {
    "half an object": (
        "train.jsonl",
        GOOD + b'{"prompt": "q"',
        r"train\.jsonl:2: expected JSON, .* error at column 15",
    ),
    "a list": ("train.jsonl", b'["q"]', r"train\.jsonl:1: a row must be an object with columns, got list \['q'\]"),
    "nested too deep": ("train.jsonl", GOOD + b"[" * 100_000, r"train\.jsonl:2: expected JSON"),
    "no UTF-8": (
        "train.jsonl",
        b'{"prompt": "q"}\n{"prompt": "\xff"}\n',
        r"train\.jsonl:2: expected UTF-8, got byte 0xff at position 12",
    ),
    "no lines": ("empty.jsonl", b"\n\n", r"empty\.jsonl has no rows"),
    "no list": ("empty.json", b"\n\n", r"empty\.json has no rows"),
    "lines as .json": (
        "rows.json",
        b'{"prompt": "q"}\n{"prompt": "r"}\n',
        r"rows\.json:2: .*Extra data; one object a line is a \.jsonl file",
    ),
    "an object as .json": ("rows.json", b'{"prompt": "q"}', r"rows\.json: expected a list of objects, got dict"),
    "no parquet": ("rows.parquet", b"not parquet at all", r"rows\.parquet: expected a parquet file"),
    "another kind": ("rows.csv", b"prompt\nq\n", r"rows\.csv must end in one of \.jsonl"),
}


@pytest.mark.parametrize(("name", "content", "said"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path / name)


def test_a_file_that_is_not_there_and_an_empty_list_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl is not there"):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="the list of rows has no rows"):
        read_examples([])


def test_a_wrong_row_of_a_parquet_file_is_named_by_its_number(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "q"}, {"prompt": ""}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet, row 1, column `prompt`: expected a question"):
        read_examples(tmp_path / "rows.parquet")


@pytest.mark.parametrize("source", [3, None])
def test_a_source_of_another_type_is_an_error(source: Any) -> None:
    with pytest.raises(DataError, match="source must be a path, a hub id, a data set or a list of rows, got"):
        read_examples(source)


def test_data_errors_are_value_errors_of_ours() -> None:
    assert issubclass(DataError, ValueError)
    assert issubclass(DataError, SdcoreError)
