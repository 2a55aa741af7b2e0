"""Turns a group of completions into the token ids that their teacher reads.

builder = SuccessOrFeedback(overflow="truncate_context", max_teacher_prompt_length=4096)
conditioned = builder.condition(group, tokenizer)
"""

from .overflow import FEEDBACK_SEPARATOR, join_feedback, split_feedback
from .rendering import prompt_ids, require_text, student_prompt_ids, with_context
from .teacher_prompts import (
    ContextBuilder,
    Custom,
    Demonstration,
    No,
    Solution,
    SuccessOrFeedback,
    Template,
    check_examples,
)
from .templates import without_thinking
from .turns import OfTurn

__all__ = [
    "FEEDBACK_SEPARATOR",
    "ContextBuilder",
    "Custom",
    "Demonstration",
    "No",
    "OfTurn",
    "Solution",
    "SuccessOrFeedback",
    "Template",
    "check_examples",
    "join_feedback",
    "prompt_ids",
    "require_text",
    "split_feedback",
    "student_prompt_ids",
    "with_context",
    "without_thinking",
]
