"""Draws every picture of the project with matplotlib: panels of lines, bars, stacked areas, as SVG or PNG.

    figure = figure_of([lambda axes: line(axes, [1, 2], [3.0, 4.0], label="ours")], title="Loss")
    save(figure, "loss.png")                     # or .svg
    inline_svg(figure, "loss")                   # for a page

A panel is a function that draws on matplotlib's `Axes`: with `line`, `bars` and `areas`, which take plain data, and
with what `Axes` has itself for scales, ticks and marks.

What differs from the obvious: no pyplot, so that there is no state which two callers share, and no display. The same
data give the same bytes: files carry no date, and the ids inside an SVG follow from its name. A dollar sign is a dollar
sign and starts no formula, since labels come from runs. matplotlib, of the extra `plot`, is imported when something is
drawn; `require_matplotlib` asks for it before any work.
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

    Panel = Callable[[Axes], object]

# Told apart by lightness too, and in the order of use.
COLOURS: Final = ("#2557a7", "#c98a2b", "#3d8a78", "#8a5fa8", "#b0506a", "#6b7480", "#4f9ec4", "#7a7a3a")
INK: Final = "#59626d"  # text and axes
GRID: Final = "#e4e7eb"
GROUP_WIDTH: Final = 0.8  # of the bars of a group together; groups are 1 apart
DASHED: Final[Any] = {"color": "black", "linewidth": 0.8, "linestyle": "--"}  # a level, for `axhline`
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


class Bar(NamedTuple):
    """Describes a bar, of which a lower part may be pale and across which a dash may go."""

    height: float
    colour: str
    label: str = ""  # in the legend; "": not there
    pale: float = 0.0  # height of the pale part
    text: str = ""  # above it, upright
    mark: float | None = None  # height of the dash


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
    margins: tuple[float, float, float, float] | None = None,
    **grid: Any,
) -> Figure:
    """Draws the panels row by row, each `size` inches; `grid` is for `Figure.subplots`: sharex, height_ratios, ...

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
        places = figure.subplots(rows, columns, squeeze=False, **grid).flat
        labelled: dict[str, Any] = {}
        for draw, axes in zip(panels, places, strict=False):
            axes.set_prop_cycle(color=COLOURS)
            draw(axes)
            handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
            labelled |= {label: handle for label, handle in handles.items() if label not in labelled}
            if legend == "panels" and len(handles) > 1:
                axes.legend(handles.values(), handles, fontsize=7)
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        if legend == "below" and labelled:
            figure.legend(labelled.values(), labelled, loc="outside lower center", ncols=legend_columns)
        if title:
            figure.suptitle(title, x=0.01, ha="left")
    return figure


def line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    *,
    band: tuple[Sequence[float], Sequence[float]] | None = None,
    label: str = "",
    **style: Any,
) -> None:
    """Draws a line, in the next of `COLOURS` where `style` has no color, and a pale band between two others."""
    (drawn,) = axes.plot(x, y, label=label, **{"linewidth": 1.6, "markersize": 4.0} | style)
    if band is not None:
        axes.fill_between(x, *band, color=drawn.get_color(), alpha=0.15, linewidth=0)


def bars(axes: Axes, groups: Mapping[str, Sequence[Bar]], *, slanted: bool = False) -> None:
    """Draws groups of bars beside each other around 0, 1, 2, ..., with their names below, slanted where long."""
    width = GROUP_WIDTH / max([1, *map(len, groups.values())])
    for position, group in enumerate(groups.values()):
        for i, bar in enumerate(group):
            centre = position + (i - (len(group) - 1) / 2) * width
            style: dict[str, Any] = {"width": 0.92 * width, "color": bar.colour}
            axes.bar(centre, bar.pale, alpha=0.35, **style)
            axes.bar(centre, max(bar.height - bar.pale, 0), bottom=bar.pale, label=bar.label, **style)
            if bar.mark is not None:
                axes.hlines(bar.mark, centre - width / 2, centre + width / 2, color="black", zorder=3)
            if bar.text:
                axes.text(centre, bar.height, f" {bar.text}", ha="center", va="bottom", fontsize=6.5, rotation=90)
    names: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(groups)), list(groups), **names)
    axes.set_xlim(-0.6, max(len(groups), 2) - 0.4)
    axes.grid(axis="x", visible=False)


def areas(axes: Axes, x: ArrayLike, heights: Mapping[str, ArrayLike], colours: Mapping[str, str]) -> None:
    """Stacks the heights from the bottom to the top; each holds until the next x."""
    shades = [colours[label] for label in heights]
    axes.stackplot(x, *heights.values(), labels=list(heights), colors=shades, step="post", linewidth=0)


def log_scale(axes: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """Makes axes logarithmic to these bases, with plain numbers at them."""
    from matplotlib.ticker import NullFormatter

    for base, set_scale, axis in ((x, axes.set_xscale, axes.xaxis), (y, axes.set_yscale, axes.yaxis)):
        if base is not None:
            set_scale("log", base=base)
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_minor_formatter(NullFormatter())


def sizes_on_x(axes: Axes, sizes: Sequence[float]) -> None:
    """Makes the x axis logarithmic, with a number at each of the sizes and nowhere else."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, list(map(short, sizes)), fontsize=7)
    axes.xaxis.minorticks_off()


def short(size: float) -> str:
    """Writes a size as axes have it: 512, 2k, 0.03."""
    return f"{size / 1024:g}k" if size and size % 1024 == 0 else f"{size:,g}"


def count_on_x(axes: Axes) -> None:
    """Puts whole numbers below the x axis, 12k for 12000."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def save(figure: Figure, path: Path | str, *, dpi: int = 110) -> Path:
    """Writes a PNG or an SVG, as the path's suffix says."""
    import matplotlib

    target = Path(path)
    if target.suffix == ".svg":
        target.write_text(_svg(figure, target.name), encoding="utf-8")
    else:
        with matplotlib.rc_context(RC):
            figure.savefig(target, dpi=dpi)
    return target


def inline_svg(figure: Figure, name: str, *, colours: Mapping[str, str] | None = None) -> str:
    """Returns the figure as an `<svg>` element for a page, which reads `name` out where it cannot be seen.

    Two figures of a page need different names, from which their ids follow. `colours` are replaced, such as by the
    page's variables. The page's style sheet has the font and the round joints of lines.
    """
    text = _svg(figure, name, transparent=True)
    text = text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    # A style sheet would hold for the whole page, and a group's name is the same in every figure.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    for drawn, wanted in (colours or {}).items():
        text = text.replace(drawn, wanted)
    return text


def _svg(figure: Figure, name: str, *, transparent: bool = False) -> str:
    import matplotlib

    written = StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(RC):
        figure.savefig(written, format="svg", transparent=transparent, metadata=no_metadata)
    # matplotlib's own ids are random, or follow from positions that the layout finds a last bit apart.
    ids: dict[str, str] = {}
    prefix = f"{zlib.crc32(name.encode(errors='replace')):08x}"
    pattern = r'(?<=[#"])[mp][0-9a-f]{10}(?=[")])'
    return re.sub(pattern, lambda match: ids.setdefault(match[0], f"i{prefix}-{len(ids)}"), written.getvalue())
