"""What a run says about itself: its files, its metrics against definitions written out here, and the probes."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sdcore.diagnostics import KEYS, RunLog, RunLogError, drift, key_of, leak, metrics, overlap, read_run, topk_overlap
from sdcore.diagnostics.keys import OTHER, TOPICS
from sdcore.errors import ArgumentError, PlanError, SdcoreError
from sdcore.losses import FusedLinearDivergence
from sdcore.models import Head
from sdcore.prefix import plan
from sdcore.presets import Method
from sdcore.step import distill_step
from sdcore.teachers import Frozen, Live, TrustRegion
from sdcore.types import Conditioned, Example, Group, Trajectory
from sdkernels import LogitTransform
from tests.sdcore.prefix.models import CONFIGS, VOCAB, build

Sampled = tuple[list[Group], list[Conditioned]]
random = partial(torch.randn, dtype=torch.float64)


pytestmark = pytest.mark.usefixtures("in_double_precision")


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def logged(directory: Path, steps: int) -> RunLog:
    log = RunLog(directory)
    for step in range(1, steps + 1):
        log.metrics(step, {"loss": 1.0 / step}, samples=8 * step, tokens=100 * step)
        log.samples(step, [{"prompt": "p", "completion": f"c{step}", "tokens": ["c"], "per_token": [0.1]}])
    return log


def test_a_line_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    logged(tmp_path, 1)
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line.pop("time") >= 0
    assert line == {"step": 1, "samples": 8, "tokens": 100, "loss": 1.0}
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert sample == {"step": 1, "prompt": "p", "completion": "c1", "tokens": ["c"], "per_token": [0.1]}


def test_resuming_cuts_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    logged(tmp_path, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(re.sub(r'"time": [\d.]+', lambda _: '"time": 1000.0', path.read_text()))
    log = RunLog(tmp_path, resume_step=3)
    log.metrics(4, {"loss": 9.0}, samples=32, tokens=400)
    run = read_run(tmp_path)
    assert [(line["step"], line["loss"]) for line in run.metrics] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    assert [line["step"] for line in run.samples] == [1, 2, 3]
    assert run.metrics[-1]["time"] >= 1000
    RunLog(tmp_path / "new", resume_step=7).metrics(8, {"loss": 1.0}, samples=1, tokens=1)  # nothing to cut
    assert [line["step"] for line in read_run(tmp_path / "new").metrics] == [8]


@pytest.mark.parametrize("cut", [1, 20], ids=["without the newline", "half a line"])
def test_a_torn_last_line_is_repaired_on_resume(tmp_path: Path, cut: int) -> None:
    logged(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in read_run(tmp_path).metrics][:2] == [1, 2]
    RunLog(tmp_path, resume_step=3).metrics(4, {}, samples=0, tokens=0)
    assert [line["step"] for line in lines(path)] == [1, 2, 4]


def test_a_reader_counts_the_lines_that_it_cannot_read(tmp_path: Path) -> None:
    logged(tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'[1]\n{"loss": 1}\n{"step": 3, "lo')
    run = read_run(tmp_path)
    assert (len(run.metrics), run.unreadable) == (2, 3)


def test_a_new_run_moves_an_older_one_aside_when_it_first_writes(tmp_path: Path) -> None:
    logged(tmp_path, 2).describe({"model": "old"})
    new = RunLog(tmp_path)
    assert len(lines(tmp_path / "metrics.jsonl")) == 2, "making the log must not touch the files"
    new.metrics(1, {"loss": 7.0}, samples=1, tokens=1)
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")] == [7.0]
    assert len(lines(tmp_path / "metrics.jsonl.1")) == 2
    assert json.loads((tmp_path / "run.json.1").read_text())["model"] == "old"
    logged(tmp_path, 3)
    assert len(lines(tmp_path / "metrics.jsonl.1")) == 2
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl.2")] == [7.0]


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    values = {"a": float("nan"), "b": torch.tensor(float("-inf")), "c": torch.tensor(2.0), "d": None, "e": True}
    log.metrics(1, values, samples=1, tokens=1)
    log.samples(1, [{"per_token": torch.tensor([1.0, float("nan")]), "tokens": ["x", "y"], "reward": float("inf")}])
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert [line[name] for name in "abcde"] == [None, None, 2.0, None, 1]
    assert line["nonfinite"] == {"a": "nan", "b": "-inf"}
    (sample,) = lines(tmp_path / "samples.jsonl")
    assert (sample["per_token"], sample["reward"]) == ([1.0, None], None)


def test_any_text_survives_the_files(tmp_path: Path) -> None:
    text = 'line\u2028separator\x85 "quoted" \x00 \ud800 naïve 漢字 🙂\r\n'
    log = RunLog(tmp_path)
    log.samples(1, [{"completion": text}])
    log.samples(2, [{"completion": "next"}])
    log.describe({"model": text})
    run = read_run(tmp_path)
    assert [sample["completion"] for sample in run.samples] == [text, "next"]
    assert run.description["model"] == text
    assert run.unreadable == 0


def test_the_description_takes_a_method_and_keeps_what_was_there(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.describe({"method": Method(alpha=0.5), "output": tmp_path, "model": "a"})
    log.describe({"model": "b", "rate": float("nan"), "names": {"y", "x"}})
    described = read_run(tmp_path).description
    assert described["method"]["alpha"] == 0.5
    assert (described["output"], described["model"], described["rate"]) == (str(tmp_path), "b", None)
    assert described["names"] == ["x", "y"]
    assert described["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    RunLog(tmp_path, resume_step=3).describe({"resumed": 3})
    assert read_run(tmp_path).description["model"] == "b"


class FullDisk:
    """`os.write` on a disk that has room for so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, os.write

    def __call__(self, file: int, data: Any) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.write(file, bytes(data[: self.room]))
        self.room -= written
        return written


def test_a_full_disk_is_a_clear_error_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logged(tmp_path, 1)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", FullDisk(10))
        with pytest.raises(RunLogError, match=r"could not write .*No space left.*resumed.*metrics\.jsonl") as caught:
            log.metrics(2, {"loss": 1.0}, samples=1, tokens=1)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, SdcoreError)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    log.metrics(2, {"loss": 1.0}, samples=1, tokens=1)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_description_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RunLog(tmp_path)
    log.describe({"model": "a"})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunLogError, match=r"No space left.*run\.json"):
            log.describe({"model": "b"})
    assert read_run(tmp_path).description["model"] == "a"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda log: log.metrics(1, {}, samples=1, tokens=1), r"step must not go back: metrics.jsonl is at 2, got 1"),
        (lambda log: log.metrics(3, {"step": 1.0}, samples=1, tokens=1), r"must not be called .*got 'step'"),
        (lambda log: log.metrics(3, {"a": "x"}, samples=1, tokens=1), r"metric 'a' must be a number, got str 'x'"),
        (lambda log: log.metrics(3, {"a": torch.ones(2)}, samples=1, tokens=1), r"'a' must be a number, got Tensor"),
        (lambda log: log.samples(3, [{}, {"tokens": ["a"], "per_token": []}]), r"rows\[1\] .*1 tokens and 0 values"),
        (lambda log: RunLog(log.directory, resume_step=-1), r"resume_step must be at least 0, got -1"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path: Path, call: Any, message: str) -> None:
    log = logged(tmp_path, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ArgumentError, match=message):
        call(log)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_directory_that_is_a_file_or_has_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunLogError, match=r"could not create .*out"):
        RunLog(tmp_path / "out")
    with pytest.raises(RunLogError, match=r"must be the output directory of a run"):
        read_run(tmp_path)


# What a step says: counts and averages.


def rollout(length: int, **values: Any) -> Trajectory:
    ids = torch.randint(VOCAB, (length,))
    return Trajectory.answer(completion_ids=ids, logprobs=None, text="", **{"finished": True} | values)


def group_of(prompt: Sequence[int], rollouts: Sequence[Trajectory], **example: Any) -> Group:
    asked = Example(**{"prompt": " ".join(map(str, prompt))} | example)
    return Group(example=asked, prompt_ids=torch.tensor(prompt), rollouts=tuple(rollouts))


@pytest.fixture
def two_groups() -> Sampled:
    """Rewards 1, 0, none and 0.2, 0.2; teachers of the first see one token in the prompt's middle, or nothing."""
    groups = [
        group_of(
            [1, 2, 3, 4],
            [rollout(3, reward=1.0), rollout(5, reward=0.0, finished=False, feedback="no"), rollout(0, feedback=" ")],
        ),
        group_of([5, 6], [rollout(1, reward=0.2), rollout(2, reward=0.2)]),
    ]
    seen = torch.tensor([1, 2, 9, 3, 4])
    conditioned = [
        Conditioned(
            teacher_prompts=(groups[0].prompt_ids, seen, seen),
            active=(False, True, True),
            counts={"context/overflow": 1, "context/with_feedback": 1, "context/prompt_tokens": 8},
        ),
        Conditioned(teacher_prompts=(groups[1].prompt_ids,) * 2, active=(False, False), counts={"context/overflow": 2}),
    ]
    return groups, conditioned


def test_metrics_count_what_was_sampled(two_groups: Sampled) -> None:
    assert metrics(*two_groups) == pytest.approx(
        {
            "self_distillation/reward_mean": (1.0 + 0.0 + 0.2 + 0.2) / 4,
            "self_distillation/reward_std": torch.tensor([1.0, 0.0, 0.2, 0.2]).std().item(),
            "self_distillation/success_group_fraction": 1 / 2,
            "self_distillation/flat_group_fraction": 1 / 2,
            "self_distillation/unjudged_fraction": 1 / 5,
            "self_distillation/feedback_available_fraction": 1 / 5,
            "self_distillation/feedback_used_fraction": 1 / 5,
            "self_distillation/reprompt_sample_fraction": 2 / 5,
            "completions/mean_length": 11 / 5,
            "completions/clipped_ratio": 1 / 5,
            "completions/empty_ratio": 1 / 5,
            "context/overflow": 3,
            "context/with_feedback": 1,
            "context/shared_fraction": 2 / 4,
            "context/added_tokens": 1,
        }
    )


@pytest.mark.parametrize("reward", [None, 1.0])
def test_without_rewards_there_is_no_mean_reward_and_alone_no_completion_is_a_flat_group(reward: float | None) -> None:
    groups = [group_of([1], [rollout(2, reward=reward)])]
    found = metrics(groups, [Conditioned(teacher_prompts=(groups[0].prompt_ids,), active=(True,))])
    judged = {name for name in found if "reward" in name or "success" in name}
    assert bool(judged) == (reward is not None)
    assert found.get("self_distillation/reward_mean") == reward
    assert "self_distillation/flat_group_fraction" not in found


def test_lists_that_do_not_fit_are_refused(two_groups: Sampled) -> None:
    groups, conditioned = two_groups
    with pytest.raises(ArgumentError, match=r"conditioned must have one entry per group, got 2 and 1"):
        metrics(groups, conditioned[:1])
    with pytest.raises(ArgumentError, match=r"conditioned\[0\] must have one entry per completion, 3, got 2 of active"):
        metrics(groups, [replace(conditioned[0], active=(True, True)), conditioned[1]])


def model_of(family: str = "llama", seed: int = 0) -> nn.Module:
    return build(CONFIGS[family](), seed=seed)


def planned(groups: Sequence[Group], conditioned: Sequence[Conditioned]) -> Any:
    return plan(
        [group.prompt_ids for group in groups],
        [[one.completion_ids for one in group.rollouts] for group in groups],
        [list(one.teacher_prompts) for one in conditioned],
    )


def log_softmax_rows(model: nn.Module, prompt: Tensor, completion: Tensor) -> Tensor:
    """(R, V) before each completion token, of one plain forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_first_tokens_divergence_is_per_position_whatever_the_weights(two_groups: Sampled) -> None:
    groups, conditioned = two_groups
    model, rows = model_of(), planned(groups, conditioned)
    # Completions of 3, 5, 0, 1 and 2 tokens: position 0 without loss in all of them, the fourth completion wholly.
    weights = torch.tensor([0, 2, 3, 0, 5, 1, 1, 7, 0, 0, 4], dtype=torch.float64)
    output = distill_step(model, rows, token_weights=weights)
    found = metrics(groups, conditioned, output, plan=rows, token_weights=weights)
    second = [
        float(kl(*(log_softmax_rows(model, prompt, one.completion_ids) for prompt in prompts))[1])
        for group, seen in zip(groups, conditioned, strict=True)
        for one, teacher in zip(group.rollouts, seen.teacher_prompts, strict=True)
        if len(one.completion_ids) > 1
        for prompts in [(group.prompt_ids, teacher)]
    ]
    assert len(second) == 3
    assert found["loss/position_1"] == pytest.approx(sum(second) / 3, rel=1e-9)
    assert "loss/position_0" not in found
    assert {"loss/position_2", "loss/position_3"} <= found.keys()
    assert found["loss/active_fraction"] == 7 / 11
    assert found["self_distillation/distillation_loss"] == pytest.approx(float(output.loss))
    gap = found["student/entropy"] - found["teacher/entropy"]
    assert found["teacher/entropy_gap"] == pytest.approx(gap) != 0
    with pytest.raises(ArgumentError, match=r"token_weights must be of shape \(N=11,\), got \(3,\)"):
        metrics(groups, conditioned, output, plan=rows, token_weights=weights[:3])


def test_a_step_that_was_not_finite_says_so(two_groups: Sampled) -> None:
    groups, conditioned = two_groups
    rows = planned(groups, conditioned)
    output = distill_step(model_of(), rows)
    found = metrics(groups, conditioned, output._replace(loss=output.loss * math.nan), plan=rows)
    assert math.isnan(found["self_distillation/distillation_loss"])
    assert not {name for name, value in found.items() if math.isnan(value)} - {"self_distillation/distillation_loss"}


# The table of keys.


def test_every_metric_that_is_emitted_is_in_the_table(two_groups: Sampled) -> None:
    groups, conditioned = two_groups
    model, rows = model_of(), planned(groups, conditioned)
    output = distill_step(model, rows, loss=FusedLinearDivergence(alpha=0.5))
    builder = InTheMiddle()
    asked = [replace(group, example=replace(group.example, privileged_context="7 8")) for group in groups]
    asked[1] = replace(asked[1], example=replace(asked[1].example, privileged_context="9"))
    emitted = (
        metrics(groups, conditioned, output, plan=rows)
        | overlap(model, groups, conditioned)
        | drift(model, groups, Frozen(model_of(seed=1)))
        | leak(model, asked, builder, None)
    )
    assert {"loss/position_0", "teacher/leak_ratio", "student/drift_kl", "prefix/student_tokens"} <= emitted.keys()
    assert [name for name in emitted if key_of(name) is None] == []


def test_every_name_in_the_sources_of_metrics_is_in_the_table() -> None:
    """Also of steps that were not run above."""
    root = Path(__file__).resolve().parents[2] / "sdcore"
    files = [
        *(root / "step").glob("*.py"),
        root / "training" / "update.py",
        *(root / "contexts").glob("*.py"),
        root / "prefix" / "report.py",
    ]
    namespaces = "self_distillation|completions|distillation|context|student|teacher|loss|policy|tilt|prefix|rewards"
    names = {name for file in files for name in re.findall(rf'"((?:{namespaces})/\w+)"', file.read_text())}
    assert len(names) > 20
    assert sorted(name for name in names if key_of(name) is None) == []


def test_the_table_is_complete_and_has_each_name_once() -> None:
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert {key.topic for key in KEYS} == set(TOPICS)
    assert OTHER not in TOPICS
    assert all(key.meaning.endswith(".") and key.title for key in KEYS)
    assert {key.direction for key in KEYS} == {"up", "down", "watch", "none"}


def test_a_placeholder_is_filled_in_by_the_longest_pattern_that_fits() -> None:
    found = key_of("prefix/student_naive_tokens")
    assert found is not None
    assert found.title == "tokens without sharing, student pass"
    assert key_of("loss/position_12").title == "divergence of token 12"  # type: ignore[union-attr]
    assert key_of("nonsense/metric") is None


# Probes.


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(LogitTransform(), id="plain"),
        pytest.param(LogitTransform(bias=random(VOCAB), scale=0.7, softcap=2.0), id="bias, scale and soft-cap"),
    ],
)
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_top_k_overlap_is_that_of_full_distributions(
    transform: LogitTransform, of: Literal["student", "teacher"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdcore.models.heads.GATHERED", 300)  # several gathers
    k, temperature = 7, 0.8
    hidden = [random(11, 6), random(11, 5)]
    heads = [Head(random(VOCAB, 6), transform), Head(random(VOCAB, 5), replace(transform, scale=1.3))]
    found = topk_overlap(hidden[0], heads[0], hidden[1], heads[1], k=k, of=of, temperature=temperature)

    def distribution(states: Tensor, head: Head) -> Tensor:
        logits = states @ head.weight.T + (0 if head.transform.bias is None else head.transform.bias)
        logits = logits * head.transform.scale
        cap = head.transform.softcap
        return ((cap * (logits / cap).tanh() if cap else logits) / temperature).softmax(-1)

    p, q = (distribution(*side) for side in zip(hidden, heads, strict=True))
    tops = [x.topk(k).indices for x in (p, q)]
    support = tops[0] if of == "student" else tops[1]
    for name, x in (("student", p), ("teacher", q)):
        torch.testing.assert_close(found[f"distillation/{name}_mass"], x.gather(1, support).sum(-1))
    common = [len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(*tops, strict=True)]
    assert found["distillation/overlap_ratio"].tolist() == pytest.approx(common)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_overlap_looks_at_active_completions_only(two_groups: Sampled, family: str) -> None:
    groups, conditioned = two_groups
    model, one = model_of(family), groups[0].rollouts[1].completion_ids
    found = overlap(model, groups, conditioned, k=5, teacher=Live())
    p, q = (log_softmax_rows(model, x, one).exp() for x in (groups[0].prompt_ids, conditioned[0].teacher_prompts[1]))
    support = p.topk(5).indices
    for name, x in (("student", p), ("teacher", q)):
        assert found[f"distillation/{name}_mass"] == pytest.approx(float(x.gather(1, support).sum(-1).mean()))
    nothing = [replace(seen, active=(False,) * len(seen.active)) for seen in conditioned]
    assert overlap(model, groups, nothing) == {}


def test_drift_is_the_kl_to_the_reference_without_context(two_groups: Sampled) -> None:
    groups, _ = two_groups
    model, base = model_of(), model_of(seed=1)
    pairs = [
        [log_softmax_rows(one, group.prompt_ids, r.completion_ids) for one in (model, base)] + [r.completion_ids]
        for group in groups
        for r in group.rollouts
        if len(r.completion_ids)
    ]
    p, q, ids = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    found = drift(model, groups, Frozen(base))
    assert found["student/drift_kl"] == pytest.approx(float(kl(p, q).mean()), rel=1e-6)
    gap = (p - q).gather(1, ids[:, None]).mean()
    assert found["student/drift_logprob_gap"] == pytest.approx(float(gap), rel=1e-6)


def test_a_model_that_has_not_moved_has_no_drift(two_groups: Sampled) -> None:
    groups, _ = two_groups
    model = model_of()
    assert drift(model, groups, Frozen(copy.deepcopy(model)))["student/drift_kl"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ArgumentError, match=r"reference must have other weights .* got Live"):
        drift(model, groups, Live())


@dataclass
class InTheMiddle:
    """Puts the ids that the row's privileged context spells before the prompt's last token; None: inactive."""

    longest: int = 100

    def condition(self, group: Group, tokenizer: Any) -> Conditioned:
        context = group.example.privileged_context
        ids = torch.tensor([int(word) for word in (context or "").split()], dtype=torch.int64)
        prompt = torch.cat([group.prompt_ids[:-1], ids, group.prompt_ids[-1:]])
        if len(prompt) > self.longest:
            raise PlanError("too long")
        size = len(group.rollouts)
        return Conditioned(teacher_prompts=(prompt,) * size, active=(context is not None,) * size)


def asked(*contexts: str | None, prompts: Sequence[Sequence[int]] = ((1, 2, 3), (4, 5), (6, 7))) -> list[Group]:
    return [
        group_of(prompt, [rollout(4), rollout(3)], privileged_context=context)
        for prompt, context in zip(prompts, contexts, strict=False)
    ]


def test_the_leak_probe_gives_every_prompt_the_context_of_the_next() -> None:
    model, groups = model_of(), asked("10 11", "12", "13 14 15")
    found = leak(model, groups, InTheMiddle(), None, max_completions=6)
    right, wrong, between = [], [], []
    for g, group in enumerate(groups):
        contexts = [groups[g].example.privileged_context, groups[(g + 1) % 3].example.privileged_context]
        prompts = [torch.tensor([*group.prompt_ids[:-1], *map(int, c.split()), group.prompt_ids[-1]]) for c in contexts]  # type: ignore[union-attr]
        for one in group.rollouts:
            p, q, r = (log_softmax_rows(model, x, one.completion_ids) for x in (group.prompt_ids, *prompts))
            right.append(kl(p, q))
            wrong.append(kl(p, r))
            between.append(kl(q, r))
    means = [float(torch.cat(values).mean()) for values in (right, wrong, between)]
    for name, value in zip(
        ("context_kl", "leak_kl", "content_kl", "leak_ratio"), [*means, means[1] / means[0]], strict=True
    ):
        assert found[f"teacher/{name}"] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param(lambda: asked("10", "10"), id="one context for all"),
        pytest.param(lambda: asked("10"), id="one group"),
        pytest.param(lambda: asked("10", "11", prompts=((1, 2), (1, 2))), id="one prompt"),
        pytest.param(lambda: asked(None, None), id="no context"),
        pytest.param(lambda: asked("10", None), id="one context"),
    ],
)
def test_where_there_is_no_other_context_the_leak_probe_says_nothing(groups: Callable[[], list[Group]]) -> None:
    assert leak(model_of(), groups(), InTheMiddle(), None) == {}


def test_another_prompts_context_that_does_not_fit_is_passed_over() -> None:
    model, groups = model_of(), asked("10", "11 12 13", "14")
    exchanged = [*groups[:1], groups[2], groups[1]]
    # Of the first prompt, 3 tokens, with the second's context there would be 6.
    assert leak(model, groups, InTheMiddle(longest=5), None, max_completions=1) == leak(
        model, exchanged, InTheMiddle(), None, max_completions=1
    )
    with pytest.raises(PlanError, match="too long"):  # a prompt's own context that does not fit is an error
        leak(model, groups, InTheMiddle(longest=4), None)


def test_the_whole_group_is_exchanged_but_the_prompt() -> None:
    seen: list[Group] = []

    class Recording(InTheMiddle):
        def condition(self, group: Group, tokenizer: Any) -> Conditioned:
            seen.append(group)
            return super().condition(group, tokenizer)

    groups = asked("10", "11")
    groups = [
        replace(group, example=replace(group.example, columns={"answer": i}), rollouts=group.rollouts[i:])
        for i, group in enumerate(groups)
    ]
    leak(model_of(), groups, Recording(), None)
    exchanged = seen[2]
    assert exchanged.example.prompt == groups[0].example.prompt
    assert exchanged.prompt_ids is groups[0].prompt_ids
    assert exchanged.example.columns == {"answer": 1}
    assert exchanged.rollouts == groups[1].rollouts


def test_a_teacher_that_hears_nothing_has_a_ratio_of_none() -> None:
    """With the context of no effect there is neither a leak nor a ratio."""
    model = model_of()
    for layer in model.model.layers:  # type: ignore[union-attr]
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    found = leak(model, asked("10", "11"), InTheMiddle(), None)
    assert found["teacher/leak_kl"] == pytest.approx(0, abs=1e-12)
    assert "teacher/leak_ratio" not in found


def test_a_trust_region_is_probed_at_its_reference() -> None:
    model, reference, groups = model_of(), Frozen(model_of(seed=1)), asked("10 11", "12")
    of_region, of_reference = (
        leak(model, groups, InTheMiddle(), None, teacher=t) for t in (TrustRegion(reference), reference)
    )
    assert of_region == of_reference


def test_probes_run_the_model_as_often_whatever_they_find() -> None:
    """Or ranks that call them together would wait for each other."""
    model = model_of()
    calls: list[int] = []
    model.model.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]

    def runs(probe: Callable[[], Any]) -> int:
        calls.clear()
        probe()
        return len(calls)

    builder, groups = InTheMiddle(), [asked("10", "11"), asked(None, None)]
    for some in groups:
        leak(model, some, builder, None, strategy="packed")  # the first use is checked
    leaks = [runs(lambda some=some: leak(model, some, builder, None, strategy="packed")) for some in groups]  # type: ignore[misc]
    assert leaks[0] == leaks[1] > 0
    seen = [[builder.condition(group, None) for group in some] for some in groups]
    overlaps = [runs(lambda seen=seen: overlap(model, groups[0], seen, strategy="packed")) for seen in seen]  # type: ignore[misc]
    assert overlaps[0] == overlaps[1] > 0


def test_probes_leave_no_gradient_and_the_model_as_it_was() -> None:
    model, groups = model_of(), asked("10 11", "12")
    model.train()
    leak(model, groups, InTheMiddle(), None)
    drift(model, groups, Frozen(model_of(seed=1)))
    overlap(model, groups, [InTheMiddle().condition(group, None) for group in groups])
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: overlap(model, asked("1"), []), r"conditioned must have one entry per group, got 1 and 0"),
        (lambda model: overlap(model, [], [], k=0), r"k must be at least 1, got 0"),
        (lambda model: drift(model, asked("1"), Frozen(model), max_completions=0), r"max_completions must be at least"),
        (lambda model: leak(model, asked("1"), InTheMiddle(), None, max_completions=0), r"max_completions must be at"),
    ],
)
def test_a_probe_refuses_wrong_arguments(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(nn.Linear(1, 1))


def test_the_log_and_the_table_need_no_torch(run_python: Callable[..., str]) -> None:
    code = "import sys; from sdcore.diagnostics import KEYS, RunLog, read_run; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"
