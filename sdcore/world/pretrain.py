"""Pretrains the small world's model and writes it as an ordinary Hugging Face checkpoint.

    python -m sdcore.world.pretrain --output DIR --seed 0
    python -m sdcore.world.pretrain --output DIR --talks           # the first, gone on with conversations

Takes about seven minutes on one core; the checkpoints beside this file were made by exactly this. A model is released
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
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from sdcore.world import CHECKPOINT
from sdcore.world.episodes import MAX_HINTS, Episode, demonstrated, hinted, pretraining_batch, prior
from sdcore.world.language import ANSWER, BOS, EOS, PAD, VOCABULARY, build_tokenizer
from sdcore.world.talks import talk
from sdcore.world.verifier import accuracy

logger = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Phase:
    steps: int
    learning_rate: float  # the peak; warmed up, then a cosine to zero
    guesses: bool = True  # open tasks come without context too
    talks: bool = False  # conversations


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


def collate(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads plain sequences on the right: input ids and labels, both (B, T); only answers are labelled.

    Causal attention never looks right, so no attention mask is needed.
    """
    sequences = [torch.tensor(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    input_ids = pad_sequence(sequences, batch_first=True, padding_value=tokenizer.pad_token_id)
    begins, ends = (input_ids == tokenizer.convert_tokens_to_ids(word) for word in (ANSWER, EOS))
    # From behind each ANSWER to the EOS, which is labelled too.
    answers = (begins.cumsum(1) > ends.cumsum(1) - ends.long()) & ~begins
    return input_ids, input_ids.masked_fill(~answers, IGNORED)


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
        if phase.talks:
            texts = [talk(rng) for _ in range(config.batch_size)]
        else:
            texts = [e.plain() for e in pretraining_batch(rng, config.batch_size, guesses=phase.guesses)]
        input_ids, labels = collate(tokenizer, texts)
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


def pretrain(output: Path, config: PretrainConfig, *, start: Path | None = None) -> dict[str, float]:
    """Trains, measures, and writes model and tokenizer to `output`. `start` None: from fresh weights.

    Returns the gate's measurements. Raises `RuntimeError`, and writes nothing, when one is below `gate_accuracy`.
    """
    tokenizer = build_tokenizer()
    if start is None:
        model = build_model(config.seed)
    else:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
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
    talks: Annotated[bool, typer.Option(help="Go on from the bundled model with conversations.")] = False,
) -> None:
    """Pretrain the small world's model and write a Hugging Face checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    # One thread is faster than two for matrices this small, and makes the sums reproducible.
    torch.set_num_threads(1)
    if talks:
        phases = (Phase(steps=2_000, learning_rate=2e-3, talks=True),)
        pretrain(output, PretrainConfig(seed=seed, phases=phases, batch_size=64), start=CHECKPOINT)
    else:
        pretrain(output, PretrainConfig(seed=seed))


if __name__ == "__main__":
    typer.run(main)
