"""Samples with vLLM: in this process, or by a server that speaks the OpenAI completions protocol.

    sampler = VLLMServer("http://localhost:8000", model="policy", weights_folder="/shared/policy")
    sampler = VLLMColocated("Qwen/Qwen3-8B", gpu_memory_utilization=0.4)        # needs pip install 'sdcore[vllm]'

    VLLM_SERVER_DEV_MODE=1 vllm serve /shared/policy --served-model-name policy --logprobs-mode processed_logprobs

Prompts are sent as token ids, and completions come back as token ids with the log-probabilities that they were drawn
with (which the server's `--logprobs-mode` says), so nothing is tokenized twice. An engine rounds otherwise than the
trainer does: use a method with an `importance_clip`.

What differs from the obvious: an engine has weights of its own. `VLLMColocated` is handed the student's before every
optimizer step, the first one too. `VLLMServer` writes them as safetensors into `weights_folder`, the folder that the
server was started from, in the files that are there, and asks it to read them again, which a server in development mode
does. Weights of other names or shapes than the files have are refused and nothing is written. Without a folder the
server goes on with the weights that it has, and the importance clip does what it can. Seeds are sent along, but a
server that batches requests as they come need not repeat itself: that a resumed run gives the same numbers is a promise
of `ModelSampler`. A server that is away or busy for a moment is asked again. That is safe for all that is asked here: a
completion changes nothing, and weights that are read twice, or a cache that is emptied twice, are the same as once.

Tested against a small fake of the HTTP protocol and of the engine's interface, and, where there is one, against vLLM
itself (tests/sdcore/rollouts/test_engine.py; docs/methods.md says which version was tried).

Not covered: several servers, and handing over an adapter by itself (it is merged into the weights).
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ArgumentError, SdcoreError
from ..models import find_body
from .handover import whole_state, write_weights
from .samplers import BaseSampler, SampledCompletion, Sampling, completion_of, seed_of


class EngineError(SdcoreError, RuntimeError):
    """Says that an engine cannot be reached, or answers what was not asked."""


class _Hiccup(EngineError):
    """Says what may have passed when the same is asked again."""


FIRST_PAUSE = 0.5  # seconds before a request is sent again, twice as many each time
LONGEST_PAUSE = 15.0
# Request Timeout, Too Many Requests, Bad Gateway, Service Unavailable, Gateway Timeout.
PASSING = frozenset({408, 429, 502, 503, 504})


@dataclass(kw_only=True)
class Server:
    """Asks an engine over HTTP. Raises `EngineError` where it fails, with its address and words.

    What may pass is asked again, after longer and longer pauses: a connection that is refused, reset or cut off, a name
    that is not known now, half an answer, the statuses 408, 429, 502, 503 and 504. Other statuses, and no answer within
    `timeout`, are an error at once.
    """

    url: str = field(kw_only=False)
    api_key: str | None = None
    timeout: float = 600.0  # seconds, of a request
    retry_seconds: float = 300.0  # from a request's first failure on, in which it is sent again; 0: never
    concurrent: int = 16  # requests at a time
    _stopping: bool = field(default=False, init=False)  # one of several requests has failed for good

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ArgumentError(f"url must start with http:// or https:// and name a host, got {self.url!r}")
        if not self.retry_seconds >= 0:
            raise ArgumentError(f"retry_seconds must be at least 0, got {self.retry_seconds}")

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Returns the JSON answers to requests, in their order."""
        try:
            with ThreadPoolExecutor(max(1, min(self.concurrent, len(bodies)))) as pool:
                try:
                    return list(pool.map(lambda body: self.post(path, body), bodies))
                finally:  # where one has failed, the pool waits for those under way
                    self._stopping = True
        finally:
            self._stopping = False

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Returns the JSON answer; None where it is empty."""
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url.rstrip("/") + path, json.dumps(body).encode(), headers)
        pause, attempts, first, limit = FIRST_PAUSE, 0, 0.0, self.retry_seconds
        while True:
            try:
                return self._answer(request)
            except _Hiccup as error:
                attempts, now = attempts + 1, time.monotonic()
                first = first or now
                left = first + limit - now
                if left <= 0 or self._stopping:
                    raise EngineError(
                        f"{error} (attempts: {attempts}, within {now - first:.3g} s; retry_seconds={limit:g})"
                    ) from error.__cause__
                if attempts == 1:
                    warnings.warn(f"{error}; it is asked again for {limit:g} s", stacklevel=2)
                time.sleep(min(pause, left))
                pause = min(2 * pause, LONGEST_PAUSE)

    def _answer(self, request: urllib.request.Request) -> Any:
        """Asks once. Raises `_Hiccup` for what may pass."""
        where = request.full_url
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            kind = _Hiccup if error.code in PASSING else EngineError
            raise kind(f"{where} answered {error.code}: {_words(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError) and reason.errno is None:  # the system's own has a number
                raise EngineError(f"{where} did not answer within timeout={self.timeout:g} s") from error
            # No certificate that is trusted, or another protocol: but cut off is cut off, in these too.
            lasting = isinstance(reason, ssl.SSLError | http.client.BadStatusLine)
            kind = EngineError if lasting and not isinstance(reason, ssl.SSLEOFError | ConnectionError) else _Hiccup
            raise kind(f"{where} gave no answer: {type(reason).__name__}: {reason}") from error
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            kind = _Hiccup if text.lstrip()[:1] in (b"{", b"[") else EngineError  # begun, and not ended
            raise kind(f"{where} must answer JSON, got {text[:200]!r}") from error


def _words(error: urllib.error.HTTPError) -> str:
    """Returns what a server says of an error; the status in words where that is nothing, or a page for a browser."""
    try:
        text = error.read().decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        text = ""
    return str(error.reason) if not text or text.startswith("<") else text[:500]


class _Engine(BaseSampler):
    """Samples by an engine with weights of its own."""

    def draw(
        self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int
    ) -> list[list[SampledCompletion]]:
        """Asks in vLLM's words, with a seed for each prompt.

        What is not asked for is said too: else a server takes it from the model's generation config, which for chat
        models often penalises repetitions, and ends completions at the model's own ends.
        """
        asked = {
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "n": sampling.num_completions,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "stop_token_ids": list(sampling.eos_token_id),
            "logprobs": 0,  # of the sampled token alone
        }
        # vLLM takes 31 bits.
        seeded = [asked | {"seed": seed_of(seed, i) % 2**31} for i in range(len(prompts))]
        drawn = self._drawn([prompt.tolist() for prompt in prompts], seeded, frozenset(sampling.eos_token_id))
        known, ids = find_body(model).vocab_size, [completion.ids for group in drawn for completion in group]
        if ids and (highest := max(torch.cat(ids).tolist(), default=0)) >= known:
            raise EngineError(
                f"the engine must sample ids of the student's vocabulary, below {known}, got {highest}: it has another "
                "model or tokenizer"
            )
        return drawn

    @abstractmethod
    def _drawn(
        self, prompts: list[list[int]], asked: list[dict[str, Any]], ends: frozenset[int]
    ) -> list[list[SampledCompletion]]:
        """Asks the engine, in vLLM's words, for completions of each prompt."""


@dataclass(kw_only=True)
class VLLMServer(_Engine, Server):
    """Samples over HTTP, one request per prompt."""

    model: str  # the name that the server knows it by
    weights_folder: str | Path | None = None  # that the server reads its weights from; None: they stay as they are
    _step: int | None = field(default=None, init=False)  # whose weights the server has, as far as is known

    def _drawn(
        self, prompts: list[list[int]], asked: list[dict[str, Any]], ends: frozenset[int]
    ) -> list[list[SampledCompletion]]:
        common = {"model": self.model, "return_token_ids": True, "skip_special_tokens": False}
        requests = [common | words | {"prompt": prompt} for prompt, words in zip(prompts, asked, strict=True)]
        answers = self.post_all("/v1/completions", requests)
        return [self._completions(answer, words["n"], ends) for answer, words in zip(answers, asked, strict=True)]

    def follow(self, model: nn.Module, step: int) -> None:
        """Writes the weights where the server reads them, and has it read them."""
        if self.weights_folder is None or step == self._step:
            return
        weights = whole_state(model)
        distributed = dist.is_available() and dist.is_initialized()
        refusals: list[Exception | None] = [None]
        if not distributed or dist.get_rank() == 0:
            try:
                tied = getattr(find_body(model).causal_lm, "all_tied_weights_keys", None)
                write_weights(weights, Path(self.weights_folder), tied=tied)
                self.post("/collective_rpc", {"method": "reload_weights"})
                self.post("/reset_prefix_cache", {})
            except (ArgumentError, EngineError, OSError) as error:
                refusals = [error]
        if distributed:  # the others wait for it, and end with it
            dist.broadcast_object_list(refusals)
        if refusals[0] is not None:
            raise refusals[0]
        self._step = step

    def _completions(self, answer: Mapping[str, Any], count: int, ends: frozenset[int]) -> list[SampledCompletion]:
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            completions = [
                completion_of(choice["token_ids"], choice["logprobs"]["token_logprobs"], ends) for choice in choices
            ]
        except (KeyError, TypeError, ArgumentError) as error:
            raise EngineError(
                f"{self.url} must answer with choices that have token_ids and logprobs.token_logprobs, one per token "
                f"(vLLM 0.10.2 or later, with return_token_ids); {type(error).__name__}: {error}"
            ) from error
        if len(completions) != count:
            raise EngineError(f"{self.url} was asked for {count} completions, got {len(completions)}")
        return completions


class VLLMColocated(_Engine):
    """Samples by an engine in this process, beside the student. `options` go to `vllm.LLM`.

    Raises `ImportError`, which names what to install, where vllm is missing.
    """

    def __init__(self, model: str, **options: Any) -> None:
        # Only in this process can its weights be exchanged.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self._vllm: Any = importlib.import_module("vllm")
        except ImportError as error:
            raise ImportError(
                "VLLMColocated needs vLLM: pip install 'sdcore[vllm]' (a server, VLLMServer, needs it on its side "
                "alone)"
            ) from error
        defaults = {"gpu_memory_utilization": 0.4, "logprobs_mode": "processed_logprobs"}
        self.engine = self._vllm.LLM(model=model, **(defaults | options))
        self._step: int | None = None

    def _drawn(
        self, prompts: list[list[int]], asked: list[dict[str, Any]], ends: frozenset[int]
    ) -> list[list[SampledCompletion]]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        parameters = [self._vllm.SamplingParams(**words) for words in asked]
        return [
            [
                completion_of(
                    list(output.token_ids),
                    [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)],
                    ends,
                )
                for output in answer.outputs
            ]
            for answer in self.engine.generate(given, parameters, use_tqdm=False)
        ]

    def follow(self, model: nn.Module, step: int) -> None:
        """Hands the student's weights over; the cache of prefixes under the old ones is emptied."""
        if step == self._step:
            return
        if not hasattr(self.engine.llm_engine, "model_executor"):
            raise EngineError(
                "vLLM does not run its model in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0 must be set before vllm "
                "is imported), so that it cannot be handed weights"
            )
        # Not the model's own load_weights: what vLLM made of its weights after loading has to be made anew.
        weights = iter(whole_state(model).items())
        try:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except TypeError as error:
            raise EngineError(f"this vLLM takes no weights from memory (0.32 does): {error}") from error
        self.engine.reset_prefix_cache()
        self._step = step


__all__ = ["EngineError", "Server", "VLLMColocated", "VLLMServer", "whole_state"]
