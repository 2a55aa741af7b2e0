"""Draw what was measured: live bytes over the step, stacked by category, the contenders side by side on one scale.

    save_plot(measure(config, load), "memory.png", title="Qwen3, 2 layers")
    table = measured_table(found, predicted)

Needs matplotlib: pip install "sdcore[plot]".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .estimate import MIB, Prediction, shown_bytes
from .measured import CONTENDERS, Measurement
from .timeline import CATEGORIES, PHASES, Lives

if TYPE_CHECKING:
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
    "student forward": "#2f7ebc",
    "teacher forward": "#5aa469",
    "loss": "#e3b23c",
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


def save_plot(found: Mapping[str, Measurement], path: Path | str, *, title: str = "") -> Path:
    """Write a PNG of all contenders that ran. Raises `ImportError` without matplotlib, and `ValueError` for none."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "sdcore[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ran = {name: one for name, one in found.items() if one.lives is not None}
    if not ran:
        raise ValueError("found must hold a contender that ran, got none")
    highest = max(one.lives.peak for one in ran.values() if one.lives) / MIB
    figure, axes = plt.subplots(
        2,
        len(ran),
        figsize=(1.2 + 3.3 * len(ran), 4.4),
        squeeze=False,
        sharex="col",
        sharey="row",
        gridspec_kw={"height_ratios": (18, 1), "hspace": 0.06, "wspace": 0.07},
    )
    for column, (name, one) in enumerate(ran.items()):
        if one.lives is not None:
            _curves(axes[0][column], one, one.lives, highest)
            _phases(axes[1][column], one.lives)
        heading = NAMES.get(name, name)
        axes[0][column].set_title(heading, fontsize=10, fontweight="bold" if name == "ours" else "normal", loc="left")
    axes[0][0].set_ylabel("live MiB")
    phases = [name for name in PHASES[:-1] if any(p.name == name for one in ran.values() for p in _of(one))]
    categories = [name for name in CATEGORIES if any(one.lives and one.lives.bytes[name].any() for one in ran.values())]
    handles = [Patch(color=COLOURS[name], label=name) for name in reversed(categories)]
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.0, 0.56), frameon=False, fontsize=8)
    figure.legend(
        handles=[Patch(color=PHASE_COLOURS[name], label=name) for name in phases],
        loc="lower center",
        bbox_to_anchor=(0.55, 0.0),
        ncols=len(phases),
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    left = 1.75 / figure.get_figwidth()
    figure.subplots_adjust(left=left, right=0.99, top=0.86, bottom=0.15)
    target = Path(path)
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _of(one: Measurement) -> tuple[Any, ...]:
    return one.lives.phases if one.lives else ()


def _places(lives: Lives) -> tuple[np.ndarray, np.ndarray]:
    """Ticks where phases meet, and where these are drawn: what happens often is no wider than what lives long.

    All stretches of a phase together are as wide in every panel, whatever the number of allocations in them.
    """
    ticks = {
        phase.name: sum(other.end - other.start for other in lives.phases if other.name == phase.name)
        for phase in lives.phases
    }
    edges, places = [0], [0.0]
    for phase in lives.phases:
        edges.append(phase.end)
        places.append(places[-1] + WIDTHS[phase.name] * (phase.end - phase.start) / ticks[phase.name])
    return np.array(edges), np.array(places)


def _curves(axis: Any, one: Measurement, lives: Lives, highest: float) -> None:
    ticks, curves = _by_phase(lives)
    places = np.interp(ticks, *_places(lives))
    stacked = [curves[name] / MIB for name in CATEGORIES]
    axis.stackplot(places, stacked, colors=[COLOURS[name] for name in CATEGORIES], step="post", linewidth=0)
    peak = lives.peak / MIB
    axis.axhline(peak, color="black", linewidth=0.7, linestyle=(0, (4, 3)))
    axis.annotate(
        f"peak {peak:,.0f} MiB, {lives.phase_at(lives.peak_at)}",
        (places[-1] * 0.01, peak),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=8,
    )
    axis.set_ylim(0, highest * 1.08)
    axis.set_xlim(0, places[-1])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(True, axis="y", linewidth=0.4, alpha=0.5)
    axis.set_axisbelow(True)


def _phases(axis: Any, lives: Lives) -> None:
    edges, places = _places(lives)
    for phase in lives.phases:
        start, end = np.interp((phase.start, phase.end), edges, places)
        axis.axvspan(start, end, color=PHASE_COLOURS[phase.name], linewidth=0)
    axis.set_yticks([])
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.set_xlabel(f"{edges[-1]:,} allocations and releases", fontsize=8)


def _by_phase(lives: Lives) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ticks and bytes, thinned in each phase by itself."""
    share = max(POINTS // max(len(lives.phases), 1), 8)
    pieces = [lives.thinned(share, start=phase.start, end=phase.end) for phase in lives.phases]
    ticks = np.concatenate([found for found, _ in pieces])
    return ticks, {name: np.concatenate([curves[name] for _, curves in pieces]) for name in CATEGORIES}


def measured_table(
    found: Mapping[str, Measurement], predicted: Mapping[str, Prediction] | None = None, title: str = "Measured peak"
) -> Table:
    """For a terminal: what each contender's peak is made of, with the estimate of the same step behind it."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("at the peak")
    for name in found:
        table.add_column(NAMES.get(name, name), justify="right")
        if name in (predicted or {}):
            table.add_column("estimate", justify="right", style="dim")

    def row(label: str, measured: Any, estimated: Any, **style: Any) -> None:
        cells = []
        for name, one in found.items():
            cells.append("–" if one.lives is None else measured(one.lives))
            if predicted and name in predicted:
                cells.append(estimated(predicted[name]))
        table.add_row(label, *cells, **style)

    for category in CATEGORIES:
        parts = PREDICTED.get(category, ())
        row(
            category,
            lambda lives, category=category: shown_bytes(lives.at_peak[category]),
            lambda one, parts=parts: shown_bytes(sum(one.parts[part] for part in parts)),
        )
    table.add_section()
    row("peak", lambda lives: shown_bytes(lives.peak), lambda one: shown_bytes(one.update), style="bold")
    row("reached in", lambda lives: lives.phase_at(lives.peak_at), lambda _: "")
    return table


def as_json(found: Mapping[str, Measurement]) -> dict[str, Any]:
    """What `save_plot` draws, and what the table says, for other programs."""
    written: dict[str, Any] = {}
    for name, one in found.items():
        if one.lives is None:
            written[name] = {"describes": CONTENDERS[name].describes, "reason": one.reason}
            continue
        ticks, curves = _by_phase(one.lives)
        written[name] = {
            "describes": CONTENDERS[name].describes,
            "strategy": one.strategy,
            "loss": one.loss,
            "peak_bytes": one.lives.peak,
            "peak_phase": one.lives.phase_at(one.lives.peak_at),
            "at_peak": one.lives.at_peak,
            "phases": [phase._asdict() for phase in one.lives.phases],
            "ticks": ticks.tolist(),
            "bytes": {category: curve.tolist() for category, curve in curves.items()},
            "allocator_peak_bytes": max(one.allocator, default=None),
        }
    return written


__all__ = ["as_json", "measured_table", "save_plot"]
