"""Fills the template of the HTML page. Everything that comes from a run goes through its autoescaping."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from ..charts import COLOURS, GRID, INK, figure_of, inline_svg
from ..diagnostics import RunData
from ..diagnostics.keys import COST, OTHER
from .notes import notes_of
from .samples import SHADES, samples_of
from .series import (
    AXES,
    AXIS_TITLES,
    Axis,
    Change,
    Chart,
    changes_of,
    charts_by_topic,
    constants_of,
    draw,
    key_for,
    shown,
)

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
# What the style sheet calls the colours of a chart, in light and in dark.
VARIABLES: Final = {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)} | {
    INK: "var(--soft)",
    GRID: "var(--rule)",
}
ARROWS: Final = {"up": "↑ is better", "down": "↓ is better", "watch": "watch for jumps", "none": ""}


def page(runs: Runs) -> str:
    """Writes the whole page as text."""
    environment = ImmutableSandboxedEnvironment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    template = environment.from_string(source)
    topics = charts_by_topic(runs)
    axes = [axis for axis in AXES if all(axis in chart.axes for charts in topics.values() for chart in charts)]
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
            (topic, [(chart, [(axis, _drawn(chart, axis)) for axis in axes]) for chart in charts])
            for topic, charts in topics.items()
        ],
        folded=FOLDED,
        constants=constants_of(runs),
        samples=shown_samples,
        shades=[
            (shade, shown(shown_samples.darkest * (shade / SHADES) ** 2)) for shade in range(0, SHADES + 1, SHADES // 5)
        ],
        metrics=list({name: change for _, run in runs for name, change in changes_of(run).items()}.values()),
        descriptions=[(label, sections_of(run)) for label, run in runs],
        arrows=ARROWS,
        lines=len(COLOURS),
        show=shown,
    )


def _drawn(chart: Chart, axis: Axis) -> Markup:
    """Draws a chart without its title and its legend, which are the page's."""
    names = ", ".join(series.label for series in chart.series)
    figure = figure_of([partial(draw, chart, axis)], size=(3.8, 2.0), legend="none", margins=(0.13, 0.2, 0.98, 0.97))
    name = f"{chart.title} over {AXIS_TITLES[axis]}: {names}"
    return Markup(inline_svg(figure, name, colours=VARIABLES))  # escaped there


def title_of(runs: Runs) -> str:
    """Names method and model of a run, or how many runs are compared."""
    if len(runs) > 1:
        return f"{len(runs)} runs compared"
    label, run = runs[0]
    method, model = run.description.get("method"), run.description.get("model")
    if isinstance(method, dict):
        method = method.get("name")
    if isinstance(model, str) and model.startswith("/"):
        model = "/".join(Path(model).parts[-2:])  # a checkpoint on disk
    names = [name for name in (method, model) if isinstance(name, str) and name]
    return " · ".join(names) or label


def subtitle_of(run: RunData) -> str:
    """Says how many steps, completions and tokens there were and how long it took, as far as the last line does."""
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
    """Writes seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def headline(run: RunData) -> list[Change]:
    """Picks the numbers at the top, as many as the run has."""
    changes = changes_of(run)
    return [changes[name] for name in HEADLINE if name in changes]


def compared(runs: Runs) -> list[tuple[Any, list[Change | None]]]:
    """Puts the runs' changes beside each other, for the headline's metrics that any run has."""
    by_run = [changes_of(run) for _, run in runs]
    return [
        (key_for(name), [changes.get(name) for changes in by_run])
        for name in HEADLINE
        if any(name in changes for changes in by_run)
    ]


def sections_of(run: RunData) -> list[tuple[str, dict[str, str]]]:
    """Splits what run.json says into a table of settings for each of its objects."""
    facts, sections = {}, []
    for name, value in run.description.items():
        if isinstance(value, dict) and value:
            sections.append((name, {str(key): _text(entry) for key, entry in value.items()}))
        else:
            facts[name] = _text(value)
    order = {"method": 0, "versions": 1}
    sections.sort(key=lambda section: order.get(section[0], 2))
    return ([("run", facts)] if facts else []) + sections


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
