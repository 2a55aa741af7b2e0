"""The HTML page: what the template is filled with. Everything that comes from a run goes through its autoescaping."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from ..diagnostics import RunData
from ..diagnostics.keys import COST, OTHER
from . import svg
from .charts import (
    AXES,
    AXIS_TITLES,
    Change,
    changes_of,
    charts_by_topic,
    constants_of,
    key_for,
    shown,
)
from .notes import notes_of
from .samples import SHADES, samples_of

Runs = Sequence[tuple[str, RunData]]
# The numbers at the top, as many of these as the run has.
HEADLINE: Final = (
    "eval_reward_mean",
    "self_distillation/reward_mean",
    "self_distillation/distillation_loss",
    "self_distillation/reprompt_sample_fraction",
    "teacher/entropy_gap",
    "student/drift_kl",
    "teacher/leak_ratio",
    "completions/mean_length",
)
# Topics that are there for those who look for them.
FOLDED: Final = frozenset({COST, OTHER})
ARROWS: Final = {"up": "↑ is better", "down": "↓ is better", "watch": "watch for jumps", "none": ""}


class Fact(NamedTuple):
    name: str
    value: str


def page(runs: Runs) -> str:
    """The whole page as text."""
    environment = ImmutableSandboxedEnvironment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    template = environment.from_string(source)
    topics = charts_by_topic(runs)
    axes = [
        axis for axis in AXES if all(axis in one.x for charts in topics.values() for c in charts for one in c.series)
    ]
    shown_samples = samples_of(runs)
    single = runs[0][1] if len(runs) == 1 else None
    return template.render(
        title=title_of(runs),
        subtitle=subtitle_of(single) if single else "",
        runs=[(label, title_of([(label, run)]), subtitle_of(run)) for label, run in runs],
        single=single is not None,
        tiles=headline(single) if single else [],
        compared=compared(runs) if not single else [],
        notes=[(label, notes_of(run)) for label, run in runs],
        axes=[(axis, AXIS_TITLES[axis]) for axis in axes],
        topics=[
            (
                topic,
                [
                    (chart, [(axis, Markup(svg.draw(chart, axis))) for axis in axes])  # escaped there
                    for chart in charts
                ],
            )
            for topic, charts in topics.items()
        ],
        folded=FOLDED,
        constants=constants_of(runs),
        samples=shown_samples,
        shades=[
            (shade, shown(shown_samples.darkest * (shade / SHADES) ** 2)) for shade in range(0, SHADES + 1, SHADES // 5)
        ],
        changes=changes_of(single) if single else [],
        keys=[
            key_for(name) for name in dict.fromkeys(change.key.name for _, run in runs for change in changes_of(run))
        ],
        descriptions=[(label, sections_of(run)) for label, run in runs],
        arrows=ARROWS,
        lines=SHOWN_LINES,
        show=shown,
    )


SHOWN_LINES: Final = 8


def title_of(runs: Runs) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    label, run = runs[0]
    method, model = run.description.get("method"), run.description.get("model")
    if isinstance(method, dict):
        method = method.get("name")
    if isinstance(model, str) and model.startswith("/"):
        model = "/".join(Path(model).parts[-2:])  # a checkpoint on disk
    names = [str(one) for one in (method, model) if isinstance(one, str) and one]
    return " · ".join(names) or label


def subtitle_of(run: RunData) -> str:
    """Steps, completions, tokens, time: as far as the last line says."""
    if not run.metrics:
        return "nothing logged"
    last = run.metrics[-1]
    parts = [f"{last['step']:,} step{'' if last['step'] == 1 else 's'}"]
    parts += [
        f"{last[key]:,.0f} {name}" for key, name in (("samples", "completions"), ("tokens", "tokens")) if key in last
    ]
    if "time" in last:
        parts.append(duration(last["time"]))
    if isinstance(started := run.description.get("started"), str):
        parts.append(f"started {started[:16].replace('T', ' ')}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def headline(run: RunData) -> list[Change]:
    by_name = {change.key.name: change for change in changes_of(run)}
    return [by_name[name] for name in HEADLINE if name in by_name]


def compared(runs: Runs) -> list[tuple[Any, list[Change | None]]]:
    """Key, and each run's change; the headline's metrics of which any run has one."""
    by_run = [{change.key.name: change for change in changes_of(run)} for _, run in runs]
    return [
        (key_for(name), [found.get(name) for found in by_run])
        for name in HEADLINE
        if any(name in found for found in by_run)
    ]


def sections_of(run: RunData) -> list[tuple[str, list[Fact]]]:
    """What run.json says, a table for each of its objects."""
    facts, sections = [], []
    for name, value in run.description.items():
        if isinstance(value, dict) and value:
            sections.append((name, [Fact(str(key), _text(entry)) for key, entry in value.items()]))
        else:
            facts.append(Fact(name, _text(value)))
    order = {"method": 0, "versions": 1}
    sections.sort(key=lambda section: order.get(section[0], 2))
    return ([("run", facts)] if facts else []) + sections


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


__all__ = ["HEADLINE", "duration", "headline", "page", "sections_of", "subtitle_of", "title_of"]
