"""What each metric means: the one table that the report, the documentation and the tests use."""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

Direction = Literal["up", "down", "watch", "none"]


class Key(NamedTuple):
    """A metric's name, what it is, and how to read it."""

    name: str
    meaning: str
    unit: str  # "share" is of 1; "nats" a divergence, an entropy or a log-probability
    direction: Direction  # what is good: "up" or "down"; "watch": a sudden change is a sign; "none": a fact
    topic: str  # heading in the report
    title: str  # of its curve, short


REWARD, LOSS, TEACHER, PROBES, COMPLETIONS, COST, OPTIMIZER, EVALUATION = (
    "Reward and feedback",
    "Loss",
    "Student and teacher",
    "Drift, leak probe and top-k support",
    "Completions and context",
    "Cost",
    "Optimizer",
    "Evaluation",
)
TOPICS: Final = (REWARD, EVALUATION, LOSS, TEACHER, PROBES, COMPLETIONS, COST, OPTIMIZER)
OTHER: Final = "Other"  # of names that are not in the table

KEYS: Final = (
    Key(
        "self_distillation/reward_mean",
        "Mean reward of the completions that were judged.",
        *("", "up", REWARD, "mean reward"),
    ),
    Key(
        "self_distillation/reward_std",
        "Standard deviation of those rewards.",
        *("", "none", REWARD, "reward, standard deviation"),
    ),
    Key(
        "self_distillation/success_group_fraction",
        "Groups in which a completion reached the success threshold.",
        *("share", "up", REWARD, "groups with a success"),
    ),
    Key(
        "self_distillation/flat_group_fraction",
        "Groups of several completions with the same reward: no policy gradient, and no example if all failed.",
        *("share", "down", REWARD, "groups with flat rewards"),
    ),
    Key(
        "self_distillation/reprompt_sample_fraction",
        "Active completions: those whose teacher had something privileged in view. The others carry no loss.",
        *("share", "up", REWARD, "active completions"),
    ),
    Key(
        "self_distillation/feedback_available_fraction",
        "Completions that the environment said something about.",
        *("share", "none", REWARD, "completions with feedback"),
    ),
    Key(
        "self_distillation/feedback_used_fraction",
        "Completions whose feedback was shown to the teacher.",
        *("share", "none", REWARD, "feedback used"),
    ),
    Key(
        "self_distillation/unjudged_fraction",
        "Completions without a reward: no reward function, or one that failed or ran out of time.",
        *("share", "down", REWARD, "completions not judged"),
    ),
    Key(
        "rewards/dropped",
        "Completions without a reward because the reward function failed.",
        *("count", "down", REWARD, "rewards lost"),
    ),
    Key("rewards/{function}/mean", "Mean of one reward function.", "", "up", REWARD, "reward of {function}"),
    Key("rewards/{why}", "Calls of reward functions that failed so.", "count", "down", REWARD, "rewards: {why}"),
    Key(
        "self_distillation/distillation_loss",
        "The loss that was minimised: the divergence of the teacher, aggregated as the method says.",
        *("nats", "down", LOSS, "distillation loss"),
    ),
    Key("loss", "The loss that the optimizer saw.", "nats", "down", LOSS, "loss"),
    Key(
        "loss/distillation",
        "The divergence's part of a mixture with a policy gradient, before its weight.",
        *("nats", "down", LOSS, "distillation part"),
    ),
    Key("loss/policy", "The policy gradient's part, before its weight.", "", "none", LOSS, "policy gradient part"),
    Key("policy/anchor", "KL estimate of the anchor to the reference.", "nats", "watch", LOSS, "KL anchor"),
    Key(
        "policy/clipped_fraction",
        "Tokens whose probability ratio was clipped: the samples are older than the policy gradient can use.",
        *("share", "down", LOSS, "clipped ratios"),
    ),
    Key("policy/ratio", "Mean probability ratio of student to sampler.", "", "watch", LOSS, "probability ratio"),
    Key(
        "tilt/gap",
        "Mean of log π - log p_ref - inv_temperature·reward over completions; minus log Z at the target.",
        *("nats", "none", LOSS, "tilt gap, mean"),
    ),
    Key(
        "tilt/gap_std",
        "Its standard deviation: 0 where the student is the tilted distribution on its samples.",
        *("nats", "down", LOSS, "tilt gap, standard deviation"),
    ),
    Key(
        "tilt/reference_kl",
        "Mean log-ratio of a completion under student and reference: an estimate of their KL.",
        *("nats", "watch", PROBES, "KL to the reference, per completion"),
    ),
    Key("tilt/completions", "Completions in the tilt's loss.", "count", "none", LOSS, "tilted completions"),
    Key(
        "tilt/reused_logprobs",
        "1 where the sampler's log-probabilities served as the student's.",
        *("", "none", LOSS, "reused log-probabilities"),
    ),
    Key("loss/active_tokens", "Completion tokens that carried loss.", "tokens", "none", LOSS, "tokens with loss"),
    Key(
        "loss/active_fraction",
        "Share of the completion tokens that carried loss. At 0 nothing is learned.",
        *("share", "up", LOSS, "share of tokens with loss"),
    ),
    Key(
        "loss/position_{i}",
        "Mean divergence of the completions' token number i, from 0. Where the first few tower over the loss, the "
        "teacher changes how an answer begins, such as by mentioning its context.",
        *("nats", "watch", LOSS, "divergence of token {i}"),
    ),
    Key(
        "student/entropy",
        "Mean entropy of the student's next-token distribution. A collapse ends exploration.",
        *("nats", "watch", TEACHER, "entropy, student"),
    ),
    Key(
        "teacher/entropy",
        "Mean entropy of the teacher's, at the same tokens.",
        *("nats", "none", TEACHER, "entropy, teacher"),
    ),
    Key(
        "teacher/entropy_gap",
        "Student's entropy minus the teacher's: how much surer the context makes the model. About 0: it says nothing.",
        *("nats", "watch", TEACHER, "entropy gap"),
    ),
    Key(
        "student/logprob",
        "Mean log-probability of the sampled tokens under the student.",
        *("nats", "none", TEACHER, "log-probability, student"),
    ),
    Key(
        "teacher/logprob",
        "The same under the teacher.",
        *("nats", "none", TEACHER, "log-probability, teacher"),
    ),
    Key(
        "distillation/student_mass",
        "The student's probability inside the top-k support, on a few completions.",
        *("share", "up", PROBES, "mass in the support, student"),
    ),
    Key(
        "distillation/teacher_mass",
        "The teacher's probability inside the same support. What is missing is seen by the tail's bucket alone.",
        *("share", "up", PROBES, "mass in the support, teacher"),
    ),
    Key(
        "distillation/overlap_ratio",
        "Share of the student's k likeliest tokens that are among the teacher's k likeliest.",
        *("share", "up", PROBES, "top-k overlap"),
    ),
    Key(
        "student/drift_kl",
        "KL of the student to the reference model on the student's own completions, per token, without any context.",
        *("nats", "watch", PROBES, "KL to the base model"),
    ),
    Key(
        "student/drift_logprob_gap",
        "Log-probability of the sampled tokens under the student minus that under the reference.",
        *("nats", "watch", PROBES, "log-probability gap to the base model"),
    ),
    Key(
        "teacher/context_kl",
        "The student's divergence to the teacher with the right context, on the probe's completions.",
        *("nats", "none", PROBES, "KL, right context"),
    ),
    Key(
        "teacher/leak_kl",
        "The same with the context of another prompt.",
        *("nats", "down", PROBES, "KL, another prompt's context"),
    ),
    Key(
        "teacher/leak_ratio",
        "Leak over context KL. Near 1, with little content KL: any context teaches as much, so it teaches style.",
        *("", "down", PROBES, "leak ratio"),
    ),
    Key(
        "teacher/content_kl",
        "KL of the teacher with the right context to the teacher with another prompt's: what the content itself says.",
        *("nats", "up", PROBES, "KL between the two teachers"),
    ),
    Key("completions/mean_length", "Mean length of the completions.", "tokens", "watch", COMPLETIONS, "mean length"),
    Key(
        "completions/clipped_ratio",
        "Completions that were cut at the length limit.",
        *("share", "down", COMPLETIONS, "cut at the limit"),
    ),
    Key("completions/count", "Completions since the last line.", "count", "none", COMPLETIONS, "completions"),
    Key(
        "completions/without_loss",
        "Completions that carried no loss of any kind.",
        *("count", "down", COMPLETIONS, "without loss"),
    ),
    Key(
        "completions/truncated_masked",
        "Completions left out of the loss because they were cut at the length limit.",
        *("count", "down", COMPLETIONS, "left out as cut"),
    ),
    Key("completions/empty_ratio", "Completions without a token.", "share", "down", COMPLETIONS, "empty completions"),
    Key(
        "context/overflow",
        "Teacher prompts in this step that were too long and lost some of their context.",
        *("prompts", "down", COMPLETIONS, "context overflows"),
    ),
    Key(
        "context/shared_fraction",
        "Share of the student's prompt tokens that the teacher's prompts begin with: what need not be computed twice.",
        *("share", "up", COMPLETIONS, "prompt shared with the teacher"),
    ),
    Key(
        "context/added_tokens",
        "Mean length of the teacher's prompts minus that of the student's.",
        *("tokens", "none", COMPLETIONS, "context tokens"),
    ),
    Key(
        "context/missing",
        "Completions for which there was nothing privileged to show; they carry no loss.",
        *("count", "down", COMPLETIONS, "without context"),
    ),
    Key(
        "context/with_solution",
        "Completions whose teacher saw the row's privileged context or a successful attempt.",
        *("count", "none", COMPLETIONS, "shown a solution"),
    ),
    Key(
        "context/with_feedback",
        "Completions whose teacher saw feedback.",
        *("count", "none", COMPLETIONS, "shown feedback"),
    ),
    Key(
        "context/dropped",
        "Completions for whose context there was no room at all; they carry no loss.",
        *("count", "down", COMPLETIONS, "without room for context"),
    ),
    Key(
        "context/dropped_feedback",
        "Entries of feedback that did not fit.",
        *("count", "down", COMPLETIONS, "feedback entries cut"),
    ),
    Key("context/truncated_tokens", "Context tokens that did not fit.", "tokens", "down", COMPLETIONS, "tokens cut"),
    Key(
        "context/{count}",
        "What the context builder counted, added up over the step.",
        *("count", "none", COMPLETIONS, "context: {count}"),
    ),
    Key("prefix/speedup", "Naive FLOPs over computed FLOPs, without the output layer.", "×", "up", COST, "speedup"),
    Key("prefix/step_speedup", "The same with the output layer.", "×", "up", COST, "speedup of the step"),
    Key("prefix/fallbacks", "Strategies that were wanted and not taken.", "count", "down", COST, "fallbacks"),
    Key(
        "prefix/shared_fraction",
        "As context/shared_fraction, from the plan of the passes.",
        *("share", "up", COST, "shared with the teacher"),
    ),
    Key("prefix/{pass}_tokens", "Tokens that a pass computed.", "tokens", "down", COST, "tokens, {pass} pass"),
    Key(
        "prefix/{pass}_naive_tokens",
        "Tokens that the pass would have computed without sharing.",
        *("tokens", "none", COST, "tokens without sharing, {pass} pass"),
    ),
    Key("prefix/{pass}_padding", "Padding in a pass's batches.", "share", "down", COST, "padding, {pass} pass"),
    Key("learning_rate", "Learning rate.", "", "none", OPTIMIZER, "learning rate"),
    Key("grad_norm", "Norm of the gradient before clipping.", "", "watch", OPTIMIZER, "gradient norm"),
    Key("epoch", "Passes over the data.", "", "none", OPTIMIZER, "epoch"),
    Key(
        "eval_reward_mean",
        "Mean reward on the evaluation set, the same seeds every time.",
        *("", "up", EVALUATION, "evaluation reward"),
    ),
    Key(
        "eval_reward_stderr",
        "Its standard error over questions.",
        "",
        "none",
        EVALUATION,
        "evaluation reward, standard error",
    ),
    Key(
        "eval_success_rate",
        "Completions on the evaluation set that reached the success threshold.",
        *("share", "up", EVALUATION, "evaluation successes"),
    ),
    Key(
        "eval_pass_any",
        "Questions of which any completion did.",
        *("share", "up", EVALUATION, "questions with a success"),
    ),
    Key("eval_mean_length", "Mean length on it.", "tokens", "watch", EVALUATION, "evaluation length"),
    Key("eval_clipped_ratio", "Cut at the length limit.", "share", "down", EVALUATION, "evaluation, cut at the limit"),
    Key("eval_runtime", "Seconds that an evaluation took.", "s", "down", COST, "evaluation time"),
    Key("eval_{what}_per_second", "Speed of an evaluation.", "1/s", "up", COST, "evaluation {what} per second"),
    Key("eval_{name}", "Measured on the evaluation set.", "", "none", EVALUATION, "evaluation: {name}"),
)

_BY_NAME: Final = {key.name: key for key in KEYS}
_PATTERNS: Final = tuple(
    (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(key.name)) + r"\Z"), key)
    for key in KEYS
    if "{" in key.name
)


def key_of(name: str) -> Key | None:
    """The table's entry for a metric, with its placeholders filled in; None for a name that is not in the table."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    # The longest pattern that fits says most: prefix/student_naive_tokens is no prefix/{pass}_tokens.
    fitting = [(len(key.name), found, key) for pattern, key in _PATTERNS if (found := pattern.match(name))]
    if not fitting:
        return None
    _, found, key = max(fitting, key=lambda fit: fit[0])
    return key._replace(name=name, title=key.title.format_map(found.groupdict()))


__all__ = ["KEYS", "OTHER", "TOPICS", "Direction", "Key", "key_of"]
