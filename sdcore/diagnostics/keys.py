"""Says what each metric means: the one table that the report, the documentation and the tests use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple, cast

Direction = Literal["up", "down", "watch", "none"]


class Key(NamedTuple):
    """Says what a metric's name stands for, and how to read it."""

    name: str
    meaning: str
    unit: str  # "share" is of 1; "nats" a divergence, an entropy or a log-probability
    direction: Direction  # what is good: "up" or "down"; "watch": a sudden change is a sign; "none": a fact
    topic: str  # heading in the report
    title: str  # of its curve, short


COST: Final = "Cost"
OTHER: Final = "Other"  # of names that are not in the table

# A metric's name, direction, unit and title, and below it its meaning, under the heading of its topic.
TABLE: Final = """
[Reward and feedback]
self_distillation/reward_mean | up | | mean reward
    Mean reward of the student's completions that were judged; a teacher's (teacher_samples) are left out.
self_distillation/reward_std | none | | reward, standard deviation
    Standard deviation of those rewards.
self_distillation/success_group_fraction | up | share | groups with a success
    Groups in which a completion reached the success threshold.
self_distillation/flat_group_fraction | down | share | groups with flat rewards
    Groups of several completions with the same reward: no policy gradient, and no example if all failed.
self_distillation/reprompt_sample_fraction | up | share | active completions
    Active completions: those whose teacher had something privileged in view. The others carry no loss.
self_distillation/feedback_available_fraction | none | share | completions with feedback
    Completions that the environment said something about.
self_distillation/feedback_used_fraction | none | share | feedback used
    Completions whose feedback was shown to the teacher.
self_distillation/unjudged_fraction | down | share | completions not judged
    Completions without a reward: no reward function, or one that failed or ran out of time.
rewards/dropped | down | count | rewards lost
    Completions without a reward because the reward function failed.
rewards/{function}/mean | up | | reward of {function}
    Mean of one reward function.
rewards/{why} | down | count | rewards: {why}
    Calls of reward functions that failed so.
[Evaluation]
eval_reward_mean | up | | evaluation reward
    Mean reward on the evaluation set, the same seeds every time.
eval_reward_stderr | none | | evaluation reward, standard error
    Its standard error over questions.
eval_success_rate | up | share | evaluation successes
    Completions on the evaluation set that reached the success threshold.
eval_pass_any | up | share | questions with a success
    Questions of which any completion did.
eval_mean_length | watch | tokens | evaluation length
    Mean length on it.
eval_clipped_ratio | down | share | evaluation, cut at the limit
    Cut at the length limit.
eval_{name} | none | | evaluation: {name}
    Measured on the evaluation set.
[Loss]
self_distillation/distillation_loss | down | nats | distillation loss
    The loss that was minimised: the divergence of the teacher, aggregated as the method says.
loss | down | nats | loss
    The loss that the optimizer saw.
loss/distillation | down | nats | distillation part
    The divergence's part of a mixture with a policy gradient, before its weight.
loss/policy | none | | policy gradient part
    The policy gradient's part, before its weight.
policy/anchor | watch | nats | KL anchor
    KL estimate of the anchor to the reference.
policy/clipped_fraction | down | share | clipped ratios
    Tokens whose probability ratio was clipped: the samples are older than the policy gradient can use.
policy/ratio | watch | | probability ratio
    Mean probability ratio of student to sampler.
tilt/gap | none | nats | tilt gap, mean
    Mean of log π - log p_ref - inv_temperature·reward over completions; minus log Z at the target.
tilt/gap_std | down | nats | tilt gap, standard deviation
    Its standard deviation: 0 where the student is the tilted distribution on its samples.
tilt/completions | none | count | tilted completions
    Completions in the tilt's loss.
tilt/reused_logprobs | none | | reused log-probabilities
    1 where the sampler's log-probabilities served as the student's.
loss/active_tokens | none | tokens | tokens with loss
    Completion tokens that carried loss.
loss/active_fraction | up | share | share of tokens with loss
    Share of the completion tokens that carried loss. At 0 nothing is learned.
loss/unscored_tokens | down | tokens | tokens that no view scores
    Tokens that were to carry loss and that not every teacher's views score (trajectories): they carry none.
loss/gradient_error | watch | share | error of the gradients
    With gradient_tolerance: the estimated relative error of the loss's own gradients, the larger of both and of all
    parts. 0 where they were formed in full.
loss/position_{i} | watch | nats | divergence of token {i}
    Mean divergence of the completions' token number i, from 0. Where the first few tower over the loss, the
    teacher changes how an answer begins, such as by mentioning its context.
[Student and teacher]
student/entropy | watch | nats | entropy, student
    Mean entropy of the student's next-token distribution. A collapse ends exploration.
teacher/entropy | none | nats | entropy, teacher
    Mean entropy of the teacher's, at the same tokens.
teacher/entropy_gap | watch | nats | entropy gap
    Student's entropy minus the teacher's: how much surer the context makes the model. About 0: it says nothing.
student/logprob | none | nats | log-probability, student
    Mean log-probability of the sampled tokens under the student.
teacher/logprob | none | nats | log-probability, teacher
    The same under the teacher.
[Drift, leak probe and top-k support]
tilt/reference_kl | watch | nats | KL to the reference, per completion
    Mean log-ratio of a completion under student and reference: an estimate of their KL.
distillation/student_mass | up | share | mass in the support, student
    The student's probability inside the top-k support, on a few completions.
distillation/teacher_mass | up | share | mass in the support, teacher
    The teacher's probability inside the same support. What is missing is seen by the tail's bucket alone.
distillation/overlap_ratio | up | share | top-k overlap
    Share of the student's k likeliest tokens that are among the teacher's k likeliest.
student/drift_kl | watch | nats | KL to the base model
    KL of the student to the reference model on the student's own completions, per token, without any context.
student/drift_logprob_gap | watch | nats | log-probability gap to the base model
    Log-probability of the sampled tokens under the student minus that under the reference.
teacher/context_kl | none | nats | KL, right context
    The student's divergence to the teacher with the right context, on the probe's completions.
teacher/leak_kl | down | nats | KL, another prompt's context
    The same with the context of another prompt.
teacher/leak_ratio | down | | leak ratio
    Leak over context KL. Near 1, with little content KL: any context teaches as much, so it teaches style.
teacher/content_kl | up | nats | KL between the two teachers
    KL of the teacher with the right context to the teacher with another prompt's: what the content itself says.
[Completions and context]
completions/mean_length | watch | tokens | mean length
    Mean length of the completions.
completions/clipped_ratio | down | share | cut at the limit
    Completions that were cut at the length limit.
completions/count | none | count | completions
    Completions since the last line.
completions/by_teacher | none | count | drawn by the teacher
    Those of them that the teacher drew, with its context in view. Rewards are averaged over the others.
completions/without_loss | down | count | without loss
    Completions that carried no loss of any kind.
completions/truncated_masked | down | count | left out as cut
    Completions left out of the loss because they were cut at the length limit.
completions/empty_ratio | down | share | empty completions
    Completions without a token.
context/overflow | down | prompts | context overflows
    Teacher prompts in this step that were too long and lost some of their context.
context/shared_fraction | up | share | prompt shared with the teacher
    Share of the student's prompt tokens that the teacher's prompts begin with: what need not be computed twice.
context/added_tokens | none | tokens | context tokens
    Mean length of the teacher's prompts minus that of the student's.
context/missing | down | count | without context
    Completions for which there was nothing privileged to show; they carry no loss.
context/anchored | none | count | anchors
    Completions without privileged context whose teacher reads what the student reads (anchor=True).
context/with_solution | none | count | shown a solution
    Completions whose teacher saw the row's privileged context or a successful attempt.
context/with_feedback | none | count | shown feedback
    Completions whose teacher saw feedback.
context/dropped | down | count | without room for context
    Completions for whose context there was no room at all; they carry no loss.
context/skipped | down | count | skipped contexts
    Completions whose context was refused and left out (on_bad_row="skip"); they carry no loss.
context/dropped_feedback | down | count | feedback entries cut
    Entries of feedback that did not fit.
context/truncated_tokens | down | tokens | tokens cut
    Context tokens that did not fit.
context/{count} | none | count | context: {count}
    What the context builder counted, added up over the step.
[Turns]
turns/count | none | count | turns of the student
    Turns that the student spoke in trajectories with tools or an environment.
trajectories/{outcome} | none | count | trajectories: {outcome}
    How trajectories ended: answered, or a turn was cut, no room for another turn or its tokens, no time; or the
    environment failed, and the trajectory carries no loss.
tools/{what} | watch | count | tools: {what}
    Calls of tools, and those of which the student was told that there is no such tool or not with such arguments
    (refused), that it raised, took too long (timeout) or returned neither text nor JSON (invalid).
environment/{why} | down | count | environment: {why}
    Environments that raised, took too long or returned what they may not; the trajectory ended there.
history/refused | down | count | pasts not kept
    Turns after which the chat template would render the past otherwise; the trajectory ended there.
history/normalised | watch | count | turns otherwise rendered
    Turns around which the chat template would have more than was sampled, such as an empty thinking block.

[Cost]
prefix/speedup | up | × | speedup
    Naive FLOPs over computed FLOPs, without the output layer.
prefix/step_speedup | up | × | speedup of the step
    The same with the output layer.
prefix/fallbacks | down | count | fallbacks
    Strategies that were wanted and not taken.
prefix/shared_fraction | up | share | shared with the teacher
    As context/shared_fraction, from the plan of the passes.
prefix/{pass}_tokens | down | tokens | tokens, {pass} pass
    Tokens that a pass computed.
prefix/{pass}_naive_tokens | none | tokens | tokens without sharing, {pass} pass
    Tokens that the pass would have computed without sharing.
prefix/{pass}_padding | down | share | padding, {pass} pass
    Padding in a pass's batches.
eval_runtime | down | s | evaluation time
    Seconds that an evaluation took.
eval_{what}_per_second | up | 1/s | evaluation {what} per second
    Speed of an evaluation.
[Optimizer]
learning_rate | none | | learning rate
    Learning rate.
grad_norm | watch | | gradient norm
    Norm of the gradient before clipping.
epoch | none | | epoch
    Passes over the data.
"""


def _read(table: str) -> Iterator[Key]:
    for section in table.split("\n[")[1:]:
        topic, _, rows = section.partition("]\n")
        for row in re.split(r"\n(?=\S)", rows.strip()):
            head, *meaning = row.split("\n")
            name, direction, unit, title = (cell.strip() for cell in head.split("|"))
            words = " ".join(line.strip() for line in meaning)
            yield Key(name, words, unit, cast(Direction, direction), topic, title)


KEYS: Final = tuple(_read(TABLE))
TOPICS: Final = tuple(dict.fromkeys(key.topic for key in KEYS))
_BY_NAME: Final = {key.name: key for key in KEYS}
_PATTERNS: Final = tuple(
    (re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(key.name)) + r"\Z"), key)
    for key in KEYS
    if "{" in key.name
)


def key_of(name: str) -> Key | None:
    """Returns the table's entry for a metric, with its placeholders filled in; None for a name it does not have."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    # The longest pattern that fits says most: prefix/student_naive_tokens is no prefix/{pass}_tokens.
    fitting = [(key, match.groupdict()) for pattern, key in _PATTERNS if (match := pattern.match(name))]
    if not fitting:
        return None
    key, filled_in = max(fitting, key=lambda fit: len(fit[0].name))
    return key._replace(name=name, title=key.title.format_map(filled_in))
