"""Turns a prompt's text into its token ids, and puts the privileged context into a conversation.

A conversation is rendered by the tokenizer's chat template, with the generation prompt; plain text is tokenized as it
is, with the special tokens that the tokenizer puts before a text, once, and without those behind one. Both for the
student and for the teacher, so their sequences begin with the same tokens up to where the texts part.

Only the last user turn is changed, and only by adding to it where the template begins with the question. System turns,
earlier turns and parts of other types (images) are left as they are. transformers runs chat templates in Jinja's
sandbox too.

Not covered: control tokens that a question or a context spells out (`<|im_end|>` in a verifier's output ends the turn,
as it does everywhere in transformers). Images, sound and other inputs beside the tokens, in parts of a message or in
columns such as `pixel_values`: what runs the model takes token ids alone, so they are refused, by row.

Columns that chat templates read, `tools`, `documents` and a row's own `chat_template_kwargs`, go to the template, as
lists and objects or as their JSON. A row whose `tools` or `documents` change nothing is refused, unless a builder's
template reads them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final

import jinja2
import torch
from torch import Tensor

from ..data import without_null
from ..errors import ContextError, UnsupportedModelError
from ..types import Example, Message, Prompt

# Columns that processors of models which see or hear make or read, as data sets for them have it.
MODEL_INPUTS: Final = frozenset(
    {
        *("image", "images", "pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw"),
        *("video", "videos", "pixel_values_videos", "video_grid_thw"),
        *("audio", "audios", "input_features", "feature_attention_mask"),
    }
)

# What else a chat template reads of a row, and what it is.
TEMPLATE_INPUTS: Final[Mapping[str, type]] = {"chat_template_kwargs": dict, "tools": list, "documents": list}


def require_text(examples: Sequence[Example]) -> None:
    """Raises `UnsupportedModelError`, with row and columns, for the first example that is more than text."""
    for example in examples:
        columns = [name for name, value in example.columns.items() if name in MODEL_INPUTS and _is_there(value)]
        if columns:
            raise UnsupportedModelError(
                f"{example.source}: {', '.join(f'`{name}`' for name in columns)} would have to go to the model, and "
                "the passes over shared prefixes take token ids alone: expected text (give a column that is for reward "
                "functions another name)"
            )
        if not isinstance(example.prompt, str):
            _check_parts(example.prompt, example.source)


def _is_there(value: object) -> bool:
    """True where a column holds something: a data set's rows have every column, null or an empty list for nothing."""
    return value is not None and not (isinstance(value, list | dict) and not value)


def student_prompt_ids(
    example: Example,
    tokenizer: Any,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    read_elsewhere: Collection[str] = (),
) -> Tensor:
    """Returns what the student reads, with the generation prompt: (P,) int64, on the CPU.

    `chat_template_kwargs` go to the chat template, such as `{"enable_thinking": False}`; give a builder the same ones.
    The example's own come before them. Raises `ContextError`, which names the row, where the chat template refuses the
    conversation or does not use the row's `tools` or `documents`, and `UnsupportedModelError` for examples with images.
    Columns that are `read_elsewhere`, as by a builder's template (`columns_of`), need not be used.
    """
    require_text([example])
    columns = _template_columns(example)
    arguments = _merged(chat_template_kwargs, columns)
    ids = prompt_ids(example.prompt, tokenizer, chat_template_kwargs=arguments, source=example.source)
    for name in columns:
        if name in read_elsewhere:
            continue
        if isinstance(example.prompt, str):
            why = "the prompt is plain text, which no chat template renders"
        elif name in arguments and torch.equal(ids, _without(name, example, tokenizer, arguments)):
            why = "the tokenizer's chat template renders the same prompt without it"
        else:
            continue
        raise ContextError(
            f"{example.source}: column `{name}` would have to change the prompt, and {why} (give a column that is for "
            "reward functions another name)"
        )
    return ids


def template_arguments(example: Example, chat_template_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what the chat template gets beside the conversation: the run's arguments, then what the row has.

    Raises `ContextError`, which names row and column.
    """
    return _merged(chat_template_kwargs, _template_columns(example))


def _merged(chat_template_kwargs: Mapping[str, Any] | None, columns: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(chat_template_kwargs or {})
    for name, value in columns.items():
        arguments |= value if TEMPLATE_INPUTS[name] is dict else {name: value}
    return arguments


def _template_columns(example: Example) -> dict[str, Any]:
    """Returns the columns that are for the chat template and hold something, by their names."""
    columns: dict[str, Any] = {}
    for name, expected in TEMPLATE_INPUTS.items():
        value = example.columns.get(name)
        if isinstance(value, str):  # as data sets have it whose tables know no nested columns
            with suppress(json.JSONDecodeError):
                value = json.loads(value) if value.strip() else None
        else:
            value = without_null(value)
        if not _is_there(value):
            continue
        if not isinstance(value, expected):
            kind = "an object" if expected is dict else "a list"
            raise ContextError(f"{example.source}: column `{name}` must be {kind}, or its JSON, got {value!r:.80}")
        columns[name] = value
    return columns


def _without(name: str, example: Example, tokenizer: Any, arguments: Mapping[str, Any]) -> Tensor:
    others = {key: value for key, value in arguments.items() if key != name}
    return prompt_ids(example.prompt, tokenizer, chat_template_kwargs=others, source=example.source)


def prompt_ids(
    prompt: Prompt, tokenizer: Any, *, chat_template_kwargs: Mapping[str, Any] | None = None, source: str
) -> Tensor:
    """Returns a prompt as the model reads it: (T,) int64, on the CPU. Raises as `student_prompt_ids`."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if not isinstance(prompt, str):
        _check_parts(prompt, source)
    try:
        if isinstance(prompt, str):
            encoded = tokenizer(prompt, return_special_tokens_mask=True)
            ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
            while len(ids) > 1 and added[len(ids) - 1]:  # an end of the text would end it before the answer
                ids.pop()
            before = added.index(0) if 0 in added else 0
            if before and ids[before : 2 * before] == ids[:before]:  # a text that a chat template rendered has it
                del ids[:before]
        else:
            ids = tokenizer.apply_chat_template(
                [dict(message) for message in prompt],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **(chat_template_kwargs or {}),
            )["input_ids"]
    except (jinja2.TemplateError, ValueError, TypeError) as error:  # half a surrogate pair is a TypeError
        who = "tokenizer refused the text" if isinstance(prompt, str) else "chat template refused the conversation"
        raise ContextError(f"{source}: the {who}: {error}") from error
    if not len(ids):
        raise ContextError(f"{source}: expected a prompt of at least one token, got none from {prompt!r}")
    return torch.tensor(ids, dtype=torch.int64)


def turn_end(tokenizer: Any) -> int | None:
    """Returns the token with which the chat template ends an answer; None where there is no template, or no end.

    Warns where it ends one with a text that is no token of its own, which sampling cannot stop at.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    return _turn_end(tokenizer, str(template), len(tokenizer)) if template else None


@lru_cache(maxsize=8)  # asked for every row of the data, of one tokenizer, to which template and tokens may be added
def _turn_end(tokenizer: Any, template: str, size: int) -> int | None:
    del template, size
    answer = "forty-two"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        _, shown, behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(answer)
    except (jinja2.TemplateError, ValueError, TypeError):  # it wants another conversation; rows will tell
        return None
    behind = behind.strip() if shown else ""
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    own = tokenizer.added_tokens_decoder
    end = next((int(token) for token in ids if token in own), None)
    if behind and end is None:
        warnings.warn(
            f"the chat template ends an answer with {behind!r:.80}, which is no token of its own: completions do not "
            "end there (stop_token_ids says where they do)",
            stacklevel=4,
        )
    return end


def answer_end(prompt: Prompt, tokenizer: Any) -> int | None:
    """Returns the token that ends an answer: the chat template's; where that has none, and in plain text, a text's."""
    end = None if isinstance(prompt, str) else turn_end(tokenizer)
    return tokenizer.eos_token_id if end is None else end


def question_of(prompt: Prompt) -> str:
    """Returns the text of the last user turn; of a turn with several parts, those that are text."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def with_context(prompt: Prompt, place: Callable[[str], str]) -> Prompt:
    """Returns the prompt whose last user turn says `place(question)` in place of the question.

    Where that adds to the question, the addition goes to the end of the turn: into its last part, or, where that is an
    image, into a new one behind it. Where it does not, the text stands in place of the turn's first text.
    """
    question = question_of(prompt)
    text = place(question)
    if isinstance(prompt, str):
        return text
    last = prompt[-1]
    content = last["content"]
    if isinstance(content, str):
        content = text
    elif text.startswith(question):
        content = _added(content, text.removeprefix(question))
    else:
        content = _replaced(content, text)
    return (*prompt[:-1], {**last, "content": content})


def _added(parts: list[Message], text: str) -> list[Message]:
    if parts and parts[-1]["type"] == "text":
        return [*parts[:-1], {**parts[-1], "text": parts[-1]["text"] + text}]
    return [*parts, {"type": "text", "text": text.lstrip()}]


def _replaced(parts: list[Message], text: str) -> list[Message]:
    first = next(i for i, part in enumerate(parts) if part["type"] == "text")
    others = [part for part in parts[first + 1 :] if part["type"] != "text"]
    return [*parts[:first], {**parts[first], "text": text}, *others]


def _check_parts(prompt: tuple[Message, ...], source: str) -> None:
    for i, message in enumerate(prompt):
        content = message.get("content", "")
        for part in () if isinstance(content, str) else content:
            if part["type"] != "text":
                raise UnsupportedModelError(
                    f"{source}: message {i} has a part of type {part['type']!r}, and the passes over shared prefixes "
                    "take token ids alone: expected text"
                )
