"""Says what stands out in a run, in sentences: what someone who knows these methods would look for first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from ..diagnostics import RunData
from .series import Change, changes_of, is_number, shown

COLLAPSED: Final = 0.2  # of the first entropy
CLIPPED: Final = 0.3
INACTIVE: Final = 0.1
LEAKS: Final = 0.7
CONTENT: Final = 0.3  # of the context's KL: below, two contexts say much the same
FIRST_TOKEN: Final = 5.0  # times the mean divergence


def notes_of(run: RunData) -> list[str]:
    """Returns sentences, the gravest first; [] where nothing stands out."""
    changes = changes_of(run)
    return [*_numbers(run), *_shares(changes), *_distributions(changes), *_leak(changes), *_lost(run)]


def _numbers(run: RunData) -> Iterator[str]:
    if not run.metrics:
        yield "No metrics were logged."
    bad: dict[str, list[int]] = {}
    for line in run.metrics:
        if isinstance(line.get("nonfinite"), dict):
            for name in line["nonfinite"]:
                bad.setdefault(name, []).append(line["step"])
    for name, steps in bad.items():
        lines = "one line" if len(steps) == 1 else f"{len(steps)} lines"
        yield f"{name} was not finite on {lines}, first at step {steps[0]}."


def _shares(changes: dict[str, Change]) -> Iterator[str]:
    active = changes.get("self_distillation/reprompt_sample_fraction")
    if active and active.last < INACTIVE:
        yield (
            f"In the end {shown(active.last, 'share')} of the completions were active: for the others there was no "
            "successful attempt, no feedback and no privileged context, and they carried no loss."
        )
    flat = changes.get("self_distillation/flat_group_fraction")
    if flat and flat.last > 0.9:
        yield f"In the end all rewards were alike in {shown(flat.last, 'share')} of the groups."
    clipped = changes.get("completions/clipped_ratio")
    if clipped and clipped.last > CLIPPED:
        yield f"In the end {shown(clipped.last, 'share')} of the completions were cut at the length limit."


def _distributions(changes: dict[str, Change]) -> Iterator[str]:
    entropy, taught = changes.get("student/entropy"), changes.get("teacher/entropy")
    # Down to the teacher's is what it was taught.
    floor = taught.last if taught else math.inf
    if entropy and entropy.lines > 1 and entropy.last < min(floor, COLLAPSED * entropy.first):
        yield (
            f"The student's entropy fell from {shown(entropy.first)} to {shown(entropy.last)} nats: it hardly explores "
            "any more."
        )
    first, loss = changes.get("loss/position_0"), changes.get("self_distillation/distillation_loss")
    if first and loss and loss.last > 1e-4 and first.last > FIRST_TOKEN * loss.last:
        yield (
            f"The first token's divergence is {shown(first.last / loss.last)} times the mean: the teacher begins its "
            "answers differently. Consider skip_first_tokens."
        )


def _leak(changes: dict[str, Change]) -> Iterator[str]:
    ratio, content = changes.get("teacher/leak_ratio"), changes.get("teacher/content_kl")
    context = changes.get("teacher/context_kl")
    if not (ratio and content and context) or ratio.last < LEAKS:
        return
    if content.last < CONTENT * context.last:
        yield (
            f"Another prompt's context teaches {shown(ratio.last)} times what the right one does, and says much the "
            "same: what is taught is style, or that there is a context."
        )
    else:
        yield (
            f"Another prompt's context teaches {shown(ratio.last)} times what the right one does, but says something "
            "else: the teacher believes whatever it reads."
        )


def _lost(run: RunData) -> Iterator[str]:
    for name, what in (
        ("context/overflow", "Teacher prompts that were too long"),
        ("context/skipped", "Contexts that were refused and skipped"),
        ("rewards/dropped", "Rewards lost to errors"),
    ):
        total = sum(line[name] for line in run.metrics if is_number(line.get(name)))
        if total:
            yield f"{what}: {shown(total)}."
    for name, skipped in run.description.get("skipped_rows", {}).items():
        yield f"Rows of {name} that could not be used and were skipped: {skipped['rows']}, as {skipped['first'][0]}."
    if run.unreadable:
        yield f"Lines of the log that could not be read and are left out: {run.unreadable}."
