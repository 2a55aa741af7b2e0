"""Measures what a model knows of the handbook and what it has kept of the rest, along a run.

    points = sit(subject, book, settings, lambda measure: train(subject, method, rows, ..., measure=measure))

A point has the share of held-out questions that are answered right (`right`), or as a wrong handbook has it (`wrong`),
that of general knowledge, the perplexity of prose, and the mean of both as shares of what they were (`kept`). The first
point, before training, has three predictions of each fact; the last has what became of it.

What differs from the obvious: what two arms keep is read where they know equally much, on the line between two
checkpoints. A measurement takes half a minute, so that checkpoints are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias

from .book import Handbook, answers, has_words, perplexity, question_of
from .real_model import Settings, Subject, base_answers, kept, scored
from .records import Column, Panel, Point, Quantity, Results, Study, Verdict, compare, crossing, final, matched, sparing

LEVEL: Final = 0.3  # of held-out questions: more than half of what SmolLM2 answers with the handbook in view
PROSE: Final = 0.1  # the least standard error of a difference in perplexity
GENERAL: Final = 1 / Settings.general  # and of one in general knowledge: one answer
# What a wrong handbook says: the value of another fact where there is one of its kind, else an invented one.
SWAPPED: Final = (
    *(("1987", "1962"), ("Odalys Brankovic", "Ingram Vasquez"), ("Tarnby", "Lindholm"), ("barometers", "violins")),
    *(("blue heron", "red fox"), ("412", "640"), ("8:40", "11:50"), ("11:50", "3:15"), ("33", "19")),
    *(("Wednesdays", "Mondays"), ("2 days", "5 days"), ("Ingram Vasquez", "Petra Lindqvist")),
    *(("Petra Lindqvist", "Tomas Okafor"), ("Tomas Okafor", "Beatrix Ashdown"), ("Beatrix Ashdown", "Yusuf Halloran")),
    *(("Yusuf Halloran", "Odalys Brankovic"), ("4821", "7306"), ("kestrel", "Walnut"), ("/srv/amber", "/srv/copper")),
    *(("Lighthouse", "kestrel"), ("19", "33"), ("3:15", "8:40"), ("Walnut", "Lighthouse"), ("floor 5", "floor 2")),
    *(("7306", "4821"), ("Copper", "Amber"), ("library", "kitchen"), ("640", "412"), ("23rd", "8th")),
    *(("Merrow and Sons", "Tarnby and Sons"),),
)
Shown: TypeAlias = Literal["right", "wrong", "other", "none"]


def wrong_sentence(book: Handbook, number: int) -> str:
    """Returns what the wrong handbook says in the place of a fact."""
    right, wrong = SWAPPED[number]
    sentence = [sentence for _, sentences in book.sections for sentence in sentences][number]
    return sentence.replace(right, wrong)


def shown_to(book: Handbook, row: dict[str, Any], shown: Shown) -> dict[str, Any]:
    """Returns the row with what the teacher of an arm reads."""
    section = row["section"]
    if shown == "other":
        section = (section + 1) % len(book.sections)
    title, sentences = book.sections[section]
    if shown == "none":
        sentences = ["There are no entries yet."]
    if shown == "wrong":
        first = sum(len(said) for _, said in book.sections[:section])
        sentences = [wrong_sentence(book, first + i) for i in range(len(sentences))]
    return row | {"privileged_context": book.context(title, sentences)}


@lru_cache(maxsize=2)
def book_of(split: int, facts: int) -> Handbook:
    return Handbook(split=split, facts=facts)


def taught(subject: Subject, book: Handbook, shown: Shown) -> dict[str, tuple[str, bool]]:
    """Returns question → what the teacher of an arm answers, and whether it is right.

    All questions are asked at once and in one order, so that every split of them has the same answers from the cache.
    """
    rows = sorted([*book.train, *book.held_out], key=question_of)
    texts, right = base_answers(subject, [book.in_view(shown_to(book, row, shown)) for row in rows])
    return {question_of(row): answer for row, answer in zip(rows, zip(texts, right, strict=True), strict=True)}


def measure(subject: Subject, book: Handbook, general: int, model: Any) -> Point:
    """Returns what a model knows and what it has kept of what it knew; `fact 00` and so on are shares of a fact."""
    stops = subject.stops
    texts, right = answers(model, subject.tokenizer, book.held_out, stop_token_ids=stops)
    told = [has_words(text, SWAPPED[row["fact"]][1:]) for text, row in zip(texts, book.held_out, strict=True)]
    known = answers(model, subject.tokenizer, book.general[:general], stop_token_ids=stops)[1]
    of_fact: dict[int, list[bool]] = {}
    for row, is_right in zip(book.held_out, right, strict=True):
        of_fact.setdefault(row["fact"], []).append(is_right)
    return {
        "right": sum(right) / len(right),
        "wrong": sum(told) / len(told),
        "general": sum(known) / len(known),
        "perplexity": perplexity(model, subject.tokenizer, book.prose),
        **{f"fact {number:02d}": sum(each) / len(each) for number, each in of_fact.items()},
    }


def before(subject: Subject, book: Handbook, general: int) -> Point:
    """Measures the model before training, with what is predicted of each fact.

    `gain` is by how much the context raises the log-probability of the right words, the mean over the held-out
    questions; `view` their log-probability with it; `taught` the share of the questions to learn from that the teacher
    answers right.
    """

    def make() -> Point:
        point = measure(subject, book, general, subject.base)
        said = [[row[name] for row in book.held_out] for name in ("sentence", "words")]
        shown = [book.in_view(row) for row in book.held_out]
        bare, seen = (scored(subject, subject.base, rows, *said) for rows in (book.held_out, shown))
        answered = taught(subject, book, "right")
        point["ceiling"] = sum(answered[question_of(row)][1] for row in book.held_out) / len(book.held_out)
        for number in sorted({row["fact"] for row in book.held_out}):
            own = [i for i, row in enumerate(book.held_out) if row["fact"] == number]
            learned = [answered[question_of(row)][1] for row in book.train if row["fact"] == number]
            point[f"gain {number:02d}"] = sum(seen[i] - bare[i] for i in own) / len(own)
            point[f"view {number:02d}"] = sum(seen[i] for i in own) / len(own)
            point[f"taught {number:02d}"] = sum(learned) / len(learned)
        return point

    questions = [question_of(row) for row in [*book.train, *book.held_out]]
    return kept(["before", subject.name, general, questions, [row["words"] for row in book.held_out]], make)


def with_kept(start: Point, point: Point) -> Point:
    """Adds what is left of what the model could do before."""
    general = point["general"] / max(start["general"], 1e-9)
    return point | {"kept": (general + start["perplexity"] / point["perplexity"]) / 2}


def sit(
    subject: Subject, book: Handbook, settings: Settings, learn: Callable[[Callable[[Any], Point]], list[Point]]
) -> list[Point]:
    """Measures before training and has `learn` measure along it, with what it is given. Returns all points."""
    start = before(subject, book, settings.general)
    points = learn(lambda model: with_kept(start, measure(subject, book, settings.general, model)))
    first = {"step": 0.0, "samples": 0.0, "tokens": 0.0} | with_kept(start, start)
    between = [{name: x for name, x in point.items() if not name.startswith("fact ")} for point in points[:-1]]
    return [first, *between, points[-1]]


def way(points: Sequence[Point]) -> float:
    """Returns how far from before to the ceiling the model has come."""
    start = points[0]
    return (points[-1]["right"] - start["right"]) / max(start["ceiling"] - start["right"], 1e-9)


def at(name: str, level: float = LEVEL) -> Quantity:
    """Reads a quantity where held-out questions come to the level."""
    return matched(name, "right", level, at=crossing)


def keeps_more(results: Results, statement: str, first: str, second: str, level: float = LEVEL) -> list[Verdict]:
    """Judges that one arm keeps more than another where both know equally much, by both measures."""
    return [
        compare(
            results,
            f"{statement}: general knowledge, at {level:.0%} right",
            *(first, second, at("general", level)),
            resolution=GENERAL,
        ),
        compare(
            results,
            f"{statement}: perplexity of prose, that of the other is higher, at {level:.0%} right",
            *(second, first, at("perplexity", level)),
            resolution=PROSE,
            digits=1,
        ),
    ]


def columns(level: float) -> tuple[Column, ...]:
    """Returns the columns of a study's table."""
    return (
        Column(f"samples to {level:.0%}", at("samples", level), 0),
        Column("general, matched", at("general", level)),
        Column("perplexity, matched", at("perplexity", level), 1),
        Column("right, end", final("right")),
        Column("wrong, end", final("wrong")),
        Column("general, end", final("general")),
        Column("perplexity, end", final("perplexity"), 1),
        Column("kept, end", final("kept")),
    )


def study(name: str, title: str, claimed: str, *, full: Settings, level: float = LEVEL, **parts: Any) -> Study:
    """Makes a study of the handbook; `level` is one that its main arms can reach."""
    quick = replace(full, steps=2, checkpoints=(1,), facts=3, general=3, episodes=6, batch=4, rank=4)
    return Study(
        name=name,
        claim=name,
        title=title,
        claimed=claimed,
        full=full,
        quick=quick,
        rule=f"the rate that has kept most where held-out questions come to {level:.0%} right; of rates within 0.01 of "
        "the best, the one that needs fewest samples",
        choose=sparing("right", level, ("kept",), at=crossing),
        columns=columns(level),
        panels=(
            Panel("held-out questions", "right"),
            Panel("general knowledge", "general"),
            Panel("perplexity of prose", "perplexity", log_y=True),
            Panel("kept against right", "kept", x="right"),
        ),
        group="real",
        **parts,
    )
