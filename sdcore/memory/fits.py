"""Says what fits a card: the largest prompt, context, completion, group or batch, each alone, by the estimate.

    fits = what_fits(config, load, device_bytes=device_bytes("H100"))
    fits["fused, shared"]["completions"].value

Sought by bisection in `estimate.predict`, with everything else as the load says; a length is bounded by the model's
positions too. A tenth of the device is left alone by default, for what the estimate does not know: the CUDA context,
the allocator's fragmentation, temporaries.

Not covered: several devices; quantities that only fit together with a change of another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import ArgumentError
from ..prefix.costs.sizes import model_sizes
from .estimate import MIB, Load, Parameters, Setting, count_parameters, predict, variants_of

if TYPE_CHECKING:
    from rich.table import Table

GIB: Final = 1 << 30
# Memory of a card in GiB as its driver reports it, somewhat less than what it is sold with.
CARDS: Final = {
    "T4": 14.6,
    "L4": 22.0,
    "A10": 22.0,
    "RTX 3090": 23.6,
    "RTX 4090": 23.6,
    "RTX 5090": 31.4,
    "V100-32": 31.7,
    "A100-40": 39.4,
    "L40S": 44.4,
    "RTX 6000 Ada": 47.4,
    "A100-80": 79.2,
    "H100": 79.2,
    "H200": 139.8,
    "B200": 178.4,
    "MI300X": 191.9,
}
UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": MIB, "GIB": GIB}
HEADROOM: Final = 0.1
# What is sought, with its letter, and the least of it.
QUANTITIES: Final = {
    "completion_tokens": ("R, tokens of a completion", 1),
    "completions": ("G, completions of a prompt", 1),
    "prompts": ("B, prompts at a time", 1),
    "prompt_tokens": ("P, tokens of the prompt", 1),
    "context_tokens": ("C, tokens of the context", 0),
}
LENGTHS: Final = ("prompt_tokens", "context_tokens", "completion_tokens")
# Nobody asks for more; where it is reached, something else is the limit.
MOST: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Holds the largest value of one quantity."""

    value: int | None  # None: not even the least fits
    rows: int  # N, completion tokens in the step; 0 for None
    limit: str = ""  # what stopped it where it was not memory


def device_bytes(name: str) -> int:
    """Returns the bytes of a device: the name of a card, or a size such as "80GB", "79.2GiB".

    Raises `ArgumentError`, with the cards that are known.
    """
    wanted = re.sub(r"[\s_-]", "", name).upper()
    for card, gib in CARDS.items():
        if re.sub(r"[\s_-]", "", card).upper() == wanted:
            return int(gib * GIB)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Z]*)\s*", name.upper())
    if match is None or match[2] not in UNITS:
        raise ArgumentError(f"device memory must be a size such as 80GB or one of {', '.join(CARDS)}, got {name!r}")
    return int(float(match[1]) * UNITS[match[2]])


def largest(
    config: Any,
    load: Load,
    setting: Setting,
    quantity: str,
    *,
    available: int,
    parameters: Parameters | None = None,
) -> Fit:
    """Finds the largest `quantity`, one of `QUANTITIES`, with which a step's peak is at most `available` bytes."""
    if quantity not in QUANTITIES:
        raise ArgumentError(f"quantity must be one of {', '.join(QUANTITIES)}, got {quantity!r}")
    counted = parameters or count_parameters(config)
    least = QUANTITIES[quantity][1]
    most, limit = MOST, "more than anybody asks for"
    positions = getattr(config, "max_position_embeddings", None)
    if quantity in LENGTHS and positions:
        others = sum(getattr(load, name) for name in LENGTHS if name != quantity)
        if positions - others < most:
            most, limit = positions - others, "the model's positions"

    def with_quantity(value: int) -> Load:
        return replace(load, **{quantity: value})  # type: ignore[arg-type]  # of QUANTITIES, which are numbers

    def fits(value: int) -> bool:
        return predict(config, with_quantity(value), setting, parameters=counted).total <= available

    if most < least or not fits(least):
        return Fit(value=None, rows=0)
    below, above = least, most + 1
    while (doubled := 2 * max(below, 1)) < above:  # small answers, which are cheap to try, before large ones
        below, above = (doubled, above) if fits(doubled) else (below, doubled)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return Fit(value=below, rows=with_quantity(below).rows, limit=limit if below == most else "")


def what_fits(
    config: Any,
    load: Load,
    setting: Setting | None = None,
    *,
    device_bytes: int,
    headroom: float = HEADROOM,
    parameters: Parameters | None = None,
) -> dict[str, dict[str, Fit]]:
    """Finds the largest of every quantity, for the variants of `compare` and for few completions in flight at a time.

    `headroom` is the share of the device that is left alone. Raises `ArgumentError` for one outside [0, 1).
    """
    if not 0 <= headroom < 1:
        raise ArgumentError(f"headroom must be in [0, 1), got {headroom}")
    setting = setting or Setting()
    model_sizes(config)
    counted = parameters or count_parameters(config)
    available = int(device_bytes * (1 - headroom))
    variants = variants_of(setting)
    if setting.strategy != "two_phase":
        at_a_time = setting.micro_batch or 1
        variants[f"fused, {at_a_time} at a time"] = replace(
            setting, fused=True, strategy="two_phase", micro_batch=at_a_time
        )
    return {
        name: {
            quantity: largest(config, load, variant, quantity, available=available, parameters=counted)
            for quantity in QUANTITIES
        }
        for name, variant in variants.items()
    }


def fits_table(fits: Mapping[str, Mapping[str, Fit]], load: Load, title: str) -> Table:
    """Lists on a terminal a line per quantity, a column per variant."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=_caption(fits), caption_justify="left")
    table.add_column("largest, alone")
    table.add_column("given", justify="right")
    for name in fits:
        table.add_column(name, justify="right")
    for quantity, (label, _) in QUANTITIES.items():
        cells = [_shown(variant[quantity], with_rows=quantity not in LENGTHS[:2]) for variant in fits.values()]
        table.add_row(label, f"{getattr(load, quantity):,}", *cells)
    return table


def _caption(fits: Mapping[str, Mapping[str, Fit]]) -> str:
    limits = {fit.limit for variant in fits.values() for fit in variant.values() if fit.limit}
    notes = ["N: completion tokens in the step, B·G·R."]
    if "the model's positions" in limits:
        notes.append("*: as long as the model's positions allow.")
    if limits - {"the model's positions"}:
        notes.append(f"**: {MOST:,}, and memory is not the limit.")
    return " ".join(notes)


def _shown(fit: Fit, *, with_rows: bool) -> str:
    if fit.value is None:
        return "–"
    star = {"": "", "the model's positions": " *"}.get(fit.limit, " **")
    return f"{fit.value:,}{star}" + (f" (N {fit.rows:,})" if with_rows else "")
