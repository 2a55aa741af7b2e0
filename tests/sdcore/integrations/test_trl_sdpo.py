"""The fused SDPO trainer is TRL's, in losses, gradients and metrics, and never holds a completion's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

from sdcore.errors import ArgumentError, UnsupportedModelError
from sdcore.integrations.trl import FusedOptions
from sdcore.integrations.trl.self_distillation import TRUNCATED
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.integrations import trl_runs as runs
from tests.sdcore.integrations.trl_runs import MODES, FusedSDPOTrainer, SDPOTrainer, load_model, logged, losses
from tests.sdcore.prefix.models import double_precision

Make = Callable[..., Any]
DISTILLATION = "self_distillation/distillation_loss"
KINDS = ("ids", "mask")
POLICY = "self_distillation/policy_loss"


@pytest.fixture(scope="module")
def pair(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return runs.same_teacher(runs.SDPO, folder, tmp_path_factory.mktemp("pair"))


@pytest.fixture
def set_up(pair: tuple[Any, Any]) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`set_up(name=value)`: both trainers with these arguments, for this test."""
    kept = [(trainer, dict(vars(trainer.args)), dict(vars(trainer))) for trainer in pair]

    def changed(fused: FusedOptions | None = None, **arguments: Any) -> tuple[Any, Any]:
        for trainer in pair:
            for name, value in arguments.items():
                setattr(trainer.args, name, value)
                if hasattr(trainer, name):
                    setattr(trainer, name, value)
        if fused is not None:
            pair[1].fused = fused
        return pair

    yield changed
    for trainer, arguments, attributes in kept:
        for own, before in ((trainer.args, arguments), (trainer, attributes)):
            vars(own).clear()
            vars(own).update(before)


def outcome(trainer: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], dict[str, list[float]]]:
    """Returns loss, gradients and logged metrics of one `compute_loss`, in float64."""
    model = trainer.model.train()
    model.zero_grad()
    trainer._metrics["train"].clear()
    with double_precision():
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
    gradients = [w.grad.clone() for w in model.parameters()]
    return loss.detach(), gradients, dict(trainer._metrics["train"])


def assert_equal(pair: tuple[Any, Any], batch: dict[str, Tensor], *, rtol: float = 1e-6) -> Tensor:
    """Compares two outcomes; tokens' weights are float32 in both, so nothing is equal beyond their digits."""
    (loss, gradients, metrics), (own, own_gradients, own_metrics) = (outcome(trainer, batch) for trainer in pair)
    assert torch.allclose(own, loss.to(own.dtype), rtol=rtol, atol=1e-9)
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for ours, theirs in zip(own_gradients, gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=rtol * scale + 1e-12)
    assert own_metrics.keys() == metrics.keys()
    for name, values in metrics.items():
        assert own_metrics[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name
    return own


# One step of each setting.


@pytest.mark.parametrize("clip", [None, 1.2])
@pytest.mark.parametrize("mode", MODES)
def test_every_distillation_mode_has_trls_loss_and_gradients(set_up: Any, mode: str, clip: float | None) -> None:
    assert assert_equal(set_up(**MODES[mode], distillation_is_clip=clip), runs.batch()) != 0


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("weight", [0.0, 0.4])
@pytest.mark.parametrize("old", [True, False])
def test_every_policy_loss_has_trls_loss_and_gradients(
    set_up: Any, weight: float, loss_type: str, level: str, old: bool
) -> None:
    batch = runs.batch()
    if not old:
        del batch["old_per_token_logps"]
    both = set_up(
        **MODES["topk tail"],
        distillation_weight=weight,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=0.1,
        epsilon_high=0.3,
    )
    assert assert_equal(both, batch) != 0


def test_the_temperature_divides_both_sides_logits(set_up: Any) -> None:
    hot, cold = (assert_equal(set_up(temperature=t, **MODES["full jsd"]), runs.batch()) for t in (0.5, 2.0))
    assert hot != cold


def test_importance_weights_need_the_samplers_logprobs(set_up: Any) -> None:
    batch = runs.batch()
    clipped = assert_equal(set_up(distillation_is_clip=2.0), batch)
    del batch["old_per_token_logps"]
    assert assert_equal(set_up(distillation_is_clip=2.0), batch) != clipped


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_completions_that_are_masked_as_truncated_count_as_in_trl(set_up: Any, weight: float) -> None:
    batch = runs.batch()
    batch["completion_mask"][0] = 0
    batch["teacher_attention_mask"][0, -batch["completion_ids"].shape[1] :] = 0
    assert_equal(set_up(distillation_weight=weight), batch)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}], ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("mode", ["full jsd", "topk tail", "sampled"])
def test_a_tools_output_in_a_completion_is_read_and_has_no_loss(
    set_up: Any, monkeypatch: pytest.MonkeyPatch, mode: str, weight: float, options: Any
) -> None:
    arguments = {"distillation_weight": weight, "importance_sampling_level": "sequence", "distillation_is_clip": 1.2}
    arguments["num_iterations"] = 2  # so that the sampler's log-probabilities are asked for
    pair = set_up(FusedOptions(**options), **MODES[mode], **arguments)
    monkeypatch.setattr(pair[0], "_forward_logits", runs.reading_holes(pair[0]))
    with_tools = runs.batch_with_tools()
    assert assert_equal(pair, with_tools) != 0
    with double_precision():
        logps = [
            t._compute_rollout_logps(*(with_tools[f"{of}_{what}"] for of in ("prompt", "completion") for what in KINDS))
            for t in pair
        ]
    mask = with_tools["completion_mask"]
    assert torch.allclose(logps[1] * mask, logps[0] * mask, rtol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_without_an_active_sample_the_loss_is_zero_with_a_graph(set_up: Any, weight: float) -> None:
    batch = runs.batch()
    batch["self_distillation_mask"][:] = 0
    pair = set_up(distillation_weight=weight)
    loss = assert_equal(pair, batch)
    assert (loss == 0) == (weight == 1.0)
    assert pair[1]._metrics["train"][DISTILLATION] == [0.0]


def test_without_a_token_at_all_every_weight_gets_a_gradient_of_zero(set_up: Any) -> None:
    batch = runs.batch()
    batch["completion_mask"][:] = 0
    batch["teacher_attention_mask"][:, -batch["completion_ids"].shape[1] :] = 0
    for weight in (1.0, 0.5, 0.0):
        loss, gradients, _ = outcome(set_up(distillation_weight=weight)[1], batch)
        assert loss == 0
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("strategy", ["packed", "cached", "naive"])
def test_every_strategy_has_the_same_loss(set_up: Any, strategy: Any) -> None:
    assert_equal(set_up(FusedOptions(strategy=strategy), distillation_weight=0.5), runs.batch())


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"strategy": "two_phase"}], ids=str)
def test_bounded_memory_goes_backward_itself_with_the_same_gradients(set_up: Any, options: Any, weight: float) -> None:
    both = set_up(FusedOptions(**options), distillation_weight=weight, importance_sampling_level="sequence")
    assert_equal(both, runs.batch())
    ours = both[1]
    ours.model.zero_grad()
    loss = ours.compute_loss(ours.model, runs.batch())
    before = [w.grad.clone() for w in ours.model.parameters()]
    assert loss.requires_grad
    loss.backward()
    assert all(torch.equal(w.grad, grad) for w, grad in zip(ours.model.parameters(), before, strict=True))


def test_a_loss_is_divided_by_the_accumulation_steps_only_while_training(set_up: Any) -> None:
    for fused in (FusedOptions(), FusedOptions(micro_batch=2)):
        ours = set_up(fused, current_gradient_accumulation_steps=1)[1]
        whole, gradients, _ = outcome(ours, runs.batch())
        ours.current_gradient_accumulation_steps = 4
        quarter, quarters, _ = outcome(ours, runs.batch())
        assert float(quarter) * 4 == pytest.approx(float(whole))
        assert all(torch.allclose(a, 4 * b, atol=1e-9) for a, b in zip(gradients, quarters, strict=True))
        with torch.no_grad(), double_precision():
            assert float(ours.compute_loss(ours.model.eval(), runs.batch())) == pytest.approx(float(whole))


def test_outputs_are_refused(set_up: Any) -> None:
    ours = set_up()[1]
    with pytest.raises(ArgumentError, match="return_outputs must be False"):
        ours.compute_loss(ours.model, runs.batch(), return_outputs=True)


# What TRL has no setting for.


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", lambda loss, mask, limit: ((loss * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()),
        ("bnpo", lambda loss, mask, limit: (loss * mask).sum() / mask.sum()),
        ("dapo", lambda loss, mask, limit: (loss * mask).sum() / mask.sum()),
        ("dr_grpo", lambda loss, mask, limit: (loss * mask).sum() / (len(loss) * limit)),
    ],
)
def test_as_configured_the_loss_type_is_the_distillation_losss_too(set_up: Any, loss_type: str, expected: Any) -> None:
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    batch = runs.batch()
    theirs, ours = set_up(
        FusedOptions(loss_type="as_configured"), loss_type=loss_type, distillation_is_clip=None, **MODES["full jsd"]
    )
    with double_precision(), torch.no_grad():
        loss = ours.compute_loss(ours.model.train(), dict(batch))
        logits = theirs._compute_teacher_student_logits(theirs.model.train(), theirs.teacher_model, batch)
    per_token = compute_full_logit_self_distillation_loss(
        logits.student_logits, logits.teacher_logits, distillation_alpha=0.3
    )
    wanted = expected(per_token, logits.loss_mask, ours.max_completion_length)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_no_tensor_is_as_large_as_the_completions_logits(tmp_path: Path) -> None:
    """It holds in a training step and for the sampler's log-probabilities; TRL's step holds several such tensors."""
    vocab, rows = 4096, (12, 12, 12, 12)
    from transformers import AutoModelForCausalLM, Qwen2Config

    model = AutoModelForCausalLM.from_config(Qwen2Config(**(runs.SIZES | {"vocab_size": vocab, "hidden_size": 16})))
    batch = runs.batch(lengths=rows, prompts=(5, 5, 5, 5))
    batch["self_distillation_mask"][:] = 1
    largest = {}
    for kind, fused in ((SDPOTrainer, None), (FusedSDPOTrainer, FusedOptions(workspace_mb=20))):
        trainer = runs.build(
            kind,
            model,
            tmp_path,
            teacher_model_kind="live",
            gradient_accumulation_steps=1,
            num_iterations=2,
            fused=fused,
            **MODES["full jsd"],
        )
        trainer.current_gradient_accumulation_steps = 1
        trainer._prepare_inputs = lambda _: dict(batch)
        with LiveBytes() as probe:
            trainer.training_step(model, [], None)
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
            assert trainer._compute_rollout_logps(**{name: batch[name] for name in names}) is not None
        largest[kind] = probe.largest_numel
    logits = sum(rows) * vocab
    assert largest[SDPOTrainer] >= logits
    assert largest[FusedSDPOTrainer] <= logits / 2


# A teacher on TRL's server.


class Server:
    """Answers as vLLM does, for the prompts and completions of these teacher rows."""

    def __init__(self, model: Any) -> None:
        self.model, self.synced, self.asked = model, 0, 0

    def sync_weights(self) -> None:
        self.synced += 1

    @torch.no_grad()
    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, temperature: float
    ) -> dict[str, list[Any]]:
        self.asked += 1
        answer: dict[str, list[Any]] = {"actual_logprobs": [], "logprobs": [], "logprob_token_ids": []}
        for ids, start in zip(sequences, prompt_lengths, strict=True):
            row = torch.tensor(ids)
            logprobs = (self.model(row[None]).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
            top = logprobs.topk(top_logprobs)
            answer["actual_logprobs"].append(logprobs.gather(1, row[start:, None]).tolist())
            answer["logprobs"].append(top.values.tolist())
            answer["logprob_token_ids"].append(top.indices.tolist())
        return answer


@pytest.mark.parametrize("clip", [None, 1.2])
@pytest.mark.parametrize("mode", ["topk tail", "topk no tail", "sampled"])
def test_a_served_teacher_has_trls_loss_and_gradients(set_up: Any, pair: Any, mode: str, clip: float | None) -> None:
    both = set_up(**MODES[mode], distillation_is_clip=clip, use_teacher_server=True)
    server = Server(pair[1].teacher.model)
    for trainer in both:
        trainer.teacher_client = trainer.vllm_generation = server
        trainer._last_loaded_step = -1
    assert assert_equal(both, runs.batch(), rtol=3e-6) != 0
    assert "self_distillation/server_logprob_abs_diff" in both[1]._metrics["train"]
    assert (server.synced, server.asked) == (2, 2)


def test_a_server_that_answers_too_little_is_refused(set_up: Any, pair: Any) -> None:
    ours = set_up(**MODES["topk tail"], use_teacher_server=True)[1]

    class Short(Server):
        def get_sequence_logprobs(self, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
            return {
                name: [row[:-1] for row in rows]
                for name, rows in super().get_sequence_logprobs(*args, **kwargs).items()
            }

    ours.teacher_client = ours.vllm_generation = Short(pair[1].teacher.model)
    with pytest.raises(ArgumentError, match="the teacher server returned no log-probability"):
        ours.compute_loss(ours.model, runs.batch())


def test_what_is_left_to_trls_own_code_is_said(set_up: Any) -> None:
    ours = set_up(**MODES["sampled"], use_teacher_server=True)[1]
    with pytest.warns(UserWarning, match="distillation_mode='sampled_token' is left to TRL's own code"):
        ours._setup_teacher_model()
    ours.fused = FusedOptions(teacher="trust_region")
    with pytest.raises(ArgumentError, match="teacher must be None with use_teacher_server"):
        ours._setup_teacher_model()


# Whole runs.


@pytest.mark.parametrize("mode", MODES)
def test_three_steps_have_trls_losses(make: Make, mode: str) -> None:
    theirs, ours = (losses(make(kind, **MODES[mode])) for kind in runs.SDPO)
    assert len(theirs) == 3
    assert len(set(theirs)) == 3
    assert ours == pytest.approx(theirs, abs=1e-4)


MIXED: dict[str, Any] = {
    "distillation_weight": 0.5,
    "num_iterations": 2,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 3,
    "num_generations": 3,
    "mask_truncated_completions": True,
    "importance_sampling_level": "sequence",
    "loss_type": "grpo",
    "include_environment_feedback": True,
    "temperature": 1.3,
}


@pytest.mark.parametrize("fused", [FusedOptions(), FusedOptions(micro_batch=2)], ids=["whole", "bounded"])
def test_reused_samples_policy_loss_and_accumulation_log_what_trl_logs(make: Make, fused: FusedOptions) -> None:
    """Two steps per generation, twice each, so that the sampler's log-probabilities are old ones."""
    changes = MIXED | {"gradient_accumulation_steps": 2, "max_steps": 4, "max_completion_length": 12}
    trainers = []
    for kind, options in ((SDPOTrainer, None), (FusedSDPOTrainer, fused)):
        trainers.append(make(kind, fused=options, **changes))
        trainers[-1].train()  # seeded at construction
    theirs, ours = trainers
    names = {name for line in theirs.state.log_history for name in line}
    assert {POLICY, DISTILLATION, "sdpo/distillation_loss"} <= names
    for name in names:
        if not any(word in name for word in ("runtime", "per_second", "flos")):
            assert logged(ours, name) == pytest.approx(logged(theirs, name), abs=1e-4), name
    new = {name for line in ours.state.log_history for name in line} - names
    assert new == {TRUNCATED}


def test_evaluation_logs_what_trl_logs(make: Make) -> None:
    values = []
    for kind, fused in ((SDPOTrainer, None), (FusedSDPOTrainer, None), (FusedSDPOTrainer, FusedOptions(micro_batch=1))):
        torch.manual_seed(0)
        values.append(make(kind, fused=fused).evaluate()["eval_loss"])
    assert values[1:] == pytest.approx([values[0]] * 2, abs=1e-5)


# What is refused.


def test_dropout_is_refused_where_trl_would_keep_it(folder: Path, make: Make) -> None:
    model = load_model(folder)
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    make(FusedSDPOTrainer, model=model)
    model.model.layers[0].mlp.act_fn[1].p = 0.1  # TRL has turned it off
    with pytest.raises(UnsupportedModelError, match="disable_dropout must be True, got False"):
        make(FusedSDPOTrainer, model=model, disable_dropout=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fast"}, "strategy must be one of 'auto'.*got 'fast'"),
        ({"verify": True}, "verify must be one of"),
        ({"loss_type": "dapo"}, "loss_type must be one of 'sequence', 'as_configured', got 'dapo'"),
        ({"teacher": "ema"}, "teacher must be None or 'trust_region', got 'ema'"),
        ({"micro_batch": 0}, "micro_batch must be positive"),
        ({"micro_batch": 1, "strategy": "packed"}, "micro_batch must be positive, for strategy 'two_phase'"),
    ],
)
def test_options_are_refused_by_name(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        FusedOptions(**options)


def test_options_of_another_type_are_refused(make: Make) -> None:
    with pytest.raises(ArgumentError, match="fused must be a FusedOptions or None, got dict"):
        make(FusedSDPOTrainer, fused={"micro_batch": 1})


def test_a_model_that_is_not_states_times_a_matrix_is_refused_at_construction(folder: Path, make: Make) -> None:
    model = load_model(folder)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="output layer"):
        make(FusedSDPOTrainer, model=model)
