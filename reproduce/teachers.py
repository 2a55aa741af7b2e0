"""Measures what the teachers of the real studies know before any training: what a method can teach is no more.

    python -m reproduce.teachers --output docs/reproduction/teachers.json

Each row is a method on a study's questions. The untrained SmolLM2-135M-Instruct is asked them with what the method's
teacher reads in view, and without it, as by `sdcore eval --method`. Where that is feedback, it is the feedback on
answers that the model has given before, right ones have none, and both shares are of questions that have some.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import torch
import typer

from sdcore.data import read_examples
from sdcore.presets import SDPO, ContextDistillation, Method, SDFTAsRun
from sdcore.training.evaluation import evaluate

from . import real_feedback
from .book import has_words, question_of, row_of
from .real_exam import book_of
from .real_model import Settings, Subject, subject_of
from .real_sdft import SdftSettings, demonstrations

SHOWN: Final = ("with_context_reward_mean", "with_context_reward_stderr")
BARE: Final = ("without_context_reward_mean", "without_context_reward_stderr")


class Asked(NamedTuple):
    study: str
    title: str
    method: Method
    rows: Sequence[dict[str, Any]]
    reward: Any
    settings: Settings
    temperature: float


def asked(seed: int, most: int | None) -> list[Asked]:
    """Returns what is asked: `most` questions of each study, or all."""
    feedback, written = real_feedback.FeedbackSettings(), SdftSettings()
    book = book_of(seed, written.facts)
    given = demonstrations(book, written.demonstrations, seed)[:most]
    sections = [
        row_of(question_of(row), **{name: row[name] for name in ("privileged_context", "words")}) for row in given
    ]
    sentences = [row_of(question_of(row), privileged_context=row["sentence"], words=row["words"]) for row in given]
    own = ContextDistillation(template=book.template)
    sums = real_feedback.sums(seed, feedback.episodes)[1][:most]
    sdpo: dict[str, Any] = {"num_generations": real_feedback.GROUP, "temperature": feedback.temperature}
    return [
        Asked("real_context", "the handbook's section, in the study's words", own, sections, has_words, written, 0.0),
        Asked("real_sdft", "a demonstration, in SDFT's words", SDFTAsRun(), sentences, has_words, written, 1.0),
        Asked("", "a demonstration, in the handbook's words", own, sentences, has_words, written, 1.0),
        Asked(
            "real_feedback",
            "feedback or a right answer, in SDPO's words",
            *(SDPO(**sdpo), sums, real_feedback.about_it, feedback, feedback.temperature),
        ),
    ]


def measured(subject: Subject, about: Asked, seed: int) -> dict[str, Any]:
    """Returns the numbers of `evaluate`, and three answers of the teacher."""
    result = evaluate(
        subject.base,
        subject.tokenizer,
        read_examples(about.rows),
        [about.reward],
        num_generations=about.method.num_generations,
        max_completion_length=about.settings.room,
        temperature=about.temperature,
        stop_token_ids=subject.stops,
        context=about.method.build_context(),
        seed=seed,
    )
    numbers = {name: float(f"{value:.4g}") for name, value in result.metrics.items()}
    said = [group.rollouts[0].text for group in result.in_view[:3]]
    return {"study": about.study, "reads": about.title, "metrics": numbers, "answers": said}


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for every number.")] = None,
    seed: Annotated[int, typer.Option(help="Of the questions and the answers.")] = 0,
    most: Annotated[int | None, typer.Option(help="So many questions of each study; default: all.")] = None,
) -> None:
    """Measure what the real studies' teachers know before training."""
    torch.set_num_threads(1)
    subject = subject_of("smollm2")
    found = [measured(subject, about, seed) for about in asked(seed, most)]
    if output is not None:
        output.write_text(json.dumps({"seed": seed, "teachers": found}, indent=1) + "\n", encoding="utf-8")
    typer.echo("| the teacher reads | asked | right without | right with it in view |\n| --- | ---: | ---: | ---: |")
    for row in found:
        shares = [" ± ".join(f"{row['metrics'][name]:.2f}" for name in names) for names in (BARE, SHOWN)]
        typer.echo(f"| {row['reads']} | {row['metrics']['asked_again']:.0f} | {shares[0]} | {shares[1]} |")


if __name__ == "__main__":
    typer.run(main)
