"""Teaches a model a new task from demonstrations, three ways, and measures what each costs.

`learners` holds the three ways and `run_demo`, `experiment` the model, the questions and the training loop, which the
studies of `reproduce/` share, and `report` what is printed and written.
"""

from sdcore.demo.learners import DemoConfig, run_demo
from sdcore.world import CHECKPOINT

__all__ = ["CHECKPOINT", "DemoConfig", "run_demo"]
