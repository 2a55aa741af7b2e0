"""Teaches a model a new task from demonstrations, three ways, and measures what each costs.

A model meets a task name whose letter→digit map it cannot know, and an expert who demonstrates right answers in a
foreign style. *SDFT* lets the model answer without help and distils, into the model, what the same frozen model says
when it sees the demonstration. *SFT* imitates the demonstrations. The *oracle* imitates the same answers in the
model's own style, which nobody has in practice. All start from the same weights and see the same questions.

Runs on one CPU thread by default, which is fastest for the bundled model; the same seed gives the same numbers. It
goes through `transformers` only, so another causal model takes the bundled one's place by its path.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedModel

from sdcore.charts import require_matplotlib
from sdcore.demo.experiment import Exam, Task, learn, load_base
from sdcore.demo.report import TITLES, DemoReport, Learner, Point, Sample, plot_curves, print_report
from sdcore.losses import FusedLinearDivergence
from sdcore.models import head_of
from sdcore.prefix import plan
from sdcore.step import StepOutput, distill_step, imitate_step
from sdcore.teachers import Frozen
from sdcore.world import CHECKPOINT
from sdcore.world.episodes import random_digits
from sdcore.world.language import OPEN_NAMES
from sdcore.world.verifier import sample_answers, sample_texts

SHOWN: Final = 3  # sampled answers in the report


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    model: str | None = None  # a path or a Hub name; None: the bundled one
    output: Path = Path("demo-output")  # report.json and curves.png go here
    seed: int = 0  # of the task, the questions and every sample
    alpha: float = 1.0  # 1: reverse KL, 0: forward KL, between: Jensen-Shannon
    learning_rate: float = 1e-4
    steps: int = 60  # of SDFT and the oracle; SFT is also shown after as many
    sft_steps: int = 300  # SFT knows the task much later
    batch_size: int = 32  # questions per step
    eval_every: int = 10  # steps
    eval_episodes: int = 300  # questions per measurement
    threads: int = 1  # of torch
    device: str = "cpu"
    plot: bool = True  # needs matplotlib

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        for name in ("steps", "sft_steps", "batch_size", "eval_every", "eval_episodes", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sft_steps < self.steps:
            raise ValueError(f"sft_steps must be at least steps={self.steps}, got {self.sft_steps}")

    def steps_of(self, learner: Learner) -> int:
        return self.sft_steps if learner == "sft" else self.steps


def exam_of(config: DemoConfig) -> Exam:
    """Loads the model, and draws the task and the questions that every learner is measured on.

    Refuses, before any work, a model whose logits are not its states times a matrix.
    """
    base = load_base(config.model or CHECKPOINT, device=config.device)
    head_of(base.model)
    rng = random.Random(config.seed)
    task = Task(rng.choice(OPEN_NAMES), random_digits(rng))
    return Exam(base, [task], rng, seed=config.seed, episodes=config.eval_episodes)


def train_step(
    config: DemoConfig, exam: Exam, learner: Learner, student: PreTrainedModel, rng: random.Random
) -> StepOutput:
    """Leaves the gradients of one batch: the whole difference between the three learners."""
    base, episodes = exam.base, exam.batch(rng, config.batch_size)
    prompts = base.prompts(episodes)
    if learner == "sdft":
        completions = sample_answers(student, base.tokenizer, episodes)
        contexts = base.prompts([episode.with_demonstration() for episode in episodes])
        return distill_step(
            student,
            plan(prompts, [[completion] for completion in completions], contexts),
            loss=FusedLinearDivergence(alpha=config.alpha),
            teacher=Frozen(base.model),
        )
    texts = [episode.demonstration if learner == "sft" else episode.native_answer for episode in episodes]
    return imitate_step(student, plan(prompts, [[answer] for answer in base.answers(texts)]))


def train(
    config: DemoConfig, exam: Exam, learner: Learner, before: Point, advance: Callable[[], None]
) -> tuple[PreTrainedModel, list[Point]]:
    """Trains a copy of the base model; returns it with its curve, which starts at `before`."""
    student = exam.base.fresh()
    steps = config.steps_of(learner)
    step = partial(train_step, config, exam, learner, student)
    curve = [before]
    updates = learn(student, step, learning_rate=config.learning_rate, steps=steps, seed=config.seed)
    for number, _ in enumerate(updates, start=1):
        if number % config.eval_every == 0 or number in {config.steps, steps}:
            curve.append(Point(number, exam.skills(student)))
        advance()
    return student, curve


def run_demo(config: DemoConfig, console: Console) -> DemoReport:
    """Runs all learners, prints the tables, writes `report.json` and `curves.png` into `config.output`.

    Raises `ImportError` before any work when a plot is wanted and matplotlib is missing, `UnsupportedModelError` for a
    model whose logits are not what its configuration says, and what transformers raises for a model it cannot load.
    """
    if config.plot:
        require_matplotlib("a plot, which --no-plot leaves out,")
    torch.set_num_threads(config.threads)
    exam = exam_of(config)
    base, questions = exam.base, exam.new[0]
    config.output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"New task [bold]{exam.task.name}[/]: the letters a to j become the digits {exam.task.digits}. "
        f"The model does not know them; a demonstration shows them, in a foreign style:"
    )
    console.print(f"  question [bold]{questions[0].question}[/]   demonstration [bold]{questions[0].demonstration}[/]")

    before = Point(0, exam.skills(base.model))
    teacher = exam.right(base.model, [episode.with_demonstration() for episode in questions])
    models, curves = {}, {}
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for learner in TITLES:
            bar = progress.add_task(learner, total=config.steps_of(learner))
            advance = partial(progress.advance, bar)
            models[learner], curves[learner] = train(config, exam, learner, before, advance)

    shown = questions[:SHOWN]
    first, *answers = (
        sample_texts(model, base.tokenizer, shown, seed=config.seed) for model in (base.model, *models.values())
    )
    samples = [
        Sample(episode.question, episode.native_answer, start, dict(zip(TITLES, after, strict=True)))
        for episode, start, *after in zip(shown, first, *answers, strict=True)
    ]
    settings = {key: value for key, value in asdict(config).items() if key not in {"output", "plot"}}
    report = DemoReport(settings=settings, task=exam.task, teacher=teacher, curves=curves, samples=samples)
    print_report(report, console)
    (config.output / "report.json").write_text(report.to_json())
    console.print(f"numbers: {config.output / 'report.json'}")
    if config.plot:
        plot_curves(report, config.output / "curves.png")
        console.print(f"curves:  {config.output / 'curves.png'}")
    return report
