"""What the student and the teacher read: columns that belong to the prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, ByT5Tokenizer, LlamaTokenizer

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


def that_adds(single: str) -> Any:
    model = Tokenizer.from_str(chat_tokenizer("qwen")._tokenizer.to_str())
    special = [(token, model.token_to_id(token)) for token in ("<bos>", "<pad>", "<|im_end|>")]
    model.post_processor = processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1 <|im_end|>:1", special_tokens=special
    )
    return type(chat_tokenizer("qwen"))(tokenizer_object=model, bos_token="<bos>", eos_token="<|im_end|>")


def llama(**options: Any) -> Any:
    return LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581a": 3, "a": 4}, merges=[], **options)


TOKENIZERS = {
    "an end": (lambda: that_adds("$A <|im_end|>"), []),
    "a beginning and an end": (lambda: that_adds("<bos> $A <|im_end|>"), ["<bos>"]),
    "two ends": (lambda: that_adds("<bos> $A <|im_end|> <pad>"), ["<bos>"]),
    "a beginning": (lambda: that_adds("<bos> $A"), ["<bos>"]),
    "Llama's add_eos_token": (lambda: llama(add_eos_token=True), []),
    "one in Python": (ByT5Tokenizer, []),
}


@pytest.mark.parametrize(("make", "before"), TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("spelled", [False, True])
def test_a_plain_prompt_does_not_end_before_the_answer(make: Any, before: list[str], spelled: bool) -> None:
    tokenizer = make()
    text = "a a" + tokenizer.eos_token * spelled
    inner = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer.convert_tokens_to_ids(before)
    row = example(text, "a", completion="a")
    group = group_of(row, tokenizer)
    assert group.prompt_ids.tolist() == [*first, *inner]
    (teacher,) = Template("{{ prompt }} {{ privileged_context }}").condition(group, tokenizer).teacher_prompts
    assert teacher.tolist() == [*first, *tokenizer(text + " a", add_special_tokens=False)["input_ids"]]
    stops = [tokenizer.eos_token_id]
    given = given_completion(row, tokenizer, group.prompt_ids, stop_ids=stops, max_length=9).completion_ids.tolist()
    assert given == [*tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_of_no_text_what_stands_before_it_is_left() -> None:
    tokenizer = that_adds("<bos> $A <|im_end|>")
    assert student_prompt_ids(example(""), tokenizer).tolist() == [tokenizer.bos_token_id]
