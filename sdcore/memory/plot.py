"""Shows what was measured: live bytes over the step, stacked by category, the contenders side by side on one scale.

save_plot(measure(config, load), "memory.png", title="Qwen3, 2 layers")       # needs the extra `plot`
table = measured_table(measurements, predicted)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..charts import areas, figure_of, require_matplotlib, save
from .estimate import MIB, Prediction, shown_bytes
from .measured import CONTENDERS, Measurement
from .timeline import CATEGORIES, Lives

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

POINTS: Final = 1200  # of a curve that is drawn or written
COLOURS: Final = {
    "weights": "#c9ccd1",
    "optimizer": "#9aa0a8",
    "gradients": "#5f6b7a",
    "activations": "#2f7ebc",
    "prompt cache": "#7fc4c9",
    "workspace": "#e3b23c",
    "logits": "#c8443c",
    "temporary": "#dcd0e8",
}
PHASE_COLOURS: Final = {
    "student forward": "#1d3a5f",
    "teacher forward": "#5aa469",
    "loss": "#a6761d",
    "backward": "#8a5fa8",
    "optimizer": "#6b6b6b",
    "rest": "#eeeeee",
}
# Of a panel, in relation to each other.
WIDTHS: Final = {
    "student forward": 1.0,
    "teacher forward": 1.0,
    "loss": 1.0,
    "backward": 1.4,
    "optimizer": 0.3,
    "rest": 0.05,
}
NAMES: Final = {"ours": "sdcore", "naive": "naive", "trl": "TRL chunked", "liger": "Liger chunked"}
# The estimate's parts that a category is held against; what it has none of is not predicted.
PREDICTED: Final = {"weights": ("weights", "teacher weights")} | {
    name: (name,) for name in ("optimizer", "gradients", "activations", "prompt cache", "workspace", "logits")
}


def save_plot(measurements: Mapping[str, Measurement], path: Path | str, *, title: str = "") -> Path:
    """Writes a picture of all contenders that ran. Raises `ImportError` without matplotlib, `ValueError` for none."""
    require_matplotlib("a plot")
    ran = {name: lives for name, measured in measurements.items() if (lives := measured.lives)}
    if not ran:
        raise ValueError("measurements must hold a contender that ran, got none")
    highest = max(lives.peak for lives in ran.values()) / MIB
    curves = [partial(_curves, name, lives, highest) for name, lives in ran.items()]
    stripes = [partial(_stripes, lives) for lives in ran.values()]
    figure = figure_of(
        [*curves, *stripes],
        columns=len(ran),
        size=(3.4, 2.6),
        title=title,
        legend="below",
        sharex="col",
        sharey="row",
        height_ratios=(18, 1),
    )
    figure.axes[0].set_ylabel("live MiB")
    return save(figure, path)


def _places(lives: Lives) -> tuple[np.ndarray, np.ndarray]:
    """Pairs the ticks where phases meet with where these are drawn.

    All stretches of a phase together are as wide in every panel, whatever the number of allocations in them: what
    happens often is no wider than what lives long.
    """
    ticks: Counter[str] = Counter()
    for phase in lives.phases:
        ticks[phase.name] += phase.end - phase.start
    edges, places = [0], [0.0]
    for phase in lives.phases:
        edges.append(phase.end)
        places.append(places[-1] + WIDTHS[phase.name] * (phase.end - phase.start) / ticks[phase.name])
    return np.array(edges), np.array(places)


def _curves(name: str, lives: Lives, highest: float, axes: Axes) -> None:
    ticks, curves = _by_phase(lives)
    edges, places = _places(lives)
    heights = {category: curves[category] / MIB for category in CATEGORIES if lives.bytes[category].any()}
    areas(axes, np.interp(ticks, edges, places), heights, COLOURS)
    peak, words = lives.peak / MIB, lives.phase_at(lives.peak_at)
    axes.axhline(peak, color="black", linewidth=0.7, linestyle="--")
    axes.annotate(f"peak {peak:,.0f} MiB, {words}", (0.03, peak), (0, 2), textcoords="offset points", fontsize=8)
    axes.set_title(NAMES.get(name, name), fontweight="bold" if name == "ours" else "normal")
    axes.set(xlim=(0, places[-1]), ylim=(0, 1.08 * highest))


def _stripes(lives: Lives, axes: Axes) -> None:
    edges, places = _places(lives)
    for phase in lives.phases:
        start, end = np.interp((phase.start, phase.end), edges, places)
        label = {"optimizer": "update", "rest": ""}.get(phase.name, phase.name)
        axes.axvspan(start, end, color=PHASE_COLOURS[phase.name], label=label, linewidth=0)
    axes.set(xlabel=f"{edges[-1]:,} allocations and releases", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _by_phase(lives: Lives) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Thins ticks and bytes, each phase by itself."""
    share = max(POINTS // max(len(lives.phases), 1), 8)
    pieces = [lives.thinned(share, start=phase.start, end=phase.end) for phase in lives.phases]
    ticks = np.concatenate([firsts for firsts, _ in pieces])
    return ticks, {name: np.concatenate([curves[name] for _, curves in pieces]) for name in CATEGORIES}


def measured_table(
    measurements: Mapping[str, Measurement],
    predicted: Mapping[str, Prediction] | None = None,
    title: str = "Measured peak",
) -> Table:
    """Says on a terminal what each contender's peak is made of, with the estimate of the same step behind it."""
    from rich.table import Table

    estimates = predicted or {}
    table = Table(title=title, title_justify="left")
    table.add_column("at the peak")
    for name in measurements:
        table.add_column(NAMES.get(name, name), justify="right")
        if name in estimates:
            table.add_column("estimate", justify="right", style="dim")

    def row(
        label: str, measured: Callable[[Lives], str], estimated: Callable[[Prediction], str], style: str = ""
    ) -> None:
        cells = []
        for name, measurement in measurements.items():
            cells.append(measured(measurement.lives) if measurement.lives else "–")
            cells += [estimated(estimates[name])] if name in estimates else []
        table.add_row(label, *cells, style=style)

    for category in CATEGORIES:
        parts = PREDICTED.get(category, ())
        row(
            category,
            lambda lives, category=category: shown_bytes(lives.at_peak[category]),  # type: ignore[misc]
            lambda estimate, parts=parts: shown_bytes(sum(estimate.parts[part] for part in parts)),  # type: ignore[misc]
        )
    table.add_section()
    row("peak", lambda lives: shown_bytes(lives.peak), lambda estimate: shown_bytes(estimate.update), "bold")
    row("reached in", lambda lives: lives.phase_at(lives.peak_at), lambda _: "")
    return table


def as_json(measurements: Mapping[str, Measurement]) -> dict[str, Any]:
    """Writes what `save_plot` draws and the table says for other programs."""
    written: dict[str, Any] = {}
    for name, measured in measurements.items():
        written[name] = {"describes": CONTENDERS[name].describes}
        lives = measured.lives
        if lives is None:
            written[name] |= {"reason": measured.reason}
            continue
        ticks, curves = _by_phase(lives)
        written[name] |= {
            "strategy": measured.strategy,
            "loss": measured.loss,
            "peak_bytes": lives.peak,
            "peak_phase": lives.phase_at(lives.peak_at),
            "at_peak": lives.at_peak,
            "phases": [phase._asdict() for phase in lives.phases],
            "ticks": ticks.tolist(),
            "bytes": {category: curve.tolist() for category, curve in curves.items()},
            "allocator_peak_bytes": measured.allocator_peak,
        }
    return written
