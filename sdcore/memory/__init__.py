"""Says how much memory a training step takes and for what: predicted from a configuration, or measured.

    compare(config, load)["fused, shared"].total          # estimate: from the configuration alone, on any machine
    what_fits(config, load, device_bytes=80 * 10**9)      # fits: the largest prompt, group, completion, ... on a card
    measure(config, load)["ours"].lives.peak              # measured: one step of random weights, every byte by category

`plot` draws what was measured; `timeline` is the instrument, for any code around a model.
"""

from .estimate import (
    PARTS,
    Load,
    Parameters,
    Prediction,
    Setting,
    compare,
    count_parameters,
    memory_table,
    predict,
)
from .fits import CARDS, Fit, device_bytes, fits_table, largest, what_fits
from .measured import CONTENDERS, Measurement, Tiles, measure
from .plot import measured_table, save_plot
from .shrink import Shrunk, shrunk
from .timeline import CATEGORIES, Lives, TimeLine

__all__ = [
    "CARDS",
    "CATEGORIES",
    "CONTENDERS",
    "PARTS",
    "Fit",
    "Lives",
    "Load",
    "Measurement",
    "Parameters",
    "Prediction",
    "Setting",
    "Shrunk",
    "Tiles",
    "TimeLine",
    "compare",
    "count_parameters",
    "device_bytes",
    "fits_table",
    "largest",
    "measure",
    "measured_table",
    "memory_table",
    "predict",
    "save_plot",
    "shrunk",
    "what_fits",
]
