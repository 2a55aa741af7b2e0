"""Losses between hidden states of student and teacher, as modules."""

from .divergence import FusedLinearDivergence

__all__ = ["FusedLinearDivergence"]
