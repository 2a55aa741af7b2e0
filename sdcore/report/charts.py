"""Draws every picture of the project with matplotlib: panels of lines, bars, stacked areas, as SVG or PNG.

    panel = Panel(marks=[Line(x=[1, 2], y=[3.0, 4.0], label="ours")], x_label="step", y_label="nats")
    save(figure_of([panel]), "loss.png")                     # or .svg
    inline_svg(figure_of([panel]), "loss")                   # for a page

What differs from the obvious: no pyplot, so that there is no state which two callers share, and no display. The same
data give the same bytes: files carry no date, and the ids inside an SVG follow from its name. A dollar sign is a dollar
sign and starts no formula, since labels come from runs. matplotlib, of the extra `plot`, is imported when something is
drawn; `require_matplotlib` asks for it before any work.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by lightness too, and in the order of use.
COLOURS: Final = ("#2557a7", "#c98a2b", "#3d8a78", "#8a5fa8", "#b0506a", "#6b7480", "#4f9ec4", "#7a7a3a")
INK: Final = "#59626d"  # text and axes
GRID: Final = "#e4e7eb"
GROUP_WIDTH: Final = 0.8  # of the bars of a group together; groups are 1 apart
RC: Final[Any] = {  # matplotlib names every setting in a type of its own
    "axes.edgecolor": INK,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "figure.titlesize": 10,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.color": GRID,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line through points, or with style "" its markers alone."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""  # in the legend; "": not there
    colour: str = ""  # "": the next of COLOURS in this panel
    band: tuple[Sequence[float], Sequence[float]] | None = None  # from and to at each x, shaded
    marker: str = ""
    hollow: bool = False  # markers are outlines
    style: str = "-"
    width: float = 1.6


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar, of which a lower part may be pale."""

    height: float
    colour: str
    label: str = ""
    pale: float = 0.0  # height of the pale part
    text: str = ""  # above it, upright


@dataclass(frozen=True)
class Bars:
    """Groups of bars around 0, 1, 2, ...; what a group is called is the panel's `x_ticks`."""

    groups: Sequence[Sequence[Bar]]


@dataclass(frozen=True, kw_only=True)
class Areas:
    """Heights that add up, from the bottom to the top; each holds until the next x."""

    x: Sequence[float]
    heights: Mapping[str, Sequence[float]]  # label -> one for each x
    colours: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line through the whole panel."""

    y: float
    label: str = ""
    colour: str = "black"
    style: str = "--"


@dataclass(frozen=True, kw_only=True)
class Span:
    """A vertical stripe from `start` to `end`."""

    start: float
    end: float
    colour: str
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Words:
    """Text that begins at a share of the panel's width, at a share of its height or on a value of y."""

    text: str
    x: float = 0.02
    y: float = 0.96
    on_value: bool = False  # y is a value, and the text stands on it


Mark = Line | Bars | Areas | Level | Span | Words


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes and what is drawn between them."""

    marks: Sequence[Mark]
    title: str = ""
    bold: bool = False  # the title
    x_label: str = ""
    y_label: str = ""
    x_log: float | None = None  # base of a logarithmic axis; None: a linear one
    y_log: float | None = None
    x_linear_until: float | None = None  # a logarithmic axis that is linear around 0
    x_ticks: Mapping[float, str] | None = None  # {}: none; None: where they fall
    tick_angle: float = 0.0
    x_counts: bool = False  # ticks are whole numbers, 12k for 12000
    y_ticks: bool = True
    y_text: Callable[[float], str] | None = None  # how a value is written at the axis
    x_limits: tuple[float | None, float | None] = (None, None)
    y_limits: tuple[float | None, float | None] = (None, None)


def require_matplotlib(what: str) -> None:
    """Raises `ImportError` with what to install where matplotlib is missing; `what` needs it, as "a report"."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f'{what} needs matplotlib: pip install "sdcore[plot]"')


def figure_of(
    panels: Sequence[Panel],
    *,
    columns: int = 1,
    size: tuple[float, float] = (4.6, 2.9),
    title: str = "",
    legend: Literal["panels", "below", "none"] = "panels",
    legend_columns: int = 4,
    share_x: Literal["none", "all", "row", "col"] = "none",
    share_y: Literal["none", "all", "row", "col"] = "none",
    heights: Sequence[float] | None = None,
    margins: tuple[float, float, float, float] | None = None,
) -> Figure:
    """Draws the panels row by row; `size` is one panel's in inches, `heights` relates the rows to each other.

    A legend stands in every panel with more than one label, or below all panels with each label once. `margins` are
    shares of the figure: left, bottom, right and top edge of the panels; None leaves what the labels need, which takes
    as long to find as the drawing.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout=None if margins else "constrained")
        if margins:
            figure.subplots_adjust(*margins)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=share_x, sharey=share_y, height_ratios=heights)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        labelled: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel)
            handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            labelled |= {label: handle for label, handle in handles.items() if label not in labelled}
            if legend == "panels" and len(handles) > 1:
                axes.legend(handles.values(), handles, fontsize=7)
        if legend == "below" and labelled:
            figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=legend_columns)
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


def save(figure: Figure, path: Path | str, *, dpi: int = 110) -> Path:
    """Writes a PNG or an SVG, as the path's suffix says."""
    import matplotlib

    target = Path(path)
    with matplotlib.rc_context(RC | {"svg.hashsalt": target.name}):
        figure.savefig(target, dpi=dpi, metadata={"Date": None} if target.suffix == ".svg" else None)
    return target


def inline_svg(figure: Figure, name: str, *, colours: Mapping[str, str] | None = None) -> str:
    """Returns the figure as an `<svg>` element for a page, which reads `name` out where it cannot be seen.

    Two figures of a page need different names, from which their ids follow. `colours` are replaced, such as by the
    page's variables. The page's style sheet has the font and the round joints of lines.
    """
    import matplotlib

    written = StringIO()
    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = written.getvalue()
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    # A style sheet would hold for the whole page, and a group's name is the same in every figure.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    for drawn, wanted in (colours or {}).items():
        text = text.replace(drawn, wanted)
    return text


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

    if panel.x_linear_until is not None:
        axes.set_xscale("symlog", linthresh=panel.x_linear_until)
    elif panel.x_log is not None:
        axes.set_xscale("log", base=panel.x_log)
    if panel.y_log is not None:
        axes.set_yscale("log", base=panel.y_log)
        axes.yaxis.set_minor_formatter(NullFormatter())
    colours = iter(COLOURS * len(panel.marks))
    for mark in panel.marks:
        match mark:
            case Line():
                _draw_line(axes, mark, mark.colour or next(colours))
            case Bars():
                _draw_bars(axes, mark)
            case Areas(x=x, heights=heights):
                shades = [mark.colours[label] for label in heights]
                axes.stackplot(x, *heights.values(), labels=list(heights), colors=shades, step="post", linewidth=0)
            case Level(y=y, label=label, colour=colour, style=style):
                axes.axhline(y, color=colour, label=label, linestyle=style, linewidth=0.8)
            case Span(start=start, end=end, colour=colour, label=label):
                axes.axvspan(start, end, color=colour, label=label, linewidth=0)
            case Words(text=text, x=x, y=y, on_value=on_value):
                transform = axes.get_yaxis_transform() if on_value else axes.transAxes
                axes.text(x, y, text, transform=transform, va="bottom" if on_value else "top", fontsize=8)
    axes.set_title(panel.title, fontweight="bold" if panel.bold else "normal")
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label, xlim=panel.x_limits, ylim=panel.y_limits)
    if panel.x_ticks is not None:
        axes.set_xticks(list(panel.x_ticks), list(panel.x_ticks.values()))
        axes.xaxis.set_minor_locator(NullLocator())
    if panel.tick_angle:
        axes.tick_params(axis="x", labelrotation=panel.tick_angle)
        for tick_label in axes.get_xticklabels():
            tick_label.set_horizontalalignment("right")
    if panel.x_counts:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not panel.y_ticks:
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    if panel.y_text is not None:
        write = panel.y_text
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _draw_line(axes: Axes, line: Line, colour: str) -> None:
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        line.x,
        line.y,
        color=colour,
        label=line.label,
        linestyle=line.style,
        linewidth=line.width,
        marker=line.marker,
        markersize=2 + 1.2 * line.width,
        markerfacecolor="white" if line.hollow else colour,
    )


def _draw_bars(axes: Axes, bars: Bars) -> None:
    width = GROUP_WIDTH / max(map(len, bars.groups))
    for position, group in enumerate(bars.groups):
        for i, bar in enumerate(group):
            centre = position + (i - (len(group) - 1) / 2) * width
            style: dict[str, Any] = {"width": 0.92 * width, "color": bar.colour}
            axes.bar(centre, bar.pale, alpha=0.35, **style)
            axes.bar(centre, bar.height - bar.pale, bottom=bar.pale, label=bar.label, **style)
            if bar.text:
                axes.text(centre, bar.height, f" {bar.text}", ha="center", va="bottom", fontsize=6.5, rotation=90)
