"""Templates: what they see, what they are refused, and what of a completion is thinking."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from sdcore.contexts import Custom, Demonstration, Solution, SuccessOrFeedback, Template, without_thinking
from sdcore.contexts import templates as texts
from sdcore.errors import ArgumentError, ContextError
from tests.sdcore.contexts.chats import chat_tokenizer, example, group_of


def rendered(text: str, prompt: str = "q", **columns: Any) -> str:
    return texts.render(text, {"prompt": prompt, "privileged_context": "c"}, columns, source="train.jsonl:7")


ESCAPES = {
    "class of a string": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ cycler.__init__.__globals__ }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "by filter": "{{ ''|attr('__class__') }}",
    "by format": "{{ '{0.__class__}'.format('') }}",
    "by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "by join of names": "{{ ''['__cla' ~ 'ss__'] }}",
    "of the template itself": "{{ self.__init__.__globals__ }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "change of a list": "{{ tags.append('x') }}",
    "change of a dict": "{{ table.update({'a': 2}) }}",
    "a very long range": "{% for i in range(10 ** 9) %}x{% endfor %}",
}


@pytest.mark.parametrize("attack", ESCAPES.values(), ids=ESCAPES)
def test_a_template_gets_at_nothing_but_its_data(attack: str) -> None:
    with pytest.raises(ContextError, match=r"^train\.jsonl:7: the template "):
        rendered("{{ prompt }}" + attack, tags=["t"], table={"a": 1})


def test_a_builder_refuses_the_same_and_names_the_row() -> None:
    tokenizer = chat_tokenizer("qwen")
    builder = Template("{{ prompt }}{{ ''.__class__.__mro__ }}")
    with pytest.raises(ContextError, match=r"train\.jsonl:7: the template was refused: SecurityError: .*__class__"):
        builder.condition(group_of(example(), tokenizer), tokenizer)


def test_a_chat_template_gets_at_nothing_either() -> None:
    tokenizer = type(chat_tokenizer("qwen"))(tokenizer_object=chat_tokenizer("qwen")._tokenizer)
    tokenizer.chat_template = "{{ messages[0].content.__class__.__mro__ }}"
    with pytest.raises(ContextError, match=r"train\.jsonl:7: the chat template refused the conversation: .*__class__"):
        group_of(example(({"role": "user", "content": "q"},)), tokenizer)


class Opens:
    """An object with a method that a template must not call."""

    def remove(self) -> str:
        raise AssertionError("the template called a method")

    def __str__(self) -> str:
        raise AssertionError("the template printed an object")


@pytest.mark.parametrize("value", [Opens(), [Opens()], {"a": Opens()}, type("Text", (str,), {})("text")])
def test_objects_that_are_not_plain_data_are_not_given_to_a_template(value: object) -> None:
    with pytest.raises(
        ContextError, match=r"'column' is undefined; .*; left out, since they are no plain data: `column`$"
    ):
        rendered("{{ prompt }}{{ column }}", column=value)


def test_columns_of_plain_data_are_given_to_a_template() -> None:
    columns = {"n": 3, "tags": ["a", "b"], "meta": {"day": datetime.date(2026, 1, 2)}, "none": None}
    shown = rendered("{{ prompt }} {{ n }} {{ tags | join('+') }} {{ meta.day }} {{ none is none }}", **columns)
    assert shown == "q 3 a+b 2026-01-02 True"


def test_a_column_does_not_replace_the_question() -> None:
    assert rendered("{{ prompt }} {{ privileged_context }}", prompt="question", privileged_context="x") == "question c"


def test_a_variable_that_nobody_set_is_an_error_with_the_names_that_there_are() -> None:
    with pytest.raises(ContextError, match=r"train\.jsonl:7: .*'hint' is undefined; there are `answer`, `privileged_c"):
        rendered("{{ prompt }} {{ hint }}", answer=7)
    assert rendered("{{ prompt }}{% if hint is defined %} {{ hint }}{% endif %}") == "q"


def test_a_template_has_nothing_that_draws_random_numbers() -> None:
    with pytest.raises(ContextError, match="'lipsum' is undefined"):
        rendered("{{ prompt }}{{ lipsum() }}")
    with pytest.raises(ArgumentError, match="No filter named 'random'"):
        Template("{{ prompt }}{{ [1, 2] | random }}")


def test_an_operation_that_fails_names_the_row() -> None:
    with pytest.raises(ContextError, match=r"train\.jsonl:7: the template raised ZeroDivisionError"):
        rendered("{{ prompt }}{{ 1 / 0 }}")


def test_braces_in_data_are_text() -> None:
    assert (
        rendered("{{ prompt }} {{ privileged_context }}", prompt="{{ 1 / 0 }} {% raw %}") == "{{ 1 / 0 }} {% raw %} c"
    )


def test_exactly_question_space_context_is_possible() -> None:
    assert rendered("{{ prompt }} {{ privileged_context }}") == "q c"
    assert rendered("{{ prompt }} {{ privileged_context }}\n") == "q c"  # a YAML block's newline


WRONG = {
    "syntax": ("{{ prompt", r"text must be a Jinja template, got an error in line 1"),
    "no question": ("{{ privileged_context }}", r"text must show \{\{ prompt \}\}, got one that reads `privileged_c"),
    "single braces": ("{prompt} {privileged_context}", r"reads no variable; Jinja's braces are double"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_template_is_refused_before_any_work(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Template(text)


def test_a_builder_refuses_a_template_that_does_not_show_its_context() -> None:
    for build in (
        lambda t: Demonstration(template=t),
        lambda t: Solution(template=t),
        lambda t: Custom(len, template=t),
    ):
        with pytest.raises(ArgumentError, match=r"template must show \{\{ privileged_context \}\}"):
            build("{{ prompt }}")
    with pytest.raises(ArgumentError, match=r"template must show \{\{ feedback \}\}, got one that reads `attempt`"):
        SuccessOrFeedback(template="{{ prompt }} {{ attempt }}")
    SuccessOrFeedback(template="{{ prompt }} {{ attempt }}", use_feedback=False)
    with pytest.raises(ArgumentError, match="template must be text, got int"):
        Demonstration(template=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["PLAIN", "DEMONSTRATION", "SOLUTION", "SUCCESS_OR_FEEDBACK"])
def test_default_texts_begin_with_the_question(name: str) -> None:
    assert getattr(texts, name).startswith("{{ prompt }}")


def test_the_text_for_attempts_and_feedback_has_a_part_for_each_that_there_is() -> None:
    def shown(attempt: str | None, feedback: str | None) -> str:
        variables = {"prompt": "QUESTION", "attempt": attempt, "feedback": feedback}
        return texts.render(texts.SUCCESS_OR_FEEDBACK, variables, {}, source="here")

    end = "\n\nNow solve the question at the top."
    attempt, feedback = "\n\nAn earlier attempt that solved this:\n\nA", "\n\nWhat came back from checking another"
    assert shown("A", None) == f"QUESTION{attempt}{end}"
    assert shown(None, "F").startswith(f"QUESTION{feedback}")
    assert shown("A", "F").startswith(f"QUESTION{attempt}{feedback}")
    assert shown("A", "F").endswith(f"\n\nF{end}")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no thinking", "no thinking"),
        ("<think>a\nb</think>\n\nanswer", "answer"),
        ("first <think>a</think> second <think>b</think> third", "first  second  third"),
        ("the prompt opened it\n</think>\nanswer", "answer"),
        ("one</think>two</think>answer", "answer"),
        ("<think>a <think>nested</think> rest</think>answer", "answer"),
        ("answer <think>cut off", "answer"),
        ("<think>only this was ever said", ""),
        ("a < think > b", "a < think > b"),
    ],
)
def test_thinking_blocks_are_taken_out(text: str, left: str) -> None:
    assert without_thinking(text) == left
