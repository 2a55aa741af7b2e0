"""The world's quiz says what was wrong and no more; its model was pretrained on conversations that follow it."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from sdcore.data import read_examples
from sdcore.errors import ArgumentError
from sdcore.rollouts.environments import Reply
from sdcore.types import Example
from sdcore.world.data import QUESTIONS, rows
from sdcore.world.language import ANSWER, BOS, EOS, HINT, OPEN_NAMES, PRIOR_TASKS, build_tokenizer
from sdcore.world.pretrain import collate
from sdcore.world.talks import Quiz, talk

SHORT = Example(
    prompt=({"role": "user", "content": "luma a b"},), columns={"questions": ["luma a b", "luma c a"], "digits": "123"}
)


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_quiz_names_the_pairs_of_wrong_letters_and_asks_on() -> None:
    quiz = Quiz()
    quiz.reset(SHORT)
    assert quiz.step(said("a1 b7")) == Reply("H b2 luma c a", False, 0.25, "H a1 H b2")
    assert quiz.step(said("c3 a1")) == Reply(None, True, 0.5, None)
    quiz.reset(SHORT)  # another trajectory
    assert quiz.step(said("")) == Reply("H a1 H b2 luma c a", False, 0.0, "H a1 H b2")
    assert quiz.step(said("a1 c3")) == Reply("H c3 H a1", True, 0.0, "H c3 H a1")


def test_rows_of_another_kind_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"rows:1: columns 'questions' and 'digits' must be a list and a text"):
        Quiz().reset(Example(prompt="luma a", source="rows:1"))


def test_rows_have_the_questions_of_their_split_and_the_map() -> None:
    train, held_out = (rows("quiz", task="luma", count=5, seed=3, split=split) for split in ("train", "eval"))
    asked = [{question for row in split for question in row["questions"]} for split in (train, held_out)]
    assert len(train) == 5
    assert not asked[0] & asked[1]
    for example in read_examples(train):
        assert example.prompt[0]["content"] == example.columns["questions"][0]  # type: ignore[index]
        assert len(example.columns["questions"]) == QUESTIONS
        assert len(example.columns["digits"]) == 10


def turns_of(text: str) -> list[tuple[list[str], list[str]]]:
    """What was asked and what was answered, turn by turn."""
    turns = [turn.split() for turn in text.split(BOS)[1:]]
    assert all(turn[-1] == EOS for turn in turns)
    return [(turn[: turn.index(ANSWER)], turn[turn.index(ANSWER) + 1 : -1]) for turn in turns]


@pytest.mark.parametrize("seed", range(40))
def test_a_talk_is_the_quizs_with_an_agent_that_knows_what_it_was_told(seed: int) -> None:
    turns = turns_of(talk(random.Random(seed)))
    task = next(word for word in turns[0][0] if word in (*OPEN_NAMES, *PRIOR_TASKS, "reverse", "sort"))
    assert len(turns) == QUESTIONS
    known: set[str] = set()
    for t, (asked, answered) in enumerate(turns):
        told = {pair for flag, pair in pairwise(asked) if flag == HINT}
        if t and task in OPEN_NAMES:  # what was said about the last answer is right, and is about its wrong pairs
            corrections = {pair for pair in told if pair in asked[: asked.index(task)]}
            known |= {pair for pair in turns[t - 1][1] if pair[0] not in {pair[0] for pair in corrections}}
        known |= told
        right = {pair[0]: pair for pair in known}
        assert len(right) == len(known), "a letter has one digit"
        assert all(right.get(pair[0], pair) == pair for pair in answered)


def test_all_answers_of_a_talk_are_labelled_and_nothing_else() -> None:
    tokenizer: Any = build_tokenizer()
    texts = [talk(random.Random(seed)) for seed in (0, 1)]
    input_ids, labels = collate(tokenizer, texts)
    for row, text in enumerate(texts):
        answers = " ".join(" ".join([*answered, EOS]) for _, answered in turns_of(text))
        assert tokenizer.decode(labels[row][labels[row] >= 0], skip_special_tokens=False) == answers
        assert tokenizer.decode(input_ids[row], skip_special_tokens=False).startswith(text)
