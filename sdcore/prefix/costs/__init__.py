"""Counts what passes cost, from sizes alone: tokens, FLOPs and kept bytes as integers, without a model or a tensor."""

from .count import Cost, PassCost, cost, cost_of_sizes
from .sizes import ModelSizes, model_sizes

__all__ = ["Cost", "ModelSizes", "PassCost", "cost", "cost_of_sizes", "model_sizes"]
