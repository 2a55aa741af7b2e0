"""The vLLM samplers, against a small fake of the HTTP protocol and of the engine: no vLLM runs here."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sdcore.errors import ArgumentError
from sdcore.prefix import generate
from sdcore.presets import SDPO
from sdcore.rollouts import vllm
from sdcore.rollouts.samplers import FollowsWeights, ModelSampler, Sampler
from sdcore.rollouts.vllm import EngineError, Server, VLLMColocated, VLLMServer
from sdcore.world.data import with_feedback
from tests.processes import serving
from tests.sdcore.trainer_runs import SHOW_ATTEMPT, lines, tokenizer, trainer, world_model

EOS = 2
PROMPTS = [torch.tensor([1, 5, 9]), torch.tensor([1, 7])]


class FakeServer:
    """Answers completions with the small world's model; reads its weights again from a folder when asked."""

    def __init__(self, folder: Path | None = None) -> None:
        self.model = world_model()
        self.folder = folder
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.override: dict[str, Any] | None = None  # what a choice says instead
        self.status = 200
        self._lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            assert self.folder is not None
            state = load_file(self.folder / "model.safetensors")
            self.model.load_state_dict(state, strict=False)
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return None
        with self._lock:
            sampled = generate(
                self.model,
                [body["prompt"]],
                num_completions=body["n"],
                max_new_tokens=body["max_tokens"],
                eos_token_id=body["stop_token_ids"],
                temperature=body["temperature"],
                top_p=body["top_p"],
                top_k=None if body["top_k"] == -1 else body["top_k"],
                seed=body["seed"],
            )
        ids = [completion.tolist() for completion in sampled.completions[0]]
        logprobs = [part.tolist() for part in sampled.logprobs.split([len(one) for one in ids])]
        choices = [
            {"index": i, "token_ids": one, "logprobs": {"token_logprobs": values}} | (self.override or {})
            for i, (one, values) in enumerate(zip(ids, logprobs, strict=True))
        ]
        return {"choices": choices[::-1]}  # in no particular order


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    fake = FakeServer(tmp_path / "policy")

    def answer(path: str, body: Any, headers: dict[str, str]) -> tuple[int, bytes]:
        fake.requests.append((path, body, headers))
        return fake.status, b"no such model" if fake.status != 200 else json.dumps(fake.answer(path, body)).encode()

    with serving(answer) as url:
        yield SimpleNamespace(fake=fake, url=url)


def ask(sampler: Any, **changes: Any) -> Any:
    options: dict[str, Any] = {"num_completions": 3, "max_new_tokens": 6, "eos_token_id": [EOS], "seed": 4}
    return sampler.sample(world_model(), PROMPTS, **(options | changes))


def test_prompts_and_completions_are_token_ids_with_log_probabilities(server: Any) -> None:
    sampler = VLLMServer(server.url, model="policy", api_key="secret")
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler, FollowsWeights)
    completions_B_G = ask(sampler, top_p=0.9, top_k=20, temperature=0.8)
    assert [len(group) for group in completions_B_G] == [3, 3]
    sent = {tuple(body["prompt"]): body for _, body, _ in server.fake.requests}
    for prompt, group in zip(PROMPTS, completions_B_G, strict=True):
        body = sent[tuple(prompt.tolist())]
        wanted = {"n": 3, "max_tokens": 6, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "stop_token_ids": [EOS]}
        assert {name: body[name] for name in wanted} == wanted
        again = generate(
            server.fake.model, [prompt], num_completions=3, max_new_tokens=6, eos_token_id=EOS, seed=body["seed"],
            temperature=0.8, top_p=0.9, top_k=20,
        )  # fmt: skip
        assert [one.ids.tolist() for one in group] == [ids.tolist() for ids in again.completions[0]]
        assert torch.equal(torch.cat([one.logprobs for one in group]), again.logprobs)
        assert all(one.finished == (int(one.ids[-1]) == EOS) for one in group)
    assert all(headers["Authorization"] == "Bearer secret" for _, _, headers in server.fake.requests)
    assert len({body["seed"] for _, body, _ in server.fake.requests}) == 2


def test_ids_that_the_student_does_not_have_are_the_servers_fault_and_no_rows(server: Any) -> None:
    server.fake.override = {"token_ids": [5, 5000], "logprobs": {"token_logprobs": [-1.0, -1.0]}}
    with pytest.raises(EngineError, match=r"ids of the student's vocabulary, below \d+, got 5000: it has"):
        ask(VLLMServer(server.url, model="policy"))


def test_the_same_seed_asks_for_the_same(server: Any) -> None:
    sampler = VLLMServer(server.url, model="policy")
    first, second, third = ask(sampler), ask(sampler), ask(sampler, seed=5)
    texts = [
        [[one.ids.tolist() for one in group] for group in completions_B_G] for completions_B_G in (first, second, third)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"token_ids": None}, "must answer with choices that have token_ids"),
        ({"logprobs": None}, "must answer with choices that have token_ids"),
        ({"logprobs": {"token_logprobs": [0.0] * 99}}, "one per token .* got 99"),
    ],
)
def test_an_answer_without_ids_or_log_probabilities_is_a_clear_error(
    override: dict[str, Any], message: str, server: Any
) -> None:
    server.fake.override = override
    with pytest.raises(EngineError, match=message):
        ask(VLLMServer(server.url, model="policy"))


def test_a_server_that_fails_is_named_with_its_words(server: Any) -> None:
    server.fake.status = 404
    with pytest.raises(EngineError, match=r"127.0.0.1:\d+/v1/completions answered 404: no such model"):
        ask(VLLMServer(server.url, model="policy"))


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "http://", "http://localhost:port", "http://localhost:0", "http://[::1", "ftp://localhost"],
)
def test_an_address_that_leads_nowhere_is_refused_before_it_is_asked(url: str) -> None:
    with pytest.raises(ArgumentError, match="url must start with http"):
        Server(url)
    with pytest.raises(ArgumentError, match="retry_seconds must be at least 0, got -1"):
        Server("http://localhost", retry_seconds=-1)


Fault = Callable[[BaseHTTPRequestHandler], None]


def status(code: int, text: bytes = b"no", headers: dict[str, str] | None = None) -> Fault:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in ({"Content-Length": str(len(text))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text)

    return respond


def reset(handler: BaseHTTPRequestHandler) -> None:
    # Lingering for no time, a socket that is closed sends RST.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def without_end(handler: BaseHTTPRequestHandler) -> None:
    """Half an answer of which nobody has said how long it is."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def slow(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)


def another_protocol(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"220 mail\r\n")


HTML = b"<html><head><title>503</title></head><body>Service Temporarily Unavailable</body></html>"
PASSING: dict[str, Fault] = {
    "reset": reset,
    "closed without a word": lambda handler: None,
    "half an answer": status(200, b'{"half', {"Content-Length": "100"}),
    "half an answer without a length": without_end,
    "408": status(408),
    "429": status(429),
    "502": status(502, HTML),
    "503": status(503, HTML),
    "half of a 503": status(503, b"<html>", {"Content-Length": "100"}),
    "504": status(504),
}
LASTING: dict[str, tuple[Fault, str]] = {
    "400": (status(400, b"max_tokens is too large"), "answered 400: max_tokens is too large$"),
    "401": (status(401, b""), "answered 401: Unauthorized$"),
    "404": (status(404, HTML), "answered 404: Not Found$"),
    "422": (status(422), "answered 422: no$"),
    "500": (status(500, b"EngineDeadError"), "answered 500: EngineDeadError$"),
    "slow": (slow, r"did not answer within timeout=0\.3 s$"),
    "not HTTP": (another_protocol, "BadStatusLine: 220 mail"),
    "a page": (status(200, HTML), "must answer JSON, got b'<html>"),
}


@contextlib.contextmanager
def misbehaving(faults: list[Fault], port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Serves these faults, one a request, and then a 1. Yields the address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            (faults.pop(0) if faults else status(200, b"1"))(self)

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:
            pass

    with Quiet(("127.0.0.1", port), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_address[1]}", asked
        http.shutdown()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "FIRST_PAUSE", 0.01)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_ends_nothing(fault: str) -> None:
    with misbehaving([PASSING[fault]] * 3) as (url, asked):
        with pytest.warns(UserWarning, match=rf"{url}/v1/completions .*; it is asked again for 300 s"):
            assert Server(url).post("/v1/completions", {}) == 1
        assert len(asked) == 4


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.filterwarnings("ignore:.*it is asked again")
@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_does_not_pass_in_time_is_one_clear_error(fault: str) -> None:
    with misbehaving([PASSING[fault]] * 99) as (url, asked):
        with pytest.raises(
            EngineError, match=rf"{url}/x .* \(attempts: \d+, within 0\.\d+ s; retry_seconds=0\.2\)"
        ) as error:
            Server(url, retry_seconds=0.2).post("/x", {})
        assert len(asked) > 2
        assert "html" not in str(error.value).lower()
    with misbehaving([PASSING[fault]]) as (url, asked):
        with pytest.raises(EngineError, match="attempts: 1"):
            Server(url, retry_seconds=0).post("/x", {})
        assert len(asked) == 1


@pytest.mark.parametrize("fault", LASTING)
def test_what_will_not_pass_is_an_error_at_once(fault: str) -> None:
    does, message = LASTING[fault]
    with misbehaving([does]) as (url, asked):
        with pytest.raises(EngineError, match=message):
            Server(url, timeout=0.3).post("/x", {})
        assert len(asked) == 1
        with pytest.raises(EngineError, match="gave no answer: SSLError"):
            Server(url.replace("http:", "https:")).post("/x", {})


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.filterwarnings("ignore:.*it is asked again")
def test_a_server_that_starts_anew_is_waited_for() -> None:
    port = closed_port()
    answers: list[Any] = []
    client = Server(f"http://127.0.0.1:{port}")
    asking = threading.Thread(target=lambda: answers.append(client.post("/x", {})))
    asking.start()
    time.sleep(0.1)
    assert not answers
    with misbehaving([], port):
        asking.join(timeout=20)
    assert answers == [1]
    with pytest.raises(
        EngineError, match=r"gave no answer: ConnectionRefusedError: .* \(attempts: \d, within 0\."
    ) as error:
        Server(f"http://127.0.0.1:{port}", retry_seconds=0.05).post("/x", {})
    assert "600" not in str(error.value)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.filterwarnings("ignore:.*it is asked again")
def test_of_many_requests_to_a_server_that_is_gone_none_waits_anew() -> None:
    client, started = Server(f"http://127.0.0.1:{closed_port()}", retry_seconds=0.3, concurrent=2), time.monotonic()
    with pytest.raises(EngineError, match="ConnectionRefusedError"):
        client.post_all("/x", [{}] * 40)
    assert time.monotonic() - started < 3  # and not 20 times 0.3 s
    with misbehaving([reset]) as (url, _):
        client.url = url
        assert client.post_all("/x", [{}] * 3) == [1, 1, 1]


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.filterwarnings("ignore:.*it is asked again")
def test_weights_that_did_not_arrive_are_handed_over_again(tmp_path: Path) -> None:
    model = world_model()
    with misbehaving([reset, status(500), status(200, b"1"), status(503), status(200, b"1")]) as (url, asked):
        sampler = VLLMServer(url, model="policy", weights_folder=tmp_path / "policy")
        with pytest.raises(EngineError, match="answered 500"):
            sampler.follow(model, 1)
        sampler.follow(model, 1)
        sampler.follow(model, 1)  # it has them now
    assert asked == ["/collective_rpc"] * 3 + ["/reset_prefix_cache"] * 2


def test_a_trainer_samples_from_a_server_that_follows_its_weights(server: Any, tmp_path: Path) -> None:
    method = SDPO(template=SHOW_ATTEMPT, num_generations=4)
    sampler = VLLMServer(server.url, model="policy", weights_folder=tmp_path / "policy")
    options: dict[str, Any] = {"method": method, "kind": "sdpo", "reward_funcs": [with_feedback], "max_steps": 3}
    made = trainer(tmp_path / "run", sampler=sampler, **options)
    made.train()
    calls = [path for path, _, _ in server.fake.requests if path != "/v1/completions"]
    # Before each step, the first one too; what the third learned nobody has sampled from.
    assert calls == ["/collective_rpc", "/reset_prefix_cache"] * 3
    # The server's weights are those before the last step, the student's after it.
    assert not torch.equal(server.fake.model.lm_head.weight, made.model.lm_head.weight)
    sampler.follow(made.model, 3)
    assert torch.equal(server.fake.model.lm_head.weight, made.model.lm_head.weight)
    sampler.follow(made.model, 3)  # nothing new
    assert len([path for path, _, _ in server.fake.requests if path == "/collective_rpc"]) == 4
    assert [line["completions/count"] for line in lines(tmp_path / "run")] == [16, 16, 16]


def test_nothing_is_left_to_the_models_generation_config(server: Any) -> None:
    ask(VLLMServer(server.url, model="policy"))
    for _, body, _ in server.fake.requests:
        neutral = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        wanted = neutral | {"top_p": 1.0, "top_k": -1, "temperature": 1.0, "ignore_eos": True}
        assert {name: body[name] for name in wanted} == wanted


def test_a_colocated_engine_without_vllm_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'sdcore\[vllm\]'"):
        VLLMColocated("any")


class FakeEngine:
    """The part of `vllm.LLM` that is used."""

    def __init__(self, model: str, **options: Any) -> None:
        self.options = options
        self.loaded: dict[str, Any] = {}
        self.resets = 0
        self.llm_engine: Any = SimpleNamespace(model_executor=None)

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        self.loaded = dict(kwargs["weights_iterator"])

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: list[dict[str, list[int]]], asked: list[Any], *, use_tqdm: bool) -> list[Any]:
        sampled = ModelSampler()
        answers = []
        for prompt, how in zip(prompts, asked, strict=True):
            (group,) = sampled.sample(
                world_model(),
                [torch.tensor(prompt["prompt_token_ids"])],
                num_completions=how.n,
                max_new_tokens=how.max_tokens,
                eos_token_id=how.stop_token_ids,
                seed=how.seed,
            )
            outputs = []
            for one in group:
                ids, values = one.ids.tolist(), one.logprobs.tolist()
                entries = [{i: SimpleNamespace(logprob=value)} for i, value in zip(ids, values, strict=True)]
                outputs.append(SimpleNamespace(token_ids=ids, logprobs=entries))
            answers.append(SimpleNamespace(outputs=outputs))
        return answers


def test_a_colocated_engine_samples_and_is_handed_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(LLM=FakeEngine, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    sampler = VLLMColocated("any", gpu_memory_utilization=0.2)
    assert sampler.engine.options["gpu_memory_utilization"] == 0.2
    completions_B_G = ask(sampler)
    assert [len(group) for group in completions_B_G] == [3, 3]
    assert all(len(one.ids) == len(one.logprobs) for group in completions_B_G for one in group)
    model = world_model()
    sampler.follow(model, 0)  # whatever the engine had before
    assert torch.equal(sampler.engine.loaded["lm_head.weight"], model.lm_head.weight)
    sampler.follow(model, 0)
    assert sampler.engine.resets == 1
    sampler.follow(model, 1)
    assert sampler.engine.resets == 2
    sampler.engine.llm_engine = SimpleNamespace()
    with pytest.raises(EngineError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        sampler.follow(model, 2)
    sampler.engine.llm_engine = SimpleNamespace(model_executor=None)
    sampler.follow(model, 2)  # what was refused was not handed over
    assert sampler.engine.resets == 3
    assert tokenizer().eos_token_id == EOS
