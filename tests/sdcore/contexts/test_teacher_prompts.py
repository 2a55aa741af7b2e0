"""What the teacher of a completion reads: which context, where in the prompt, and for which completions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import sdcore.world
from sdcore.contexts import (
    ContextBuilder,
    Custom,
    Demonstration,
    No,
    Solution,
    SuccessOrFeedback,
    Template,
    check_examples,
    join_feedback,
    student_prompt_ids,
    with_context,
)
from sdcore.contexts.teacher_prompts import COUNTS
from sdcore.errors import ArgumentError, ContextError, DataError, UnsupportedModelError
from sdcore.prefix import plan
from sdcore.types import Conditioned, Example, Group, Message, Prompt
from sdcore.world import episodes
from tests.sdcore.contexts.chats import FAMILIES, chat_tokenizer, example, group_of, rollout, user

SYSTEM: Message = {"role": "system", "content": "You are a careful assistant."}
TURNS: tuple[Message, ...] = (
    {"role": "user", "content": "What is the sum of the first ten odd numbers?"},
    {"role": "assistant", "content": "100, I am sure of it."},
    {"role": "user", "content": "Write a function that reverses a list, and a test of the function."},
)
QUESTION = TURNS[-1]["content"]
PLAIN = "{{ prompt }} {{ privileged_context }}"


def texts(conditioned: Conditioned, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in conditioned.teacher_prompts]


def conditioned_texts(builder: ContextBuilder, group: Group, tokenizer: Any) -> list[str]:
    return texts(builder.condition(group, tokenizer), tokenizer)


def attempts_group(tokenizer: Any, *rollouts: Any, **columns: Any) -> Group:
    return group_of(example(user(QUESTION), **columns), tokenizer, *rollouts)


def prompt_for(family: str) -> tuple[Message, ...]:
    return TURNS if family == "gemma" else (SYSTEM, *TURNS)


# Where the context goes.


@pytest.mark.parametrize("family", FAMILIES)
def test_context_goes_to_the_end_of_the_last_user_turn_and_everything_before_it_is_shared(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    group = group_of(example(prompt_for(family), context="def reverse(items): ..."), tokenizer, *[rollout("a")] * 3)
    conditioned = Template(PLAIN).condition(group, tokenizer)
    student = tokenizer.decode(group.prompt_ids)
    assert set(texts(conditioned, tokenizer)) == {student.replace(QUESTION, f"{QUESTION} def reverse(items): ...")}
    assert len({id(ids) for ids in conditioned.teacher_prompts}) == 1

    # Only what follows the question, the end of the turn and the generation prompt, is not shared.
    after = student[student.index(QUESTION) + len(QUESTION) :]
    private = len(tokenizer(after, add_special_tokens=False)["input_ids"])
    made = plan([group.prompt_ids], [[[1, 2]] * 3], [list(conditioned.teacher_prompts)])
    shared = made.teacher[0].shared
    assert shared == len(group.prompt_ids) - private
    assert shared / len(group.prompt_ids) > 0.85
    assert conditioned.counts["context/shared_tokens"] == 3 * shared
    assert conditioned.counts["context/prompt_tokens"] == 3 * len(group.prompt_ids)
    assert conditioned.counts["context/teacher_tokens"] == 3 * len(conditioned.teacher_prompts[0])


def test_context_before_the_question_is_possible_and_shows_in_the_shared_tokens() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = group_of(example((SYSTEM, *user(QUESTION)), context="a hint"), tokenizer)
    counts = Template("Hint: {{ privileged_context }}\n{{ prompt }}").condition(group, tokenizer).counts
    assert 0 < counts["context/shared_tokens"] < counts["context/prompt_tokens"] / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_text_is_continued_and_gets_no_chat_template(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    group = group_of(example("The sum of 3 and 4 is", context="(7)"), tokenizer)
    assert tokenizer.decode(group.prompt_ids) == "The sum of 3 and 4 is"
    assert conditioned_texts(Template(PLAIN), group, tokenizer) == ["The sum of 3 and 4 is (7)"]


def test_the_small_world_reads_exactly_its_own_demonstrations() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(sdcore.world.__file__).parent / "checkpoint")
    builders = (Template(PLAIN), Demonstration(template=PLAIN), Solution(template=PLAIN))
    builders += (Custom(lambda group: [group.example.privileged_context], template=PLAIN),)
    for seed, builder in enumerate(builders):
        episode = episodes.mapped("luma", "3141592653", random.Random(seed))
        given = example(tuple(episode.messages()), context=episode.demonstration)
        group = group_of(given, tokenizer)
        assert tokenizer.decode(group.prompt_ids) == f"<bos> {episode.question} ="
        wanted = student_prompt_ids(example(tuple(episode.with_demonstration().messages())), tokenizer)
        (ids,) = builder.condition(group, tokenizer).teacher_prompts
        assert ids.tolist() == wanted.tolist()
        assert tokenizer.unk_token_id not in ids.tolist()


def test_an_attempt_of_the_small_world_can_be_decorated_by_the_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(sdcore.world.__file__).parent / "checkpoint")
    episode = episodes.mapped("luma", "3141592653", random.Random(0))
    decorated = "{{ prompt }}{% for pair in (attempt or feedback).split() %} H {{ pair }}{% endfor %}"
    rollouts = (rollout("a0 b0", 0.0), rollout(episode.native_answer, 1.0))
    group = group_of(example(tuple(episode.messages())), tokenizer, *rollouts)
    conditioned = SuccessOrFeedback(template=decorated).condition(group, tokenizer)
    wanted = student_prompt_ids(example(tuple(episode.with_demonstration().messages())), tokenizer)
    assert conditioned.teacher_prompts[0].tolist() == wanted.tolist()
    assert conditioned.active == (True, False)


def test_arguments_of_the_chat_template_reach_both_prompts() -> None:
    tokenizer = chat_tokenizer("qwen")
    kwargs = {"enable_thinking": False}
    group = group_of(example(user(QUESTION), context="a hint"), tokenizer, chat_template_kwargs=kwargs)
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(group.prompt_ids).endswith(end)
    assert conditioned_texts(Template(PLAIN, chat_template_kwargs=kwargs), group, tokenizer)[0].endswith(end)


def test_a_chat_template_that_refuses_names_the_row() -> None:
    with pytest.raises(ContextError, match=r"train\.jsonl:7: the chat template refused .*System role not supported"):
        student_prompt_ids(example((SYSTEM, *TURNS)), chat_tokenizer("gemma"))


def test_a_tokenizer_without_chat_template_names_the_row() -> None:
    bare = type(chat_tokenizer("qwen"))(tokenizer_object=chat_tokenizer("qwen")._tokenizer)
    with pytest.raises(ContextError, match=r"train\.jsonl:7: the chat template refused .*chat_template is not set"):
        student_prompt_ids(example(user("q")), bare)


@pytest.mark.parametrize("prompt", ["q \ud83d", ({"role": "user", "content": "q \ud83d"},)])
def test_a_text_that_is_no_unicode_names_the_row(prompt: Prompt) -> None:
    with pytest.raises(ContextError, match=r"train\.jsonl:7: the (tokenizer|chat template) refused"):
        student_prompt_ids(example(prompt), chat_tokenizer("qwen"))


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(ContextError, match=r"train\.jsonl:7: expected a prompt of at least one token"):
        student_prompt_ids(example(""), chat_tokenizer("qwen"))


# Content of several parts.

IMAGE = {"type": "image", "image": "cat.png"}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("parts", "template", "wanted"),
    [
        ([text_part("q")], "{q} c", [text_part("q c")]),
        ([IMAGE, text_part("q")], "{q} c", [IMAGE, text_part("q c")]),
        ([text_part("q"), IMAGE], "{q} c", [text_part("q"), IMAGE, text_part("c")]),
        ([text_part("a"), IMAGE, text_part("b")], "{q} c", [text_part("a"), IMAGE, text_part("b c")]),
        ([IMAGE], "{q} c", [IMAGE, text_part("c")]),
        ([text_part("a"), IMAGE, text_part("b")], "c {q}", [text_part("c ab"), IMAGE]),
        ([IMAGE, text_part("q")], "c {q}", [IMAGE, text_part("c q")]),
    ],
)
def test_context_is_added_to_the_text_and_images_stay_as_they_are(
    parts: list[dict[str, str]], template: str, wanted: list[dict[str, str]]
) -> None:
    before = [dict(part) for part in parts]
    prompt = with_context(
        ({**SYSTEM}, {"role": "user", "content": parts, "name": "ann"}), lambda q: template.format(q=q)
    )
    assert prompt == (SYSTEM, {"role": "user", "content": wanted, "name": "ann"})
    assert parts == before


@pytest.mark.parametrize("family", FAMILIES)
def test_content_in_parts_renders_as_the_same_content_in_one_text(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    parts: Prompt = ({"role": "user", "content": [text_part(QUESTION)]},)
    conditioned_both = [
        Demonstration().condition(group_of(example(prompt, context="an answer"), tokenizer), tokenizer)
        for prompt in (parts, user(QUESTION))
    ]
    assert conditioned_both[0].teacher_prompts[0].tolist() == conditioned_both[1].teacher_prompts[0].tolist()


def test_a_prompt_with_an_image_is_refused_where_ids_are_made() -> None:
    prompt: Prompt = ({"role": "user", "content": [IMAGE, text_part("q")]},)
    with pytest.raises(UnsupportedModelError, match=r"train\.jsonl:7: message 0 has a part of type 'image'"):
        student_prompt_ids(example(prompt), chat_tokenizer("qwen"))


# The row's context.


@pytest.mark.parametrize("builder", [Template(), Demonstration(), Solution()])
def test_a_row_without_context_carries_no_loss_and_is_counted(builder: Any) -> None:
    tokenizer = chat_tokenizer("qwen")
    group = group_of(example(user(QUESTION)), tokenizer, rollout("a"), rollout("b"))
    conditioned = builder.condition(group, tokenizer)
    assert conditioned.active == (False, False)
    assert all(torch.equal(ids, group.prompt_ids) for ids in conditioned.teacher_prompts)
    assert conditioned.counts["context/missing"] == 2
    assert conditioned.counts["context/prompt_tokens"] == 0


@pytest.mark.parametrize("builder", [Template(anchor=True), Demonstration(anchor=True), Solution(anchor=True)])
def test_an_anchors_teacher_reads_what_the_student_reads(builder: Any) -> None:
    tokenizer = chat_tokenizer("qwen")
    for context in (None, " "):
        group = group_of(example(user(QUESTION), context=context), tokenizer, rollout("a"), rollout("b"))
        conditioned = builder.condition(group, tokenizer)
        assert conditioned.active == (True, True)
        assert all(torch.equal(ids, group.prompt_ids) for ids in conditioned.teacher_prompts)
        assert conditioned.counts["context/anchored"] == 2
        assert conditioned.counts["context/missing"] == 0
        assert conditioned.counts["context/teacher_tokens"] == 2 * len(group.prompt_ids)
    shown = builder.condition(group_of(example(user(QUESTION), context="a hint"), tokenizer), tokenizer)
    assert shown.counts["context/anchored"] == 0
    assert "a hint" in texts(shown, tokenizer)[0]


def test_an_anchor_beside_a_template_that_shows_every_row_something_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"anchor must be False .* \{\{ privileged_context \}\}"):
        Template("{{ prompt }}\nBe terse.", anchor=True)


def test_a_template_of_other_columns_or_of_fixed_words_needs_no_context() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = group_of(example(user(QUESTION), hint="use a slice"), tokenizer)
    for text, added in {"{{ prompt }}\n{{ hint }}": "\nuse a slice", "{{ prompt }}\nBe terse.": "\nBe terse."}.items():
        conditioned = Template(text).condition(group, tokenizer)
        assert conditioned.active == (True,)
        assert QUESTION + added + "<|im_end|>" in texts(conditioned, tokenizer)[0]


def test_data_without_any_context_is_refused_before_any_work() -> None:
    rows = [example("q", answer=7), example("r", answer=8)]
    with pytest.raises(DataError, match=r"train\.jsonl:7: Demonstration needs a column `privileged_context`.*`answer`"):
        check_examples(Demonstration(), rows)
    assert check_examples(Solution(), [*rows, example("s", context="hint")]) == 2
    assert check_examples(Template("{{ prompt }} {{ answer }}"), rows) == 0
    assert check_examples(SuccessOrFeedback(), rows) == 0
    assert check_examples(No(), rows) == 0


def test_thinking_in_the_rows_context_stays_unless_it_is_to_go() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = group_of(example(user(QUESTION), context="<think>hm</think>\nslice it"), tokenizer)
    assert "<think>hm</think>" in conditioned_texts(Solution(), group, tokenizer)[0]
    assert "hm" not in conditioned_texts(Solution(remove_thinking=True), group, tokenizer)[0]
    nothing = group_of(example(user(QUESTION), context="<think>hm"), tokenizer)
    assert Solution(remove_thinking=True).condition(nothing, tokenizer).active == (False,)


def test_without_context_the_teacher_reads_what_the_student_reads() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = group_of(example(user(QUESTION), context="a hint"), tokenizer, rollout("a"), rollout("b"))
    conditioned = No().condition(group, tokenizer)
    assert conditioned.active == (True, True)
    assert all(ids is group.prompt_ids for ids in conditioned.teacher_prompts)
    made = plan([group.prompt_ids], [[[1], [2]]], [list(conditioned.teacher_prompts)])
    assert conditioned.counts["context/shared_tokens"] == 2 * made.teacher[0].shared
    assert conditioned.counts["context/teacher_tokens"] == conditioned.counts["context/prompt_tokens"]


def test_a_custom_function_says_what_each_teacher_sees() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = attempts_group(tokenizer, rollout("a", 0.0), rollout("b", 1.0), rollout("c", 0.5), level=3)

    def function(given: Group) -> list[str | None]:
        return [f"level {given.example.columns['level']}", None, " "]

    conditioned = Custom(function).condition(group, tokenizer)
    assert conditioned.active == (True, False, False)
    assert f"{QUESTION}\n\nlevel 3<|im_end|>" in texts(conditioned, tokenizer)[0]
    for wrong, said in (([None], "one entry per completion, 3, got 1"), ("abc", "got str"), ([1, 2, 3], "got int")):
        with pytest.raises(ContextError, match=rf"train\.jsonl:7: the context function must give .*{said}"):
            Custom(lambda _, wrong=wrong: wrong).condition(group, tokenizer)


# Attempts and feedback.


def shown(builder: SuccessOrFeedback, *rollouts: Any) -> list[str]:
    """Per completion what stands between the question and the template's last words; "-" where it is not active."""
    tokenizer = chat_tokenizer("qwen")
    group = attempts_group(tokenizer, *rollouts)
    conditioned = builder.condition(group, tokenizer)
    contexts = []
    for text, active in zip(texts(conditioned, tokenizer), conditioned.active, strict=True):
        contexts.append(text.split(QUESTION)[1].split("<|im_end|>")[0] if active else "-")
    return contexts


SHORT = "{{ prompt }}{% if attempt %}|{{ attempt }}{% endif %}{% if feedback %}|F:{{ feedback }}{% endif %}"


def test_a_completion_sees_the_first_attempt_of_another_one_that_succeeded() -> None:
    rollouts = [rollout("FAILED", 0.0), rollout("good", 0.5), rollout("better", 1.0), rollout("UNJUDGED")]
    assert shown(SuccessOrFeedback(template=SHORT), *rollouts) == ["|good", "|better", "|good", "|good"]


def test_a_failed_attempt_is_in_no_prompt() -> None:
    rollouts = [rollout("FAILED", 0.49, "wrong"), rollout("good", 0.5), rollout("UNJUDGED", None, "no verdict")]
    for both in (True, False):
        builder = SuccessOrFeedback(environment_feedback_only_without_solution=both)
        assert not any("FAILED" in text or "UNJUDGED" in text for text in shown(builder, *rollouts))


def test_a_group_without_success_or_feedback_carries_no_loss() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = attempts_group(tokenizer, rollout("a", 0.0), rollout("b", 0.4, "  "), rollout("c", 0.1, ""))
    conditioned = SuccessOrFeedback().condition(group, tokenizer)
    assert conditioned.active == (False, False, False)
    assert all(ids is group.prompt_ids for ids in conditioned.teacher_prompts)
    assert conditioned.counts == dict.fromkeys(COUNTS, 0) | {"context/missing": 3}


def test_the_only_success_carries_no_loss_itself_unless_it_may_be_shown_itself() -> None:
    rollouts = [rollout("good", 1.0), rollout("bad", 0.0)]
    assert shown(SuccessOrFeedback(template=SHORT), *rollouts) == ["-", "|good"]
    builder = SuccessOrFeedback(template=SHORT, dont_reprompt_on_self_success=False)
    assert shown(builder, *rollouts) == ["|good", "|good"]


def test_feedback_is_about_the_very_completion_and_stands_in_for_an_attempt() -> None:
    rollouts = [rollout("a", 0.0, "wrong sign"), rollout("b", 1.0, "all right"), rollout("c", 0.0)]
    assert shown(SuccessOrFeedback(template=SHORT), *rollouts) == ["|b", "|F:all right", "|b"]
    both = SuccessOrFeedback(template=SHORT, environment_feedback_only_without_solution=False)
    assert shown(both, *rollouts) == ["|b|F:wrong sign", "|F:all right", "|b"]
    solution_only = SuccessOrFeedback(template=SHORT, use_feedback=False)
    assert shown(solution_only, *rollouts) == ["|b", "-", "|b"]
    feedback_only = SuccessOrFeedback(template=SHORT, use_solution=False)
    assert shown(feedback_only, *rollouts) == ["|F:wrong sign", "|F:all right", "-"]


def test_entries_of_feedback_are_shown_oldest_first_with_a_blank_line_between() -> None:
    entries = join_feedback(["first run", "", "second run"])
    assert shown(SuccessOrFeedback(template=SHORT), rollout("a", 0.0, entries)) == ["|F:first run\n\nsecond run"]


def test_thinking_is_taken_out_of_attempts_and_an_attempt_of_thinking_alone_is_none() -> None:
    rollouts = [rollout("bad", 0.0), rollout("<think>only", 1.0), rollout("<think>so</think>\ngood", 1.0)]
    assert shown(SuccessOrFeedback(template=SHORT), *rollouts) == ["|good", "|good", "-"]
    kept = SuccessOrFeedback(template=SHORT, remove_thinking=False)
    assert shown(kept, *rollouts)[0] == "|<think>only"


def test_an_empty_completion_that_succeeded_is_not_shown() -> None:
    assert shown(SuccessOrFeedback(template=SHORT), rollout("bad", 0.0), rollout(" ", 1.0)) == ["-", "-"]


def test_completions_whose_teachers_read_the_same_have_the_same_tensor_and_are_counted() -> None:
    tokenizer = chat_tokenizer("llama")
    rollouts = [rollout("good", 1.0), *[rollout(f"bad {i}", 0.0, "no") for i in range(3)], rollout("fine", 1.0)]
    conditioned = SuccessOrFeedback().condition(attempts_group(tokenizer, *rollouts), tokenizer)
    first, *others = conditioned.teacher_prompts
    assert len({id(ids) for ids in others}) == 1
    assert "fine" in tokenizer.decode(first)
    assert conditioned.counts["context/with_solution"] == 5
    assert conditioned.counts["context/with_feedback"] == 0


def test_options_that_leave_nothing_to_show_are_refused() -> None:
    with pytest.raises(ArgumentError, match="use_solution or use_feedback must be true"):
        SuccessOrFeedback(use_solution=False, use_feedback=False)
    with pytest.raises(ArgumentError, match="success_threshold must be a number, got nan"):
        SuccessOrFeedback(success_threshold=float("nan"))
    with pytest.raises(ArgumentError, match="function must be callable, got str"):
        Custom("module:function")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("builder", [Demonstration(), Solution(), SuccessOrFeedback()], ids=lambda b: type(b).__name__)
def test_default_texts_share_the_whole_question_with_the_student(builder: Any, family: str) -> None:
    tokenizer = chat_tokenizer(family)
    given = Example(prompt=prompt_for(family), privileged_context="items[::-1]", source="here")
    group = group_of(given, tokenizer, rollout("bad", 0.0, "AssertionError"), rollout("good", 1.0))
    conditioned = builder.condition(group, tokenizer)
    prefix = tokenizer.decode(group.prompt_ids).split(QUESTION)[0] + QUESTION
    for ids, active in zip(conditioned.teacher_prompts, conditioned.active, strict=True):
        assert tokenizer.decode(shared(group.prompt_ids, ids)) == prefix if active else ids is group.prompt_ids


def shared(student: Tensor, teacher: Tensor) -> Tensor:
    return student[: plan([student], [[[1]]], [teacher]).teacher[0].shared]
