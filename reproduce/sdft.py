"""Tests claim (a): SDFT learns a new task from demonstrations and forgets less than imitating the same demonstrations.

Self-distillation fine-tuning (arXiv:2601.19897): the student answers the bare question, the teacher is the same model
with the demonstration in view, and the student learns, token by token, what the teacher says about its answer. Two
studies: one new task, and three tasks one after the other.

Controls. *SFT* has the same demonstrations. The *oracle* imitates the same answers in the model's own style, which
nobody has in practice; what is good about SDFT and not about the oracle would be self-distillation's own. A *wrong
demonstration* shows another map in the same style: what it still teaches is not the demonstration's content.

The paper leaves the first tokens of a completion without loss because its teachers open with a phrase about the
demonstration. Here the first token is the first fifth of the answer, so all tokens have loss.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from sdcore.demo.experiment import Exam
from sdcore.losses import FusedLinearDivergence
from sdcore.prefix import plan
from sdcore.step import distill_step, imitate_step
from sdcore.world.episodes import Episode
from sdcore.world.language import LETTERS

from .experiment import (
    BATCH,
    GAP,
    Cost,
    TeacherKind,
    Teaching,
    base,
    exam_of,
    measure,
    sample,
    teaching,
    total_length,
    train,
)
from .records import (
    Arm,
    Column,
    Panel,
    Point,
    Results,
    Study,
    Verdict,
    at_step,
    compare,
    final,
    matched,
    needed,
    sparing,
)

LEVEL = 0.9  # of the new task, lenient, at which arms of unequal speed are compared


@dataclass(frozen=True, kw_only=True)
class SdftArm(Arm):
    learns: str  # "distill", or what is imitated: "demonstration", "native"
    teacher: TeacherKind = "frozen"
    alpha: float = 1.0  # 1: reverse KL, 0: forward KL
    wrong: bool = False  # the demonstration shows another map
    long: bool = False  # trained for `long_steps`: slower, and a step costs half


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 120
    long_steps: int = 480
    tasks: int = 1  # learned one after the other
    episodes: int = 150  # questions of a measurement
    update_rate: float = 0.01  # of the EMA teacher, the paper's


def step(student: PreTrainedModel, arm: SdftArm, exam: Exam, taught: Teaching, task: int, rng: random.Random) -> Cost:
    """Leaves the gradients of one batch: the whole difference between the arms."""
    episodes = exam.batch(rng, BATCH, task)
    prompts = base().prompts(episodes)
    if arm.learns != "distill":
        native = arm.learns == "native"
        answers = base().answers([episode.native_answer if native else episode.demonstration for episode in episodes])
        imitate_step(student, plan(prompts, [[answer] for answer in answers]))
        return Cost(BATCH, total_length(prompts, answers))
    completions = sample(student, prompts)
    wrong = exam.tasks[task].wrong
    contexts = base().prompts([with_map(e, wrong) if arm.wrong else e.with_demonstration() for e in episodes])
    loss = FusedLinearDivergence(alpha=arm.alpha)
    distill_step(student, plan(prompts, completions, contexts), loss=loss, teacher=taught.teacher)
    answers = [completion for group in completions for completion in group]
    # Sampled, learned from, and read by the teacher with the demonstration in view.
    return Cost(BATCH, 2 * total_length(prompts, answers) + total_length(contexts, answers))


def with_map(episode: Episode, digits: str) -> Episode:
    """Returns the question with an answer by another map as its demonstration."""
    return replace(episode, hints=tuple(pair[0] + digits[LETTERS.index(pair[0])] for pair in episode.answer))


def run(arm: SdftArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    exam = exam_of(seed, episodes=settings.episodes)
    student = base().fresh()
    taught = teaching(arm.teacher, student, update_rate=settings.update_rate)
    return train(
        student,
        partial(step, student, arm, exam, taught, 0),
        partial(measure, exam),
        learning_rate=learning_rate,
        steps=settings.long_steps if arm.long else settings.steps,
        seed=seed,
        after=taught.after,
    )


def run_sequence(arm: SdftArm, settings: Settings, learning_rate: float, seed: int) -> list[Point]:
    """Trains each task until it is known, or for all steps; a point before, and after each task.

    A frozen teacher stays the base model; an average goes on.
    """
    exam = exam_of(seed, episodes=settings.episodes, tasks=settings.tasks)
    student = base().fresh()

    def point(model: PreTrainedModel) -> Point:
        known = {f"task {i}": exam.right(model, questions).lenient for i, questions in enumerate(exam.new, start=1)}
        return measure(exam, model) | known

    points = [{"step": 0.0, "samples": 0.0, "tokens": 0.0, "tasks": 0.0, "learned": 0.0} | point(student)]
    learned = 0
    taught = teaching(arm.teacher, student, update_rate=settings.update_rate)
    for task in range(settings.tasks):
        path = train(
            student,
            partial(step, student, arm, exam, taught, task),
            partial(_current, exam, task),
            learning_rate=learning_rate,
            steps=settings.long_steps if arm.long else settings.steps,
            seed=seed + 10_000 * task,
            after=taught.after,
            stop=lambda point: point["current"] >= LEVEL,
        )
        learned += path[-1]["current"] >= LEVEL
        spent = {name: points[-1][name] + path[-1][name] for name in ("step", "samples", "tokens")}
        points.append(spent | {"tasks": task + 1.0, "learned": float(learned)} | point(student))
    return points


def _current(exam: Exam, task: int, model: PreTrainedModel) -> Point:
    return {"current": exam.right(model, exam.new[task]).lenient}


def _thousands(points: Sequence[Point]) -> float | None:
    tokens = matched("tokens", "new", LEVEL)(points)
    return None if tokens is None else tokens / 1000


def judge(results: Results) -> list[Verdict]:
    kept, prior, in_context = (matched(name, "new", LEVEL) for name in ("kept", "prior", "in_context"))
    known = needed("new", LEVEL)
    equal = partial(at_step, step=Settings.steps)
    say = partial(compare, results)
    verdicts = []
    for arm, name in (("reverse-frozen", "reverse KL"), ("forward-frozen", "forward KL")):
        verdicts += [
            say(f"SDFT ({name}) keeps more in-context ability than SFT at matched accuracy", arm, "sft", in_context),
            say(f"SDFT ({name}) keeps more of the prior tasks than SFT at matched accuracy", arm, "sft", prior),
            say(
                f"SDFT ({name}) needs fewer samples than SFT, each at the rate that keeps most",
                "sft",
                arm,
                known,
                digits=0,
                resolution=GAP,
            ),
            say(f"SDFT ({name}) keeps more than the native-style oracle at matched accuracy", arm, "oracle", kept),
        ]
    return [
        *verdicts,
        say(
            "SDFT (reverse KL) keeps its own style after equal steps, which SFT does not",
            *("reverse-frozen", "sft", equal("in_context_strict")),
        ),
        say(
            "Reverse KL keeps more than forward KL at matched accuracy (frozen teacher)",
            *("reverse-frozen", "forward-frozen", kept),
        ),
        say(
            "An EMA teacher keeps more than a frozen one after equal steps (reverse KL)",
            *("reverse-ema", "reverse-frozen", equal("kept")),
        ),
        say(
            "A right demonstration teaches the task, a wrong one in the same style does not",
            *("reverse-frozen", "wrong", equal("new")),
            margin=0.5,
        ),
    ]


def judge_sequence(results: Results) -> list[Verdict]:
    return [
        compare(results, f"After three tasks SDFT (reverse KL) {what} than {title}", "reverse-frozen", arm, final(name))
        for arm, title in (("sft", "SFT"), ("oracle", "the native-style oracle"))
        for name, what in (("new", "knows more of all three"), ("kept", "has kept more of what it could do before"))
    ]


SFT_RATES = (1e-4, 3e-4, 1e-3)
ARMS = (
    SdftArm(name="reverse-frozen", title="SDFT, reverse KL, frozen teacher", learns="distill", quick_rate=3e-4),
    SdftArm(name="reverse-ema", title="SDFT, reverse KL, EMA teacher", learns="distill", teacher="ema"),
    SdftArm(name="forward-frozen", title="SDFT, forward KL, frozen teacher", learns="distill", alpha=0.0),
    SdftArm(name="forward-ema", title="SDFT, forward KL, EMA teacher", learns="distill", alpha=0.0, teacher="ema"),
    SdftArm(
        name="sft",
        title="SFT on the demonstrations",
        learns="demonstration",
        long=True,
        learning_rates=SFT_RATES,
        quick_rate=1e-3,
    ),
    SdftArm(name="oracle", title="oracle: SFT in the model's own style", learns="native"),
    SdftArm(
        name="wrong",
        title="SDFT, wrong demonstration",
        learns="distill",
        wrong=True,
        rate_of="sdft/reverse-frozen",
        quick_rate=3e-4,
    ),
)
RULE = (
    "the rate that keeps most (mean of prior tasks and in-context ability) at the first checkpoint where the new task "
    f"is at {LEVEL:.2f} or above; of rates within 0.01 of the best, the one that needs fewest samples"
)

ONE_TASK = Study(
    name="sdft",
    claim="sdft",
    title="SDFT against SFT on the same demonstrations",
    claimed="Distilling one's own answers with a demonstration in view learns the task and forgets less than imitating "
    "the demonstrations.",
    arms=ARMS,
    full=Settings(),
    quick=Settings(steps=40, long_steps=60, episodes=60),
    run=run,
    rule=RULE,
    choose=sparing("new", LEVEL, ("prior", "in_context")),
    columns=(
        Column(f"samples to {LEVEL:g}", matched("samples", "new", LEVEL), 0),
        Column(f"thousand tokens to {LEVEL:g}", _thousands, 0),
        Column("prior, matched", matched("prior", "new", LEVEL)),
        Column("in-context, matched", matched("in_context", "new", LEVEL)),
        Column("new, end", final("new")),
        Column("new strict, end", final("new_strict")),
        Column("prior, end", final("prior")),
        Column("in-context, end", final("in_context")),
    ),
    panels=(
        Panel("new task, lenient", "new", log_x=True),
        Panel("prior tasks", "prior", log_x=True),
        Panel("in-context, other names", "in_context", log_x=True),
        Panel("new task, lenient", "new", x="tokens", log_x=True),
    ),
    judge=judge,
    notes=f"The end is after {Settings.steps} steps of {BATCH} samples, for SFT after {Settings.long_steps}.",
)

SEQUENCE = Study(
    name="sdft_sequence",
    claim="sdft",
    title="Three tasks one after the other",
    claimed="SDFT accumulates tasks where SFT forgets the earlier ones.",
    arms=tuple(
        replace(arm, rate_of=f"sdft/{arm.name}", quick_rate=None)
        for arm in ARMS
        if arm.name in {"reverse-frozen", "reverse-ema", "sft", "oracle"}
    ),
    full=Settings(tasks=3),
    quick=Settings(tasks=2, steps=40, long_steps=80, episodes=50),
    run=run_sequence,
    rule="the rate of the same arm in the study of one task",
    choose=sparing("new", LEVEL, ("prior", "in_context")),
    columns=(
        Column("samples", final("samples"), 0),
        Column("tasks that were learned", final("learned"), 1),
        Column("first task, end", final("task 1")),
        Column("second task, end", final("task 2")),
        Column("third task, end", final("task 3")),
        Column("prior, end", final("prior")),
        Column("in-context, end", final("in_context")),
    ),
    panels=(
        Panel("first task, lenient", "task 1", x="tasks"),
        Panel("mean of the three tasks", "new", x="tasks"),
        Panel("prior tasks", "prior", x="tasks"),
        Panel("in-context, other names", "in_context", x="tasks"),
    ),
    judge=judge_sequence,
    notes=f"A task is trained until a checkpoint has it at {LEVEL:g} or above, for {Settings.steps} steps at most "
    f"({Settings.long_steps} for SFT); then comes the next one. In this world no method binds a map to its name: after "
    "any training the other open names answer with the new map too, so each task overwrites the one before.",
)


STUDIES = (ONE_TASK, SEQUENCE)
