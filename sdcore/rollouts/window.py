"""Orders examples in windows, one an optimizer step, and keeps completions that serve several steps.

    order = WindowOrder(len(examples), window=32, repeats=2, seed=0)        # which examples, in which order
    save_rollouts(path, batches); batches = load_rollouts(path)             # what a checkpoint keeps of a window

What differs from the obvious: with `repeats` the data loader gives each window as often as it is used, so that
transformers' count of steps, its epochs and its skipping of batches on resuming stay right. The order of an epoch is a
pure function of seed and epoch, whatever was drawn before. A last window that would not be full is filled up from the
beginning where it is repeated, because else it could not be told where its repetition starts.

Not covered: data without a length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor
from torch.utils.data import Sampler as TorchSampler

from ..contexts.rendering import answer_end, template_arguments
from ..contexts.rendering import prompt_ids as _prompt_ids
from ..contexts.templates import unopened
from ..errors import ArgumentError, DataError
from ..types import Example, Group, Prompt, Trajectory, Turn
from .samplers import seed_of

COMPLETION = "completion"


class WindowOrder(TorchSampler[int]):
    """Yields indices of examples, a window of them after another, each window `repeats` times."""

    def __init__(
        self, count: int, *, window: int, repeats: int = 1, seed: int = 0, shuffle: bool = True, drop_last: bool = False
    ) -> None:
        if count < 1 or window < 1 or repeats < 1:
            raise ArgumentError(f"count, window and repeats must be at least 1, got {count}, {window} and {repeats}")
        self.count, self.window, self.repeats = count, window, repeats
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.repeats == 1:
            return self.count // self.window * self.window if self.drop_last else self.count
        windows = self.count // self.window if self.drop_last else -(-self.count // self.window)
        return windows * self.window * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
        if self.repeats > 1 and not self.drop_last:
            missing = -self.count % self.window
            order += [order[i % self.count] for i in range(missing)]
        for start in range(0, len(order), self.window):
            part = order[start : start + self.window]
            if len(part) == self.window or not self.drop_last:
                yield from part * self.repeats


def given_completion(
    example: Example,
    tokenizer: Any,
    prompt_ids: Tensor,
    *,
    stop_ids: Collection[int],
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Trajectory:
    """Returns the example's column `completion` as if it had been sampled, up to what ends it.

    In a conversation it is rendered as the assistant's turn, where that begins with the prompt and has an end; in plain
    text it is read together with the prompt, where that leaves the prompt's tokens as they are. Else its own tokens
    follow the prompt, without a thinking tag that the prompt has opened already. Then comes the end of a turn or, in
    plain text, of the sequence. Raises `DataError` where there is no such text.
    """
    text = example.columns.get(COMPLETION)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{example.source}: expected a text in column `{COMPLETION}`, got {text!r:.60}")
    arguments = template_arguments(example, chat_template_kwargs)
    whole, start = _rendered(example.prompt, text, tokenizer, arguments, example.source), prompt_ids.tolist()
    answer = whole[len(start) :] if whole[: len(start)] == start else []
    if not (answer and (isinstance(example.prompt, str) or set(answer) & set(stop_ids))):
        answer = tokenizer(unopened(text, tokenizer.decode(start)), add_special_tokens=False)["input_ids"]
    stop = next((i for i, token in enumerate(answer) if token in stop_ids), None)
    if stop is not None:
        ids = answer[: stop + 1]  # templates go on behind it, with a newline
    else:
        end = answer_end(example.prompt, tokenizer)
        ids = [*answer, *([] if end is None else [end])]
    finished = len(ids) <= max_length
    return Trajectory.answer(
        completion_ids=torch.tensor(ids[:max_length], dtype=torch.int64),
        logprobs=None,
        text=text,
        finished=finished,
        raw_text=tokenizer.decode(ids[:max_length]),
    )


def _rendered(prompt: Prompt, text: str, tokenizer: Any, arguments: Mapping[str, Any], source: str) -> list[int]:
    if isinstance(prompt, str):
        return _prompt_ids(prompt + text, tokenizer, source=source).tolist()
    messages = [*(dict(message) for message in prompt), {"role": "assistant", "content": text}]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise DataError(f"{source}: the chat template refused the completion: {error}") from error
    return list(rendered["input_ids"])


def save_rollouts(path: Path, batches: Sequence[Sequence[Group]]) -> None:
    """Writes the rollouts of a window, whole or not at all. JSON keeps every digit of a float."""
    saved = [[[_as_json(rollout) for rollout in group.rollouts] for group in batch] for batch in batches]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(saved), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_rollouts(path: Path) -> list[list[tuple[Trajectory, ...]]]:
    """Reads what `save_rollouts` wrote: batches of groups of rollouts, without their examples."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    return [[tuple(_from_json(rollout) for rollout in group) for group in batch] for batch in saved]


def _as_json(rollout: Trajectory) -> dict[str, Any]:
    turns = [
        {**vars(turn), "ids": turn.ids.tolist(), "logprobs": None if turn.logprobs is None else turn.logprobs.tolist()}
        for turn in rollout.turns
    ]
    return {**vars(rollout), "turns": turns}


def _from_json(saved: dict[str, Any]) -> Trajectory:
    return Trajectory(**{**saved, "turns": tuple(_turn(**turn) for turn in saved["turns"])})


def _turn(ids: list[int], logprobs: list[float] | None, messages: list[Any], **plain: Any) -> Turn:
    drawn = None if logprobs is None else torch.tensor(logprobs, dtype=torch.float32)
    return Turn(ids=torch.tensor(ids, dtype=torch.int64), logprobs=drawn, messages=tuple(messages), **plain)
