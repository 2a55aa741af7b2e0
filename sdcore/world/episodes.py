"""Draws episodes of the small world: a question, its answer, and the context that may accompany it.

Everything is drawn from a `random.Random` that the caller seeds, so a list of episodes is a pure function of its
arguments. An episode knows its answer in the native style and can render itself three ways: as chat messages, as the
plain sequence that pretraining reads, and as an expert demonstration in the decorated style.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdcore.world.language import ANSWER, BOS, DIGITS, EOS, LETTERS, OPEN_NAMES, PRIOR_TASKS, SKILLS, decorate

QUESTION_LETTERS = 5
MAX_HINTS = len(LETTERS)


@dataclass(frozen=True, kw_only=True)
class Episode:
    """Is a question of the world with its right answer."""

    task: str
    letters: tuple[str, ...]
    answer: tuple[str, ...]  # pair tokens, native style
    hints: tuple[str, ...] = ()  # pair tokens shown between question and answer; empty: no context

    @property
    def question(self) -> str:
        return " ".join((self.task, *self.letters))

    @property
    def native_answer(self) -> str:
        return " ".join(self.answer)

    @property
    def demonstration(self) -> str:
        """Returns the answer as the expert writes it: right, but not in the model's style."""
        return decorate(self.answer)

    def messages(self) -> list[dict[str, str]]:
        """Returns the user turn as chat messages: the question, then the hints if there are any."""
        content = f"{self.question} {decorate(self.hints)}" if self.hints else self.question
        return [{"role": "user", "content": content}]

    def plain(self) -> str:
        """Returns the whole sequence as pretraining sees it; the chat template renders the same tokens."""
        context = (decorate(self.hints),) if self.hints else ()
        return " ".join((BOS, self.question, *context, ANSWER, self.native_answer, EOS))

    def with_demonstration(self) -> Episode:
        """Returns the same question with the expert's demonstration of this very question as its context."""
        return replace(self, hints=self.answer)


def random_digits(rng: random.Random) -> str:
    """Draws a letter→digit map as a string of ten digits; digits may repeat."""
    return "".join(rng.choices(DIGITS, k=len(LETTERS)))


def question_letters(rng: random.Random, known: Sequence[str] = LETTERS) -> tuple[str, ...]:
    """Draws the letters of a question, all different as far as `known` has enough of them.

    Different letters tell the model where it is in its answer: what follows a letter is unambiguous.
    """
    copies = -(-QUESTION_LETTERS // len(known))
    return tuple(rng.sample(list(known) * copies, k=QUESTION_LETTERS))


def mapped(task: str, digits: str, rng: random.Random, known: Sequence[str] = LETTERS) -> Episode:
    """Draws a question to a letter→digit task about letters in `known`."""
    letters = question_letters(rng, known)
    return Episode(task=task, letters=letters, answer=tuple(x + digits[LETTERS.index(x)] for x in letters))


def prior(rng: random.Random) -> Episode:
    """Draws a task whose map is in the pretrained weights; no context."""
    task = rng.choice(tuple(PRIOR_TASKS))
    return mapped(task, PRIOR_TASKS[task], rng)


def skill(rng: random.Random) -> Episode:
    """Asks to reverse or sort the letters; each pair's digit is its place in the answer. No context."""
    task = rng.choice(SKILLS)
    letters = question_letters(rng)
    ordered = letters[::-1] if task == "reverse" else sorted(letters)
    return Episode(task=task, letters=letters, answer=tuple(x + str(place) for place, x in enumerate(ordered)))


def hinted(rng: random.Random, *, names: Sequence[str] = OPEN_NAMES, hints: int | None = None) -> Episode:
    """Draws an open task with a map of its own and `hints` hints (None: 1 to 10), which cover the question's letters.

    Raises `ValueError` for a number of hints outside 1 to 10.
    """
    if hints is None:
        hints = rng.randint(1, MAX_HINTS)
    if not 1 <= hints <= MAX_HINTS:
        raise ValueError(f"hints must be in [1, {MAX_HINTS}], got {hints}")
    shown = rng.sample(LETTERS, k=hints)
    digits = random_digits(rng)
    episode = mapped(rng.choice(names), digits, rng, known=shown)
    return replace(episode, hints=tuple(x + digits[LETTERS.index(x)] for x in shown))


def demonstrated(rng: random.Random) -> Episode:
    """Draws an open task with a map of its own and the demonstrated answer to the question itself as context."""
    return unknown(rng).with_demonstration()


def unknown(rng: random.Random) -> Episode:
    """Draws an open task without context: the answer's letters can be known, its digits only guessed."""
    return mapped(rng.choice(OPEN_NAMES), random_digits(rng), rng)


def pretraining_batch(rng: random.Random, size: int, *, guesses: bool) -> list[Episode]:
    """Draws a quarter prior tasks, a quarter skills, half open tasks with 1 to 10 hints.

    With `guesses` an eighth each of prior tasks, skills and open tasks without context; the rest has hints. A model
    that was never asked what it cannot know answers a new task with noise; learning the task then means learning to
    answer it at all, at the cost of everything else.
    """
    kinds = (prior, skill, unknown, *(hinted,) * 5) if guesses else (prior, skill, hinted, hinted)
    return [kinds[i % len(kinds)](rng) for i in range(size)]
