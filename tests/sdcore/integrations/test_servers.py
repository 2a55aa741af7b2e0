"""Reads answers in the exact form of vLLM, SGLang and TRL, which are made of a small model's log-probabilities.

And vLLM itself, where `SDCORE_VLLM` names a Python that has it (see tests/sdcore/rollouts/test_engine.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sdcore.errors import ArgumentError
from sdcore.integrations.servers import Scored, SGLangServer, from_sglang, from_trl, from_vllm, score, sequences
from sdcore.losses import FusedLinearDivergence, PolicyTerm
from sdcore.losses.tilt import TokenTilt
from sdcore.models import head_of
from sdcore.prefix import plan as plan_of
from sdcore.prefix import plan_trajectories, run
from sdcore.rollouts.vllm import EngineError, Server, VLLMServer
from sdcore.step import distill_step
from sdcore.teachers import Frozen
from sdkernels import TopK, TopKLogprobs, linear_divergence, linear_topk
from tests.processes import serving
from tests.sdcore.rollouts.test_engine import needs_server, served, with_wider_heads

__all__ = ["served"]  # a fixture: vLLM itself, where there is one

V, K = 61, 5
PROMPTS = [[3, 7, 9], [11, 4]]
COMPLETIONS = [[[5, 8, 2, 6], [], [9]], [[1, 2, 3]]]
TEACHER_PROMPTS = [[3, 7, 40, 41, 9], [11, 50, 4]]


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return tiny_model(1)


@pytest.fixture
def plan() -> Any:
    return plan_of(PROMPTS, COMPLETIONS, TEACHER_PROMPTS)


@dataclass
class Logprob:
    """Is that of vllm/logprobs.py."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def log_softmax_of(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    """Returns (L, V): row i is about token i; the first is NaN, since nothing stands before it."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return torch.cat([torch.full((1, V), float("nan")), rows[:-1]])


def vllm_position(row: Tensor, own: int, k: int) -> dict[int, Logprob]:
    """Makes it as `append_logprobs_for_next_position` does: the own token first, then the k most likely."""
    top = row.topk(k)
    rank = int((row >= row[own]).sum())
    entries = {own: Logprob(float(row[own]), rank, f"<{own}>")}
    for place, (value, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), 1):
        entries[token] = Logprob(value, place, f"<{token}>")
    return entries


def vllm_output(model: LlamaForCausalLM, ids: list[int], k: int) -> Any:
    """Makes a `RequestOutput`, as far as it is read."""
    rows = log_softmax_of(model, ids)
    positions = [None, *(vllm_position(rows[i], ids[i], k) for i in range(1, len(ids)))]
    return SimpleNamespace(prompt_token_ids=list(ids), prompt_logprobs=positions)


def vllm_choice(model: LlamaForCausalLM, ids: list[int], k: int) -> dict[str, Any]:
    """Makes a choice of `/v1/completions` as JSON, whose keys are strings."""
    output = vllm_output(model, ids, k)
    positions = [
        None if entries is None else {str(token): vars(value) for token, value in entries.items()}
        for entries in output.prompt_logprobs
    ]
    choice = {"index": 0, "prompt_token_ids": output.prompt_token_ids, "prompt_logprobs": positions, "text": "x"}
    return json.loads(json.dumps(choice))


def sglang_answer(model: LlamaForCausalLM, ids: list[int], k: int, start: int = 0) -> dict[str, Any]:
    rows = log_softmax_of(model, ids)
    own: list[Any] = [[None, ids[start], None]]
    top: list[Any] = [None]
    for i in range(start + 1, len(ids)):
        best = rows[i].topk(k)
        own.append([float(rows[i, ids[i]]), ids[i], None])
        top.append([[v, t, None] for v, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)])
    meta = {"prompt_tokens": len(ids), "input_token_logprobs": own, "input_top_logprobs": top}
    return json.loads(json.dumps({"text": "x", "meta_info": meta}))


def trl_answer(model: LlamaForCausalLM, asked: list[Scored], k: int) -> dict[str, Any]:
    """Returns what TRL's own client makes of a vLLM server's answer."""
    client = pytest.importorskip("trl.generation.vllm_client").VLLMClient
    results = [
        client._format_sequence_logprobs(
            vllm_choice(model, sequence.ids, k), sequence.ids, len(sequence.ids) - sequence.rows, k
        )
        for sequence in asked
    ]
    return {key: [result[key] for result in results] for key in results[0]}


class Format(NamedTuple):
    """Answers as a server does, and reads the answers."""

    answer: Callable[[LlamaForCausalLM, list[Scored], int], Any]
    read: Callable[[Any, Any, int], TopKLogprobs]

    def scores(self, model: LlamaForCausalLM, plan: Any, k: int, said: int | None = None) -> TopKLogprobs:
        """Reads k log-probabilities of a server that has sent `said` of them, as a rule k."""
        return self.read(self.answer(model, sequences(plan), said or k), plan, k)


def one_by_one(answer: Callable[[LlamaForCausalLM, list[int], int], Any]) -> Callable[..., list[Any]]:
    return lambda model, asked, k: [answer(model, sequence.ids, k) for sequence in asked]


def sglang_parts(model: LlamaForCausalLM, asked: list[Scored], k: int) -> list[Any]:
    return [sglang_answer(model, sequence.ids, k, len(sequence.ids) - sequence.rows - 1) for sequence in asked]


FORMATS = {
    "vllm_engine": Format(one_by_one(vllm_output), from_vllm),
    "vllm_json": Format(one_by_one(vllm_choice), from_vllm),
    "sglang_whole": Format(one_by_one(sglang_answer), from_sglang),
    "sglang_part": Format(sglang_parts, from_sglang),
    "trl": Format(trl_answer, from_trl),
}
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
vllm_outputs, vllm_choices = FORMATS["vllm_engine"].answer, FORMATS["vllm_json"].answer


def linear_scores(model: LlamaForCausalLM, plan: Any, k: int) -> TopKLogprobs:
    """Computes the same rows by the library's own passes."""
    hidden = run(tiny_model(2), plan, teacher=Frozen(model)).teacher_hidden
    head = head_of(model)
    top = linear_topk(hidden, head.weight, k, head=head.transform)
    return TopKLogprobs(top.ids, top.logprobs)


def test_a_sequence_is_the_teachers_prompt_and_a_completion_that_is_not_empty(plan: Any) -> None:
    assert [tuple(sequence) for sequence in sequences(plan)] == [
        ("completions[0][0]", [3, 7, 40, 41, 9, 5, 8, 2, 6], 4),
        ("completions[0][2]", [3, 7, 40, 41, 9, 9], 1),
        ("completions[1][0]", [11, 50, 4, 1, 2, 3], 3),
    ]
    alone = plan_of(PROMPTS, COMPLETIONS)
    assert sequences(alone)[0].ids == [3, 7, 9, 5, 8, 2, 6]


@formats
@pytest.mark.parametrize("k", [1, K, V])
def test_every_format_gives_the_rows_of_linear_topk(form: Format, k: int, plan: Any, teacher: LlamaForCausalLM) -> None:
    scores, expected = form.scores(teacher, plan, k), linear_scores(teacher, plan, k)
    assert torch.equal(scores.ids, expected.ids)
    torch.testing.assert_close(scores.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert scores.logprobs.shape == (plan.num_rows, k)


@formats
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_every_format_gives_the_loss_of_the_teachers_own_states(
    form: Format, alpha: float, plan: Any, teacher: LlamaForCausalLM
) -> None:
    student = tiny_model(2)
    hidden = run(student, plan).student_hidden.detach()
    states = run(student, plan, teacher=Frozen(teacher)).teacher_hidden
    weight, teacher_weight = head_of(student).weight, head_of(teacher).weight
    expected = linear_divergence(
        hidden, weight, states, teacher_weight, alpha=alpha, support=TopK(K, of="teacher", tail=True)
    )
    out = linear_divergence(hidden, weight, alpha=alpha, teacher=form.scores(teacher, plan, K))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_the_own_token_of_vllm_is_left_out_where_it_is_not_among_the_most_likely(
    plan: Any, teacher: LlamaForCausalLM
) -> None:
    asked = sequences(plan)
    answers = vllm_outputs(teacher, asked, 1)
    counts = [len(p) for a, sequence in zip(answers, asked, strict=True) for p in a.prompt_logprobs[-sequence.rows :]]
    assert set(counts) == {1, 2} or counts == [2] * len(counts)
    scores = from_vllm(answers, plan, 1)
    assert scores.ids.shape == (plan.num_rows, 1)
    assert torch.equal(scores.ids, linear_scores(teacher, plan, 1).ids)


def test_the_own_token_does_not_stand_in_for_one_that_the_server_left_out(teacher: LlamaForCausalLM) -> None:
    unlikely = int(teacher(torch.tensor([[3, 7]])).logits[0, -1].argmin())
    small = plan_of([[3]], [[[unlikely]]], [[3, 7]])
    answers = [vllm_output(teacher, [3, 7, unlikely], K)]
    assert len(answers[0].prompt_logprobs[2]) == K + 1
    assert from_vllm(answers, small, K).ids.shape == (1, K)
    with pytest.raises(EngineError, match=r"position 0 of completions\[0\]\[0\] must have the 6 most likely .* got 5"):
        from_vllm(answers, small, K + 1)


def test_more_than_is_wanted_flat_logprobs_and_old_answers_without_the_prompts_ids_are_read_too(
    plan: Any, teacher: LlamaForCausalLM
) -> None:
    answers = vllm_outputs(teacher, sequences(plan), 12)
    assert torch.equal(from_vllm(answers, plan, K).ids, linear_scores(teacher, plan, K).ids)
    for answer in answers:
        answer.prompt_token_ids = None
        answer.prompt_logprobs[0] = {}  # FlatLogprobs has an empty position for None
    assert torch.equal(from_vllm(answers, plan, K).ids, linear_scores(teacher, plan, K).ids)


def change(answers: list[Any], what: str) -> None:
    """Breaks the second answer."""
    answer = answers[1]
    position = answer["prompt_logprobs"][-1]
    first = next(iter(position))
    if what == "other tokens":
        answer["prompt_token_ids"][2] = 60
    elif what == "other tokens, of an old server":
        del answer["prompt_token_ids"]
        position.pop(str(9), None)
    elif what == "fewer positions":
        answer["prompt_logprobs"].pop()
    elif what == "no None":
        answer["prompt_logprobs"][0] = position
    elif what == "no logprobs":
        answer["prompt_logprobs"] = None
    elif what == "NaN":
        position[first]["logprob"] = float("nan")
    elif what in ("log 0", "infinite", "much mass"):
        best = next(token for token, entry in position.items() if entry["rank"] == 1)
        position[best]["logprob"] = {"log 0": -9999.0, "infinite": float("inf"), "much mass": 0.2}[what]
    elif what == "negative id":
        best = next(token for token, entry in position.items() if entry["rank"] == 2)
        position["-4"] = position.pop(best)
    elif what == "another form":
        position[first] = 0.25
    elif what == "None within":
        answer["prompt_logprobs"][-1] = None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "other tokens",
            r"read the 6 tokens of completions\[0\]\[2\].*index 2 on \[40, 41, 9, 9\] was sent and \[60, 41",
        ),
        ("other tokens, of an old server", r"position 0 of completions\[0\]\[2\] must have an entry of the token 9"),
        ("fewer positions", r"completions\[0\]\[2\] must have an entry .* 6 tokens, got 5"),
        ("no None", r"prompt_logprobs of completions\[0\]\[2\] must begin with None"),
        ("no logprobs", r"the answer for completions\[0\]\[2\] must have prompt_logprobs, got None"),
        ("NaN", r"position 0 of completions\[0\]\[2\] must have finite log-probabilities, got NaN"),
        ("infinite", r"position 0 of completions\[0\]\[2\] must have finite log-probabilities .*inf"),
        ("log 0", r"position 0 of completions\[0\]\[2\] must have finite|the 61 most likely"),
        ("much mass", r"position 0 of completions\[0\]\[2\] must have probabilities that add up to at most 1"),
        ("negative id", r"position 0 of completions\[0\]\[2\] must have ids of at least 0"),
        ("another form", r"the answer for completions\[0\]\[2\] is not of the form"),
        ("None within", r"position 0 of completions\[0\]\[2\] must have an entry of the token 9"),
    ],
)
def test_an_answer_that_is_wrong_is_refused_by_completion_and_position(
    what: str, message: str, plan: Any, teacher: LlamaForCausalLM
) -> None:
    k = V if what == "log 0" else K
    answers = vllm_choices(teacher, sequences(plan), k)
    change(answers, what)
    with pytest.raises(EngineError, match=message):
        from_vllm(answers, plan, k)


@formats
def test_fewer_log_probabilities_than_wanted_are_refused(form: Format, plan: Any, teacher: LlamaForCausalLM) -> None:
    """A server with too small a `--max-logprobs` sends so many; the own token's entry does not make up for one."""
    with pytest.raises(
        EngineError, match=r"position 0 of completions\[0\]\[0\] must have the 6 most likely tokens, got 5"
    ):
        form.scores(teacher, plan, K + 1, said=K)


def test_what_sglang_sends_of_other_tokens_or_too_late_is_refused(plan: Any, teacher: LlamaForCausalLM) -> None:
    asked = sequences(plan)
    answers = FORMATS["sglang_whole"].answer(teacher, asked, K)
    answers[0]["meta_info"]["input_token_logprobs"][3][1] = 0
    with pytest.raises(EngineError, match=r"tokens of completions\[0\]\[0\] that were sent.*index 3 on \[41"):
        from_sglang(answers, plan, K)
    late = [sglang_answer(teacher, sequence.ids, K, len(sequence.ids) - sequence.rows) for sequence in asked]
    with pytest.raises(
        EngineError, match=r"must have 5 to 9 entries .*got 4 and 4; ask for logprob_start_len of at most 4"
    ):
        from_sglang(late, plan, K)


def test_what_trl_sends_of_other_tokens_or_lengths_is_refused(plan: Any, teacher: LlamaForCausalLM) -> None:
    answer = trl_answer(teacher, sequences(plan), K)
    answer["actual_token_ids"][2][1] = [44]
    with pytest.raises(EngineError, match=r"tokens of completions\[1\]\[0\] that were sent.*index 1 on \[2, 3\]"):
        from_trl(answer, plan, K)
    answer = trl_answer(teacher, sequences(plan), K)
    answer["logprobs"][0].pop()
    with pytest.raises(
        EngineError, match=r"completions\[0\]\[0\] must have an entry for each of its 4 tokens, got 3 of"
    ):
        from_trl(answer, plan, K)
    del answer["logprobs"]
    with pytest.raises(EngineError, match=r"must have logprobs, .*got none of logprobs"):
        from_trl(answer, plan, K)


def test_an_answer_short_or_a_k_that_is_no_number_is_refused(plan: Any, teacher: LlamaForCausalLM) -> None:
    with pytest.raises(EngineError, match="answer to each of 3 completions, got 1"):
        from_vllm([vllm_output(teacher, [1, 2], K)], plan, K)
    with pytest.raises(ArgumentError, match="k must be a positive number of tokens, got 0"):
        from_vllm([], plan, 0)


class FakeServer:
    """Answers in both protocols, by the model."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.most = V  # --max-logprobs

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/completions":
            if body["prompt_logprobs"] > self.most:
                return None
            return {"choices": [vllm_choice(self.model, body["prompt"], body["prompt_logprobs"])]}
        assert path == "/generate"
        return sglang_answer(self.model, body["input_ids"], body["top_logprobs_num"], body["logprob_start_len"])


@pytest.fixture
def server(teacher: LlamaForCausalLM) -> Iterator[Any]:
    fake = FakeServer(teacher)

    def answer(path: str, body: Any, headers: object) -> tuple[int, bytes]:
        fake.requests.append((path, body))
        if said := fake.answer(path, body):
            return 200, json.dumps(said).encode()
        return 400, b"Requested prompt logprobs of 6, greater than max of 5"

    with serving(answer) as url:
        yield SimpleNamespace(fake=fake, url=url)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_scores_the_completions_of_a_plan(
    kind: str, server: Any, plan: Any, teacher: LlamaForCausalLM
) -> None:
    client: Server = SGLangServer(server.url) if kind == "sglang" else VLLMServer(server.url, model="teacher")
    scores, expected = score(client, plan, K), linear_scores(teacher, plan, K)
    assert torch.equal(scores.ids, expected.ids)
    torch.testing.assert_close(scores.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert sorted(body.get("prompt", body.get("input_ids")) for _, body in server.fake.requests) == sorted(
        sequence.ids for sequence in sequences(plan)
    )
    if kind == "vllm":
        assert all(body["temperature"] == 1.0 and body["return_token_ids"] for _, body in server.fake.requests)


@needs_server
def test_vllm_itself_scores_as_the_librarys_own_passes(served: Any) -> None:
    model = with_wider_heads()
    planned = plan_of([[3, 7, 9], [11, 4]], [[[5, 8, 20, 60], [], [9]], [[100, 101, 3]]], TEACHER_PROMPTS)
    client = VLLMServer(served.url, model="policy")
    scores = score(client, planned, 20)
    hidden, head = run(model, planned).teacher_hidden, head_of(model)
    expected = linear_topk(hidden, head.weight, 20, head=head.transform)
    assert torch.equal(scores.ids, expected.ids)
    torch.testing.assert_close(scores.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    with pytest.raises(EngineError, match="prompt logprobs of 21, which is greater than max allowed: 20"):
        score(client, planned, 21)
    # The temperature is for what is sampled, whatever the server's --logprobs-mode.
    ids = sequences(planned)[0].ids
    body = {"model": "policy", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 3, "return_token_ids": True}
    hot, cold = (
        client.post("/v1/completions", body | {"temperature": temperature})["choices"][0]["prompt_logprobs"]
        for temperature in (1.0, 0.5)
    )
    assert hot == cold


def test_a_server_that_fails_is_named(server: Any, plan: Any) -> None:
    server.fake.most = 5
    with pytest.raises(EngineError, match=rf"{server.url}/v1/completions answered 400: Requested prompt logprobs of 6"):
        score(VLLMServer(server.url, model="teacher"), plan, 6)
    with pytest.raises(ArgumentError, match="server must be a VLLMServer or an SGLangServer, got Server"):
        score(Server(server.url), plan, 6)


def losses(student: LlamaForCausalLM, plan: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    student.zero_grad()
    out = distill_step(student, plan, **options)
    return out.loss, [p.grad.clone() for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("strategy", ["naive", "cached", "packed", "two_phase"])
def test_a_step_with_scores_is_the_step_with_the_teachers_weights(
    strategy: str, plan: Any, teacher: LlamaForCausalLM
) -> None:
    student = tiny_model(2)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0, 0.0, 3.0])
    common: dict[str, Any] = {"token_weights": weights, "strategy": strategy}
    loss = FusedLinearDivergence(alpha=0.5, support=TopK(K, of="teacher"))
    expected, gradients = losses(student, plan, loss=loss, teacher=Frozen(teacher), **common)
    scores = FORMATS["vllm_engine"].scores(teacher, plan, K)
    served, others = losses(student, plan, loss=loss, teacher=scores, **common)
    torch.testing.assert_close(served, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-6)
    # The plan needs no teacher's prompts then, and their pass is not run.
    alone, again = losses(student, plan_of(PROMPTS, COMPLETIONS), loss=loss, teacher=scores, **common)
    torch.testing.assert_close(alone, served)
    torch.testing.assert_close(again, others)


def test_a_step_with_scores_reports_no_pass_and_no_entropy_of_the_teacher(plan: Any, teacher: LlamaForCausalLM) -> None:
    out = distill_step(tiny_model(2), plan, teacher=FORMATS["sglang_part"].scores(teacher, plan, K))
    assert out.report.teacher is None
    assert "teacher/entropy" not in out.metrics
    assert out.metrics["student/entropy"] > 0


def test_a_step_with_scores_mixes_with_a_policy_gradient(plan: Any, teacher: LlamaForCausalLM) -> None:
    policy = PolicyTerm(advantages=torch.linspace(-1, 1, plan.num_rows), distillation_weight=0.25)
    scores = FORMATS["trl"].scores(teacher, plan, K)
    mixed = distill_step(tiny_model(2), plan, teacher=scores, policy=policy)
    alone = distill_step(tiny_model(2), plan, teacher=scores)
    torch.testing.assert_close(mixed.metrics["loss/distillation"], alone.loss)


def test_scores_that_do_not_fit_a_step_are_refused(plan: Any, teacher: LlamaForCausalLM) -> None:
    scores = FORMATS["vllm_engine"].scores(teacher, plan, K)
    short = TopKLogprobs(scores.ids[1:], scores.logprobs[1:])
    with pytest.raises(
        ArgumentError, match=r"teacher must have ids and logprobs of one shape \(N=8, K\), got \(7, 5\)"
    ):
        distill_step(tiny_model(2), plan, teacher=short)
    with pytest.raises(ArgumentError, match="tilt needs the teacher's full distribution, got TopKLogprobs"):
        distill_step(tiny_model(2), plan, teacher=scores, tilt=TokenTilt(exponents=torch.zeros(8)))
    with pytest.raises(ValueError, match=r"support must be None or TopK\(5, of='teacher'\)"):
        distill_step(tiny_model(2), plan, teacher=scores, loss=FusedLinearDivergence(support=TopK(3)))


def test_trajectories_are_refused() -> None:
    made = plan_trajectories([[1, 2, 3]], [[False, True, False]])
    with pytest.raises(ArgumentError, match="plan must be of prompts and completions"):
        sequences(made)
    with pytest.raises(ArgumentError, match="plan must have no masks"):
        sequences(plan_of([[1]], [[[2, 3, 4]]], masks=[[[True, False, True]]]))
