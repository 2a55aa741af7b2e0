"""Samples answers from a model and judges them.

An answer is judged as text, in two ways. *Strict*: it is the native-style answer, word for word, and it ended.
*Lenient*: it is so after every decorating `H` is taken out; the knowledge is right whatever the style. Both ask for
the whole answer, so that guessing digits gives 1e-5 and not 0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdcore.world.episodes import Episode
from sdcore.world.language import EOS, HINT


class Verdict(NamedTuple):
    lenient: bool
    strict: bool


class Accuracy(NamedTuple):
    """Holds the shares of sampled answers that are right."""

    lenient: float
    strict: float
    answers: int  # that were judged


def judge(answer: str, episode: Episode, *, eos: str = EOS) -> Verdict:
    """Judges the text of one completion, which is unfinished without the end-of-sequence word `eos`."""
    text, ended, _ = answer.partition(eos)
    words = text.split()
    right = list(episode.answer)
    return Verdict(
        lenient=bool(ended) and [word for word in words if word != HINT] == right,
        strict=bool(ended) and words == right,
    )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, episode: Episode) -> list[int]:
    """Renders the episode's user turn through the chat template, generation prompt added."""
    text = tokenizer.apply_chat_template(episode.messages(), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Returns the tokens of a complete answer, the end of the sequence included."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episodes: Sequence[Episode]
) -> list[list[int]]:
    """Draws one answer per episode, at temperature 1 from the full vocabulary with torch's global generator.

    There is room for a whole answer in the longer, decorated style. Returns ragged token ids; each ends with `<eos>`
    unless it was cut.
    """
    prompts = [prompt_ids(tokenizer, episode) for episode in episodes]
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    sampled = model.generate(
        **padded.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max(len(answer_ids(tokenizer, episode.demonstration)) for episode in episodes),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = sampled[:, padded["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episodes: Sequence[Episode], *, seed: int
) -> list[str]:
    """Draws one answer per episode as text; the same seed draws the same answers.

    The global random state is left as it was, so that measuring more or less often does not change a training run.
    """
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        return [str(tokenizer.decode(ids)) for ids in sample_answers(model, tokenizer, episodes)]


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, episodes: Sequence[Episode], *, seed: int
) -> Accuracy:
    """Samples one answer to each episode and judges it."""
    texts = sample_texts(model, tokenizer, episodes, seed=seed)
    verdicts = [
        judge(text, episode, eos=str(tokenizer.eos_token)) for text, episode in zip(texts, episodes, strict=True)
    ]
    count = len(verdicts)
    return Accuracy(sum(v.lenient for v in verdicts) / count, sum(v.strict for v in verdicts) / count, count)
