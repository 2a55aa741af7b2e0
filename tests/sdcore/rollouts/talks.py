"""Tokenizers with public chat templates, a sampler that says what it is told, an environment, a tool."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sdcore.rollouts.environments import Agent, Reply
from sdcore.rollouts.episodes import play
from sdcore.rollouts.samplers import SampledCompletion, Sampling
from sdcore.types import Example, Group
from tests.sdcore.contexts.chats import byte_level_tokenizer

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
# What ends a turn, and the tokens of its own that a template has.
ENDS = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>", "deepseek": "<｜end▁of▁sentence｜>"}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<bos>", "<pad>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁outputs▁begin｜>",
    ),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>", "<｜tool▁outputs▁end｜>", "<think>", "</think>"),
]
CORPUS = [
    "Guess the number, it is lower than that.\n\nassistant\nuser\ntool",
    '<tool_call>\n{"name": "add", "arguments"}',
]


@lru_cache(maxsize=16)
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, and TRL's text of a public chat template."""
    end = next((end for family, end in ENDS.items() if name.startswith(family)), "<|im_end|>")
    tokenizer = byte_level_tokenizer(CORPUS, SPECIAL, end, size=400)
    if name == "smollm2":
        tokenizer.chat_template = SMOLLM2
        return tokenizer
    trl = pytest.importorskip("trl")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    return tokenizer


class Says:
    """A sampler that says given texts, each as ids that no tokenizer would make of it; and notes what it reads."""

    def __init__(self, tokenizer: Any, *texts: str | Callable[[int], str], cut: bool = False) -> None:
        self.tokenizer, self.texts, self.cut = tokenizer, texts, cut
        self.read: list[list[int]] = []
        self.drawn: list[list[int]] = []
        self.seeds: list[int] = []

    def ids_of(self, text: str) -> list[int]:
        """Character by character: decoded and encoded again they would be others."""
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
            pieces = [part] if part in SPECIAL else list(part)
            ids += [i for piece in pieces for i in self.tokenizer(piece, add_special_tokens=False)["input_ids"]]
        return ids

    def sample(
        self, model: Any, prompts: Sequence[Tensor], *, num_completions: int, seed: int, **options: Any
    ) -> list[list[SampledCompletion]]:
        number = len(self.seeds)
        self.seeds.append(seed)
        drawn = []
        for prompt in prompts:
            group = []
            for _ in range(num_completions):
                said = self.texts[min(number, len(self.texts) - 1)]
                text = said if isinstance(said, str) else said(len(self.drawn))
                ids = [*self.ids_of(text), *([] if self.cut else [self.tokenizer.eos_token_id])]
                self.read.append(prompt.tolist())
                self.drawn.append(ids)
                logprobs = -torch.arange(len(ids), dtype=torch.float32) - 100 * len(self.drawn)
                group.append(SampledCompletion(torch.tensor(ids), logprobs, not self.cut))
            drawn.append(group)
        return drawn


class Higher:
    """Says which way to go, three times."""

    def reset(self, example: Example) -> str | None:
        self.guesses = 0
        return example.columns.get("opening")

    def step(self, message: dict[str, Any]) -> Reply | str | None:
        self.guesses += 1
        if self.guesses == 3:
            return Reply("That is it.", done=True, reward=1.0)
        return Reply(f"Guess {self.guesses} is too low.", reward=-0.5, feedback=f"It is {self.guesses} higher.")


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3,  "b": 4}}\n</tool_call>'
QUESTION = Example(prompt=({"role": "user", "content": "Guess!"},), source="rows:1")


def run(agent: Agent, sampler: Says, example: Example = QUESTION, **options: Any) -> Group:
    sampling = Sampling(num_completions=options.pop("count", 1), max_new_tokens=options.pop("most", 64))
    tokenizer = sampler.tokenizer
    (group,) = play(agent, sampler, torch.nn.Linear(1, 1), [example], sampling, tokenizer=tokenizer, seed=5, **options)
    return group


def learned(group: Group, i: int = 0) -> list[list[int]]:
    """The ids that a loss is on, turn by turn, where the plan finds them."""
    rollout, said = group.rollouts[i], []
    own = iter(rollout.own)
    for ids, starts in rollout.sequences(group.prompt_ids):
        said += [ids[start : start + len(next(own).ids)].tolist() for start in starts]
    return said
