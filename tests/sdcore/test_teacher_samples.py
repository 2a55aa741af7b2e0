"""`teacher_samples`: a share of the completions is what the teacher's weights say after the teacher's prompt."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdcore.contexts import Custom, SuccessOrFeedback, Template
from sdcore.data import read_examples
from sdcore.errors import ArgumentError, ContextError
from sdcore.presets import GRPO, OPSD, SDPO, ContextDistillation, Method
from sdcore.rollouts.samplers import ModelSampler, SampledCompletion, Sampling, sample_groups, seed_of
from sdcore.teachers import EMA, Frozen, Live, TrustRegion
from sdcore.training.collect import Collector
from sdcore.types import Example, Group
from sdcore.world.data import lenient, rows
from tests.sdcore.trainer_runs import SHOW, lines, losses, tokenizer, trainer, world_model

METHOD = ContextDistillation(template=SHOW, num_generations=2)
SEED = 11


class Recorded(ModelSampler):
    """The model itself, and what it was asked for."""

    asked: list[tuple[list[list[int]], int]]

    def draw(self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int) -> Any:
        self.asked.append(([prompt.tolist() for prompt in prompts], seed))
        return super().draw(model, prompts, sampling, seed)


def recorded() -> Recorded:
    sampler = Recorded()
    object.__setattr__(sampler, "asked", [])
    return sampler


class Named(ModelSampler):
    """Says the length of the prompt, so that a completion shows what it was drawn after."""

    def draw(self, model: nn.Module, prompts: Sequence[Tensor], sampling: Sampling, seed: int) -> Any:
        count = range(sampling.num_completions)
        return [[SampledCompletion(torch.tensor([len(p)]), torch.zeros(1), False) for _ in count] for p in prompts]


def examples(count: int = 6, **changes: Any) -> list[Example]:
    return read_examples([row | changes for row in rows("sdft", task="luma", count=count, seed=0)])


def collector(share: float, count: int, **options: Any) -> Collector:
    given: dict[str, Any] = {"tokenizer": tokenizer(), "sampler": Named(), "stop_ids": [tokenizer().eos_token_id]}
    given |= {"num_generations": count, "max_completion_length": 8, "teacher_samples": share}
    return Collector(**given | options)


def ids(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[rollout.completion_ids.tolist() for rollout in group.rollouts] for group in groups]


def by_teacher(groups: Sequence[Group]) -> list[int]:
    return [sum(rollout.by_teacher for rollout in group.rollouts) for group in groups]


# Whose tokens.


def test_without_a_share_everything_is_drawn_by_the_student_with_the_seeds_of_before(tmp_path: Path) -> None:
    sampler = recorded()
    made = trainer(tmp_path, method=METHOD, sampler=sampler, max_steps=2)
    made.train()
    assert [seed for _, seed in sampler.asked] == [seed_of(made.args.seed, step, 0) for step in range(2)]
    given, model = made.collector, world_model()
    drawn = given.draw(model, examples(), SEED, (made.teacher, made.rows))
    prompts = [given.prompt(example) for example in examples()]
    wanted = sample_groups(ModelSampler(), model, examples(), prompts, given.sampling, tokenizer=tokenizer(), seed=SEED)
    assert ids(drawn) == ids(wanted)
    assert sum(by_teacher(drawn)) == 0


@pytest.mark.parametrize("teacher", ["frozen", "ema", "periodic", "live", "adapter_off", "another"])
def test_a_share_of_1_is_what_the_teachers_weights_say_after_the_teachers_prompt(teacher: str, tmp_path: Path) -> None:
    kind = {"another": "frozen"}.get(teacher, teacher)
    changes = {"update_rate": 0.5} if kind == "ema" else {"sync_every": 2} if kind == "periodic" else {}
    method = replace(METHOD, teacher=kind, teacher_samples=1.0, **changes)  # type: ignore[arg-type]
    adapter = None
    if kind == "adapter_off":
        adapter = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    rate = 1e-2 if adapter is None else 0.3
    options: dict[str, Any] = {"peft_config": adapter, "max_steps": 1, "learning_rate": rate}
    made = trainer(tmp_path, method=method, **options)
    made.train()
    weights: nn.Module = made.model if kind == "live" else world_model()
    if kind == "ema":
        for weight, student in zip(weights.parameters(), made.model.parameters(), strict=True):
            weight.data.lerp_(student.data, 0.5)
    if teacher == "another":
        torch.manual_seed(0)
        for weight in weights.parameters():
            weight.data += 0.05 * torch.randn_like(weight)
        made.teacher = Frozen(weights)
    before = [weight.clone() for weight in made.model.parameters()]
    given = made.collector
    drawn = given.draw(made.model_wrapped, examples(), SEED, (made.teacher, made.rows))
    assert all(torch.equal(weight, old) for weight, old in zip(made.model.parameters(), before, strict=True))

    plain = [Group(example=example, prompt_ids=given.prompt(example), rollouts=()) for example in examples()]
    stand_ins = [replace(group, rollouts=drawn[0].rollouts[:1]) for group in plain]
    prompts = [made.context.condition(group, tokenizer()).teacher_prompts[0] for group in stand_ins]

    def wanted(module: nn.Module) -> list[list[list[int]]]:
        seed = seed_of(SEED, 2)
        return ids(
            sample_groups(ModelSampler(), module, examples(), prompts, given.sampling, tokenizer=tokenizer(), seed=seed)
        )

    assert ids(drawn) == wanted(weights)
    assert by_teacher(drawn) == [2] * len(drawn)
    assert kind == "live" or ids(drawn) != wanted(made.model)
    for group, own in zip(drawn, plain, strict=True):
        assert torch.equal(group.prompt_ids, own.prompt_ids)  # the student is to say it after its own


@pytest.mark.parametrize(("count", "share"), [(1, 0.25), (3, 0.5), (4, 0.25), (8, 0.1), (2, 1.0)])
def test_shares_are_rounded_at_random_and_right_on_average(count: int, share: float) -> None:
    given, many = collector(share, count), examples(300)
    other = (Live(), Template(SHOW))
    drawn = given.draw(world_model(), many, SEED, other)
    numbers = by_teacher(drawn)
    whole = int(count * share)
    assert set(numbers) == ({whole} if count * share == whole else {whole, whole + 1})
    # Four standard errors of a coin.
    assert statistics.fmean(numbers) == pytest.approx(count * share, abs=4 * 0.5 / 300**0.5)
    for group, seen in zip(drawn, [given.prompt(example) for example in many], strict=True):
        assert len(group.rollouts) == count
        for rollout in group.rollouts:
            assert (rollout.completion_ids.tolist() == [len(seen)]) != rollout.by_teacher
    assert ids(given.draw(world_model(), many, SEED, other)) == ids(drawn)
    assert count * share == whole or by_teacher(given.draw(world_model(), many, SEED + 1, other)) != numbers


def test_a_row_without_privileged_context_is_drawn_by_the_student() -> None:
    mixed = [replace(e, privileged_context=None) if i % 2 else e for i, e in enumerate(examples())]
    given = collector(0.75, 4)
    drawn = given.draw(world_model(), mixed, SEED, (Live(), Template(SHOW)))
    assert by_teacher(drawn) == [3, 0] * 3
    assert [len(group.rollouts) for group in drawn] == [4] * 6


def test_an_evaluation_is_the_students(tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward_funcs": [lenient], "eval_dataset": rows("sdft", task="luma", count=8, seed=0)}
    measured = []
    for share in (0.0, 1.0):
        made = trainer(tmp_path / str(share), method=replace(METHOD, teacher_samples=share), **options)
        measured.append({name: value for name, value in made.evaluate().items() if "second" not in name})
    measured = [{name: value for name, value in each.items() if "runtime" not in name} for each in measured]
    assert measured[0] == measured[1]


# What is learned and logged.


def test_the_log_and_the_samples_say_who_drew_and_rewards_are_the_students(tmp_path: Path) -> None:
    def judge(*, completion_ids: list[int], **columns: Any) -> float:
        return 0.0 if completion_ids[0] < 12 else 1.0  # a long prompt is the teacher's

    method = replace(METHOD, num_generations=4)
    prompts = [len(collector(0, 1).prompt(example)) for example in examples(24)]
    assert max(prompts) < 12
    for share in (0.25, 1.0):
        folder = tmp_path / str(share)
        made = trainer(
            folder, method=replace(method, teacher_samples=share), sampler=Named(), reward_funcs=[judge], max_steps=2
        )
        made.train()
        for line in lines(folder):
            assert line["completions/by_teacher"] == 16 * share
            assert line["completions/count"] == 16
            for name in ("self_distillation/reward_mean", "rewards/judge/mean", "self_distillation/unjudged_fraction"):
                assert line.get(name) == (0.0 if share < 1 else None), name
        shown = lines(folder, "samples.jsonl")
        assert all(row["by_teacher"] == (row["reward"] == 1.0) for row in shown)
        assert any(row["by_teacher"] for row in shown) or share < 1


@pytest.mark.parametrize("teacher", ["live", "frozen", "ema"])
def test_steps_are_taken_on_the_teachers_completions(teacher: str, tmp_path: Path) -> None:
    method = replace(METHOD, teacher=teacher, teacher_samples=0.5, num_generations=1)  # type: ignore[arg-type]
    made = trainer(tmp_path, method=method, max_steps=3, num_iterations=2, gradient_accumulation_steps=2)
    before = [weight.clone() for weight in made.model.parameters()]
    made.train()
    assert any(not torch.equal(weight, old) for weight, old in zip(made.model.parameters(), before, strict=True))
    assert len({loss for _, loss in losses(tmp_path)}) == 3


def test_a_context_that_is_refused_ends_the_run_or_leaves_the_row_to_the_student(tmp_path: Path) -> None:
    def of_row(group: Group) -> list[str]:
        if group.example.source.endswith("row 5"):
            raise ValueError("no")
        return [str(group.example.privileged_context)] * len(group.rollouts)

    method = replace(METHOD, teacher_samples=1.0)
    options: dict[str, Any] = {"method": method, "count": 8, "max_steps": 2, "sampler": Named()}
    made = trainer(tmp_path / "raise", **options)
    made.rows = replace(made.rows, context=Custom(of_row, template=SHOW))
    with pytest.raises(ContextError, match="rows, row 5: the context function raised ValueError"):
        made.train()
    made = trainer(tmp_path / "skip", on_bad_row="skip", **options)
    made.rows = replace(made.rows, context=Custom(of_row, template=SHOW))
    made.train()
    log = lines(tmp_path / "skip")
    assert sorted(line["context/skipped"] for line in log) == [0, 2]
    assert all(line["completions/by_teacher"] + line["context/skipped"] == 8 for line in log)


# What is refused.


@pytest.mark.parametrize(
    "make",
    [
        lambda share: GRPO(teacher_samples=share),
        lambda share: SDPO(teacher_samples=share, importance_clip=None),
        lambda share: Method(samples="dataset", teacher_samples=share),
        lambda share: Method(target="token_tilt", num_generations=2, teacher_samples=share),
        lambda share: Method(distillation_weight=0.5, num_generations=2, teacher_samples=share),
        lambda share: Method(teacher="trust_region", teacher_samples=share),
        lambda share: Method(importance_clip=2.0, teacher_samples=share),
        lambda share: Method(sampled_token=True, teacher_samples=share),
    ],
)
def test_methods_whose_samples_must_be_the_students_refuse_the_teachers(make: Any) -> None:
    make(0.0)
    with pytest.raises(ArgumentError, match=r"^teacher_samples must be 0 except for a divergence alone, .*, got 0.5;"):
        make(0.5)


@pytest.mark.parametrize("share", [-0.1, 1.5, "all", None])
def test_a_share_is_between_0_and_1(share: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^teacher_samples must be "):
        OPSD(teacher_samples=share)


class Elsewhere:
    """An engine of its own."""

    def sample(self, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("nothing is sampled before it is refused")


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ("live", {}, None),
        ("frozen", {}, None),
        ("live", {"sampler": Elsewhere()}, None),
        ("frozen", {"sampler": Elsewhere()}, "under FSDP2 and with a sampler of one's own, .* with Snapshot"),
        ("live", {"fsdp": object()}, None),
        ("ema", {"fsdp": object()}, "under FSDP2 and with a sampler of one's own, .* with EMA"),
        ("live", {"context": SuccessOrFeedback()}, "known before anything is sampled, got 0.5 with Live and Success"),
        ("trust_region", {}, "one set of weights and a context .*, got 0.5 with TrustRegion"),
    ],
)
def test_teachers_that_cannot_draw_are_refused(teacher: str, changes: dict[str, Any], message: str | None) -> None:
    model = world_model()
    made: Any = {
        "live": Live,
        "frozen": lambda: METHOD.build_teacher(model),
        "ema": lambda: EMA(model, 0.1),
        "trust_region": lambda: TrustRegion(Frozen(model)),
    }[teacher]()
    state = SimpleNamespace(fsdp_plugin=changes.get("fsdp"))
    arguments = (made, changes.get("context", Template(SHOW)), state)
    sampler = changes.get("sampler", ModelSampler())
    collector(0.0, 1, sampler=sampler).check(*arguments)
    if message is None:
        collector(0.5, 1, sampler=sampler).check(*arguments)
    else:
        with pytest.raises(ArgumentError, match=f"^teacher_samples must be 0 .*{message}"):
            collector(0.5, 1, sampler=sampler).check(*arguments)


def test_the_trainer_refuses_before_it_samples(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="teacher_samples must be 0 under FSDP2 and with a sampler of one's own"):
        trainer(tmp_path, method=replace(METHOD, teacher_samples=0.5), sampler=Elsewhere())


def test_the_share_is_the_runs(tmp_path: Path) -> None:
    trainer(tmp_path, method=replace(METHOD, teacher_samples=0.5), max_steps=1).train()
    assert json.loads((tmp_path / "run.json").read_text())["method"]["teacher_samples"] == 0.5
