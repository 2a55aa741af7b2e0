"""Computes losses between hidden states of student and teacher, and of rewards; makes those of tokens one number."""

from .fused_linear import FusedLinearDivergence
from .policy_gradient import Estimator, PolicyTerm, group_advantages, policy_loss
from .tilt import LogZ, Tilted, TiltOutput, TokenTilt
from .token_weighting import Aggregation, over_ranks, per_completion, spread, token_weights

__all__ = [
    "Aggregation",
    "Estimator",
    "FusedLinearDivergence",
    "LogZ",
    "PolicyTerm",
    "TiltOutput",
    "Tilted",
    "TokenTilt",
    "group_advantages",
    "over_ranks",
    "per_completion",
    "policy_loss",
    "spread",
    "token_weights",
]
