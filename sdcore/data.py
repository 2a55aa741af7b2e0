"""Turns rows into `Example`s, with errors that say which row and which column.

    examples = read_examples("train.jsonl")             # also .json, .parquet, a hub id, a Dataset, a DataFrame, dicts

A row has a question, `prompt` (text, or a conversation) or `messages` (a conversation), whose last turn is the user's;
and, where the method needs it, `privileged_context`, what only the teacher sees. `teacher_prompt` and `solution` are
other names of that column. Every other column reaches reward functions and templates as it is; `tools`, `documents` and
`chat_template_kwargs` go to the tokenizer's chat template too.

What differs from the obvious: a `solution` that serves as privileged context stays a column as well, because a reward
function wants to compare with it. Rows are validated all at once, before any work, and the first that is wrong is
named: `train.jsonl:12` is line 12, counted from 1; `train.parquet, row 12` is row 12, counted from 0, as a data frame
counts. A line that is blank is no row. An empty privileged context is none at all. Rows of data frames, and of data
sets `with_format("numpy")` or the like, are read as Python's own objects.

Not covered: streaming (all rows are kept in memory), and the meaning of other columns.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from .errors import ArgumentError, DataError
from .types import Example, Message, Prompt

if TYPE_CHECKING:
    import datasets  # type: ignore[import-untyped, unused-ignore]

    Rows: TypeAlias = datasets.Dataset | datasets.DatasetDict | Sequence[Mapping[str, Any]]

QUESTIONS: Final = ("prompt", "messages")
# What other libraries call them, for a hint.
ELSEWHERE: Final = ("question", "query", "problem", "instruction", "conversations")
PRIVILEGED: Final = ("privileged_context", "teacher_prompt", "solution")
READ_BY_REWARDS_TOO: Final = "solution"
FILES: Final = (".jsonl", ".ndjson", ".json", ".parquet")


def read_examples(
    source: str | Path | Rows, *, split: str = "train", limit: int | None = None, refused: list[str] | None = None
) -> list[Example]:
    """Reads the rows of a source, and checks them.

    Args:
        source: a `.jsonl` (one object a line), `.json` (a list of objects) or `.parquet` file; a folder that `datasets`
            wrote or can load; a data set's id on the hub, `owner/name` or `owner/name:config`; or what is in memory, a
            `datasets.Dataset`, a list of dicts, or a table that speaks Arrow, as pandas' and polars' do.
        split: of a data set that has several; files and lists have one.
        limit: read so many rows and no more. None: all.
        refused: gets what is said of the rows that cannot be used, which are left out. None: the first raises.

    Raises `DataError` (a `ValueError`) with the row and the column for what cannot be used, for a source that is not
    there and for one without rows, and `ArgumentError` for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit must be at least 1, or None for all rows, got {limit}")
    name, rows = _open(source, split)
    examples = []
    for where, row in islice(rows, limit):
        try:
            examples.append(example_of(row, where))
        except DataError as error:
            if refused is None:
                raise
            refused.append(str(error))
    if not examples:
        raise DataError(f"{name} has no rows{' that can be used: ' + refused[0] if refused else ''}")
    return examples


def example_of(row: Mapping[str, Any], source: str) -> Example:
    """Makes an `Example` of a row; `source` says where it stands. Raises `DataError`, which names source and column."""
    if not isinstance(row, Mapping):
        raise DataError(f"{source}: a row must be an object with columns, got {_described(row)}")
    odd = [key for key in row if not isinstance(key, str)]
    if odd:
        raise DataError(f"{source}: names of columns must be text, got {odd[0]!r}")
    # A data set's rows have every column, null where there is nothing.
    present = {name: value for name, value in row.items() if value is not None}
    for name in (*QUESTIONS, *PRIVILEGED):
        _check_unicode(present.get(name), f"{source}, column `{name}`")
    question = _the_one(QUESTIONS, present, source)
    if question is None:
        raise DataError(f"{source}: expected a column `prompt` or `messages`, got {_columns(row)}")
    privileged = _the_one(PRIVILEGED, present, source)
    kept = {READ_BY_REWARDS_TOO} if READ_BY_REWARDS_TOO in present else set()
    columns = {name: value for name, value in row.items() if name not in {*QUESTIONS, *PRIVILEGED} - kept}
    return Example(
        prompt=_prompt(present[question], f"{source}, column `{question}`", may_be_text=question == "prompt"),
        privileged_context=None
        if privileged is None
        else _privileged(present[privileged], f"{source}, column `{privileged}`"),
        columns=columns,
        source=source,
    )


def _open(source: object, split: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """Returns the source's name, and its rows with where each of them stands."""
    if isinstance(source, str | Path):
        path, suffix = Path(source), Path(source).suffix.lower()
        if path.is_dir():
            return str(path), _numbered(_load(path, split), f"{path} ({split})")
        if suffix in FILES:
            if not path.is_file():
                raise DataError(f"{path} is not there: expected a file, got a path that leads to none")
            read = {".json": _json_rows, ".parquet": _parquet_rows}.get(suffix, _json_lines)
            return str(path), read(path)
        if path.is_file():
            raise DataError(
                f"{path} must end in one of {', '.join(FILES)} to be read as data, got {suffix or 'no end'!r}"
            )
        return str(source), _numbered(_load_from_hub(str(source), split), f"{source} ({split})")
    if isinstance(source, Mapping):  # a DatasetDict, too, is one
        if any(name in source for name in QUESTIONS):
            raise DataError(
                "source must be a list of rows or a data set, got a dict of columns: a row goes into a list, and "
                f"datasets.Dataset.from_dict takes columns; this one has {', '.join(f'`{name}`' for name in source)}"
            )
        return "the data set", _numbered(_split_of(source, split, "the data set"), f"data set ({split})")
    if not isinstance(source, Iterable) and not hasattr(source, "__arrow_c_stream__"):
        raise DataError(f"source must be a path, a hub id, a data set or a list of rows, got {_described(source)}")
    return "the list of rows", _numbered(source, "rows")


def _numbered(rows: Any, name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(_python_rows(rows, name)))


def _python_rows(rows: Any, name: str) -> Iterable[Any]:
    """Returns a table's rows, and a data set's that would give arrays or tensors, as Python's own objects."""
    if hasattr(rows, "with_format"):
        shown = dict(getattr(rows, "format", {}))  # a stream's has no columns to hide
        if shown.pop("type", None) != "custom":  # a function of the user's own
            shown.pop("format_kwargs", None)
            return cast(Iterable[Any], rows.with_format(None, **shown))
    elif hasattr(rows, "__arrow_c_stream__"):
        pyarrow = importlib.import_module("pyarrow")
        try:
            return cast(Iterable[Any], pyarrow.table(rows).to_pylist())
        except pyarrow.ArrowException as error:
            raise DataError(f"{name}: expected columns of one type each, got an error: {error}") from error
    return cast(Iterable[Any], rows)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # By bytes: only "\n" ends a line, not the Unicode separators that JSON texts may hold.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            text = _decoded(line, where).rstrip()
            if text:
                yield where, _parsed(text, where)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = _decoded(path.read_bytes(), str(path))
    try:
        rows = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; one object a line is a .jsonl file" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}:{error.lineno}: expected JSON, got an error at column {error.colno}: {error.msg}{hint}"
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, got {_described(rows)}")
    yield from _numbered(rows, str(path))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches()
            yield from _numbered((row for batch in batches for row in batch.to_pylist()), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a parquet file, got an error: {error}") from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows puts a mark before the first line
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8, got byte 0x{raw[error.start]:02x} at position {error.start}"
        ) from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected JSON, got an error at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{where}: expected JSON that is not nested a thousand deep") from error


def _load(path: Path, split: str) -> Any:
    """Loads a folder: one that `Dataset.save_to_disk` wrote, or one of data files."""
    library = importlib.import_module("datasets")
    saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        loaded = library.load_from_disk(str(path)) if saved else library.load_dataset(str(path))
    except Exception as error:
        raise DataError(f"{path}: expected a folder that `datasets` can load, got {_failure(error)}") from error
    return _split_of(loaded, split, str(path)) if isinstance(loaded, Mapping) else loaded


def _load_from_hub(name: str, split: str) -> Any:
    library = importlib.import_module("datasets")
    identifier, _, config = name.partition(":")
    try:
        splits = library.load_dataset(identifier, config or None)
    except Exception as error:
        raise DataError(
            f"{name!r}: expected a file that ends in one of {', '.join(FILES)}, a folder, or the id of a data set on "
            f"the hub; there is no such file or folder here, and the hub gave {_failure(error)}"
        ) from error
    return _split_of(splits, split, name)


def _split_of(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(f"split must be one of those of {name}, {', '.join(map(str, splits)) or 'none'}, got {split!r}")
    return splits[split]


def _the_one(names: Sequence[str], present: Mapping[str, Any], source: str) -> str | None:
    """Returns which of the columns that mean the same there is; None if there is none."""
    columns = [name for name in names if name in present]
    if len(columns) > 1:
        raise DataError(
            f"{source}: expected one of the columns {', '.join(f'`{name}`' for name in names)}, which mean the same, "
            f"got {' and '.join(f'`{name}`' for name in columns)} (rename what is meant for reward functions)"
        )
    return columns[0] if columns else None


def _prompt(value: object, where: str, *, may_be_text: bool) -> Prompt:
    if isinstance(value, str) and may_be_text:
        if not value.strip():
            raise DataError(f"{where}: expected a question, got {value!r}")
        return value
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        expected = "text or a list of messages" if may_be_text else "a list of messages"
        raise DataError(f"{where}: expected {expected}, got {_described(value)}")
    messages = tuple(_message(message, f"{where}, message {i}") for i, message in enumerate(value))
    if not messages:
        raise DataError(f"{where}: expected at least one message, got an empty list")
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{where}: the last turn must be the user's, got one of {messages[-1]['role']!r} (an answer to learn from "
            "goes to a column of its own, such as `completion` or `privileged_context`)"
        )
    if not _says_something(messages[-1]["content"]):
        raise DataError(f"{where}: expected a question in the last turn, got {messages[-1]['content']!r}")
    return messages


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f'{where}: expected {{"role": ..., "content": ...}}, got {_described(message)}')
    given = {
        key: value if key == "content" else without_null(value) for key, value in message.items() if value is not None
    }
    role = given.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{where}: expected a `role` that is text, got {_key(given, 'role')}{_sharegpt(given)}")
    if "content" not in given and given.get("tool_calls"):
        return given  # an assistant's turn that only calls tools
    content = given.get("content")
    if isinstance(content, str):
        return given
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise DataError(f"{where}: expected a `content` that is text or a list of parts, got {_key(given, 'content')}")
    return given | {"content": [_part(part, f"{where}, part {i}") for i, part in enumerate(content)]}


def without_null(value: Any) -> Any:
    """Takes away the keys that Arrow adds: it gives every object, at any depth, those that any of a column has."""
    if isinstance(value, dict):
        return {key: without_null(entry) for key, entry in value.items() if entry is not None}
    return [without_null(entry) for entry in value] if isinstance(value, list) else value


def _part(part: object, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise DataError(f'{where}: expected {{"type": "text", "text": ...}} or another type, got {_described(part)}')
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise DataError(f"{where}: expected a `text` that is text, got {_key(part, 'text')}")
    return {key: value for key, value in part.items() if value is not None}


def _says_something(content: str | list[dict[str, Any]]) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    return any(part["type"] != "text" or part["text"].strip() for part in content)


def _privileged(value: object, where: str) -> str | None:
    """Returns the text; of a conversation, as other libraries have it in this column, the texts of its turns."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, Sequence) and value and all(isinstance(turn, Mapping) for turn in value):
        turns = [_message(turn, f"{where}, message {i}") for i, turn in enumerate(value)]
        texts = [text for turn in turns for text in _texts(turn.get("content", ""), where)]
        return "\n".join(texts) or None
    raise DataError(f"{where}: expected text or a list of messages, got {_described(value)}")


def _check_unicode(value: object, where: str) -> None:
    """Refuses half a character, which JSON can spell and no tokenizer takes."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise DataError(f"{where}: expected Unicode text, got half a surrogate pair, {half!r}") from error
    elif isinstance(value, Mapping | list | tuple):
        for entry in value.values() if isinstance(value, Mapping) else value:
            _check_unicode(entry, where)


def _texts(content: str | list[dict[str, Any]], where: str) -> list[str]:
    if isinstance(content, str):
        return [content] if content.strip() else []
    for part in content:
        if part["type"] != "text":
            raise DataError(f"{where}: expected text, which is all that can be put into a prompt, got {part['type']!r}")
    return [cast(str, part["text"]) for part in content if part["text"].strip()]


def _columns(row: Mapping[str, Any]) -> str:
    """Lists the row's columns, with what may have been meant."""
    if not row:
        return "a row without columns"
    empty = [name for name in QUESTIONS if name in row]
    if empty:
        return f"null in {' and '.join(f'`{name}`' for name in empty)}"
    alike = [name for name in row if difflib.get_close_matches(name.lower(), [*QUESTIONS, *ELSEWHERE], cutoff=0.75)]
    turns = row[alike[0]] if alike else None
    more = _sharegpt(turns[0]) if isinstance(turns, list | tuple) and turns else ""
    return ", ".join(f"`{name}`" for name in row) + (f" (rename `{alike[0]}`?){more}" if alike else "")


def _sharegpt(turn: object) -> str:
    """Says what to do with a turn in ShareGPT's words; nothing of another."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return ""
    return (
        "; ShareGPT's `from` and `value` are `role` and `content` here, 'human' and 'gpt' are 'user' and 'assistant', "
        "in a column `messages` that ends with the question"
    )


def _key(given: Mapping[str, Any], key: str) -> str:
    return _described(given[key]) if key in given else f"none, only {', '.join(map(repr, given)) or 'nothing'}"


def _described(value: object) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _failure(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}"
