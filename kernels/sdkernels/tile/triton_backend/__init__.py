"""Runs `divergence_tile`, `logprob_tile` and `topk_tile` in Triton, over tiles that the driver has projected.

Importing this package imports triton; the driver does so when the backend is used. From a tile to its results:
tiles.py; kernels: statistics.py, divergence.py, softmax_gradient.py, buckets.py, topk.py; formulas per element:
formulas.py; the upstream gradient's factor: scale.py; block sizes per architecture: configs.py.
"""

from __future__ import annotations

from ..elementwise import column_squares
from ..head import Head
from .scale import can_scale, scale_
from .tiles import divergence_tile, logprob_tile, scratch_bytes, topk_tile

# What `HeadWalk` may project as the teacher: see `TileRows.teacher_is_gap`.
TAKES_GAP = False
# The products with a head (V, H), given also the dtype of the logits.
make_head = Head

__all__ = [
    "can_scale",
    "column_squares",
    "divergence_tile",
    "logprob_tile",
    "scale_",
    "scratch_bytes",
    "topk_tile",
]
