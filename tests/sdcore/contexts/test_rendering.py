"""What the student and the teacher read: columns that belong to the prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sdcore.contexts import Template, require_text, student_prompt_ids
from sdcore.errors import ContextError
from sdcore.presets import Method
from sdcore.rollouts.window import given_completion
from sdcore.training.dry_run import dry_run
from sdcore.types import Example
from sdcore.world import CHECKPOINT
from tests.sdcore.contexts.chats import QWEN, chat_tokenizer, example, group_of, user

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"properties": {}}}},
]
DOCUMENTS = [{"title": "Sums", "text": "3 + 4 is 7."}]
READS_COLUMNS = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{- '<|im_end|>\\n' }}{% endif %}"
    "{%- for d in documents or [] %}{{ d.title + ': ' + d.text + '\\n' }}{% endfor %}" + QWEN
)


def of_template(template: str | None) -> Any:
    tokenizer = type(chat_tokenizer("qwen"))(tokenizer_object=chat_tokenizer("qwen")._tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


def as_arrow_has_it() -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = json.loads(json.dumps(TOOLS))
    tools[1]["function"]["parameters"]["properties"]["a"] = None  # each tool has every tool's keys
    return tools


COLUMNS = {
    "tools": ({"tools": TOOLS}, {"tools": TOOLS}),
    "tools as JSON": ({"tools": json.dumps(TOOLS)}, {"tools": TOOLS}),
    "tools of a table": ({"tools": as_arrow_has_it(), "documents": None}, {"tools": TOOLS}),
    "documents": ({"documents": DOCUMENTS}, {"documents": DOCUMENTS}),
    "the row's own arguments": (
        {"chat_template_kwargs": {"enable_thinking": False, "other": None}},
        {"enable_thinking": False},
    ),
    "all": (
        {"tools": TOOLS, "documents": DOCUMENTS, "chat_template_kwargs": '{"enable_thinking": false}'},
        {"tools": TOOLS, "documents": DOCUMENTS, "enable_thinking": False},
    ),
}


@pytest.mark.parametrize(("columns", "arguments"), COLUMNS.values(), ids=COLUMNS)
def test_columns_of_the_prompt_reach_the_chat_template_of_all_who_read_it(
    columns: dict[str, Any], arguments: dict[str, Any]
) -> None:
    tokenizer = of_template(READS_COLUMNS)
    row = example(user("What is 3 + 4?"), "It is 7.", completion="7", **columns)

    def rendered(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **arguments)["input_ids"]
        return ids

    student = student_prompt_ids(row, tokenizer, chat_template_kwargs={"enable_thinking": True})
    assert student.tolist() == rendered("What is 3 + 4?")
    builder = Template(chat_template_kwargs={"enable_thinking": True})
    (teacher,) = builder.condition(group_of(row, tokenizer), tokenizer).teacher_prompts
    assert teacher.tolist() == rendered("What is 3 + 4?\n\nIt is 7.")
    given = given_completion(row, tokenizer, student, stop_ids=[tokenizer.eos_token_id], max_length=9)
    assert given.completion_ids.tolist() == [*tokenizer("7")["input_ids"], tokenizer.eos_token_id]


def test_a_dry_run_counts_them() -> None:
    tokenizer = of_template(READS_COLUMNS)
    rows = [example(user("q"), "c"), example(user("q"), "c", tools=TOOLS)]
    from transformers import AutoConfig

    seen = dry_run(rows, tokenizer, Method(context="solution"), AutoConfig.from_pretrained(CHECKPOINT))
    assert seen.prompt_tokens[1] > seen.prompt_tokens[0]
    assert seen.teacher_tokens[1] - seen.prompt_tokens[1] == seen.teacher_tokens[0] - seen.prompt_tokens[0]


UNUSED = {
    "a template without tools": (QWEN, user("q"), {"tools": TOOLS}, "`tools`.*chat template"),
    "without documents": (QWEN, user("q"), {"documents": DOCUMENTS}, "`documents`.*chat template"),
    "plain text": (QWEN, "q", {"tools": TOOLS}, "`tools`.*plain text"),
    "arguments for plain text": (QWEN, "q", {"chat_template_kwargs": {"a": 1}}, "`chat_template_kwargs`.*plain text"),
    "no JSON": (READS_COLUMNS, user("q"), {"tools": "add, now"}, "`tools`.*'add, now'"),
    "no object": (READS_COLUMNS, user("q"), {"chat_template_kwargs": [1]}, "`chat_template_kwargs`.*object"),
    "no list": (READS_COLUMNS, user("q"), {"tools": 3}, "`tools`.*list"),
    "an argument of ours": (READS_COLUMNS, user("q"), {"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
}


@pytest.mark.parametrize(("template", "prompt", "columns", "says"), UNUSED.values(), ids=UNUSED)
def test_a_column_that_would_change_nothing_is_refused(
    template: str, prompt: Any, columns: dict[str, Any], says: str
) -> None:
    with pytest.raises(ContextError, match=rf"(?s)^train\.jsonl:7: .*{says}"):
        student_prompt_ids(example(prompt, **columns), of_template(template))


def test_nothing_in_a_column_is_no_column() -> None:
    row: Example = example("q", tools=None, documents=[], chat_template_kwargs={}, images=None)
    require_text([row])
    assert len(student_prompt_ids(row, of_template(None)))
