"""Samples several completions per prompt, and computes each prompt once.

    out = model.generate(input_ids=padded.repeat_interleave(G, 0), attention_mask=..., do_sample=True, top_k=0,
                         max_new_tokens=..., temperature=..., eos_token_id=...)

samples from the same distribution, and after `torch.manual_seed(seed)` the same tokens as `generate(..., seed=seed)`
here. There a prompt passes the model G times; here it passes once, and G rows go on from its keys, values and states.

What differs from the obvious: this is a loop of its own and not Hugging Face `generate` on an expanded cache, because
that takes options from the model's generation config (a top_k of 50, penalties) that would change the distribution
behind the caller's back, cannot use a generator, and gives log-probabilities only by keeping every step's (rows, V)
scores. Its temperature, top-k and top-p are used, so the distribution is the same by construction.

The first call on a kind of model compares a few steps with whole sequences, because many a model takes a cache without
using it (`**kwargs`), or counts positions from the padding: such a model is refused.

Not covered: beam search and penalties, models that keep something else than a transformers `Cache` (RWKV, xLSTM), or
nothing (GPT-1), models sharded over processes whose ranks would stop at different steps, and
rotary embeddings that change with the length (LongRoPE) where the longest sequence reaches the change.

Letters: B prompts, G completions of each, P the longest prompt, V vocabulary, N completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import ArgumentError, UnsupportedModelError, require_positive
from ..models import Body, find_body, without_dropout
from ..models.names import CACHE_ARGUMENTS, cache_argument
from .planner import TokenIds, collect_ids, entries
from .verification import departure, once, refusing


class Sampled(NamedTuple):
    """Holds what was sampled, on the model's device."""

    completions: list[list[Tensor]]  # [b][g]: (R,) int64, ends with an end-of-sequence id unless it was cut
    logprobs: Tensor  # (N,) float32, in the order prompt, completion, position: of the distribution drawn from


def generate(
    model: nn.Module,
    prompts: Sequence[TokenIds],
    *,
    num_completions: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    kept: Kept | None = None,
) -> Sampled:
    """Samples `num_completions` completions of each prompt from a causal language model.

    `prompts` are non-empty 1-D int64 or int32 tensors or sequences of ints. A completion ends with the first of
    `eos_token_id` (None: none ends it), or after `max_new_tokens`. `temperature` 0 takes the likeliest token, and then
    the log-probabilities are those of temperature 1; else they are of the distribution drawn from, with temperature,
    `top_k` (None: all) and `top_p` (None: all). `pad_token_id` (None: an end-of-sequence id, or 0) fills shorter
    prompts up and is seen by nobody. Random numbers come from `generator`, from a new one with `seed`, or from torch's
    global one. `kept` is for prompts that begin with what an earlier call with it read and sampled.

    Memory: all B·G rows at a time, with keys and values of P + max_new_tokens tokens each; call it on a few prompts at
    a time to bound it. Dropout is off meanwhile; training modes, the configuration, gradients and, with a seed or a
    generator, torch's random state are left as they were. Raises `ArgumentError` or `PlanError`, which are ValueErrors,
    `PlanTypeError`, and `UnsupportedModelError`.
    """
    body = find_body(model)
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    _check_options(num_completions, max_new_tokens, temperature, top_k, top_p, ends, pad_token_id, body.vocab_size)
    if seed is not None and generator is not None:
        raise ArgumentError("seed and generator must not both be given, got both")
    prompts_B = _on_device(prompts, body)
    check_room(body, max(len(prompt) for prompt in prompts_B), max_new_tokens)
    if seed is not None:
        generator = torch.Generator(body.device).manual_seed(seed)
    pad = pad_token_id if pad_token_id is not None else (ends or [0])[0]

    rows = len(prompts_B) * num_completions
    end_ids = torch.tensor(ends, dtype=torch.int64, device=body.device)
    unfinished = torch.ones(rows, dtype=torch.bool, device=body.device)
    tokens, logprobs, counted = [], [], []
    with torch.no_grad(), without_dropout(body.causal_lm, training=False):
        decoder, logits = (None, None) if kept is None or num_completions > 1 else kept.go_on(prompts_B)
        if decoder is None or logits is None:
            decoder = _Decoder(body, prompts_B, num_completions, pad)
            _require_right(body, padded=decoder.padded)
            logits = decoder.prefill()  # (B·G, V)
        warpers = _warpers(temperature, top_k, top_p)
        for step in range(max_new_tokens):
            # As in Hugging Face's loop: scores in float32, and the softmax of them. No warper looks at ids.
            scores = warpers(end_ids, logits.to(dtype=torch.float32, copy=True))
            if temperature == 0:
                chosen = scores.argmax(-1)
            else:
                chosen = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            counted.append(unfinished)
            tokens.append(chosen)
            logprobs.append(scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0])
            unfinished = unfinished & ~torch.isin(chosen, end_ids)
            # A finished row goes on until the last one is done; what it samples is cut off.
            if step == max_new_tokens - 1 or not bool(unfinished.any()):
                break
            logits = decoder.step(chosen)
    mask = torch.stack(counted, 1)  # (B·G, steps)
    lengths = mask.sum(1).tolist()
    ragged = torch.stack(tokens, 1)[mask].split(lengths)
    completions = [list(ragged[start : start + num_completions]) for start in range(0, rows, num_completions)]
    if kept is not None:
        kept.take(decoder, [torch.cat([prompts_B[i // num_completions], ids]) for i, ids in enumerate(ragged)], step)
    return Sampled(completions, torch.stack(logprobs, 1)[mask])


class Kept:
    """Keeps keys and values from one call of `generate` to the next, where a cache has them of all tokens."""

    def __init__(self) -> None:
        self._decoder: _Decoder | None = None
        self._read: list[Tensor] = []  # of each row, what its keys are of

    def take(self, decoder: _Decoder, sequences: Sequence[Tensor], steps: int) -> None:
        """Keeps what was read of prompts and completions: the last token of the longest was not."""
        self._decoder = decoder if decoder.can_be_cut else None
        self._read = [ids[: decoder.prompt_length(row) + steps] for row, ids in enumerate(sequences)]

    def go_on(self, prompts: Sequence[Tensor]) -> tuple[_Decoder | None, Tensor | None]:
        """Returns what has read these prompts, and the (n, V) logits after them; None where they must be read anew."""
        rows: list[int] = []
        for prompt in prompts:  # in the order of the rows that they go on from, some of which do not go on
            later = range(rows[-1] + 1 if rows else 0, len(self._read))
            fits = (r for r in later if torch.equal(prompt[: len(self._read[r])], self._read[r]))
            rows.append(next(fits, len(self._read)))
        if self._decoder is None or rows[-1] == len(self._read):
            return None, None
        return self._decoder, self._decoder.go_on(rows, prompts, [len(self._read[row]) for row in rows])


class _Decoder:
    """Has read the prompts, and goes on reading one token per row."""

    def __init__(self, body: Body, prompts_B: list[Tensor], num_completions: int, pad: int) -> None:
        if body.one_backward and body.sharded is not None:
            raise UnsupportedModelError(
                f"{body.name} has its weights partitioned by DeepSpeed, and ranks that sample until they have an end "
                "would wait for each other: sample with a server (vLLM)"
            )
        # A wrapper that gathers weights or casts has to see the call; one that reduces gradients has not.
        plain = body.through is None or isinstance(body.through, DistributedDataParallel)
        self._model: Any = body.causal_lm if plain else body.through
        self._body = body
        self._num_completions = num_completions
        name = cache_argument(body.causal_lm)
        if name is None:
            raise UnsupportedModelError(
                f"{body.name} takes no transformers cache ({' or '.join(CACHE_ARGUMENTS)}), so that nothing can go on "
                "from a prompt that was read once: sample with its own `generate`, or with a server (vLLM)"
            )
        self._cache_argument, self._cache = name, DynamicCache(config=body.config)
        padded = partial(pad_sequence, batch_first=True, padding_side="left")
        self._prompts = padded(prompts_B, padding_value=pad)
        # Without padding there is nothing to mask, and attention can take its fastest way.
        self.padded = len({len(prompt) for prompt in prompts_B}) > 1
        self._mask = padded([torch.ones_like(prompt) for prompt in prompts_B]) if self.padded else None

    def prefill(self) -> Tensor:
        """Returns (B·G, V) logits after the prompts, which are read once each."""
        seen = torch.ones_like(self._prompts) if self._mask is None else self._mask
        logits = self._call(self._prompts, (seen.cumsum(1) - 1).clamp_min(0), self._mask)
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(self._num_completions)
        # Unlike batch_repeat_interleave, every kind of cache layer has this, recurrent ones too.
        self._cache.reorder_cache(rows)
        self._mask = None if self._mask is None else self._mask[rows]
        self._lengths = seen.sum(1, keepdim=True)[rows]
        self._prompt_lengths = self._lengths[:, 0].tolist()
        return logits[rows]

    def step(self, ids: Tensor) -> Tensor:
        """Returns (B·G, V) logits after one more token per row, (B·G,)."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(ids[:, None])], 1)
        # Given always: a model whose first layer is recurrent counts its cache as empty (Bamba).
        positions, self._lengths = self._lengths, self._lengths + 1
        # A cache of states alone has no padding left in it, and such models take a mask of what they are given now.
        keys = any(isinstance(layer, CacheLayerMixin) for layer in self._cache.layers)
        return self._call(ids[:, None], positions, self._mask if keys else None)

    @property
    def can_be_cut(self) -> bool:
        """True where every layer keeps keys and values of every token, and nothing else."""
        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def prompt_length(self, row: int) -> int:
        return self._prompt_lengths[row]

    def go_on(self, rows: Sequence[int], prompts: Sequence[Tensor], known: Sequence[int]) -> Tensor | None:
        """Returns (n, V) logits after prompts of which some rows have read so many tokens; None for too short ones.

        All rows read as many tokens now, so that padding stays on the left: of what a row has read, some is read again
        where another one has more to read.
        """
        chunk = max(len(prompt) - count for prompt, count in zip(prompts, known, strict=True))
        left = [len(prompt) - chunk for prompt in prompts]
        if min(left) < 1:
            return None
        self.padded, device = min(left) < max(left), self._prompts.device
        columns = torch.zeros(len(rows), max(left), dtype=torch.int64, device=device)
        for i, (row, count) in enumerate(zip(rows, left, strict=True)):
            # What a row sampled behind its end comes last.
            seen = torch.arange(count, device=device) if self._mask is None else self._mask[row].nonzero()[:count, 0]
            columns[i, max(left) - count :] = seen
        index, at = columns[:, None, :, None], torch.tensor(rows, device=device)
        layers: Any = self._cache.layers
        for layer in layers:
            layer.keys, layer.values = (
                states[at].gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )
        self._lengths = torch.tensor(left, device=device)[:, None]
        within = torch.arange(max(left) + chunk, device=device) >= max(left) - self._lengths
        self._mask = within.long() if self.padded else None
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        positions = self._lengths + torch.arange(chunk, device=device)
        self._lengths = self._lengths + chunk
        _require_right(self._body, padded=self.padded)
        return self._call(torch.stack([prompt[-chunk:] for prompt in prompts]), positions, self._mask)

    def _call(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        more: dict[str, Any] = {self._cache_argument: self._cache}
        if self._body.accepts_position_ids:
            more["position_ids"] = positions
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **more,
        )
        return output.logits[:, -1]

    def whole(self, sequences: Sequence[Tensor]) -> Tensor:
        """Returns (B, L, V) logits of whole sequences, padded on the right, read without a cache."""
        return self._model(input_ids=pad_sequence(list(sequences), batch_first=True), use_cache=False).logits


def _require_right(body: Body, *, padded: bool) -> None:
    """Refuses a model that goes on from its cache otherwise than it reads a whole sequence.

    The ranks of a sharded model all sample and get here together, but each has prompts of its own: at the first call
    they ask both questions, in one order. No collective of ours: where the weights were gathered for sampling
    (`rollouts.samplers.whole_weights`), ranks may sample unequally often.
    """
    sharded = body.sharded is not None
    problems = {
        kind: once(body, f"generate, {kind=}, {sharded=}", partial(_departure, body, padded=kind), together=False)
        for kind in ((False, True) if sharded else (padded,))
    }
    problem = problems[padded]
    if problem is not None:
        advice = "give it prompts of one length at a time, or sample" if padded else "sample"
        where = " after prompts of several lengths, padded on the left," if padded else ""
        raise UnsupportedModelError(
            f"{body.name} does not go on from its cache{where} as it reads a whole sequence: {problem}. For this "
            f"model, {advice} with a server (vLLM)"
        )


def _departure(body: Body, *, padded: bool) -> str | None:
    """Says how much the logits of a few steps differ from those of whole sequences; None where they are the same."""
    generator = torch.Generator().manual_seed(0)
    lengths, steps = (7, 4, 2) if padded else (7, 7, 7), 3
    sequences = [
        torch.randint(body.vocab_size, (length + steps,), generator=generator).to(body.device) for length in lengths
    ]
    with refusing(f"{body.name} cannot go on from a cache of transformers"):
        decoder = _Decoder(body, [ids[:-steps] for ids in sequences], 2, pad=0)
        given = [torch.stack([ids[step - steps] for ids in sequences]).repeat_interleave(2) for step in range(steps)]
        logits = torch.stack([decoder.prefill(), *(decoder.step(ids) for ids in given)], 1)[1::2]  # (3, 1 + steps, V)
        whole = decoder.whole(sequences)
        alone = [decoder.whole([ids])[0, length - 1 :] for ids, length in zip(sequences, lengths, strict=True)]
    batched = [row[length - 1 : length + steps] for row, length in zip(whole, lengths, strict=True)]
    compared = [(logits.flatten(0, 1), torch.cat(batched), torch.cat(alone))]
    # What a wrapper casts to is not to be seen: autocast gives its logits back in float32.
    dtype = body.dtype if body.through is None else torch.bfloat16
    exceeds, reason = departure(body, compared, dtype, undecided=0.5)
    return f"logits {reason}" if exceeds else None


def _warpers(temperature: float, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if temperature == 0:
        return warpers
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _on_device(prompts: Sequence[TokenIds], body: Body) -> list[Tensor]:
    """Checks the ids, and moves them to the model's device."""
    named = [(f"prompts[{b}]", ids) for b, ids in entries("prompts", prompts)]
    if not named:
        raise ArgumentError("prompts must have at least one prompt, got none")
    ids, host = collect_ids(named, may_be_empty=frozenset())
    for name, prompt in host.items():
        highest = int(prompt.max())
        if highest >= body.vocab_size:
            raise ArgumentError(f"{name} must be in [0, V={body.vocab_size}), the model's vocabulary, got id {highest}")
    return [prompt.to(body.device) for prompt in ids.values()]


def _check_options(
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    ends: Sequence[int],
    pad_token_id: int | None,
    vocab_size: int,
) -> None:
    require_positive(num_completions=num_completions, max_new_tokens=max_new_tokens, top_k=top_k)
    if not 0 <= temperature < float("inf"):
        raise ArgumentError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ArgumentError(f"top_p must be in (0, 1], got {top_p}")
    if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
        raise ArgumentError(f"pad_token_id must be in [0, V={vocab_size}), got {pad_token_id}")
    for token in ends:
        if not 0 <= token < vocab_size:
            raise ArgumentError(f"eos_token_id must be in [0, V={vocab_size}), got {token}")


def check_room(body: Body, longest: int, max_new_tokens: int, *, name: str = "max_new_tokens", where: str = "") -> None:
    """Refuses completions that the model cannot read after a prompt of `longest` tokens.

    `name` and `where` are for the error.
    """
    read = longest + max_new_tokens - 1  # the last token is not read
    if body.max_positions is not None and longest > body.max_positions:
        raise ArgumentError(
            f"{where}a prompt must have at most {body.max_positions} tokens, what the model has positions for, got "
            f"{longest}"
        )
    if body.max_positions is not None and read > body.max_positions:
        raise ArgumentError(
            f"{where}{name} must be at most {body.max_positions - longest + 1}, what the model's {body.max_positions} "
            f"positions leave after a prompt of {longest} tokens, got {max_new_tokens}"
        )
    if body.rotary_switch is not None and read > body.rotary_switch:
        raise UnsupportedModelError(
            f"{where}{body.name} encodes positions otherwise in sequences longer than {body.rotary_switch} tokens: "
            f"keys of a prompt cannot be kept across that length, got up to {read} tokens"
        )
