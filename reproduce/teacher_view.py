"""Measures how often SDPO's teacher is right before any training, on the task of `real_feedback`.

    python -m reproduce.teacher_view --output docs/reproduction/teacher_view.json

A method that distills a teacher can teach no more than the teacher knows. Here the untrained student answers each
question several times; the teacher of each *wrong* answer then reads what SDPO shows it, the verifier's feedback, a right
answer of the same group or either, and answers in its turn. Its share of right answers is beside the student's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from sdcore.contexts import SuccessOrFeedback
from sdcore.data import read_examples
from sdcore.prefix import generate
from sdcore.training.evaluation import evaluate
from sdcore.types import Group

from .book import question_of
from .real_feedback import GROUP, FeedbackSettings, about_it, sums, verified
from .real_model import Subject, subject_of

VIEWS: Final = {
    "feedback": SuccessOrFeedback(use_solution=False),
    "a right answer of the group": SuccessOrFeedback(use_feedback=False),
    "either, as SDPO": SuccessOrFeedback(),
}
AT_A_TIME: Final = 16


def sampled(subject: Subject, rows: Sequence[dict[str, Any]], settings: FeedbackSettings, seed: int) -> tuple[Group, ...]:
    """Returns the untrained student's answers, judged."""
    return evaluate(
        subject.base,
        subject.tokenizer,
        read_examples(rows),
        [about_it],
        num_generations=GROUP,
        temperature=settings.temperature,
        max_completion_length=settings.room,
        stop_token_ids=subject.stops,
        seed=seed,
    ).groups


def prompts_of_wrong(
    groups: Sequence[Group], rows: Sequence[dict[str, Any]], view: SuccessOrFeedback, tokenizer: Any
) -> Iterator[tuple[torch.Tensor, Sequence[int]]]:
    """Yields what the teacher of each wrong answer reads, with the numbers that were asked for."""
    for group, row in zip(groups, rows, strict=True):
        shown = view.condition(group, tokenizer)
        for rollout, prompt, active in zip(group.rollouts, shown.teacher_prompts, shown.active, strict=True):
            if active and not rollout.reward:
                yield prompt, row["pair"]


def right(subject: Subject, asked: Sequence[tuple[torch.Tensor, Sequence[int]]], settings: FeedbackSettings) -> int:
    """Counts the right ones of one answer to each prompt."""
    count = 0
    for start in range(0, len(asked), AT_A_TIME):
        part = asked[start : start + AT_A_TIME]
        drawn = generate(
            subject.base,
            [prompt for prompt, _ in part],
            num_completions=1,
            max_new_tokens=settings.room,
            eos_token_id=subject.stops,
            temperature=settings.temperature,
            seed=start,
        )
        texts = [subject.tokenizer.decode(ids[0], skip_special_tokens=True) for ids in drawn.completions]
        count += sum(verified(text, pair)[0] == 1.0 for text, (_, pair) in zip(texts, part, strict=True))
    return count


def measured(settings: FeedbackSettings, seed: int) -> dict[str, Any]:
    """Returns numbers of answers and of right ones, the student's and the teacher's by what it reads."""
    subject = subject_of(settings.model)
    rows = sums(seed, settings.episodes)[1]
    groups = sampled(subject, rows, settings, seed)
    answers = [rollout.reward for group in groups for rollout in group.rollouts]
    found: dict[str, Any] = {"student": {"answers": len(answers), "right": int(sum(r or 0 for r in answers))}}
    for name, view in VIEWS.items():
        asked = list(prompts_of_wrong(groups, rows, view, subject.tokenizer))
        found[name] = {"answers": len(asked), "right": right(subject, asked, settings)}
    return {"first question": question_of(rows[0]), "seed": seed, "reads": found}


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    seed: Annotated[int, typer.Option(help="Of the questions and the answers.")] = 0,
    questions: Annotated[int, typer.Option(help="That are asked.")] = FeedbackSettings.episodes,
) -> None:
    """Measure how often SDPO's teacher is right on sums before any training."""
    torch.set_num_threads(1)
    result = measured(replace(FeedbackSettings(), episodes=questions), seed)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, counts in result["reads"].items():
        share = counts["right"] / counts["answers"] if counts["answers"] else float("nan")
        typer.echo(f"{name}: {counts['right']} of {counts['answers']} right, {share:.0%}")


if __name__ == "__main__":
    typer.run(main)
