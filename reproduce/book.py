"""Has the handbook of an invented company, questions about it, and what a model is measured by on them.

    book = Handbook()
    texts, right = answers(model, tokenizer, book.held_out)

`handbook.json` has 30 facts with eight questions each: six to learn from and two others that are held out. The context
of a question is its fact's section. An answer is right where it has the fact's words in it. What a model has forgotten
is measured on questions of general knowledge and on a page of prose; anchors, whose answers shall stay as they are, are
other questions.

What differs from the obvious: `split` draws anew which two questions of a fact are held out, so that a study's seeds
differ in their questions too. The demo keeps those of the file.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import TrainerCallback

from sdcore.data import read_examples
from sdcore.rollouts.rewards import contains
from sdcore.training.evaluation import evaluate

DATA: Final = Path(__file__).with_name("handbook.json")
MOST_TOKENS: Final = 24  # of an answer
HELD_OUT: Final = 2  # questions of a fact


class Handbook:
    """Has the rows to learn from and to be measured on: the context is a section, an answer has a fact's words.

    `split` is a seed for which questions are held out; None: those of the file. `facts` are so many of the first ones.
    """

    def __init__(self, path: Path = DATA, *, split: int | None = None, facts: int | None = None) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        self.template: str = f"{{{{ privileged_context }}}}\n\n{data['instruction']}\n\n{{{{ prompt }}}}"
        self.prose: str = data["prose"]
        self.company: str = data["company"]
        self.sections: list[tuple[str, list[str]]] = []  # title, and the sentences of its facts
        self.train, self.held_out, self.shown = [], [], []  # the last are held out, with the section in view
        self.general = [row_of(asked["question"], words=asked["answers"]) for asked in data["general"]]
        self.anchors = [row_of(question, words=()) for question in data["anchors"]]  # other questions than these
        number = 0
        for section in data["sections"]:
            self.sections.append((section["title"], [fact["fact"] for fact in section["facts"]]))
            context = self.context(*self.sections[-1])
            for fact in section["facts"]:
                if number == facts:
                    return
                about = {"privileged_context": context, "words": fact["answers"], "fact": number}
                about |= {"sentence": fact["fact"], "section": len(self.sections) - 1}
                questions = [*fact["train"], *fact["held_out"]]
                if split is not None:
                    random.Random(f"{split} {number}").shuffle(questions)
                rows = [row_of(question, **about) for question in questions]
                self.train += rows[:-HELD_OUT]
                self.held_out += rows[-HELD_OUT:]
                self.shown += [self.in_view(row) for row in rows[-HELD_OUT:]]
                number += 1

    def context(self, title: str, sentences: Sequence[str]) -> str:
        """Returns a section as the teacher reads it."""
        facts = "\n".join(f"- {sentence}" for sentence in sentences)
        return f"Handbook of {self.company}: {title}\n{facts}"

    def in_view(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row with what its teacher reads as its question."""
        said = {"privileged_context": row["privileged_context"], "prompt": question_of(row)}
        return row_of(re.sub(r"{{ (\w+) }}", lambda match: said[match[1]], self.template), words=row["words"])


def row_of(question: str, **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **columns}


def question_of(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def has_words(completion: str, words: Sequence[str]) -> float:
    """Judges an answer: 1 where one of the words stands in it."""
    return contains(completion, words)


def answers(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    stop_token_ids: Sequence[int] | None = None,
) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """Returns the likeliest answers to the rows' questions, and which of them are right."""
    judged = evaluate(
        model,
        tokenizer,
        read_examples(rows),
        [has_words],
        max_completion_length=MOST_TOKENS,
        temperature=0.0,
        batch_size=60,
        stop_token_ids=stop_token_ids,
    )
    rollouts = [group.rollouts[0] for group in judged.groups]
    return tuple(rollout.text for rollout in rollouts), tuple(rollout.reward == 1 for rollout in rollouts)


# Arguments of a run that is measured on its way and keeps nothing.
MEASURED: Final[dict[str, Any]] = {
    "use_cpu": True,
    "save_strategy": "no",
    "log_completions_every": 0,
    "leak_probe_every": 0,
    "overlap_probe_every": 0,
    "disable_tqdm": True,
}


class OnTheWay(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Calls `measure(student, step)` after some of a run's steps, with the student in eval mode."""

    def __init__(self, steps: Collection[int], measure: Callable[[Any, int], None]) -> None:
        self.steps, self.measure = steps, measure

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            training = model.training
            self.measure(model.eval(), state.global_step)
            model.train(training)


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return math.exp(model(input_ids=ids, labels=ids).loss)
