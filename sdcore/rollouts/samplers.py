"""Draws completions: the protocol of a sampler, the model itself as one, and groups of what was drawn.

    sampler.sample(model, prompts, num_completions=8, max_new_tokens=256, seed=seed_of(args.seed, step, batch), ...)
    groups = sample_groups(sampler, model, examples, prompts, Sampling(num_completions=8, max_new_tokens=256), ...)

What differs from the obvious: a sampler gets a seed with every call and never looks at a global generator, so what is
sampled at a step depends on the weights and on the step, not on what was drawn before; a run that is resumed there
samples the same. `seed_of` makes such a seed of any integers. Under FSDP2 ranks would wait for each other at every
token, and for ever once one of them is done: enter `whole_weights` first, on all ranks, and they need not.

Not covered: servers (`rollouts.vllm`), tools and several turns (`rollouts.episodes`), and beam search.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..contexts.rendering import turn_end
from ..errors import ArgumentError
from ..models import find_body
from ..prefix.sampling import Kept, check_room, generate
from ..types import Example, Group, Trajectory, Turn

NO_TAGS: Final = frozenset({"</s>", "[/INST]"})  # they end texts and turns


class SampledCompletion(NamedTuple):
    """Holds one completion as it was drawn, on the CPU."""

    ids: Tensor  # (R,) int64; ends with an end-of-sequence id if it is finished
    logprobs: Tensor  # (R,) float32, of the distribution drawn from
    finished: bool  # False: cut at the length limit


@runtime_checkable
class Sampler(Protocol):
    """Draws completions. Equal arguments and weights give equal completions, as far as the engine can."""

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        *,
        num_completions: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float | None,
        top_k: int | None,
        eos_token_id: Sequence[int],
        pad_token_id: int | None,
        seed: int,
    ) -> list[list[SampledCompletion]]:
        """Draws `num_completions` of each of B prompts, (P,) int64: `[b][g]`. An engine of its own ignores `model`."""


@runtime_checkable
class FollowsWeights(Protocol):
    """Has weights of its own, and is told by the trainer when the student's have changed."""

    def follow(self, model: nn.Module, step: int) -> None:
        """Takes the student's weights after `step` optimizer steps. Called by all ranks."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how completions are drawn: the keywords of `Sampler.sample`, without the seed."""

    num_completions: int = 1  # G, of each prompt
    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float | None = None  # None: from all tokens
    top_k: int | None = None  # None: from all tokens
    eos_token_id: Sequence[int] = ()  # ids that end a completion
    pad_token_id: int | None = None


class BaseSampler(ABC):
    """Takes the keywords of `Sampler.sample` as one `Sampling`."""

    def sample(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        *,
        num_completions: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k: int | None = None,
        eos_token_id: Sequence[int] = (),
        pad_token_id: int | None = None,
        seed: int,
    ) -> list[list[SampledCompletion]]:
        """Draws as the protocol says."""
        sampling = Sampling(
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        return self.draw(model, prompts, sampling, seed)

    @abstractmethod
    def draw(
        self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int
    ) -> list[list[SampledCompletion]]:
        """Draws the completions of each prompt."""


@dataclass(frozen=True, kw_only=True)
class ModelSampler(BaseSampler):
    """Samples from the model itself, each prompt read once. Raises what `sdcore.prefix.generate` raises."""

    prompts_at_a_time: int | None = None  # bounds the memory; None: all. Another number draws other completions
    kept: Kept | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prompts_at_a_time is not None and self.prompts_at_a_time < 1:
            raise ArgumentError(f"prompts_at_a_time must be at least 1, got {self.prompts_at_a_time}")

    def session(self) -> ModelSampler:
        """Returns one that goes on from what it has read, for turns of the same weights, if it reads all at a time."""
        return self if self.prompts_at_a_time is not None else replace(self, kept=Kept())

    def draw(
        self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int
    ) -> list[list[SampledCompletion]]:
        size = self.prompts_at_a_time or len(prompts)
        ends = frozenset(sampling.eos_token_id)
        options = vars(sampling) | {"eos_token_id": list(sampling.eos_token_id) or None}
        completions_B_G: list[list[SampledCompletion]] = []
        for start in range(0, len(prompts), size):
            part_seed = seed if start == 0 else seed_of(seed, start)
            sampled = generate(model, prompts[start : start + size], **options, seed=part_seed, kept=self.kept)
            lengths = [len(ids) for group in sampled.completions for ids in group]
            logprobs = iter(sampled.logprobs.cpu().split(lengths))
            for group in sampled.completions:
                host = [ids.cpu() for ids in group]
                completions_B_G.append([SampledCompletion(ids, next(logprobs), _ended(ids, ends)) for ids in host])
        return completions_B_G


def sample_groups(
    sampler: Sampler,
    model: nn.Module,
    examples: Sequence[Example],
    prompts: Sequence[Tensor],
    sampling: Sampling,
    *,
    tokenizer: Any,
    seed: int,
) -> list[Group]:
    """Draws completions after the prompt of each example; groups with their texts, not judged yet.

    Refuses lengths that the model cannot sample, as `max_completion_length`; another engine knows its own limits.
    """
    if isinstance(sampler, ModelSampler):
        check_room_of(model, examples, prompts, sampling.max_new_tokens)
    turns_B = turns_of(sampler.sample(model, prompts, **vars(sampling), seed=seed), tokenizer)
    return [
        Group(
            example=example,
            prompt_ids=prompt,
            rollouts=tuple(Trajectory(turns=(turn,), outcome="answered" if turn.finished else "cut") for turn in turns),
        )
        for example, prompt, turns in zip(examples, prompts, turns_B, strict=True)
    ]


def check_room_of(
    model: nn.Module, examples: Sequence[Example], prompts: Sequence[Tensor], max_completion_length: int
) -> None:
    """Refuses lengths that the model cannot sample behind the prompts of these examples."""
    body = find_body(model)
    for example, prompt in zip(examples, prompts, strict=True):
        check_room(body, len(prompt), max_completion_length, name="max_completion_length", where=f"{example.source}: ")


def turns_of(completions_B_G: Sequence[Sequence[SampledCompletion]], tokenizer: Any) -> list[list[Turn]]:
    """Returns what was drawn as turns, with their texts."""
    hidden = _hidden_ids(tokenizer)
    return [
        [
            Turn(
                ids=completion.ids,
                logprobs=completion.logprobs,
                text=tokenizer.decode([token for token in completion.ids.tolist() if token not in hidden]),
                finished=completion.finished,
                raw_text=tokenizer.decode(completion.ids.tolist()),
            )
            for completion in completions
        ]
        for completions in completions_B_G
    ]


def _hidden_ids(tokenizer: Any) -> set[int]:
    """Returns the special tokens that a text is shown without: all but tags, which are part of what is said."""
    added = getattr(tokenizer, "tokenizer", tokenizer).added_tokens_decoder  # a processor has one
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    closing = [text for text in special if "/" in text and text not in NO_TAGS]
    pairs = [(text.replace("/", "", 1), text) for text in closing]
    tags = {text for pair in pairs if pair[0] in special for text in pair}
    return {token_id for text, token_id in special.items() if text not in tags}


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Returns the ids that end a completion: the tokenizer's, the model's generation config's and the chat template's.

    A chat model often ends its turn with another token than a text. Warns as `contexts.rendering.turn_end`.
    """
    config = getattr(getattr(model, "module", model), "generation_config", None)
    entries = [getattr(tokenizer, "eos_token_id", None), getattr(config, "eos_token_id", None), turn_end(tokenizer)]
    flat = [token for entry in entries for token in (entry if isinstance(entry, list | tuple) else [entry])]
    return sorted({int(token) for token in flat if token is not None})


def seed_of(*parts: int) -> int:
    """Makes a seed for a generator, in [0, 2^63), of integers: equal for equal ones, and else as if drawn anew.

    Sums and products of seeds and steps would meet: `seed + step` of one run is another run's a step later.
    """
    text = "/".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def whole_weights(model: nn.Module, sampler: Sampler | FollowsWeights | None = None) -> Iterator[None]:
    """Gives every rank all weights of a model that FSDP2 has sharded, inside; its forward then waits for nobody.

    To be entered and left by all ranks together; does nothing for other models, nor for a `sampler` with weights of its
    own. Needs memory for the whole model: where there is none, sample by such a one (`rollouts.vllm`).
    """
    if isinstance(sampler, FollowsWeights):
        yield
        return
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if sharded:
        sharded[0]._get_fsdp_state()._lazy_init()  # only then is it settled what the root does after a forward
    groups = [group for module in sharded for group in _parameter_groups(module)]
    before = [group.post_forward_mesh_info for group in groups]
    try:
        for module in sharded:
            module.unshard()
        for group in groups:
            group.post_forward_mesh_info = None  # nothing is resharded after a forward
        yield
    finally:
        for group, info in zip(groups, before, strict=True):
            group.post_forward_mesh_info = info
        for module in sharded:
            module.reshard()


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """Returns FSDP2's own: `set_reshard_after_forward` sets the same attribute, but nothing tells what it was."""
    state: Any = module._get_fsdp_state()
    # torch up to 2.12 has at most one.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _ended(ids: Tensor, ends: frozenset[int]) -> bool:
    return len(ids) > 0 and int(ids[-1]) in ends


def completion_of(ids: Sequence[int], logprobs: Sequence[float], ends: frozenset[int]) -> SampledCompletion:
    """Makes a completion of an engine's lists. Raises `ArgumentError` without a log-probability per token."""
    if len(ids) != len(logprobs):
        raise ArgumentError(f"logprobs must have one entry per token, {len(ids)}, got {len(logprobs)}")
    tensor = torch.tensor(list(ids), dtype=torch.int64)
    return SampledCompletion(tensor, torch.tensor(list(logprobs), dtype=torch.float32), _ended(tensor, ends))
