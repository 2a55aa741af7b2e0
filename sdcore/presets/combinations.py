"""Which choices of a method go together: one line for each that depends on others.

A combination is refused where a field would have no effect or the loss would be none (always 0, or of an unknown
policy's samples), because both are mistakes that a run does not show. What a field itself may be is in `fields`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .methods import Method


def combinations(method: Method) -> list[tuple[bool, str]]:
    """(whether it makes sense, what is wrong where it does not), one for each choice that depends on others."""
    divergence, group = method.target == "divergence", method.num_generations
    mixed = divergence and method.distillation_weight < 1.0
    full = method.topk is None and not method.sampled_token
    shown = method.context == "feedback"
    return [
        # A target without a teacher has no use for what only a teacher reads.
        (
            method.has_teacher or method.context == "none",
            f"context must be 'none' with target={method.target!r}, which shows nothing to a teacher, got "
            f"{method.context!r}",
        ),
        (
            method.template is None or method.context != "none",
            f"template must be None with context='none', got {method.template!r}",
        ),
        (
            not (divergence and method.context == "none" and method.teacher == "live"),
            "teacher must not be 'live' with context='none': it would be the student itself, and the loss 0",
        ),
        (
            method.use_solution or method.use_feedback or not shown,
            "use_solution or use_feedback must be True with context='feedback', got False for both",
        ),
        (
            not shown or group > 1 or method.use_feedback or not method.dont_reprompt_on_self_success,
            f"num_generations must be at least 2 where only another attempt of the group is shown, got {group}",
        ),
        (
            method.overflow != "drop_oldest_feedback" or (shown and method.use_feedback),
            "overflow='drop_oldest_feedback' needs context='feedback' with use_feedback=True",
        ),
        # Whose weights.
        (
            method.teacher != "ema" or method.update_rate > 0,
            "update_rate must be in (0, 1] with teacher='ema', got 0: teacher='frozen' is the one that never moves",
        ),
        (
            divergence or method.teacher != "trust_region",
            f"teacher must not be 'trust_region' with target={method.target!r}: it is for the divergence",
        ),
        (
            method.has_teacher or not method.needs_reference or method.teacher != "live",
            "teacher must not be 'live' where it is the reference that the student is held to (a tilt, a "
            "kl_anchor): its distance to itself is 0",
        ),
        (
            method.target != "imitation" or method.teacher == "live",
            f"teacher must be left at 'live' with target='imitation', which has none, got {method.teacher!r}",
        ),
        # The divergence.
        (
            not method.normalize or 0.0 < method.alpha < 1.0,
            f"normalize must be False where alpha is 0 or 1, which it leaves as they are, got alpha={method.alpha}",
        ),
        (
            full or divergence,
            f"topk and sampled_token must be left out with target={method.target!r}, which is not a divergence on a "
            f"support, got topk={method.topk}, sampled_token={method.sampled_token}",
        ),
        (
            method.topk is None or not method.sampled_token,
            f"topk must be None with sampled_token=True, got {method.topk}",
        ),
        (
            method.tail or method.topk is not None,
            "tail must be True with topk=None: the full vocabulary has none, got False",
        ),
        (
            method.topk_of == "student" or method.topk is not None,
            f"topk_of must be 'student' with topk=None, which takes no one's top-k, got {method.topk_of!r}",
        ),
        (
            not method.sampled_token or (method.alpha == 1.0 and method.samples == "student"),
            "sampled_token=True is the score-function form of the reverse KL on the student's own samples: alpha "
            f"must be 1 and samples 'student', got {method.alpha} and {method.samples!r}",
        ),
        (
            method.entry_clip is None or (divergence and full),
            f"entry_clip must be None except for a divergence over the full vocabulary, got {method.entry_clip}",
        ),
        (
            method.importance_clip is None or divergence,
            f"importance_clip must be None with target={method.target!r}, got {method.importance_clip} (the policy "
            "gradient has clip_low and clip_high)",
        ),
        (
            method.importance_clip is None or method.samples == "student",
            f"importance_clip must be None with samples='dataset', which no known policy drew, got "
            f"{method.importance_clip}",
        ),
        # Rewards.
        (
            method.target != "token_tilt" or method.alpha in (0.0, 1.0),
            f"alpha must be 0 or 1 with target='token_tilt', which is exact for the two KLs, got {method.alpha}",
        ),
        (
            method.distillation_weight == 1.0 or divergence,
            f"distillation_weight must be 1 with target={method.target!r}: there is no divergence to mix, got "
            f"{method.distillation_weight}",
        ),
        (
            method.distillation_weight > 0.0,
            "distillation_weight must be in (0, 1], got 0: target='policy_gradient' is the one without distillation",
        ),
        (
            method.kl_anchor == 0.0 or mixed or method.target == "policy_gradient",
            "kl_anchor must be 0 except for target='policy_gradient' and mixtures (distillation_weight < 1), got "
            f"{method.kl_anchor}",
        ),
        (
            method.ratio_of == "token" or mixed or method.target == "policy_gradient",
            "ratio_of must be 'token' except for target='policy_gradient' and mixtures (distillation_weight < 1), got "
            f"{method.ratio_of!r}",
        ),
        (
            group > 1 or not (mixed or method.target in ("tilt", "token_tilt", "policy_gradient")),
            f"num_generations must be at least 2 where completions are compared with their group, got {group}",
        ),
        (
            method.samples == "student" or method.target in ("divergence", "imitation"),
            f"samples must be 'student' with target={method.target!r}, which learns from rewards, got 'dataset'",
        ),
        (
            method.samples == "student" or not (mixed or shown),
            "samples must be 'student' with context='feedback' and with distillation_weight < 1: both need "
            "completions that were judged, got 'dataset'",
        ),
        (
            method.target != "imitation" or method.samples == "dataset",
            "samples must be 'dataset' with target='imitation': its own samples teach the student nothing, got "
            "'student'",
        ),
        (
            method.samples == "student" or group == 1,
            f"num_generations must be 1 with samples='dataset', which has one completion a row, got {group}",
        ),
        (
            method.target != "tilt" or method.skip_first_tokens == 0,
            "skip_first_tokens must be 0 with target='tilt', which is about whole completions, got "
            f"{method.skip_first_tokens}",
        ),
    ]


__all__ = ["combinations"]
