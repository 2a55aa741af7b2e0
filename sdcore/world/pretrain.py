"""Pretrains the small world's model and writes it as an ordinary Hugging Face checkpoint.

    python -m sdcore.world.pretrain --output DIR --seed 0

Takes about seven minutes on one core; the checkpoint beside this file was made by exactly this. The model is released
only if it passes a gate on *sampled* answers: a model can be perfect greedily and still be a soft teacher, which makes
self-distillation slow and forgetful. Nothing is written when the gate is missed.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.logging import RichHandler
from rich.progress import track
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sdcore.world.episodes import MAX_HINTS, QUESTION_LETTERS, Episode, demonstrated, hinted, pretraining_batch, prior
from sdcore.world.language import BOS, EOS, PAD, VOCABULARY, build_tokenizer
from sdcore.world.verifier import accuracy

logger = logging.getLogger(__name__)

IGNORED = -100
# The answer's pairs and its `<eos>` are the last tokens of every plain sequence.
ANSWER_TOKENS = QUESTION_LETTERS + 1


@dataclass(frozen=True, kw_only=True)
class Phase:
    steps: int
    learning_rate: float  # the peak; warmed up, then a cosine to zero
    guesses: bool  # open tasks come without context too


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    # Guesses come second: from the start, their noise keeps the model from discovering that hints can be looked up.
    phases: tuple[Phase, ...] = (
        Phase(steps=1_500, learning_rate=3e-3, guesses=False),
        Phase(steps=1_000, learning_rate=2e-3, guesses=True),
    )
    batch_size: int = 128
    warmup_steps: int = 50  # of each phase
    max_grad_norm: float = 1.0
    seed: int = 0
    gate_accuracy: float = 0.99  # strict, sampled; of prior tasks and of each number of hints
    gate_episodes: int = 1_000  # per measured kind of episode
    log_every: int = 100  # steps


def build_model(seed: int) -> LlamaForCausalLM:
    """Builds a freshly initialised model of the world: 165,824 parameters, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        # Sequences are at most 34 tokens long: the usual base of 10,000 would leave most frequencies without use.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
    )
    return LlamaForCausalLM(config)


def collate(tokenizer: PreTrainedTokenizerBase, episodes: Sequence[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads plain sequences on the right: input ids and labels, both (B, T); only answers are labelled.

    Causal attention never looks right, so no attention mask is needed.
    """
    sequences = tokenizer([episode.plain() for episode in episodes], add_special_tokens=False)["input_ids"]
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, IGNORED)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, len(ids) - ANSWER_TOKENS : len(ids)] = torch.tensor(ids[-ANSWER_TOKENS:])
    return input_ids, labels


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    phase: Phase,
    config: PretrainConfig,
    rng: random.Random,
) -> None:
    """Trains in place by next-token cross-entropy on the answers of freshly drawn episodes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=config.warmup_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, phase.steps - config.warmup_steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[config.warmup_steps])
    model.train()
    for step in track(range(1, phase.steps + 1), description="pretraining"):
        episodes = pretraining_batch(rng, config.batch_size, guesses=phase.guesses)
        input_ids, labels = collate(tokenizer, episodes)
        logits = model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step == 1 or step % config.log_every == 0:
            logger.info("step %d loss %.4f", step, loss.item())
    model.eval()


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig) -> dict[str, float]:
    """Measures strict accuracy of sampled answers: prior tasks, each number of hints, and demonstrations as context."""
    rng = random.Random(config.seed + 1)
    kinds: dict[str, Callable[[random.Random], Episode]] = {"prior": prior, "demonstration": demonstrated}
    kinds |= {f"hints {k}": partial(hinted, hints=k) for k in range(1, MAX_HINTS + 1)}
    results = {}
    for kind, draw in kinds.items():
        episodes = [draw(rng) for _ in range(config.gate_episodes)]
        results[kind] = accuracy(model, tokenizer, episodes, seed=config.seed).strict
        logger.info("sampled accuracy, %s: %.4f", kind, results[kind])
    return results


def pretrain(output: Path, config: PretrainConfig) -> dict[str, float]:
    """Trains, measures, and writes model and tokenizer to `output`.

    Returns the gate's measurements. Raises `RuntimeError`, and writes nothing, when one is below `gate_accuracy`.
    """
    tokenizer = build_tokenizer()
    model = build_model(config.seed)
    rng = random.Random(config.seed)
    for phase in config.phases:
        train(model, tokenizer, phase, config, rng)
    results = measure(model, tokenizer, config)
    missed = {kind: value for kind, value in results.items() if value < config.gate_accuracy}
    if missed:
        raise RuntimeError(f"release gate: sampled accuracy must be at least {config.gate_accuracy}, got {missed}")
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    logger.info("wrote %s", output)
    return results


def main(
    output: Annotated[Path, typer.Option(help="Directory to write the checkpoint to.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and episodes.")] = 0,
) -> None:
    """Pretrain the small world's model and write a Hugging Face checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    # One thread is faster than two for matrices this small, and makes the sums reproducible.
    torch.set_num_threads(1)
    pretrain(output, PretrainConfig(seed=seed))


if __name__ == "__main__":
    typer.run(main)
