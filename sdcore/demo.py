"""The main job in small: teach a model a new task from demonstrations, three ways, and measure what each costs.

A model meets a task name whose letter→digit map it cannot know, and an expert who demonstrates right answers in a
foreign style. *SDFT* lets the model answer without help and distils, into the model, what the same frozen model says
when it sees the demonstration. *SFT* imitates the demonstrations. The *oracle* imitates the same answers in the
model's own style, which nobody has in practice. All start from the same weights and see the same questions.

Runs on one CPU thread by default, which is fastest for the bundled model; the same seed gives the same numbers. It
goes through `transformers` only, so another causal model takes the bundled one's place by its path.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sdcore.demo_report import (
    DemoReport,
    Learner,
    Point,
    Sample,
    Skill,
    Task,
    plot_curves,
    print_report,
    require_matplotlib,
)
from sdcore.losses import FusedLinearDivergence
from sdcore.models import head_of
from sdcore.prefix import plan
from sdcore.step import StepOutput, distill_step, imitate_step
from sdcore.teachers import Frozen
from sdcore.world.episodes import Episode, hinted, mapped, prior, random_digits
from sdcore.world.language import OPEN_NAMES
from sdcore.world.verifier import Accuracy, accuracy, answer_ids, prompt_ids, sample_answers, sample_texts

CHECKPOINT: Final = Path(__file__).parent / "world" / "checkpoint"
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


class Experiment:
    """The model before training, its tokenizer, the task, and the fixed questions that every learner is measured on."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(config.model or CHECKPOINT)
        model = AutoModelForCausalLM.from_pretrained(config.model or CHECKPOINT, dtype=torch.float32)
        # eval: no dropout, here and in every copy.
        self.base: PreTrainedModel = model.to(config.device).eval().requires_grad_(False)
        rng = random.Random(config.seed)
        self.task = Task(rng.choice(OPEN_NAMES), random_digits(rng))
        others = [name for name in OPEN_NAMES if name != self.task.name]
        count = config.eval_episodes
        self.questions: dict[Skill, list[Episode]] = {
            "new": [mapped(self.task.name, self.task.digits, rng) for _ in range(count)],
            "prior": [prior(rng) for _ in range(count)],
            "in_context": [hinted(rng, names=others) for _ in range(count)],
        }
        head_of(self.base)  # refuses a model whose logits are not its states times a matrix, before any work

    def measure(self, model: PreTrainedModel, episodes: list[Episode]) -> Accuracy:
        return accuracy(model, self.tokenizer, episodes, seed=self.config.seed)

    def point(self, model: PreTrainedModel, step: int) -> Point:
        return Point(step, {skill: self.measure(model, episodes) for skill, episodes in self.questions.items()})

    def answers(self, model: PreTrainedModel) -> list[str]:
        """Sampled answers to the first questions of the new task."""
        return sample_texts(model, self.tokenizer, self.questions["new"][:SHOWN], seed=self.config.seed)


def train_step(
    experiment: Experiment, learner: Learner, student: PreTrainedModel, episodes: list[Episode]
) -> StepOutput:
    """Gradients of one batch: the whole difference between the three learners."""
    prompts = [prompt_ids(experiment.tokenizer, episode) for episode in episodes]
    if learner == "sdft":
        completions = sample_answers(student, experiment.tokenizer, episodes)
        contexts = [prompt_ids(experiment.tokenizer, episode.with_demonstration()) for episode in episodes]
        return distill_step(
            student,
            plan(prompts, [[completion] for completion in completions], contexts),
            loss=FusedLinearDivergence(alpha=experiment.config.alpha),
            teacher=Frozen(experiment.base),
        )
    texts = [episode.demonstration if learner == "sft" else episode.native_answer for episode in episodes]
    return imitate_step(student, plan(prompts, [[answer_ids(experiment.tokenizer, text)] for text in texts]))


def learn(
    experiment: Experiment, learner: Learner, steps: int, before: Point, advance: Callable[[], None]
) -> tuple[PreTrainedModel, list[Point]]:
    """Train a copy of the base model; returns it with its curve, which starts at `before`."""
    config = experiment.config
    student = copy.deepcopy(experiment.base).requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.0)
    rng = random.Random(config.seed + 1)
    torch.manual_seed(config.seed + 1)
    curve = [before]
    for step in range(1, steps + 1):
        train_step(experiment, learner, student, [mapped(*experiment.task, rng) for _ in range(config.batch_size)])
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % config.eval_every == 0 or step in {config.steps, steps}:
            curve.append(experiment.point(student, step))
        advance()
    return student, curve


def run_demo(config: DemoConfig, console: Console) -> DemoReport:
    """Run all learners, print the tables, write `report.json` and `curves.png` into `config.output`.

    Raises `ImportError` before any work when a plot is wanted and matplotlib is missing, `UnsupportedModelError` for a
    model whose logits are not what its configuration says, and what transformers raises for a model it cannot load.
    """
    if config.plot:
        require_matplotlib()
    torch.set_num_threads(config.threads)
    experiment = Experiment(config)
    config.output.mkdir(parents=True, exist_ok=True)
    console.print(
        f"New task [bold]{experiment.task.name}[/]: the letters a to j become the digits {experiment.task.digits}. "
        f"The model does not know them; a demonstration shows them, in a foreign style:"
    )
    example = experiment.questions["new"][0]
    console.print(f"  question [bold]{example.question}[/]   demonstration [bold]{example.demonstration}[/]")

    plan: dict[Learner, int] = {"sdft": config.steps, "sft": config.sft_steps, "oracle": config.steps}
    before = experiment.point(experiment.base, 0)
    teacher = experiment.measure(
        experiment.base, [episode.with_demonstration() for episode in experiment.questions["new"]]
    )
    curves: dict[Learner, list[Point]] = {}
    answers: dict[Learner, list[str]] = {}
    columns = (TextColumn("{task.description:>6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for learner, steps in plan.items():
            bar = progress.add_task(learner, total=steps)
            student, curves[learner] = learn(experiment, learner, steps, before, partial(progress.advance, bar))
            answers[learner] = experiment.answers(student)

    questions = experiment.questions["new"][:SHOWN]
    samples = [
        Sample(episode.question, episode.native_answer, first, {learner: answers[learner][i] for learner in plan})
        for i, (episode, first) in enumerate(zip(questions, experiment.answers(experiment.base), strict=True))
    ]
    settings = {key: value for key, value in asdict(config).items() if key not in {"output", "plot"}}
    report = DemoReport(settings=settings, task=experiment.task, teacher=teacher, curves=curves, samples=samples)
    print_report(report, console)
    (config.output / "report.json").write_text(report.to_json())
    console.print(f"numbers: {config.output / 'report.json'}")
    if config.plot:
        plot_curves(report, config.output / "curves.png")
        console.print(f"curves:  {config.output / 'curves.png'}")
    return report
