"""Runs teacher and student so that tokens with the same past are computed once: the shared-prefix scheme."""

from .choice import Strategy
from .costs.count import Cost, PassCost, cost, cost_of_sizes
from .costs.sizes import ModelSizes
from .planner import Plan, buckets, check_against, plan
from .report import PassReport, Report
from .runner import Part, Passes, PrefixOutput, TeacherRows, passes, run
from .sampling import Sampled, generate
from .trajectories import View, plan_trajectories
from .tree import Tree

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
    "View",
    "buckets",
    "check_against",
    "cost",
    "cost_of_sizes",
    "generate",
    "passes",
    "plan",
    "plan_trajectories",
    "run",
]
