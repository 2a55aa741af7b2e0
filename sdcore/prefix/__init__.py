"""Runs teacher and student so that tokens with the same past are computed once: the shared-prefix scheme."""

from .choice import Strategy
from .costs.count import Cost, PassCost, cost, cost_of_sizes
from .costs.sizes import ModelSizes
from .planner import Plan, Tree, buckets, check_against, plan, row_slices
from .report import PassReport, Report
from .runner import Part, Passes, PrefixOutput, TeacherRows, passes, run
from .sampling import Sampled, generate

__all__ = [
    "Cost",
    "ModelSizes",
    "Part",
    "PassCost",
    "PassReport",
    "Passes",
    "Plan",
    "PrefixOutput",
    "Report",
    "Sampled",
    "Strategy",
    "TeacherRows",
    "Tree",
    "buckets",
    "check_against",
    "cost",
    "cost_of_sizes",
    "generate",
    "passes",
    "plan",
    "row_slices",
    "run",
]
