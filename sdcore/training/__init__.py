"""Runs a whole training: trainer, configuration, evaluation, search at test time, and a look ahead before a run."""

from .config import SelfDistillationConfig
from .evaluation import EvalResult, evaluate
from .trainer import SelfDistillationTrainer

__all__ = ["EvalResult", "SelfDistillationConfig", "SelfDistillationTrainer", "evaluate"]
