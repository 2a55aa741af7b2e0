"""`FusedGKDTrainer` beside TRL's `GKDTrainer`: the same losses and gradients, without logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdcore.errors import ArgumentError, PlanError, UnsupportedModelError
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.integrations.other_model_runs import (
    VOCAB,
    assert_same,
    gkd,
    gradients,
    logged,
    model,
    teacher,
    trained,
)

pytest.importorskip("trl")

from trl.experimental.gkd import GKDTrainer

from sdcore.integrations.trl import patch
from sdcore.integrations.trl.fused import FusedOptions
from sdcore.integrations.trl.gkd import FusedGKDTrainer, split_labels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and theirs, of the same models."""
    student, other = model(1), teacher()
    folder = tmp_path_factory.mktemp("pair")
    return tuple(gkd(kind, folder, student=student, of=other) for kind in (FusedGKDTrainer, GKDTrainer))  # type: ignore[return-value]


def batch(padding: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Two prompts that stand several times, not beside each other; holes in the labels; a row without any."""
    draw = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=draw).tolist()

    long, short = ids(9), ids(4)
    rows = [(long, ids(5)), (short, ids(7)), (long, ids(2)), (short, ids(1)), (ids(6), ids(3))]
    length = 17
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for number, (prompt, completion) in enumerate(rows):
        labels = [-100] * len(prompt) + completion
        if number == 1:
            labels[len(prompt) + 2] = labels[len(prompt) + 3] = labels[-1] = -100
        if number == 4:
            labels = [-100] * len(labels)
        # What `generate` leaves: prompts padded on the left to one width, completions on the right.
        left = {"left": length - len(labels), "right": 0, "both": 9 - len(prompt)}[padding]
        right = length - len(labels) - left
        for name, values, filler in (
            ("input_ids", prompt + completion, 0),
            ("attention_mask", [1] * len(labels), 0),
            ("labels", labels, -100),
        ):
            found[name].append([filler] * left + values + [filler] * right)
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_trls(pair: tuple[Any, Any], beta: float, num_items: Any, padding: str) -> None:
    for trainer in pair:
        trainer.beta = beta
    found, expected = (gradients(one, batch(padding), num_items_in_batch=num_items) for one in pair)
    assert_same(found, expected, within=1e-4)


def test_the_temperature_of_sampling_is_not_the_losses(pair: tuple[Any, Any]) -> None:
    """TRL 1.16 does not hand it on."""
    assert [one.args.temperature for one in pair] == [0.9, 0.9]
    expected = gradients(pair[0], batch("left"))
    pair[0].temperature = 3.0
    assert torch.equal(gradients(pair[0], batch("left"))[0], expected[0])
    pair[0].temperature = 0.9


def test_a_batch_without_labels_has_a_loss_of_0_in_the_graph(pair: tuple[Any, Any]) -> None:
    empty = batch("left") | {"labels": torch.full((5, 17), -100)}
    loss, found = gradients(pair[0], empty)
    assert float(loss) == 0
    assert all(not grad.any() for grad in found.values())
    assert float(gradients(pair[1], empty)[0]) == 0


def test_equal_prompts_of_a_batch_are_read_once(pair: tuple[Any, Any]) -> None:
    split = split_labels(*batch("right").values())
    out = pair[0].distill(
        pair[0].model, *split[:4], loss_mask=split.loss_mask, alpha=0.5, temperature=1.0, normalizer=None
    )
    # Prompts of 9 and 4 tokens, twice each; completions up to the token before their last label; a row without one.
    for one in (out.report.student, out.report.teacher):
        assert one.naive_tokens == 2 * 9 + 2 * 4 + 4 + 5 + 1 + 0
        assert one.tokens == one.naive_tokens - 9 - 4


def test_no_tensor_of_tokens_times_vocabulary_exists(tmp_path: Path) -> None:
    draw, count = torch.Generator().manual_seed(0), 20
    ids = torch.randint(3, VOCAB, (count, 70), generator=draw)
    labels = ids.clone()
    labels[:, :8] = -100
    long = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    tokens = int((labels != -100).sum())

    def largest(kind: Any, **extra: Any) -> int:
        trainer = gkd(kind, tmp_path, extra=extra)
        gradients(trainer, batch("left"))  # its check of first use is a pass of its own
        with LiveBytes() as probe:
            gradients(trainer, long)
        return probe.largest_numel

    # Room for one block of rows of the loss; below it is refused.
    assert largest(FusedGKDTrainer, fused=FusedOptions(workspace_mb=20)) < tokens * VOCAB // 2
    assert largest(GKDTrainer) >= tokens * VOCAB


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_three_steps_have_trls_losses(lmbda: float, tmp_path: Path) -> None:
    runs = [gkd(kind, tmp_path, lmbda=lmbda, seed=5) for kind in (FusedGKDTrainer, GKDTrainer)]
    for trainer in runs:
        trained(trainer)
    found, expected = (logged(trainer) for trainer in runs)
    assert len(found) == 3
    assert abs(found[0] - found[2]) > 1e-4
    assert found == pytest.approx(expected, rel=1e-4)


def test_accumulated_steps_and_evaluation_are_trls(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "seq_kd": True}
    runs = [gkd(kind, tmp_path, **options) for kind in (FusedGKDTrainer, GKDTrainer)]
    for trainer in runs:
        trained(trainer)
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)
    assert runs[0].evaluate()["eval_loss"] == pytest.approx(runs[1].evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "within"),
    [({"bf16": True}, 2e-3), ({"gradient_checkpointing": True}, 1e-4)],
    ids=["bf16", "checkpoints"],
)
def test_low_precision_and_checkpoints_change_nothing(options: Any, within: float, tmp_path: Path) -> None:
    runs = [trained(gkd(kind, tmp_path, **options)) for kind in (FusedGKDTrainer, GKDTrainer)]
    assert len(logged(runs[0])) == 3
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=within)


def test_an_adapter_is_trained_as_trl_trains_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    runs = [
        gkd(kind, tmp_path, extra={"peft_config": config}, gradient_accumulation_steps=1)
        for kind in (FusedGKDTrainer, GKDTrainer)
    ]
    for trainer in runs:
        trained(trainer)
    assert logged(runs[0]) == pytest.approx(logged(runs[1]), rel=1e-4)


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path) -> None:
    student = model(1)
    trainer = gkd(FusedGKDTrainer, tmp_path, student=student, of=student)
    loss, _ = gradients(trainer, batch("left"))
    assert float(loss) == pytest.approx(0, abs=1e-9)


def test_outputs_are_refused(pair: tuple[Any, Any]) -> None:
    with pytest.raises(ArgumentError, match=r"return_outputs must be False.*no logits"):
        pair[0].compute_loss(pair[0].model, batch("left"), return_outputs=True)


@pytest.mark.parametrize(
    "fused", [FusedOptions(micro_batch=2), FusedOptions(strategy="two_phase"), FusedOptions(trust_share=0.2)]
)
def test_options_that_have_no_effect_here_are_refused(fused: FusedOptions, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="must be left as it is for FusedGKDTrainer"):
        gkd(FusedGKDTrainer, tmp_path, extra={"fused": fused})


def test_patch_makes_trls_trainer_ours_or_leaves_it_as_it_was(tmp_path: Path) -> None:
    trainer = gkd(GKDTrainer, tmp_path)
    with pytest.raises(ArgumentError, match="micro_batch must be left as it is"):
        patch(trainer, micro_batch=2)
    assert type(trainer) is GKDTrainer
    expected = gradients(trainer, batch("left"))
    assert patch(trainer, workspace_mb=64) is trainer
    assert type(trainer) is FusedGKDTrainer
    assert trainer.fused.workspace_mb == 64
    assert_same(gradients(trainer, batch("left")), expected, within=1e-4)
    trained(trainer)
    assert len(logged(trainer)) == 3


def test_dropout_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="dropout"):
        gkd(FusedGKDTrainer, tmp_path, extra={"peft_config": config}, disable_dropout=False)


# Cutting rows at their first label.


@given(st.data())
def test_every_label_is_in_one_place_with_its_past(data: Any) -> None:
    """However rows are padded and labelled: what precedes a token in its row precedes it in prompt + completion."""
    count, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    ids = torch.arange(count * length).view(count, length)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row in range(count):
        start = data.draw(st.integers(0, length - 1))
        end = data.draw(st.integers(start + 1, length))
        mask[row, start:end] = 1
        for position in range(start + 1, end):
            if data.draw(st.booleans()):
                labels[row, position] = ids[row, position]
    split = split_labels(ids, mask, labels)
    expected = {(int(i), int(ids[row, j - 1])) for row, j in (labels != -100).nonzero().tolist() for i in [ids[row, j]]}
    found = set()
    for row in range(count):
        sequence = [
            *split.prompt_ids[row][split.prompt_mask[row]],
            *split.completion_ids[row][split.completion_mask[row]],
        ]
        sequence = [int(token) for token in sequence]
        start = int(mask[row].argmax())
        assert sequence == ids[row, start : start + len(sequence)].tolist()
        prompt = int(split.prompt_mask[row].sum())
        assert prompt > 0
        for j in split.loss_mask[row].nonzero()[:, 0].tolist():
            found.add((sequence[prompt + j], sequence[prompt + j - 1]))
    assert found == expected


def test_a_label_of_a_rows_first_token_has_no_loss() -> None:
    ids = torch.tensor([[7, 8, 9]])
    split = split_labels(ids, torch.ones_like(ids), ids)
    assert split.prompt_ids.tolist() == [[7]]
    assert split.completion_ids.tolist() == [[8, 9]]
    assert split.loss_mask.tolist() == [[True, True]]


@pytest.mark.parametrize(
    ("mask", "labels", "words"),
    [
        ([[1, 0, 1]], [[-100, -100, 9]], "attention_mask must have no holes; row 0 does not, at position 1"),
        ([[0, 1, 1]], [[7, -100, 9]], "labels must be -100 on padding; row 0 does not, at position 0"),
        ([[1, 1]], [[-100, 9, 9]], "attention_mask must be .B, L. as input_ids is, .1, 3., got .1, 2."),
        ([[1, 1, 1]], [[-100, 9]], "labels must be .B, L."),
    ],
)
def test_rows_that_are_not_one_run_are_refused(mask: Any, labels: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        split_labels(torch.tensor([[7, 8, 9]]), torch.tensor(mask), torch.tensor(labels))
