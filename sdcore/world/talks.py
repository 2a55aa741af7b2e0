"""Asks several questions on one task in a row: a quiz that says after each answer what was wrong in it.

    <bos> luma a b c d e = a3 b1 c7 d2 e9 <eos> <bos> H b4 H e0 luma f b g a h = ...

What it says stands before the next question, so that an answer can use what was said of all those before. `Quiz` is the
environment, as agents take it; `data.py` writes its rows. `talk` draws what the second model was pretrained on, which
is the first, gone on with such conversations: prior tasks, skills, and open tasks, of which an answer knows what was
said before and guesses the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from sdcore.errors import ArgumentError
from sdcore.rollouts.environments import Reply
from sdcore.types import Example, Message
from sdcore.world.data import QUESTIONS
from sdcore.world.episodes import Episode, mapped, prior, random_digits, skill
from sdcore.world.language import DIGITS, LETTERS, OPEN_NAMES, decorate


class Quiz:
    """Asks a row's `questions`, the first of which is its prompt, and says by its `digits` what was wrong."""

    def reset(self, example: Example) -> None:
        """Begins a trajectory. Raises `ArgumentError` for rows of another kind."""
        questions, digits = (example.columns.get(name) for name in ("questions", "digits"))
        if not isinstance(questions, list) or not isinstance(digits, str):
            raise ArgumentError(f"{example.source}: columns 'questions' and 'digits' must be a list and a text")
        self._answers = [[x + digits[LETTERS.index(x)] for x in question.split()[1:]] for question in questions]
        self._questions = [*questions[1:], ""]
        self._share = 1 / sum(map(len, self._answers))

    def step(self, message: Message) -> Reply:
        """Says the right pairs for wrong letters, and asks on; to a teacher, the whole answer.

        Rewards add up to the share of pairs in place.
        """
        answer, said = self._answers.pop(0), dict(enumerate(str(message["content"]).split()))
        wrong = [pair for place, pair in enumerate(answer) if said.get(place) != pair]
        question = self._questions.pop(0)
        return Reply(
            " ".join(filter(None, (decorate(wrong), question))) or None,
            done=not question,
            reward=self._share * (len(answer) - len(wrong)),
            feedback=decorate(answer) if wrong else None,
        )


def talk(rng: random.Random) -> str:
    """Draws a conversation as pretraining reads it: what an agent says that knows the prior tasks and what it was told.

    A question of an open task has hints in one case of two, as a teacher would see them; of these, in one of two, they
    need not be about its letters.
    """
    draw = rng.choice((prior, skill, *(_open(rng),) * 4))
    known: dict[str, str] = {}
    said: list[str] = []
    wrong: list[str] = []
    for _ in range(QUESTIONS):
        episode = draw(rng)
        known |= {pair[0]: pair for pair in episode.hints}
        answer = episode.answer
        if episode.task in OPEN_NAMES:
            answer = tuple(known.get(pair[0], pair[0] + rng.choice(DIGITS)) for pair in answer)
        turn = replace(episode, answer=answer).plain()
        said.append(turn.replace(episode.task, f"{decorate(wrong)} {episode.task}", 1) if wrong else turn)
        wrong = [pair for pair, guess in zip(episode.answer, answer, strict=True) if guess != pair]
        known |= {pair[0]: pair for pair in episode.answer}
    return " ".join(said)


def _open(rng: random.Random) -> Callable[[random.Random], Episode]:
    """Returns what draws questions of one open task."""
    task, digits = rng.choice(OPEN_NAMES), random_digits(rng)

    def draw(rng: random.Random) -> Episode:
        shown = rng.sample(LETTERS, k=rng.randint(1, len(LETTERS))) if rng.random() < 0.5 else []
        episode = mapped(task, digits, rng, shown if shown and rng.random() < 0.5 else LETTERS)
        return replace(episode, hints=tuple(x + digits[LETTERS.index(x)] for x in shown))

    return draw
