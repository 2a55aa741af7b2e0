"""Says whose weights the teacher has."""

from .ema import EMA, PeriodicSync, Snapshot
from .weights import AdapterOff, Frozen, Live, StatefulTeacher, Teacher, TrustRegion

__all__ = [
    "EMA",
    "AdapterOff",
    "Frozen",
    "Live",
    "PeriodicSync",
    "Snapshot",
    "StatefulTeacher",
    "Teacher",
    "TrustRegion",
]
