"""`FusedGKDTrainer` and `FusedDistillationTrainer` beside TRL's: the same losses and gradients, without logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("trl")

from trl import DistillationTrainer

from sdcore.errors import ArgumentError, PlanError, UnsupportedModelError
from sdcore.integrations.trl import FusedOptions, patch
from sdcore.integrations.trl.gkd import split_labels
from sdkernels.live_bytes import LiveBytes
from tests.processes import launch
from tests.sdcore.integrations import other_model_runs as runs
from tests.sdcore.integrations.other_model_runs import (
    TRAINERS,
    VOCAB,
    assert_same,
    build,
    gradients,
    labelled_batch,
    model,
    prompted_batch,
    trained,
)
from tests.sdcore.integrations.trl_runs import logged

SECONDS = 240  # a hang is a failure within this time
Pair = tuple[Any, Any]  # ours and theirs
trainers = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Constructs ours and theirs, of the same models."""
    made = {}
    for name, (ours, theirs) in TRAINERS.items():
        models: dict[str, Any] = {"student": model(1), "of": runs.teacher()}
        folder = tmp_path_factory.mktemp("pair")
        made[name] = build(ours, folder, **models), build(theirs, folder, **models)
    return made


def batch(name: str) -> dict[str, Tensor]:
    return {"gkd": labelled_batch, "distillation": prompted_batch}[name]()


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkds_loss_and_gradients_are_trls(pairs: dict[str, Pair], beta: float, num_items: Any, padding: str) -> None:
    for trainer in pairs["gkd"]:
        trainer.beta = beta
    rows = labelled_batch(padding)
    ours, theirs = (gradients(trainer, rows, num_items_in_batch=num_items) for trainer in pairs["gkd"])
    assert_same(ours, theirs, within=1e-4)


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("count", [None, 31])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillations_loss_gradients_and_entropy_are_trls(
    pairs: dict[str, Pair], beta: float, temperature: float, count: int | None, tools: bool
) -> None:
    pair, results = pairs["distillation"], []
    for trainer in pair:
        trainer.beta, trainer.temperature = beta, temperature
        results.append(gradients(trainer, prompted_batch(tools=tools, count=count)))
    assert_same(*results, within=1e-4)
    entropies = [trainer._metrics["train"]["entropy"][-1] for trainer in pair]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-5)
    assert pair[0].compute_loss(pair[0].model, prompted_batch(), return_outputs=True)[1] is None


def test_the_temperature_of_gkds_sampling_is_not_the_losses(pairs: dict[str, Pair]) -> None:
    """TRL 1.16 does not hand it on to its divergence."""
    pair = pairs["gkd"]
    assert [trainer.args.temperature for trainer in pair] == [0.9, 0.9]
    expected = gradients(pair[0], labelled_batch())
    pair[0].temperature = 3.0
    assert torch.equal(gradients(pair[0], labelled_batch())[0], expected[0])
    pair[0].temperature = 0.9


def test_a_batch_without_labels_has_a_loss_of_0_in_the_graph(pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs["gkd"]
    empty = labelled_batch() | {"labels": torch.full((5, 17), -100)}
    loss, grads = gradients(ours, empty)
    assert float(loss) == 0
    assert all(not grad.any() for grad in grads.values())
    assert float(gradients(theirs, empty)[0]) == 0


# Prompts of 9 and 4 tokens stand twice. Completions are read up to the token before their last one with a loss.
@pytest.mark.parametrize(
    ("name", "tokens"),
    [("gkd", 2 * 9 + 2 * 4 + 4 + 5 + 1 + 0), ("distillation", 2 * 9 + 2 * 4 + 4 + 1 + 6 + 0)],
    ids=TRAINERS,
)
def test_equal_prompts_of_a_batch_are_read_once(pairs: dict[str, Pair], name: str, tokens: int) -> None:
    if name == "gkd":
        rows = split_labels(*labelled_batch("right").values())._asdict()
    else:
        rows = prompted_batch()
        rows["loss_mask"] = rows["completion_mask"]
    ours = pairs[name][0]
    out = ours.distill(ours.model, **rows, alpha=0.5, temperature=1.0, normalizer=None)
    for side in (out.report.student, out.report.teacher):
        assert side.naive_tokens == tokens
        assert side.tokens == side.naive_tokens - 9 - 4


@trainers
def test_no_tensor_of_tokens_times_vocabulary_exists(name: str, tmp_path: Path) -> None:
    if name == "gkd":
        ids = torch.randint(3, VOCAB, (20, 70), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, :8] = -100
        long = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        tokens = int((labels != -100).sum())
    else:
        long = {field: values.repeat(4, 1) for field, values in prompted_batch().items()}
        long["completion_ids"] = long["completion_ids"].repeat(1, 9).clamp(min=3)
        long["completion_mask"] = torch.ones_like(long["completion_ids"])
        tokens = long["completion_ids"].numel()

    def largest(kind: Any, **extra: Any) -> int:
        trainer = build(kind, tmp_path, extra=extra)
        gradients(trainer, batch(name))  # its check of first use is a pass of its own
        with LiveBytes() as probe:
            gradients(trainer, long)
        return probe.largest_numel

    ours, theirs = TRAINERS[name]
    # Room for one block of rows of the loss; below it is refused.
    assert largest(ours, fused=FusedOptions(workspace_mb=20)) < tokens * VOCAB // 2
    # TRL's Distillation makes its loss in tiles too.
    assert name == "distillation" or largest(theirs) >= tokens * VOCAB


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_three_steps_of_gkd_have_trls_losses(lmbda: float, tmp_path: Path) -> None:
    ours, theirs = (logged(trained(build(kind, tmp_path, lmbda=lmbda, seed=5))) for kind in TRAINERS["gkd"])
    assert len(ours) == 3
    assert abs(ours[0] - ours[2]) > 1e-4
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_gkds_accumulated_steps_and_evaluation_are_trls(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "seq_kd": True}
    ours, theirs = (trained(build(kind, tmp_path, **options)) for kind in TRAINERS["gkd"])
    assert logged(ours) == pytest.approx(logged(theirs), rel=1e-4)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)


def test_three_steps_of_distillation_have_trls_losses_and_entropies(tmp_path: Path) -> None:
    options = {"seed": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    ours, theirs = (trained(build(kind, tmp_path, **options)) for kind in TRAINERS["distillation"])
    losses = logged(ours)
    assert len(losses) == 3
    assert abs(losses[0] - losses[2]) > 1e-4
    assert losses == pytest.approx(logged(theirs), rel=1e-4)
    assert logged(ours, "entropy") == pytest.approx(logged(theirs, "entropy"), rel=1e-4)
    torch.manual_seed(1)
    metrics = ours.evaluate()
    torch.manual_seed(1)
    expected = theirs.evaluate()
    for metric in ("eval_loss", "eval_entropy"):
        assert metrics[metric] == pytest.approx(expected[metric], rel=1e-3)


@trainers
@pytest.mark.parametrize(
    ("options", "within"),
    [({"bf16": True}, 2e-3), ({"gradient_checkpointing": True}, 1e-4)],
    ids=["bf16", "checkpoints"],
)
def test_low_precision_and_checkpoints_change_nothing(name: str, options: Any, within: float, tmp_path: Path) -> None:
    ours, theirs = (logged(trained(build(kind, tmp_path, **options))) for kind in TRAINERS[name])
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=within)


@trainers
def test_an_adapter_is_trained_as_trl_trains_it(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours, theirs = (
        logged(trained(build(kind, tmp_path, extra={"peft_config": config}, gradient_accumulation_steps=1)))
        for kind in TRAINERS[name]
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path) -> None:
    student = model(1)
    loss, _ = gradients(build(TRAINERS["gkd"][0], tmp_path, student=student, of=student), labelled_batch())
    assert float(loss) == pytest.approx(0, abs=1e-9)


def test_outputs_of_gkd_are_refused(pairs: dict[str, Pair]) -> None:
    ours = pairs["gkd"][0]
    with pytest.raises(ArgumentError, match=r"return_outputs must be False.*no logits"):
        ours.compute_loss(ours.model, labelled_batch(), return_outputs=True)


def test_a_batch_with_images_is_left_to_trl_with_a_warning(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = pairs["distillation"][0]
    monkeypatch.setattr(DistillationTrainer, "compute_loss", lambda *_: "TRL's")
    with pytest.warns(UserWarning, match="pixel_values are left to TRL"):
        assert ours.compute_loss(ours.model, prompted_batch() | {"pixel_values": torch.zeros(1)}) == "TRL's"


@trainers
@pytest.mark.parametrize(
    ("argument", "value"), [("micro_batch", 2), ("strategy", "two_phase"), ("trust_share", 0.2)], ids=str
)
def test_options_that_have_no_effect_here_are_refused(name: str, argument: str, value: Any, tmp_path: Path) -> None:
    kind = TRAINERS[name][0]
    with pytest.raises(ArgumentError, match=f"{argument} must be left as it is for {kind.__name__}"):
        build(kind, tmp_path, extra={"fused": FusedOptions(**{argument: value})})


@trainers
def test_patch_makes_trls_trainer_ours_or_leaves_it_as_it_was(name: str, tmp_path: Path) -> None:
    ours, theirs = TRAINERS[name]
    trainer = build(theirs, tmp_path)
    with pytest.raises(ArgumentError, match="micro_batch must be left as it is"):
        patch(trainer, micro_batch=2)
    assert type(trainer) is theirs
    expected = gradients(trainer, batch(name))
    assert patch(trainer, workspace_mb=64) is trainer
    assert type(trainer) is ours
    assert trainer.fused.workspace_mb == 64
    assert_same(gradients(trainer, batch(name)), expected, within=1e-4)
    trained(trainer)
    assert len(logged(trainer)) == 3


def test_dropout_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedModelError, match="dropout"):
        build(TRAINERS["gkd"][0], tmp_path, extra={"peft_config": config}, disable_dropout=False)


# Cutting rows at their first label.


@given(st.data())
def test_every_label_is_in_one_place_with_its_past(data: Any) -> None:
    """What precedes a token in its row precedes it in prompt + completion, however rows are padded and labelled."""
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
    pairs = set()
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
            pairs.add((sequence[prompt + j], sequence[prompt + j - 1]))
    assert pairs == expected


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


# Two ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("ranks")
    launch(runs.__file__, output, ranks=2, seconds=SECONDS)
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@trainers
def test_two_ranks_train_as_with_trl(name: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        ours, theirs = results[f"{name} ours"], results[f"{name} theirs"]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)
        assert ours["first"] == pytest.approx(theirs["first"], rel=1e-4, abs=1e-6)
    assert ranks[0][f"{name} ours"]["total"] == ranks[1][f"{name} ours"]["total"]


@trainers
def test_a_loss_of_sharded_models_has_the_gradients_of_whole_ones(name: str, ranks: list[dict[str, Any]]) -> None:
    """FSDP2 shards student and teacher, without accelerate's preparation, which shards nothing on CPUs."""
    for results in (rank[f"{name} sharded"] for rank in ranks):
        assert results["loss"] == pytest.approx(results["wanted"], rel=1e-5)
        assert results["error"] < 1e-4
