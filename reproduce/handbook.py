"""Shows context distillation on a real language model: SmolLM2-135M-Instruct learns an invented company's handbook.

    make demo-llm                                # or: python -m reproduce.handbook --model SmolLM2.gguf --output run

The handbook (`handbook.json`) has 30 facts with six questions each to learn from and two others that are held out. A
section of it is the teacher's `privileged_context`; the student reads the question alone. What is learned from are the
teacher's own answers, right or wrong, with its distribution at every token: no fact is anybody's target but as the
model itself repeats it. Beside it stand the same on all weights, and SFT on the handbook's own sentences. Each learner
starts from the same weights and sees the same questions in the same order.

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
from sdcore.models.gguf import plain_folder
from sdcore.presets import SFT, ContextDistillation, Method
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer

from .book import MOST_TOKENS, Handbook, answers, model_file, perplexity, question_of, row_of

LORA_RANK: Final = 16
SHOWN: Final = 5  # sample answers


class Learner(NamedTuple):
    """Says what is learned from, and how fast."""

    name: str
    distils: bool  # the teacher's answers with its distributions; False: the handbook's sentences as targets
    lora: bool
    learning_rate: float


LEARNERS: Final = (
    Learner("context distillation, LoRA", True, True, 2e-3),
    Learner("context distillation, all weights", True, False, 5e-4),
    Learner("SFT on the handbook's sentences, LoRA", False, True, 2e-3),
)


class Run(NamedTuple):
    """Says how each learner is run."""

    output: Path
    steps: int
    seed: int
    bf16: bool
    screen: Console


class Measured(NamedTuple):
    """Holds what a model knows, and what it costs."""

    name: str
    right: float  # share of held-out questions answered right without the handbook
    stderr: float
    general: float  # share of questions of general knowledge answered right
    perplexity: float  # of the page of prose
    learned_tokens: int  # that carried a loss
    seconds: float  # of training
    answers: tuple[str, ...]  # to the held-out questions


def measured(
    name: str, model: nn.Module, tokenizer: Any, book: Handbook, tokens: int = 0, seconds: float = 0.0
) -> Measured:
    """Measures a model on the held-out questions, on general knowledge and on prose."""
    texts, right = answers(model, tokenizer, book.held_out)
    share = sum(right) / len(right)
    return Measured(
        name=name,
        right=share,
        stderr=math.sqrt(share * (1 - share) / len(right)),
        general=sum(answers(model, tokenizer, book.general)[1]) / len(book.general),
        perplexity=perplexity(model, tokenizer, book.prose),
        learned_tokens=tokens,
        seconds=seconds,
        answers=texts,
    )


def learn(learner: Learner, name: str, tokenizer: Any, book: Handbook, taught: Sequence[str], run: Run) -> Measured:
    """Trains one learner from the start; its run is in a folder of its own."""
    if learner.distils:
        method: Method = ContextDistillation(template=book.template, samples="dataset")
        rows = [row | {"completion": text} for row, text in zip(book.train, taught, strict=True)]
    else:
        method = SFT()
        rows = [row_of(question_of(row), completion=row["sentence"]) for row in book.train]
    args = SelfDistillationConfig(
        output_dir=str(run.output / re.sub(r"\W+", "-", learner.name)),
        learning_rate=learner.learning_rate,
        max_steps=run.steps,
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
    trainer = SelfDistillationTrainer(
        name,
        args,
        method=method,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora_config(LORA_RANK if learner.lora else None),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    learned = read_run(str(args.output_dir)).metrics[-1]["tokens"]
    return measured(learner.name, trainer.model, tokenizer, book, learned, seconds)


def table_of(rows: Sequence[Measured], ceiling: float) -> Table:
    """Shows what each learner knows beside what it knew, and what it forgot."""
    table = Table(title="Held-out questions about the handbook, answered without it", title_justify="left")
    for heading in ("", "right", "of the way to the ceiling", "general knowledge", "perplexity of prose", "tokens/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    before = rows[0]
    for row in rows:
        way = (row.right - before.right) / max(ceiling - before.right, 1e-9)
        speed = f"{row.learned_tokens / row.seconds:.0f}" if row.seconds else "–"
        table.add_row(
            row.name,
            f"{row.right:.0%} ± {row.stderr:.0%}",
            f"{way:.0%}" if row is not before else "–",
            f"{row.general:.0%}",
            f"{row.perplexity:.1f}",
            speed,
        )
    return table


def main(
    model: Annotated[str | None, typer.Option(help="Path of a model; default: SmolLM2 of the package.")] = None,
    output: Annotated[Path, typer.Option(help="Directory for the runs and result.json.")] = Path("demo-llm"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each learner, of 8 questions.")] = 45,
    seed: Annotated[int, typer.Option(help="Of the order of questions and of the adapters' start.")] = 1,
) -> None:
    """Teach SmolLM2-135M-Instruct an invented company's handbook by its own answers."""
    with readable_errors("handbook"), quiet_libraries():
        started, screen, book = time.perf_counter(), console(), Handbook()
        machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
        name = plain_folder(model_file() if model is None else model)
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        run = Run(output=output, steps=steps, seed=seed, bf16=machine.get("bf16_instructions", True), screen=screen)
        screen.print(f"{name}, {'bfloat16' if run.bf16 else 'float32'}; {len(book.train)} questions to learn from")
        rows = [measured("before", base, tokenizer, book)]
        ceiling = sum(answers(base, tokenizer, book.shown)[1]) / len(book.shown)
        screen.print(f"held-out questions: {rows[0].right:.0%} right, with the handbook in view {ceiling:.0%}")
        taught, right = answers(base, tokenizer, [book.in_view(row) for row in book.train])
        screen.print(f"the teacher's answers to the questions to learn from: {sum(right) / len(right):.0%} right")
        for learner in LEARNERS:
            rows.append(learn(learner, name, tokenizer, book, taught, run))
            screen.print(f"{learner.name}: {rows[-1].right:.0%} right after {rows[-1].seconds:.0f} s")
        screen.print(table_of(rows, ceiling))
        for i in range(0, len(book.held_out), len(book.held_out) // SHOWN):
            question = question_of(book.held_out[i])
            screen.print(f"{question}\n  before: {rows[0].answers[i]}\n  after: {rows[1].answers[i]}", markup=False)
        record = {
            "machine": machine | {"bf16": run.bf16},
            "steps": steps,
            "seed": seed,
            "ceiling": ceiling,
            "seconds": time.perf_counter() - started,
            "measured": [row._asdict() for row in rows],
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
