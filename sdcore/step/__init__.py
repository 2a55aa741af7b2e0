"""Takes one training step, from token ids to gradients. `distill.py` is the file to read first."""

from .distill import distill_step, imitate_step
from .parts import StepOutput
from .rewards import policy_gradient_step, tilt_step, token_logprobs

__all__ = ["StepOutput", "distill_step", "imitate_step", "policy_gradient_step", "tilt_step", "token_logprobs"]
