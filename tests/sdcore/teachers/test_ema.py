"""Teachers made of the student's past: what is averaged, how exactly, and that a checkpoint gives it back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.prefix.runner import run
from sdcore.step import distill_step
from sdcore.teachers import EMA, AdapterOff, Frozen, Live, PeriodicSync, Snapshot, TrustRegion, ema
from tests.processes import assert_right, run_cases, verdicts_of
from tests.sdcore.prefix.models import (
    COMMON,
    assert_same_gradients,
    build,
    double_precision,
    gradients,
    tiny,
)
from tests.sdcore.prefix.trees import random_plan

STRATEGIES: list[Any] = ["naive", "packed", "cached"]


EXACT = pytest.mark.usefixtures("in_double_precision")


def linear(value: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)
    fill(layer, value)
    return layer


def fill(module: nn.Module, value: float) -> None:
    for weight in module.parameters():
        weight.data.fill_(value)


def content(teacher: Snapshot, student: nn.Module) -> dict[str, Tensor]:
    """What the student's weights are during the teacher's pass."""
    with teacher.weights(student) as module:
        return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def move(model: nn.Module, seed: int, scale: float = 0.3) -> None:
    """As an optimizer step would."""
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += scale * torch.randn(weight.shape, dtype=weight.dtype, generator=draw)


@pytest.mark.parametrize("rate", [0.0, 0.05, 1.0])
def test_the_rate_is_the_share_of_the_student(rate: float) -> None:
    """The trap: 0.05 taken for a decay would make the teacher nearly live; 0 is frozen, 1 the student."""
    student = linear(0.0)
    teacher = EMA(student, rate)
    fill(student, 1.0)
    for step, expected in ((1, rate), (2, rate + (1 - rate) * rate)):
        teacher.update(student, step)
        (average,) = content(teacher, student).values()
        assert torch.allclose(average, torch.full_like(average, expected))
        assert rate == 0.05 or bool((average == rate).all())
    assert float(student.weight.min()) == 1.0


def test_a_periodic_copy_is_renewed_on_multiples_of_its_period_only() -> None:
    student = linear(0.0)
    teacher, seen = PeriodicSync(student, 3), []
    for step in range(1, 8):
        fill(student, float(step))
        teacher.update(student, step)
        seen.append(float(content(teacher, student)["weight"].mean()))
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_a_snapshot_stays_what_it_was() -> None:
    student = linear(2.0)
    teacher = Snapshot(student)
    fill(student, 5.0)
    teacher.update(student, 1)
    assert float(content(teacher, student)["weight"].mean()) == 2.0


def test_the_pass_leaves_the_students_weights_where_and_what_they_were_also_after_an_error() -> None:
    student = tiny("llama")
    teacher = EMA(student, 0.5)
    move(student, 1)
    before = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in student.named_parameters()}

    def fail() -> None:
        with teacher.weights(student):
            assert all(weight.data_ptr() != before[name][0] for name, weight in student.named_parameters())
            with teacher.weights(student):  # a pass within the pass
                pass
            assert all(weight.data_ptr() != before[name][0] for name, weight in student.named_parameters())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    for name, weight in student.named_parameters():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])
        assert weight.requires_grad


def averaged(students: list[nn.Module], rate: float) -> nn.Module:
    """A module of its own with the average, by the formula."""
    model = copy.deepcopy(students[0])
    for student in students[1:]:
        for mine, other in zip(model.parameters(), student.parameters(), strict=True):
            mine.data = (1 - rate) * mine.data + rate * other.data
    return model


@EXACT
@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(("strategy", "micro_batch"), [*((name, None) for name in STRATEGIES), ("two_phase", 1)])
def test_a_step_is_that_of_a_second_model_with_the_average(strategy: Any, micro_batch: int | None, trust: bool) -> None:
    student, planned = tiny("llama"), random_plan(4)
    teacher, states = EMA(student, 0.3), [copy.deepcopy(student)]
    for step in (1, 2):
        move(student, step)
        teacher.update(student, step)
        states.append(copy.deepcopy(student))
    plain = copy.deepcopy(student)
    frozen = Frozen(averaged(states, 0.3))
    expected = distill_step(plain, planned, teacher=TrustRegion(frozen, 0.3) if trust else frozen, strategy="naive")
    out = distill_step(
        student,
        planned,
        teacher=TrustRegion(teacher, 0.3) if trust else teacher,
        strategy=strategy,
        micro_batch=micro_batch,
    )
    assert torch.allclose(out.loss, expected.loss, rtol=1e-9)
    assert float(out.loss) > 1e-3
    assert_same_gradients(gradients(student), gradients(plain))


def test_the_teacher_reads_none_of_the_students_states() -> None:
    student, planned = tiny("llama"), random_plan(4)
    assert any(tree.shared for tree in planned.teacher)
    teacher = EMA(student, 0.5)
    assert not run(student, planned, teacher).report.teacher_shares


def test_a_trust_region_passes_updates_and_files_on_to_its_reference(tmp_path: Path) -> None:
    student = linear(0.0)
    reference = EMA(student, 0.5)
    teacher = TrustRegion(reference)
    fill(student, 1.0)
    teacher.update(student, 1)
    teacher.save(tmp_path)
    teacher.update(student, 2)
    teacher.load(tmp_path)
    assert float(content(reference, student)["weight"].mean()) == 0.5


# bfloat16


def test_a_bfloat16_average_moves_although_each_step_is_less_than_half_its_last_digit() -> None:
    student = linear(1.0, torch.bfloat16)
    teacher = EMA(student, 0.01)
    fill(student, 1.0 + 2**-7)  # the next bfloat16
    naive = torch.tensor(1.0, dtype=torch.bfloat16)
    for step in range(1, 501):
        teacher.update(student, step)
        naive.lerp_(student.weight[0, 0].detach(), 0.01)
    assert float(naive) == 1.0
    assert float(content(teacher, student)["weight"].float().mean()) == 1.0 + 2**-7


def test_a_bfloat16_average_is_a_float32_one_and_the_teacher_is_the_nearest_bfloat16() -> None:
    torch.manual_seed(3)
    student = nn.Linear(40, 30, dtype=torch.bfloat16)
    student.weight.data[0, :4] = torch.tensor([0.0, -0.0, 1e-39, -3e38])
    expected = {name: weight.detach().to(torch.float32) for name, weight in student.named_parameters()}
    teacher = EMA(student, 0.02)
    for step in range(1, 31):
        move(student, step, 0.05)
        teacher.update(student, step)
        for name, weight in student.named_parameters():
            expected[name].lerp_(weight.detach().to(torch.float32), 0.02)
    for name, kept in teacher._kept.items():
        assert torch.equal(ema._joined(kept.value, kept.rest), expected[name])  # type: ignore[arg-type]
        nearest = expected[name].to(torch.bfloat16)
        exactly_between = (kept.value.float() - expected[name]).abs() == (nearest.float() - expected[name]).abs()
        assert bool(((kept.value == nearest) | exactly_between).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_takes_4_bytes_per_weight_that_is_trained(dtype: torch.dtype) -> None:
    student = tiny("llama").to(dtype)
    student.model.embed_tokens.requires_grad_(False)
    trained = sum(weight.numel() for weight in student.parameters() if weight.requires_grad)
    kept = EMA(student, 0.1)._kept.values()
    rests = sum(weight.rest.nbytes for weight in kept if weight.rest is not None)
    assert sum(weight.value.nbytes for weight in kept) + rests == 4 * trained


def test_pieces_do_not_change_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for piece in (2**24, 5):
        monkeypatch.setattr(ema, "PIECE", piece)
        student = tiny("llama").to(torch.bfloat16)
        teacher = EMA(student, 0.1)
        move(student, 1)
        teacher.update(student, 1)
        contents.append(content(teacher, student))
    assert all(torch.equal(contents[0][name], contents[1][name]) for name in contents[0])


# LoRA


def with_adapter() -> Any:
    """In training from the start: what the adapter adds is zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
    return peft.get_peft_model(tiny("llama"), config).double()


def products(model: nn.Module) -> dict[str, Tensor]:
    """What each adapter adds to its layer's weight."""
    factors = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            factors[name] = (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach().clone()
    return factors


def test_of_an_adapted_model_the_adapter_alone_is_averaged() -> None:
    student = with_adapter()
    teacher = EMA(student, 0.1)
    assert teacher._kept
    assert all("lora_" in name for name in teacher._kept)


def test_an_average_of_factors_from_the_students_own_is_the_average_of_products() -> None:
    """Exactly while one factor stands still; from zero it would be 26 % of the change where 51 % is meant."""
    student, rate, steps = with_adapter(), 0.05, 14
    for name, weight in student.named_parameters():
        weight.requires_grad_("lora_B" in name or "lora_A" in name)
    teacher = EMA(student, rate)
    meant = products(student)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data += torch.randn_like(weight)
    for step in range(1, steps + 1):
        teacher.update(student, step)
        meant = {name: (1 - rate) * mean + rate * products(student)[name] for name, mean in meant.items()}
    with teacher.weights(student):
        average = products(student)
    change = 1 - (1 - rate) ** steps
    for name, product in products(student).items():
        assert torch.allclose(average[name], meant[name], rtol=1e-9)
        assert torch.allclose(average[name], change * product, rtol=1e-9)
        assert abs(change - 0.51) < 0.005
        assert abs(change**2 - 0.26) < 0.005  # what both factors from zero would give


@EXACT
def test_in_training_the_average_of_factors_is_near_that_of_products() -> None:
    """AdamW at 2e-4: the error is the covariance of the factors, which grows with the rate; from zero it is a half."""
    student, rate, planned = with_adapter(), 0.05, random_plan(4)
    teacher, meant = EMA(student, rate), products(student)
    zero = {name: torch.zeros_like(w) for name, w in student.named_parameters() if "lora_" in name}
    optimizer = torch.optim.AdamW([w for w in student.parameters() if w.requires_grad], lr=2e-4)
    other = Frozen(tiny("llama", seed=1))
    for step in range(1, 15):
        distill_step(student, planned, teacher=other, strategy="cached", verify="off")
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(student, step)
        now = products(student)
        meant = {name: (1 - rate) * mean + rate * now[name] for name, mean in meant.items()}
        for name, weight in student.named_parameters():
            if name in zero:
                zero[name].lerp_(weight.detach(), rate)
    with teacher.weights(student):
        average = products(student)
    for name, mean in meant.items():
        from_zero = zero[f"{name}.lora_B.default.weight"] @ zero[f"{name}.lora_A.default.weight"]
        assert float((average[name] - mean).norm() / mean.norm()) < 0.02
        assert float((from_zero - mean).norm() / mean.norm()) > 0.4


@EXACT
def test_an_adapters_average_and_the_adapter_off_can_take_turns() -> None:
    student, planned = with_adapter(), random_plan(4)
    move(student, 1)
    teacher = EMA(student, 0.1)
    base, live = (run(student, planned, weights).teacher_hidden for weights in (AdapterOff(), Live()))
    move(student, 2)
    assert torch.allclose(run(student, planned, teacher).teacher_hidden, live, atol=1e-9)  # type: ignore[arg-type]
    assert torch.allclose(run(student, planned, AdapterOff()).teacher_hidden, base, atol=1e-9)  # type: ignore[arg-type]


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loaded_average_goes_on_to_the_last_bit(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    def student_at(seed: int) -> Any:
        model = build(LlamaConfig(**COMMON | {"tie_word_embeddings": tied}), seed=seed).to(dtype)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        return model

    student = student_at(0)
    teacher = EMA(student, 0.05)
    for step in range(1, 4):
        move(student, step, 0.01)
        teacher.update(student, step)
    teacher.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    other = EMA(student_at(1), 0.05)
    other.load(tmp_path)
    for step in range(4, 8):
        move(student, step, 0.01)
        teacher.update(student, step)
        other.update(student, step)
    ours, loaded = content(teacher, student), content(other, student)
    assert all(torch.equal(ours[name], loaded[name]) for name in ours)
    for name, kept in teacher._kept.items():
        rest = other._kept[name].rest
        assert kept.rest is rest or torch.equal(kept.rest, rest)  # type: ignore[arg-type]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = linear(1.0)
    teacher = EMA(student, 0.5)
    teacher.save(tmp_path)

    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    fill(student, 3.0)
    teacher.update(student, 1)
    monkeypatch.setattr(ema, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        teacher.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]
    assert float(load_file(tmp_path / "teacher.safetensors")["weight"].mean()) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PeriodicSync(linear(), 2), "must be of a teacher PeriodicSync, got EMA"),
        (lambda: EMA(nn.Linear(3, 2), 0.1), r"must have the student's trained weights: lacks 1 \(bias\)"),
        (lambda: EMA(nn.Linear(3, 4, bias=False), 0.1), r"must have weight of shape \(4, 3\), got \(2, 3\)"),
    ],
)
def test_another_teachers_file_is_refused(make: Callable[[], Snapshot], message: str, tmp_path: Path) -> None:
    EMA(linear(), 0.1).save(tmp_path)
    teacher = make()
    before = {name: kept.value.clone() for name, kept in teacher._kept.items()}
    with pytest.raises(ArgumentError, match=message):
        teacher.load(tmp_path)
    assert all(torch.equal(kept.value, before[name]) for name, kept in teacher._kept.items())


def test_a_frozen_model_is_recognised_by_its_fingerprint(tmp_path: Path) -> None:
    model = tiny("llama")
    Frozen(model).save(tmp_path)
    assert json.loads((tmp_path / "teacher.json").read_text())["teacher"] == "Frozen"
    Frozen(copy.deepcopy(model)).load(tmp_path)
    with pytest.raises(ArgumentError, match="model must be the teacher that"):
        Frozen(tiny("llama", seed=1)).load(tmp_path)


@pytest.mark.parametrize("teacher", [Live(), AdapterOff()])
def test_a_teacher_without_state_writes_nothing(teacher: Any, tmp_path: Path) -> None:
    teacher.update(linear(), 1)
    teacher.save(tmp_path)
    teacher.load(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Buffers, wrappers, sharding


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("bias_of_experts", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("frequencies", torch.zeros(2), persistent=False)


def test_persistent_buffers_are_the_teachers_own() -> None:
    student = WithBuffers()
    teacher = EMA(student, 0.25)
    student.bias_of_experts += 1.0
    student.count += 8
    student.frequencies += 1.0
    teacher.update(student, 1)
    with teacher.weights(student):
        assert student.bias_of_experts.tolist() == [0.25, 0.25]
        assert int(student.count) == 8
        assert student.frequencies.tolist() == [1.0, 1.0]
    assert student.bias_of_experts.tolist() == [1.0, 1.0]


def test_a_compiled_student_is_the_student() -> None:
    student = tiny("llama")
    teacher = EMA(student, 0.5)
    move(student, 1)
    teacher.update(torch.compile(student), 1)  # type: ignore[arg-type]
    wrapped = torch.compile(student)
    assert content(teacher, student).keys() == {
        name.removeprefix("_orig_mod.")
        for name in content(teacher, wrapped)  # type: ignore[arg-type]
    }


def test_a_student_whose_dtype_changes_keeps_its_average() -> None:
    student = linear(1.0, torch.bfloat16)
    teacher = EMA(student, 0.01)
    fill(student, 1.0 + 2**-7)
    teacher.update(student, 1)
    student.to(torch.float32)
    average = content(teacher, student)["weight"]
    assert average.dtype == torch.float32
    assert torch.allclose(average, torch.tensor(1.0 + 0.01 * 2**-7), rtol=2**-23)


def sharded_agrees(folder: Path, wrapped_before: bool) -> None:
    """An average of a sharded student is that of a plain one, in the pass, in the step and in the file."""

    def shard(model: Any) -> Any:
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    plain, student, planned = tiny("llama"), tiny("llama"), random_plan(4)
    single = EMA(plain, 0.3)
    sharded = None if wrapped_before else EMA(student, 0.3)
    shard(student)
    sharded = sharded or EMA(student, 0.3)
    for step in (1, 2):
        move(plain, step)
        for mine, other in zip(student.parameters(), plain.parameters(), strict=True):
            whole = torch.distributed.tensor.distribute_tensor(other.detach(), mine.device_mesh, mine.placements)
            mine.to_local().data.copy_(whole.to_local())
        single.update(plain, step)
        sharded.update(student, step)
        # Twice: the second pass meets what the first has left gathered.
        for teacher, alone in ((sharded, single), (TrustRegion(sharded, 0.3), TrustRegion(single, 0.3))):
            expected = distill_step(plain, planned, teacher=alone)
            out = distill_step(student, planned, teacher=teacher)
            assert torch.allclose(out.loss, expected.loss, rtol=1e-9)
            assert all(isinstance(weight.grad, DTensor) for weight in student.parameters())
            assert_same_gradients(gradients(student), gradients(plain))
    sharded.save(folder)
    dist.barrier()
    saved = load_file(folder / "teacher.safetensors")
    assert all(torch.equal(saved[name], kept.value) for name, kept in single._kept.items()), "the file differs"
    before = {name: kept.value.clone() for name, kept in sharded._kept.items()}
    sharded.update(student, 3)
    sharded.load(folder)
    dist.barrier()
    assert all(torch.equal(before[name], kept.value) for name, kept in sharded._kept.items()), "not loaded"


def sharded_work(rank: int, folder: str) -> None:
    cases = {str(before): partial(sharded_agrees, Path(folder), before) for before in (True, False)}
    with double_precision():
        run_cases(rank, folder, cases, ranks=2, seconds=60)


def test_the_average_of_a_student_sharded_by_fsdp2_is_sharded_and_the_same(tmp_path: Path) -> None:
    verdicts = verdicts_of(sharded_work, tmp_path, str(tmp_path), ranks=2, seconds=90)
    for wrapped_before in (True, False):
        assert_right(str(wrapped_before), verdicts)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EMA(linear(), 1.5), ArgumentError, r"update_rate must be in \[0, 1\], got 1.5"),
        (lambda: EMA(linear(), -0.1), ArgumentError, r"update_rate must be in \[0, 1\]"),
        (lambda: PeriodicSync(linear(), 0), ArgumentError, "every must be a positive number .* got 0"),
        (lambda: PeriodicSync(linear(), 2.0), ArgumentError, "every must be a positive number"),  # type: ignore[arg-type]
        (lambda: EMA("model", 0.1), ArgumentError, "student must be a module, got str"),  # type: ignore[arg-type]
        (lambda: EMA(linear().requires_grad_(False), 0.1), ArgumentError, "student must have weights that are trained"),
        (lambda: EMA(linear(dtype=torch.float16), 0.1), UnsupportedModelError, "float16"),
        (lambda: TrustRegion(Live()), ArgumentError, "reference must be a teacher with weights of its own.* got Live"),
        (lambda: TrustRegion(Frozen(linear()), 1.1), ArgumentError, r"share must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_another_student_is_refused() -> None:
    teacher = EMA(linear(), 0.1)
    with pytest.raises(ArgumentError, match=r"student must be the model that .* has 1 more \(bias\)"):
        teacher.update(nn.Linear(3, 2), 1)


def test_an_update_during_the_pass_is_refused() -> None:
    student = linear()
    teacher = EMA(student, 0.1)
    with teacher.weights(student), pytest.raises(RuntimeError, match="update must not be called during"):
        teacher.update(student, 1)
