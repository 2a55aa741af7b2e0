"""What the student and the teacher read, and what ends an answer: columns, chat templates, tokenizers' own tokens."""

from __future__ import annotations

import json
import warnings
from typing import Any
from unittest.mock import patch

import datasets  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, ByT5Tokenizer, LlamaTokenizer

from sdcore.contexts import Template, rendering, require_text, student_prompt_ids
from sdcore.contexts.rendering import answer_end
from sdcore.contexts.teacher_prompts import columns_of
from sdcore.data import read_examples
from sdcore.errors import ContextError
from sdcore.presets import Method
from sdcore.rollouts.samplers import completion_of, stop_ids
from sdcore.rollouts.window import given_completion
from sdcore.training.dry_run import dry_run
from sdcore.training.evaluation import evaluate
from sdcore.types import Example
from sdcore.world import CHECKPOINT
from tests.sdcore.contexts.chats import FAMILIES, QWEN, chat_tokenizer, example, group_of, user

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
    seen = dry_run(
        rows,
        tokenizer,
        Method(context="solution"),
        AutoConfig.from_pretrained(CHECKPOINT, vocab_size=1000, max_position_embeddings=4096),
    )
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


def test_a_column_that_a_context_reads_need_not_change_the_prompt() -> None:
    tokenizer, builder = of_template(QWEN), Template("{{ prompt }}{% for d in documents %} {{ d.title }}{% endfor %}")
    reads = columns_of(builder)
    assert reads == {"prompt", "documents"}
    with pytest.raises(ContextError, match="`tools` would have to change the prompt"):
        student_prompt_ids(example(user("q"), documents=DOCUMENTS, tools=TOOLS), tokenizer, read_elsewhere=reads)
    group = group_of(example(user("q"), documents=DOCUMENTS), tokenizer, read_elsewhere=reads)
    assert torch.equal(group.prompt_ids, student_prompt_ids(example(user("q")), tokenizer))
    (teacher,) = builder.condition(group, tokenizer).teacher_prompts
    assert DOCUMENTS[0]["title"] in tokenizer.decode(teacher)


def test_nothing_in_a_column_is_no_column() -> None:
    row: Example = example("q", tools=None, documents=[], chat_template_kwargs={}, images=None)
    require_text([row])
    assert len(student_prompt_ids(row, of_template(None)))


@pytest.mark.parametrize("nothing", ["", " ", "[]", "null"])
def test_nothing_written_as_text_is_no_column_either(nothing: str) -> None:
    tokenizer = of_template(READS_COLUMNS)
    for prompt in ("plain text", user("What is 3 + 4?")):
        plain = student_prompt_ids(Example(prompt=prompt), tokenizer)
        assert torch.equal(student_prompt_ids(Example(prompt=prompt, columns={"tools": nothing}), tokenizer), plain)


def test_a_null_that_json_spells_reaches_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"default": None}}}}]
    tokenizer, prompt = of_template(READS_COLUMNS), user("What is 3 + 4?")
    wanted = tokenizer.apply_chat_template(list(prompt), tools=tools, add_generation_prompt=True, return_dict=False)
    row = Example(prompt=prompt, columns={"tools": json.dumps(tools)})
    assert student_prompt_ids(row, tokenizer).tolist() == wanted


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


# What comes in front of a text, when a chat template that rendered it, or a hand, has written that already.
BEGINNINGS = {
    "one token": (lambda: that_adds("<bos> $A"), "<bos>"),
    "two tokens": (lambda: that_adds("<bos> <pad> $A"), "<bos><pad>"),
    "an end too": (lambda: that_adds("<bos> $A <|im_end|>"), "<bos>"),
    "none": (lambda: that_adds("$A"), "<bos>"),
    "Llama's add_bos_token": (lambda: llama(add_bos_token=True), "<s>"),
}


@pytest.mark.parametrize(("make", "written"), BEGINNINGS.values(), ids=BEGINNINGS)
def test_a_text_that_begins_as_texts_do_does_not_begin_twice(make: Any, written: str) -> None:
    tokenizer = make()
    row = example(f"{written}a a", "a", completion="a")
    once = [*tokenizer(written, add_special_tokens=False)["input_ids"]]
    group = group_of(row, tokenizer)
    assert group.prompt_ids.tolist()[: 2 * len(once)].count(once[0]) == 1
    assert group.prompt_ids.tolist() == tokenizer(f"{written}a a", add_special_tokens=False)["input_ids"]
    (teacher,) = Template("{{ prompt }} {{ privileged_context }}").condition(group, tokenizer).teacher_prompts
    assert teacher.tolist() == tokenizer(f"{written}a a a", add_special_tokens=False)["input_ids"]


def test_of_no_text_what_stands_before_it_is_left() -> None:
    tokenizer = that_adds("<bos> $A <|im_end|>")
    assert student_prompt_ids(example(""), tokenizer).tolist() == [tokenizer.bos_token_id]


def whose_text_ends_otherwise(template: str | None) -> Any:
    tokenizer = of_template(template)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return tokenizer


SPOKEN = "{% for m in messages %}{{ m.role + ': ' + m.content + END }}{% endfor %}{% if add_generation_prompt %}"
SPOKEN += "{{ 'assistant: ' }}{% endif %}"
ENDS = {
    "qwen": (FAMILIES["qwen"], "<|im_end|>"),
    "llama": (FAMILIES["llama"].replace("bos_token", "'<bos>'"), "<|eot_id|>"),
    "gemma": (FAMILIES["gemma"].replace("bos_token", "'<bos>'"), "<end_of_turn>"),
    "without a newline": (SPOKEN.replace("END", "'<|im_end|>'"), "<|im_end|>"),
    "behind a newline": (SPOKEN.replace("END", "'\\n<|im_end|>\\n'"), "<|im_end|>"),
    "the end of a text": (SPOKEN.replace("END", "eos_token"), "<|endoftext|>"),
    "no end": (SPOKEN.replace("END", "'\\n\\n'"), None),
    "no template": (None, None),
    "no answers": ("{% for m in messages if m.role == 'user' %}{{ '<|im_start|>' + m.content }}{% endfor %}", None),
    "other roles": ("{{ raise_exception('expected roles of ours') }}", None),
}


@pytest.mark.parametrize(("template", "end"), ENDS.values(), ids=ENDS)
def test_what_ends_an_answer_is_what_the_template_ends_it_with(template: str | None, end: str | None) -> None:
    tokenizer = whose_text_ends_otherwise(template)
    ends = {"<|endoftext|>", end} - {None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stops = stop_ids(torch.nn.Identity(), tokenizer)
    assert stops == sorted(tokenizer.convert_tokens_to_ids(list(ends)))


def test_the_end_is_looked_up_once_for_all_rows_and_again_where_the_template_changed() -> None:
    tokenizer = whose_text_ends_otherwise(SPOKEN.replace("END", "'\\n\\n'"))
    prompt, rendered = user("q"), []
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **kwargs: rendered.append(1) or render(*args, **kwargs)
    assert [answer_end(prompt, tokenizer) for _ in range(3)] == [tokenizer.eos_token_id] * 3
    assert len(rendered) == 1
    tokenizer.chat_template = QWEN
    assert answer_end(prompt, tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer_end("q", tokenizer) == tokenizer.eos_token_id


def test_columns_are_read_once() -> None:
    row = example(user("q"), tools=json.dumps(TOOLS))
    with patch.object(rendering, "_template_columns", wraps=rendering._template_columns) as read:
        student_prompt_ids(row, of_template(READS_COLUMNS))
    assert read.call_count == 1


@pytest.mark.parametrize(
    "template", [QWEN, SPOKEN.replace("END", "'<|eot_id|>\\n'"), SPOKEN.replace("END", "'\\n\\n'")]
)
def test_a_dry_run_ends_answers_where_sampling_does(template: str) -> None:
    tokenizer = whose_text_ends_otherwise(template)
    method, config = (
        Method(context="solution"),
        AutoConfig.from_pretrained(CHECKPOINT, vocab_size=1000, max_position_embeddings=4096),
    )
    for prompt in (user("q"), "q"):
        (preview,) = dry_run([example(prompt, "c", answer="7")], tokenizer, method, config).previews
        end = tokenizer.convert_ids_to_tokens(answer_end(prompt, tokenizer))
        assert preview.segments[-1].text == f"7{end}"


class Records:
    def __init__(self) -> None:
        self.stops: list[int] = []

    def sample(self, model: Any, prompts: Any, *, eos_token_id: Any, **options: Any) -> Any:
        self.stops += eos_token_id
        return [[completion_of([eos_token_id[0]], [0.0], frozenset(eos_token_id))] for _ in prompts]


def test_evaluation_stops_there() -> None:
    tokenizer, sampler = whose_text_ends_otherwise(QWEN), Records()
    evaluate(torch.nn.Identity(), tokenizer, [example(user("q"))], sampler=sampler)
    assert sampler.stops == sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


CHATS = [name for name, (template, _) in ENDS.items() if template and name not in ("no answers", "other roles")]


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("own_stops", [False, True])
@pytest.mark.parametrize("thinking", [None, False])
def test_an_answer_of_the_data_ends_there_and_nothing_behind_it_is_learned(
    name: str, own_stops: bool, thinking: bool | None
) -> None:
    template, end = ENDS[name]
    tokenizer = whose_text_ends_otherwise(template)
    stops = [7] if own_stops else stop_ids(torch.nn.Identity(), tokenizer)
    arguments = {} if thinking is None else {"enable_thinking": thinking}  # the prompt has more than the conversation
    row = example(user("q"), completion="42")
    prompt = student_prompt_ids(row, tokenizer, chat_template_kwargs=arguments)
    given = given_completion(
        row, tokenizer, prompt, stop_ids=stops, max_length=20, chat_template_kwargs=arguments
    ).completion_ids.tolist()
    newline = "\n" * (name == "behind a newline" and not own_stops)
    expected = tokenizer(f"42{newline}{end or '<|endoftext|>'}", add_special_tokens=False)["input_ids"]
    assert given == expected


@pytest.mark.parametrize("end", ["<|stop|>", "### End", "</turn>\\n"])
def test_an_end_that_is_no_token_is_said_not_to_be_used(end: str) -> None:
    tokenizer = whose_text_ends_otherwise(SPOKEN.replace("END", f"'{end}'"))
    with pytest.warns(UserWarning, match=r"ends an answer with .*no token of its own.*stop_token_ids"):
        assert stop_ids(torch.nn.Identity(), tokenizer) == [tokenizer.eos_token_id]


def test_a_table_of_tool_calls_is_rendered_as_its_rows_were() -> None:
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}, {"function": {"name": "now", "arguments": {"b": 1}}}]
    turns = [*user("q"), {"role": "assistant", "tool_calls": calls}, *user("r")]
    rows = datasets.Dataset.from_list([{"messages": turns, "tools": TOOLS}, {"messages": [*user("q")], "tools": []}])
    first, second = read_examples(rows)
    assert first.prompt == tuple(turns)
    tokenizer = of_template(
        "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
        "{% for m in messages %}{{ m.role }}{{ m.content or (m.tool_calls | tojson) }}{% endfor %}"
    )
    expected = tokenizer.apply_chat_template(turns, tools=TOOLS)["input_ids"]
    assert student_prompt_ids(first, tokenizer).tolist() == expected
    assert len(student_prompt_ids(second, tokenizer)) < 20
