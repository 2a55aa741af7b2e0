"""The fused loss in a loop of your own: plain PyTorch and transformers, one function of ours.

    python examples/bare_loop.py            # about ten seconds on one core

The student is asked a question; the teacher, the same model before training, sees the answer beside it. Both read the
student's own completion, and the divergence between their next-token distributions is taken on hidden states, so that
no (tokens, vocabulary) logits exist at any time.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdcore.world
from sdcore.losses import FusedLinearDivergence
from sdcore.world.episodes import Episode, mapped
from sdcore.world.verifier import accuracy, prompt_ids, sample_answers

CHECKPOINT = Path(sdcore.world.__file__).parent / "checkpoint"


def states(model, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """(N, H) the state that predicts each completion token; the first of them is the prompt's last state."""
    rows = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    hidden = model.model(input_ids=pad_sequence(rows, batch_first=True)).last_hidden_state
    return torch.cat(
        [
            hidden[i, len(prompt) - 1 : len(prompt) + len(completion) - 1]
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
    )


def main(steps: int = 40, batch: int = 32, seed: int = 0) -> float:
    """Returns the accuracy afterwards."""
    console = Console()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # fastest for a model this small
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    student = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    teacher = copy.deepcopy(student).requires_grad_(False)
    loss_of = FusedLinearDivergence(alpha=0.0)  # forward KL; 1.0 is reverse KL, between them Jensen-Shannon
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=0.0)

    def ask() -> Episode:
        return mapped("luma", "4170925831", rng)  # a task that the model has never seen

    held_out = [ask() for _ in range(200)]
    console.print(f"before: {accuracy(student, tokenizer, held_out, seed=seed).lenient:.1%} of the answers are right")
    for step in range(1, steps + 1):
        questions = [ask() for _ in range(batch)]
        prompts = [prompt_ids(tokenizer, question) for question in questions]
        with_answer = [prompt_ids(tokenizer, question.with_demonstration()) for question in questions]
        completions = sample_answers(student, tokenizer, questions)
        with torch.no_grad():
            taught = states(teacher, with_answer, completions)
        out = loss_of(states(student, prompts, completions), student.lm_head.weight, taught, teacher.lm_head.weight)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            console.print(f"step {step}: loss {out.loss.item():.4f}")
    right = accuracy(student, tokenizer, held_out, seed=seed).lenient
    console.print(f"after {steps} steps: {right:.1%}")
    return right


if __name__ == "__main__":
    main()
