"""Prompts that are too long: what goes, what never does, and that it is counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdcore.contexts import Demonstration, SuccessOrFeedback, Template, join_feedback, split_feedback
from sdcore.errors import ArgumentError, ContextError
from sdcore.types import Conditioned, Group, Message
from tests.sdcore.contexts.chats import FAMILIES, chat_tokenizer, example, group_of, rollout

QUESTION = "Write a function that reverses a list."
DIALOGUE: tuple[Message, ...] = (
    {"role": "user", "content": "What is the sum of the first ten odd numbers?"},
    {"role": "assistant", "content": "100"},
    {"role": "user", "content": QUESTION},
)
PLAIN = "{{ prompt }}\n{{ privileged_context }}\nNow answer."
SHORT = (
    "{{ prompt }}{% if attempt %}|{{ attempt }}|{% endif %}{% if feedback %}F:{{ feedback }}{% endif %}\nNow answer."
)


def lengths(conditioned: Conditioned) -> list[int]:
    return [len(ids) for ids in conditioned.teacher_prompts]


def feedback_group(tokenizer: Any, feedback: str | None, attempt: str | None = None) -> Group:
    """Its first completion failed with this feedback; its second one, if there is one, is a successful attempt."""
    others = [] if attempt is None else [rollout(attempt, 1.0)]
    return group_of(example(DIALOGUE), tokenizer, rollout("bad", 0.0, feedback), *others)


def turn_of(group: Group, conditioned: Conditioned, tokenizer: Any) -> str:
    """What the first completion's teacher reads in the last user turn, after the question. The rest is as it was."""
    before, after = tokenizer.decode(group.prompt_ids).split(QUESTION)
    text = tokenizer.decode(conditioned.teacher_prompts[0])
    assert text.startswith(before + QUESTION)
    assert text.endswith(after)
    return text.removeprefix(before + QUESTION).removesuffix(after)


@pytest.mark.parametrize("family", FAMILIES)
def test_too_long_is_an_error_that_names_the_row_and_both_lengths(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    group = group_of(example(DIALOGUE, context="items[::-1]"), tokenizer)
    (length,) = lengths(Demonstration().condition(group, tokenizer))
    assert Demonstration(max_teacher_prompt_length=length).condition(group, tokenizer).counts["context/overflow"] == 0
    with pytest.raises(
        ContextError, match=rf"train\.jsonl:7: .*max_teacher_prompt_length={length - 1} tokens, got {length},"
    ):
        Demonstration(max_teacher_prompt_length=length - 1).condition(group, tokenizer)


@pytest.mark.parametrize("overflow", ["error", "drop_oldest_feedback", "truncate_context"])
def test_a_question_that_is_too_long_by_itself_is_an_error_under_every_policy(overflow: Any) -> None:
    tokenizer = chat_tokenizer("qwen")
    group = feedback_group(tokenizer, "wrong")
    limit = len(group.prompt_ids) - 1
    builder = SuccessOrFeedback(overflow=overflow, max_teacher_prompt_length=limit)
    with pytest.raises(
        ContextError, match=rf"at most max_teacher_prompt_length={limit} tokens, got {limit + 1} without"
    ):
        builder.condition(group, tokenizer)


def test_fixed_words_are_never_cut() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = group_of(example(DIALOGUE), tokenizer)
    limit = len(group.prompt_ids) + 2
    builder = Template(
        "{{ prompt }}\nBe terse, and answer in a list.", overflow="truncate_context", max_teacher_prompt_length=limit
    )
    with pytest.raises(ContextError, match="or shorten the template, which shows no context"):
        builder.condition(group, tokenizer)


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    context=st.text(min_size=1, max_size=80).filter(str.strip),
    room=st.integers(0, 90),
)
def test_a_truncated_prompt_never_exceeds_the_limit_and_loses_nothing_but_context(
    family: str, context: str, room: int
) -> None:
    tokenizer = chat_tokenizer(family)
    group = group_of(example(DIALOGUE, context=context), tokenizer)
    limit = len(group.prompt_ids) + room
    whole = Template(PLAIN).condition(group, tokenizer)
    builder = Template(PLAIN, overflow="truncate_context", max_teacher_prompt_length=limit)
    conditioned = builder.condition(group, tokenizer)
    assert lengths(conditioned)[0] <= limit
    counts = conditioned.counts
    assert counts["context/truncated_tokens"] == lengths(whole)[0] - lengths(conditioned)[0]
    assert counts["context/overflow"] == (lengths(whole)[0] > limit)
    assert conditioned.active == (not counts["context/dropped"],)
    if not conditioned.active[0]:
        assert conditioned.teacher_prompts[0] is group.prompt_ids
        return
    turn = turn_of(group, conditioned, tokenizer)
    assert turn.startswith("\n")
    assert turn.endswith("\nNow answer.")
    assert context.startswith(turn[1 : -len("\nNow answer.")])


def test_truncation_keeps_the_most_that_fits() -> None:
    tokenizer = chat_tokenizer("qwen")
    words = " ".join(f"word{i}" for i in range(60))
    group = group_of(example(DIALOGUE, context=words), tokenizer)
    (whole,) = lengths(Template(PLAIN).condition(group, tokenizer))
    for limit in range(whole - 100, whole):
        builder = Template(PLAIN, overflow="truncate_context", max_teacher_prompt_length=limit)
        assert limit - 2 <= lengths(builder.condition(group, tokenizer))[0] <= limit


def test_truncation_keeps_the_beginning_of_a_context_and_the_end_of_feedback() -> None:
    tokenizer = chat_tokenizer("qwen")
    words = " ".join(map(str, range(100)))
    group = feedback_group(tokenizer, words)
    limit = len(group.prompt_ids) + 60
    builder = SuccessOrFeedback(template=SHORT, overflow="truncate_context", max_teacher_prompt_length=limit)
    kept = turn_of(group, builder.condition(group, tokenizer), tokenizer)
    assert kept.endswith("98 99\nNow answer.")
    assert words.endswith(kept.removeprefix("F:").removesuffix("\nNow answer."))

    given_context = group_of(example(DIALOGUE, context=words), tokenizer)
    template = Template(PLAIN, overflow="truncate_context", max_teacher_prompt_length=limit)
    assert turn_of(given_context, template.condition(given_context, tokenizer), tokenizer).startswith("\n0 1 2 ")


def test_truncation_cuts_feedback_before_the_attempt() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = feedback_group(tokenizer, join_feedback(["u " * 20, "v " * 20]), attempt="items[::-1]" * 3)
    options: dict[str, Any] = {"template": SHORT, "environment_feedback_only_without_solution": False}
    (whole, _) = lengths(SuccessOrFeedback(**options).condition(group, tokenizer))
    seen = []
    for limit in range(len(group.prompt_ids), whole):
        builder = SuccessOrFeedback(**options, overflow="truncate_context", max_teacher_prompt_length=limit)
        conditioned = builder.condition(group, tokenizer)
        assert lengths(conditioned)[0] <= limit
        turn = turn_of(group, conditioned, tokenizer)
        seen.append((conditioned.active[0], "items[::-1]" * 3 in turn, "v" in turn, "u" in turn))
        assert conditioned.counts["context/dropped_feedback"] == ("u" not in turn) + ("v" not in turn)
    # The more room there is, the more is shown: nothing, some of the attempt, all of it, the newest feedback, all.
    assert seen == sorted(seen)
    assert seen[0] == (False, False, False, False)
    assert {(True, False, False, False), (True, True, False, False), (True, True, True, False)} <= set(seen)
    assert seen[-1] == (True, True, True, True)


def test_the_oldest_feedback_is_dropped_first_and_whole() -> None:
    tokenizer = chat_tokenizer("llama")
    group = feedback_group(tokenizer, join_feedback(["first " * 9, "second " * 9, "third " * 9]))
    words_left = {}
    (whole,) = lengths(SuccessOrFeedback(template=SHORT).condition(group, tokenizer))
    for limit in range(len(group.prompt_ids), whole):
        builder = SuccessOrFeedback(template=SHORT, overflow="drop_oldest_feedback", max_teacher_prompt_length=limit)
        conditioned = builder.condition(group, tokenizer)
        turn = turn_of(group, conditioned, tokenizer)
        counts = conditioned.counts
        assert lengths(conditioned)[0] <= limit
        assert counts["context/truncated_tokens"] == whole - lengths(conditioned)[0]
        words_left[counts["context/dropped_feedback"]] = [turn.count(word) for word in ("first", "second", "third")]
        assert conditioned.active == (counts["context/dropped_feedback"] < 3,)
        assert counts["context/dropped"] == (not conditioned.active[0])
    assert words_left == {3: [0, 0, 0], 2: [0, 0, 9], 1: [0, 9, 9]}


def test_an_attempt_that_does_not_fit_alone_makes_room_for_feedback() -> None:
    tokenizer = chat_tokenizer("qwen")
    group = feedback_group(tokenizer, join_feedback(["older", "newer"]), attempt="items " * 80)
    builder = SuccessOrFeedback(
        template=SHORT,
        environment_feedback_only_without_solution=False,
        overflow="drop_oldest_feedback",
        max_teacher_prompt_length=len(group.prompt_ids) + 40,
    )
    conditioned = builder.condition(group, tokenizer)
    assert turn_of(group, conditioned, tokenizer) == "F:older\n\nnewer\nNow answer."
    assert conditioned.active == (True, False)
    assert conditioned.counts["context/with_solution"] == 0
    assert conditioned.counts["context/with_feedback"] == 1
    assert conditioned.counts["context/overflow"] == 1


def test_feedback_longer_than_the_limit_is_counted_and_carries_no_loss() -> None:
    tokenizer = chat_tokenizer("gemma")
    group = group_of(example(DIALOGUE), tokenizer, *[rollout(f"bad {i}", 0.0, "no " * 200) for i in range(4)])
    limit = len(group.prompt_ids) + 20
    builder = SuccessOrFeedback(overflow="drop_oldest_feedback", max_teacher_prompt_length=limit)
    conditioned = builder.condition(group, tokenizer)
    assert conditioned.active == (False,) * 4
    assert conditioned.counts["context/dropped"] == conditioned.counts["context/overflow"] == 4
    assert conditioned.counts["context/missing"] == 0


def test_slow_tokenizers_are_cut_as_well() -> None:
    class Slow:
        """A tokenizer that cannot say where its tokens stand in the text."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, text: str, **kwargs: Any) -> Any:
            assert "return_offsets_mapping" not in kwargs
            return self.inner(text, **kwargs)

        def decode(self, ids: Any) -> str:
            return str(self.inner.decode(ids))

        def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
            return self.inner.apply_chat_template(messages, **kwargs)

    tokenizer = Slow(chat_tokenizer("qwen"))
    context = "Die Größe des Schlüssels: 鍵 🔑 ist falsch. " * 5
    group = group_of(example(DIALOGUE, context=context), tokenizer)
    for room in range(0, 120, 7):
        limit = len(group.prompt_ids) + room
        builder = Template(PLAIN, overflow="truncate_context", max_teacher_prompt_length=limit)
        conditioned = builder.condition(group, tokenizer)
        assert lengths(conditioned)[0] <= limit
        assert conditioned.active[0] == (room > 12)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match="overflow must be one of error, drop_oldest_feedback, truncate_context"):
        Demonstration(overflow="cut")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="needs a context that shows feedback"):
        Demonstration(overflow="drop_oldest_feedback")
    with pytest.raises(ArgumentError, match="needs a context that shows feedback"):
        SuccessOrFeedback(use_feedback=False, overflow="drop_oldest_feedback")
    with pytest.raises(ArgumentError, match="max_teacher_prompt_length must be at least 1"):
        Demonstration(max_teacher_prompt_length=0)


def test_feedback_is_split_where_it_was_joined() -> None:
    assert split_feedback(join_feedback(["a\n\nb", "c"])) == ("a\n\nb", "c")
    assert split_feedback(None) == split_feedback("") == split_feedback(" \n") == ()
