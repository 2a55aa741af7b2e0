"""Loads the two real language models, trains them by a method, and measures them along the way.

    subject = subject_of("smollm2")
    points = train(subject, method, rows, learning_rate=1e-3, settings=Settings(), seed=0, measure=measure)

A run is the product's trainer on two cores: LoRA of rank 16 on all linear layers, a linear schedule, and a measurement
at a few checkpoints. SmolLM2-135M-Instruct reads its chat template. Gemma 3 270M is a base model: a question is a line
of plain text to it, and an answer ends with its line.

What differs from the obvious: what is the same for many runs, such as a teacher's answers, is computed once and kept in
`~/.cache/sdcore/reproduce`, under a name made of the model and of everything asked. Training is in bfloat16,
measurements are in float32.

Not covered: models by other names. A folder or GGUF file elsewhere is given by the environment variable of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sdcore.cli.running import lora_config
from sdcore.contexts import student_prompt_ids
from sdcore.data import read_examples
from sdcore.errors import ArgumentError
from sdcore.losses import PolicyTerm
from sdcore.models.gguf import cache_folder, packaged_file, plain_folder
from sdcore.prefix import plan
from sdcore.presets import Method
from sdcore.rollouts.samplers import stop_ids
from sdcore.rollouts.window import given_completion
from sdcore.step import policy_gradient_step, token_logprobs
from sdcore.training.config import SelfDistillationConfig
from sdcore.training.trainer import SelfDistillationTrainer

from .book import MEASURED, MOST_TOKENS, OnTheWay, answers, row_of
from .records import Point

# The variable with the path of a model that is elsewhere than in its package, and the package.
MODELS: Final = {"smollm2": ("REPRODUCE_SMOLLM2", "smollm2"), "gemma3": ("REPRODUCE_GEMMA3", "gemma")}
# A base model's: questions and answers in lines.
PLAIN: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer:"
    "{% else %} {{ m.content }}\n{% endif %}{% endfor %}"
)
CACHE: Final = cache_folder("reproduce")
SCORED: Final = 30  # sentences that are scored at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Says how a run of a real model is made."""

    model: str = "smollm2"
    steps: int = 45
    batch: int = 8  # completions in a step
    checkpoints: tuple[int, ...] = (10, 20, 30)  # and the end
    rank: int = 16
    room: int = MOST_TOKENS  # of a completion
    temperature: float = 1.0  # of sampling
    facts: int = 30  # of the handbook
    general: int = 40  # questions of general knowledge
    episodes: int = 60  # held-out questions: the least standard error is one answer


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """Is a model before training, with its tokenizer and what ends its answers."""

    name: str
    folder: str
    tokenizer: Any
    base: PreTrainedModel
    stops: tuple[int, ...]


@lru_cache(maxsize=1)
def subject_of(name: str) -> Subject:
    """Loads a model once per process. Raises `ArgumentError` for a name that none has, and `ImportError`."""
    if name not in MODELS:
        raise ArgumentError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    variable, packaged = MODELS[name]
    folder = plain_folder(os.environ.get(variable) or packaged_file(packaged))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stops = stop_ids(base, tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN
        stops = [*stops, *ends_of_line(tokenizer)]
    return Subject(name=name, folder=folder, tokenizer=tokenizer, base=base, stops=tuple(stops))


def ends_of_line(tokenizer: Any) -> list[int]:
    """Returns the tokens that end a line and say nothing more: several newlines may be one token."""
    (one,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    more = (index for token, index in tokenizer.get_vocab().items() if token and not token.strip("\n"))
    return sorted({one, *more})


def kept(asked: Any, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns, from the cache where the same was asked before; both are plain JSON."""
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{key}.json"
    with FileLock(CACHE / f".{key}.lock"):  # another worker may be at it
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(make()), encoding="utf-8")
            os.replace(partial, path)
        return json.loads(path.read_text(encoding="utf-8"))


def base_answers(subject: Subject, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[bool]]:
    """Returns the likeliest answers of the model before training, and which are right."""
    asked = [subject.name, Path(subject.folder).name, MOST_TOKENS, [[row["messages"], row["words"]] for row in rows]]

    def make() -> Any:
        return answers(subject.base, subject.tokenizer, rows, stop_token_ids=subject.stops)

    texts, right = kept(asked, make)
    return texts, right


def scored(
    subject: Subject,
    model: Any,
    questions: Sequence[dict[str, Any]],
    sentences: Sequence[str],
    words: Sequence[Sequence[str]],
) -> list[float]:
    """Returns the log-probability of each sentence's words as the answer to a question, with what stands before them.

    Only tokens that have a letter of the first of the words that the sentence has are counted.
    """
    tokenizer, sums = subject.tokenizer, []
    for start in range(0, len(questions), SCORED):
        part = slice(start, start + SCORED)
        said = zip(questions[part], sentences[part], strict=True)
        rows = [row_of(row["messages"][0]["content"], completion=sentence) for row, sentence in said]
        examples = read_examples(rows)
        prompts = [student_prompt_ids(example, tokenizer) for example in examples]
        given = [
            given_completion(example, tokenizer, prompt, stop_ids=subject.stops, max_length=1000).completion_ids
            for example, prompt in zip(examples, prompts, strict=True)
        ]
        logprobs = token_logprobs(model, plan(prompts, [[ids] for ids in given])).split([len(ids) for ids in given])
        for ids, row, sentence, right in zip(given, logprobs, sentences[part], words[part], strict=True):
            counted = torch.tensor(word_tokens(tokenizer, ids.tolist(), sentence, right))
            sums.append(float(row[counted].sum()))
    return sums


def word_tokens(tokenizer: Any, ids: Sequence[int], sentence: str, words: Sequence[str]) -> list[bool]:
    """Says of each token whether it has a letter of the first of the words that the sentence has."""
    word = next((word for word in words if word in sentence), None)
    if word is None:
        raise ArgumentError(f"sentence must have one of the words {', '.join(words)}, got {sentence!r}")
    ends = [len(tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
    text = tokenizer.decode(ids)
    begin = text.index(word)
    return [end > begin and start < begin + len(word) for start, end in pairwise(ends)]


class FixedAdvantage(SelfDistillationTrainer):
    """Gives every token that the student sampled the same advantage, -1, in the place of any teacher or reward.

    A preset cannot say it: the advantages of a group have a mean of 0.
    """

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        weights = inputs.policy_weights
        term = PolicyTerm(
            advantages=-torch.ones_like(weights), token_weights=weights, normalizer=num_items_in_batch.policy
        )
        with self.compute_loss_context_manager():
            out = policy_gradient_step(model, inputs.plan, term, backward=self.accelerator.backward)
        self._observe(inputs, out)
        return out.loss


def train(
    subject: Subject,
    method: Method,
    rows: Sequence[Mapping[str, Any]],
    *,
    learning_rate: float,
    settings: Settings,
    seed: int,
    measure: Callable[[Any], Point],
    reward_funcs: Sequence[Any] = (),
    kind: type[SelfDistillationTrainer] = SelfDistillationTrainer,
) -> list[Point]:
    """Trains an adapter on the model and returns a point per checkpoint, the one before training not among them."""
    points: list[Point] = []

    def add(model: Any, step: int) -> None:
        where = {"step": step, "samples": step * settings.batch, "tokens": trainer._seen["tokens"]}
        points.append({name: float(number) for name, number in where.items()} | measure(model))

    folder = tempfile.mkdtemp(prefix="reproduce-")
    try:
        args = SelfDistillationConfig(
            output_dir=folder,
            learning_rate=learning_rate,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch // method.num_generations,
            warmup_steps=min(4, settings.steps // 2),
            max_completion_length=settings.room,
            sampling_temperature=settings.temperature,
            stop_token_ids=list(subject.stops),
            bf16=True,
            seed=seed,
            **MEASURED,
        )
        trainer = kind(
            subject.folder,
            args,
            method=method,
            train_dataset=list(rows),
            processing_class=subject.tokenizer,
            reward_funcs=list(reward_funcs),
            peft_config=lora_config(settings.rank),
            callbacks=[OnTheWay({*settings.checkpoints, settings.steps}, add)],
        )
        trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return points
