"""Shows context distillation on a real language model: SmolLM2-135M-Instruct learns an invented company's handbook.

    make demo-llm                                # or: python -m reproduce.handbook --model SmolLM2.gguf --output run

The handbook (`handbook.json`) has 30 facts with six questions each to learn from and two others that are held out. A
section of it is the teacher's `privileged_context`; the student reads the question alone. What is learned from are the
teacher's own answers, right or wrong, with its distribution at every token: no fact is anybody's target but as the
model itself repeats it. Every fourth question is an anchor: about something else, its answer to stay what it is. Beside
it stands SFT on the handbook's own sentences, with anchors and without, and the same on all weights where that is asked
for. Each learner starts from the same weights, and is measured three times on its way: what they forgot is also read
where they know equally much.

What differs from the obvious: the teacher is frozen, so its answers are drawn once, before training; `sdcore train`
with `teacher_samples=1` draws them at each step, which on two cores takes as long as learning from them. An answer is
right where it has the fact's words in it. Training is in bfloat16 where the machine has instructions for it.

Not covered: several seeds, learning rates and controls, which are a study and no demo.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdcore.bench.rows import describe_machine
from sdcore.cli.running import console, lora_config, quiet_libraries, readable_errors
from sdcore.diagnostics.runlog import read_run
from sdcore.models.gguf import packaged_file, plain_folder
from sdcore.presets import SFT, ContextDistillation, Method
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer

from .book import MOST_TOKENS, Handbook, OnTheWay, answers, perplexity, question_of, row_of
from .records import crossing

LORA_RANK: Final = 16
SHOWN: Final = 5  # sample answers


class Learner(NamedTuple):
    """Says what is learned from, and how fast."""

    name: str
    distils: bool  # the teacher's answers with its distributions; False: the handbook's sentences as targets
    lora: bool
    anchored: bool
    learning_rate: float
    steps: int  # of 8 questions


LEARNERS: Final = (
    Learner("context distillation, LoRA", True, True, True, 2e-3, 75),
    Learner("SFT, LoRA", False, True, False, 2e-3, 33),
    Learner("SFT, LoRA, with anchors", False, True, True, 2e-3, 42),
)
ALL_WEIGHTS: Final = Learner("context distillation, all weights", True, False, True, 3e-4, 36)


class Run(NamedTuple):
    """Says how each learner is run."""

    model: str
    tokenizer: Any
    book: Handbook
    taught: Sequence[str]  # the teacher's answers to what is learned from
    unchanged: Sequence[str]  # the model's answers to the anchors
    output: Path
    steps: int | None  # None: the learner's own
    seed: int
    bf16: bool
    screen: Console


class Measured(NamedTuple):
    """Holds what a model knows."""

    step: float
    right: float  # share of held-out questions answered right without the handbook
    stderr: float
    general: float  # share of questions of general knowledge answered right
    perplexity: float  # of the page of prose
    answers: tuple[str, ...] = ()  # to the held-out questions


class Learned(NamedTuple):
    """Holds what a learner knew on its way, and what it cost."""

    name: str
    measured: tuple[Measured, ...]
    tokens: int = 0  # that carried a loss
    seconds: float = 0.0  # of training

    def at(self, right: float) -> Measured:
        """Returns what was kept where so much was known, between two measurements by a straight line."""
        numbers = [{k: v for k, v in point._asdict().items() if k != "answers"} for point in self.measured]
        point = crossing(numbers, "right", right)
        if point is None:
            return self.measured[-1]
        return Measured(point["step"], right, point["stderr"], point["general"], point["perplexity"])


def measured(step: int, model: nn.Module, tokenizer: Any, book: Handbook) -> Measured:
    """Measures a model on the held-out questions, on general knowledge and on prose."""
    texts, right = answers(model, tokenizer, book.held_out)
    share = sum(right) / len(right)
    return Measured(
        step=step,
        right=share,
        stderr=math.sqrt(share * (1 - share) / len(right)),
        general=sum(answers(model, tokenizer, book.general)[1]) / len(book.general),
        perplexity=perplexity(model, tokenizer, book.prose),
        answers=texts,
    )


def learn(learner: Learner, run: Run, before: Measured) -> Learned:
    """Trains one learner from the start; its run is in a folder of its own."""
    book = run.book
    if learner.distils:
        method: Method = ContextDistillation(template=book.template, samples="dataset", anchor=learner.anchored)
        rows = [row | {"completion": text} for row, text in zip(book.train, run.taught, strict=True)]
    else:
        method = SFT()
        rows = [row_of(question_of(row), completion=row["sentence"]) for row in book.train]
    if learner.anchored:
        rows += [row | {"completion": text} for row, text in zip(book.anchors, run.unchanged, strict=True)]
    args = SelfDistillationConfig(
        output_dir=str(run.output / re.sub(r"\W+", "-", learner.name)),
        learning_rate=learner.learning_rate,
        max_steps=run.steps or learner.steps,
        per_device_train_batch_size=8,
        warmup_steps=4,
        max_completion_length=MOST_TOKENS,
        bf16=run.bf16,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        leak_probe_every=0,
        overlap_probe_every=0,
        seed=run.seed,
        disable_tqdm=not run.screen.is_terminal,
    )
    steps, points, aside = int(args.max_steps), [before], 0.0

    def add(model: nn.Module, step: int) -> None:
        nonlocal aside
        began = time.perf_counter()
        points.append(measured(step, model, run.tokenizer, book))
        aside += time.perf_counter() - began
        run.screen.print(f"{learner.name}, step {step} of {steps}: {points[-1].right:.0%} right")

    trainer = SelfDistillationTrainer(
        run.model,
        args,
        method=method,
        train_dataset=rows,
        processing_class=run.tokenizer,
        peft_config=lora_config(LORA_RANK if learner.lora else None),
        callbacks=[OnTheWay({steps // 3, 2 * steps // 3, steps}, add)],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started - aside
    tokens = read_run(str(args.output_dir)).metrics[-1]["tokens"]
    return Learned(learner.name, tuple(points), tokens, seconds)


def table_of(learned: Sequence[Learned], ceiling: float) -> Table:
    """Shows what each learner knows beside what it knew, and what it forgot, also where all know equally much."""
    level = min(each.measured[-1].right for each in learned)
    table = Table(title="Held-out questions about the handbook, answered without it", title_justify="left")
    kept = f"where all know {level:.0%}"
    for heading in (
        "",
        "right",
        "of the way",
        "general",
        "perplexity",
        f"general, {kept}",
        f"perplexity, {kept}",
        "tokens/s",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    before = learned[0].measured[0]
    table.add_row("before", f"{before.right:.0%}", "–", f"{before.general:.0%}", f"{before.perplexity:.1f}", "", "", "")
    table.add_row("with the handbook in view", f"{ceiling:.0%}", "100%", "", "", "", "", "")
    for each in learned:
        end, same = each.measured[-1], each.at(level)
        way = (end.right - before.right) / max(ceiling - before.right, 1e-9)
        cells = [f"{end.right:.0%} ± {end.stderr:.0%}", f"{way:.0%}"]
        cells += [cell for state in (end, same) for cell in (f"{state.general:.0%}", f"{state.perplexity:.1f}")]
        table.add_row(each.name, *cells, f"{each.tokens / each.seconds:.0f}")
    return table


def main(
    model: Annotated[str | None, typer.Option(help="Path of a model; default: SmolLM2 of the package.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the runs and result.json.")] = Path("demo-llm"),
    steps: Annotated[int | None, typer.Option(min=3, help="Optimizer steps of each learner; default: its own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of questions and of the adapters' start.")] = 1,
    all_weights: Annotated[bool, typer.Option("--all-weights", help="Also train all weights: minutes more.")] = False,
) -> None:
    """Teach SmolLM2-135M-Instruct an invented company's handbook by its own answers."""
    with readable_errors("handbook"), quiet_libraries():
        started, screen, book = time.perf_counter(), console(), Handbook()
        machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
        name = plain_folder(packaged_file("smollm2") if model is None else model)
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        bf16 = machine.get("bf16_instructions", True)
        screen.print(f"{name}, {'bfloat16' if bf16 else 'float32'}; {len(book.train)} questions to learn from")
        before = measured(0, base, tokenizer, book)
        ceiling = sum(answers(base, tokenizer, book.shown)[1]) / len(book.shown)
        screen.print(f"held-out questions: {before.right:.0%} right, with the handbook in view {ceiling:.0%}")
        taught, right = answers(base, tokenizer, [book.in_view(row) for row in book.train])
        screen.print(f"the teacher's answers to the questions to learn from: {sum(right) / len(right):.0%} right")
        unchanged, _ = answers(base, tokenizer, book.anchors)
        run = Run(name, tokenizer, book, taught, unchanged, output, steps, seed, bf16, screen)
        learners = [*LEARNERS, *([ALL_WEIGHTS] if all_weights else [])]
        learned = [learn(learner, run, before) for learner in learners]
        screen.print(table_of(learned, ceiling))
        for i in range(0, len(book.held_out), len(book.held_out) // SHOWN):
            after = learned[0].measured[-1].answers[i]
            said = f"{question_of(book.held_out[i])}\n  before: {before.answers[i]}\n  after: {after}"
            screen.print(said, markup=False)
        record = {
            "machine": machine | {"bf16": bf16},
            "seed": seed,
            "ceiling": ceiling,
            "teacher_right": sum(right) / len(right),
            "seconds": time.perf_counter() - started,
            "learned": [
                each._asdict() | {"measured": [point._asdict() for point in each.measured[1:]]}
                for each in [Learned("before", (before, before)), *learned]
            ],
        }
        output.mkdir(parents=True, exist_ok=True)
        (output / "result.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        screen.print(
            f"{record['seconds']:.0f} s in all; numbers: {output / 'result.json'}; curves: sdcore report FOLDER"
        )


app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(main)

if __name__ == "__main__":
    app(prog_name="python -m reproduce.handbook")
