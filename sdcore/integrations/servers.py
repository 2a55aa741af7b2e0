"""Makes a teacher of a server: reads what vLLM, SGLang or TRL's client say of completions as `TopKLogprobs`.

    plan = sdcore.prefix.plan(prompts, completions, teacher_prompts)
    server = VLLMServer("http://localhost:8000", model="teacher")
    distill_step(model, plan, teacher=score(server, plan, 20), loss=FusedLinearDivergence(alpha=0.0))

`score` sends every teacher's prompt with its completion as token ids, and asks for the log-probabilities of the k most
likely tokens at every position of the completion. `from_vllm`, `from_sglang` and `from_trl` read answers that somebody
else has fetched. All give (N, k) ids and log-probabilities, most likely first, in the order of `plan.target_ids`.

What differs from the obvious: position i of an answer is about token i given those before it, so the first row of a
completion is at its first token, not at the last of the prompt. vLLM always adds the prompt's own token to the k most
likely ones; where it is not among them, it is left out here: its mass belongs to the tail. That the server read the
trainer's tokens is checked by the ids that it sends back, token by token. Anything missing, out of order, not finite
or of more mass than 1 raises `EngineError`, which names completion and position.

A prompt's log-probabilities are those of the plain softmax, at temperature 1, whatever is asked for (in vLLM with
`--logprobs-mode processed_logprobs` too, and SGLang unless told otherwise): use a loss with `temperature=1.0`.

Formats as read in vllm-project/vllm `vllm/logprobs.py` (578b601), sgl-project/sglang's scheduler and tokenizer manager,
and trl 1.16.0 `generation/vllm_client.py`. Tested with answers of that form, and against vLLM 0.32.0; not against a
running SGLang.

Not covered: `echo` with OpenAI's `logprobs`, which names tokens by their text, and prompts with images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdkernels import TopKLogprobs
from sdkernels.validation import MOST_MASS

from ..errors import ArgumentError
from ..prefix.planner import Plan
from ..rollouts.vllm import EngineError, Server, VLLMServer

# What vLLM sends for log 0 over HTTP, where JSON has no infinity.
VLLM_LOG_ZERO = -9999.0


class Scored(NamedTuple):
    """Holds what a server is asked about: a teacher's prompt and a completion."""

    name: str  # for errors: `completions[g][i]`
    ids: list[int]
    rows: int  # the last so many ids are the completion


class Entry(NamedTuple):
    """Holds one token of a position."""

    token: int
    logprob: float
    rank: int | None = None  # from 1; None where the format has none


@dataclass(kw_only=True)
class SGLangServer(Server):
    """Speaks an SGLang server's own protocol, `/generate`. Raises `EngineError` where it fails."""


def sequences(plan: Plan) -> list[Scored]:
    """Lists every completion behind the teacher's prompt, or the student's for a plan without; leaves out empty ones.

    `from_vllm` and the others expect an answer to each of them, in this order. Raises `ArgumentError` for a plan of
    trajectories or masks, whose tokens with loss are not the last of a sequence.
    """
    if not plan.given[0][0].startswith("student_prompts"):
        raise ArgumentError("plan must be of prompts and completions, got one of plan_trajectories")
    if any(bool((tree.positions[of].diff() != 1).any()) for tree in plan.student for of in tree.slices):
        raise ArgumentError("plan must have no masks, got completions of which tokens in between carry no loss")
    asked = []
    for g, (tree, slices) in enumerate(zip(plan.teacher or plan.student, plan.rows, strict=True)):
        for i in tree.active:
            ids = [*tree.sequence(i).tolist(), int(plan.target_ids[slices[i].stop - 1])]
            asked.append(Scored(f"completions[{g}][{i}]", ids, tree.counts[i]))
    return asked


def score(server: Server, plan: Plan, k: int) -> TopKLogprobs:
    """Asks a `VLLMServer` or `SGLangServer` for (N, k), one request a completion. Raises `EngineError`.

    vLLM must be started with `--max-logprobs` of at least k (its default is 20), and must be 0.10.2 or later.
    """
    _check_k(k)
    asked = sequences(plan)
    if isinstance(server, VLLMServer):
        common = {
            "model": server.model,
            "max_tokens": 1,  # at least one; it is thrown away
            "temperature": 1.0,
            "prompt_logprobs": k,
            "return_token_ids": True,
        }
        answers = server.post_all("/v1/completions", [common | {"prompt": sequence.ids} for sequence in asked])
        return from_vllm([_only_choice(*pair) for pair in zip(answers, asked, strict=True)], plan, k)
    if isinstance(server, SGLangServer):
        bodies = [
            {
                "input_ids": sequence.ids,
                "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
                "return_logprob": True,
                # An entry before the completion, because the first one that is sent is always empty.
                "logprob_start_len": len(sequence.ids) - sequence.rows - 1,
                "top_logprobs_num": k,
            }
            for sequence in asked
        ]
        return from_sglang(server.post_all("/generate", bodies), plan, k)
    raise ArgumentError(f"server must be a VLLMServer or an SGLangServer, got {type(server).__name__}")


def from_vllm(answers: Sequence[Any], plan: Plan, k: int) -> TopKLogprobs:
    """Reads vLLM's answers to `sequences(plan)`: `RequestOutput`s, or choices of the completions endpoint.

    Each has `prompt_logprobs`, with an entry per token (None for the first), and `prompt_token_ids`. Without the
    latter, of older versions, the tokens are known by their own entries, which vLLM always adds.
    """
    return _collect(answers, plan, k, _vllm_positions)


def from_sglang(answers: Sequence[Mapping[str, Any]], plan: Plan, k: int) -> TopKLogprobs:
    """Reads SGLang's answers to `sequences(plan)`, made with `return_logprob` and `top_logprobs_num=k`.

    Each has `meta_info` with `input_token_logprobs` and `input_top_logprobs`: (logprob, id, text) of the last tokens of
    the sequence, from `logprob_start_len` on, the first of them without a log-probability.
    """
    return _collect(answers, plan, k, _sglang_positions)


def from_trl(answer: Mapping[str, Sequence[Any]], plan: Plan, k: int) -> TopKLogprobs:
    """Reads what TRL's `VLLMClient.get_sequence_logprobs(ids, prompt_lengths, top_logprobs=k)` returns for `sequences`.

    `logprobs`, `logprob_token_ids` and `actual_token_ids`, each with a list per sequence and completion token. TRL pads
    positions of which the server said less with -inf, which is refused here.
    """
    names = ("logprobs", "logprob_token_ids", "actual_token_ids")
    missing = [name for name in names if name not in answer]
    if missing:
        raise EngineError(f"the answer must have {', '.join(names)}, got none of {', '.join(missing)}")
    return _collect(list(zip(*(answer[name] for name in names), strict=True)), plan, k, _trl_positions)


Positions = Callable[[Any, Scored], Iterator[list[Entry]]]


def _collect(answers: Sequence[Any], plan: Plan, k: int, positions: Positions) -> TopKLogprobs:
    _check_k(k)
    asked = sequences(plan)
    if len(answers) != len(asked):
        raise EngineError(f"there must be an answer to each of {len(asked)} completions, got {len(answers)}")
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    for answer, sequence in zip(answers, asked, strict=True):
        try:
            entries_at = list(positions(answer, sequence))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise EngineError(
                f"the answer for {sequence.name} is not of the form that is read here; {type(error).__name__}: {error}"
            ) from error
        for position, entries in enumerate(entries_at):
            kept = _most_likely(entries, k, sequence, position)
            ids.append([entry.token for entry in kept])
            logprobs.append([entry.logprob for entry in kept])
    rows = TopKLogprobs(torch.tensor(ids).long().reshape(-1, k), torch.tensor(logprobs).float().reshape(-1, k))
    _check_rows(rows.logprobs, rows.ids, asked)
    return TopKLogprobs(rows.ids.to(plan.device), rows.logprobs.to(plan.device))


def _most_likely(entries: list[Entry], k: int, sequence: Scored, position: int) -> list[Entry]:
    """Returns the k entries of highest log-probability, which must be the k most likely tokens of all."""
    if any(math.isnan(entry.logprob) for entry in entries):
        raise EngineError(f"{_where(sequence, position)} must have finite log-probabilities, got NaN")
    ranked = sorted(entries, key=lambda entry: (-entry.logprob, entry.rank or 0))[:k]
    if len(ranked) < k or any(entry.rank is not None and entry.rank > k for entry in ranked):
        came = sum(entry.rank is None or entry.rank <= k for entry in ranked)
        raise EngineError(
            f"{_where(sequence, position)} must have the {k} most likely tokens, got {came} of them; ask the server "
            "for as many, and start vLLM with --max-logprobs of at least that"
        )
    return ranked


def _check_rows(logprobs: Tensor, ids: Tensor, asked: Sequence[Scored]) -> None:
    """Raises `EngineError` for the first row that is no list of distinct tokens with probabilities, by its name."""
    ordered = ids.sort(dim=-1).values
    mass = logprobs.exp().sum(-1)
    wrong = {
        f"must have finite log-probabilities (the server's log 0 is {VLLM_LOG_ZERO:g})": (
            ~(logprobs.isfinite() & (logprobs > VLLM_LOG_ZERO)).all(-1)
        ),
        "must not name a token twice": (ordered[:, 1:] == ordered[:, :-1]).any(-1),
        "must have ids of at least 0": (ids < 0).any(-1),
        "must have probabilities that add up to at most 1, of the full vocabulary": mass > MOST_MASS,
    }
    starts = torch.tensor([sequence.rows for sequence in asked]).cumsum(0)
    for claim, rows in wrong.items():
        if bool(rows.any()):
            row = int(rows.nonzero()[0, 0])
            which = int(torch.searchsorted(starts, row, right=True))
            position = row - (int(starts[which]) - asked[which].rows)
            raise EngineError(
                f"{_where(asked[which], position)} {claim}, got log-probabilities {logprobs[row].tolist()[:8]} "
                f"(probabilities add up to {float(mass[row]):.4g}) of ids {ids[row].tolist()[:8]}"
            )


def _vllm_positions(answer: Any, sequence: Scored) -> Iterator[list[Entry]]:
    read = answer.get if isinstance(answer, Mapping) else lambda name: getattr(answer, name, None)
    given, tokens = read("prompt_logprobs"), read("prompt_token_ids")
    if given is None:
        raise EngineError(f"the answer for {sequence.name} must have prompt_logprobs, got None")
    if tokens is not None:
        _check_tokens(list(tokens), sequence.ids, sequence)
    if len(given) != len(sequence.ids):
        raise EngineError(
            f"the answer for {sequence.name} must have an entry in prompt_logprobs for each of its "
            f"{len(sequence.ids)} tokens, got {len(given)}"
        )
    if given[0]:
        raise EngineError(f"prompt_logprobs of {sequence.name} must begin with None, got {given[0]!r}")
    first = len(sequence.ids) - sequence.rows
    for position in range(first, len(sequence.ids)):
        entries = [_vllm_entry(token, value) for token, value in (given[position] or {}).items()]
        own = sequence.ids[position]
        if own not in {entry.token for entry in entries}:
            raise EngineError(
                f"{_where(sequence, position - first)} must have an entry of the token {own} that stands there, got "
                f"those of {[entry.token for entry in entries][:8]}: the server has read other tokens"
            )
        yield entries


def _vllm_entry(token: int | str, value: Any) -> Entry:
    """Reads a `Logprob` of the engine, or the same as JSON."""
    if isinstance(value, Mapping):
        return Entry(int(token), float(value["logprob"]), value.get("rank"))
    return Entry(int(token), float(value.logprob), value.rank)


def _sglang_positions(answer: Any, sequence: Scored) -> Iterator[list[Entry]]:
    meta = answer["meta_info"]
    own, top = meta["input_token_logprobs"], meta["input_top_logprobs"]
    if len(own) != len(top) or not sequence.rows < len(own) <= len(sequence.ids):
        raise EngineError(
            f"the answer for {sequence.name} must have {sequence.rows + 1} to {len(sequence.ids)} entries in "
            f"input_token_logprobs and as many in input_top_logprobs, got {len(own)} and {len(top)}; ask for "
            f"logprob_start_len of at most {len(sequence.ids) - sequence.rows - 1}"
        )
    _check_tokens([int(entry[1]) for entry in own], sequence.ids[-len(own) :], sequence)
    for entries in top[-sequence.rows :]:
        yield [Entry(int(token), float(logprob)) for logprob, token, *_ in entries or []]


def _trl_positions(answer: Any, sequence: Scored) -> Iterator[list[Entry]]:
    logprobs, tokens, own = answer
    if not len(logprobs) == len(tokens) == len(own) == sequence.rows:
        raise EngineError(
            f"the answer for {sequence.name} must have an entry for each of its {sequence.rows} tokens, got "
            f"{len(logprobs)} of logprobs, {len(tokens)} of logprob_token_ids, {len(own)} of actual_token_ids"
        )
    _check_tokens([int(token) for (token,) in own], sequence.ids[-sequence.rows :], sequence)
    for values, named in zip(logprobs, tokens, strict=True):
        pairs = zip(named, values, strict=True)
        yield [Entry(int(token), float(value)) for token, value in pairs if value is None or value != -math.inf]


def _check_tokens(came: list[int], sent: list[int], sequence: Scored) -> None:
    if came == sent:
        return
    pairs = enumerate(zip(came, sent, strict=False))
    index = next((i for i, (back, out) in pairs if back != out), min(len(came), len(sent)))
    raise EngineError(
        f"the server must have read the {len(sent)} tokens of {sequence.name} that were sent, got {len(came)}; "
        f"from index {index} on {sent[index : index + 4]} was sent and {came[index : index + 4]} came back"
    )


def _only_choice(answer: Any, sequence: Scored) -> Any:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1:
        raise EngineError(f"the answer for {sequence.name} must have one choice, got {str(answer)[:200]}")
    return choices[0]


def _where(sequence: Scored, position: int) -> str:
    return f"position {position} of {sequence.name}"


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ArgumentError(f"k must be a positive number of tokens, got {k!r}")


__all__ = ["SGLangServer", "Scored", "from_sglang", "from_trl", "from_vllm", "score", "sequences"]
