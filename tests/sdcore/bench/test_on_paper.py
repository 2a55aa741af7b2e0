"""What is calculated for 64 GPUs agrees with the models it is made of, and with what the code really sends."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sdcore.bench import on_paper, readme
from sdcore.bench.models import size_of
from sdcore.bench.on_paper import BF16, FP32, LOAD, ROW_STATISTICS, Cluster, Step, Way, steps
from sdcore.memory import Load, predict
from sdkernels import linear_divergence
from sdkernels.vocab_parallel.shards import Shards

SMALL_LOAD = Load(prompt_tokens=40, context_tokens=8, completion_tokens=16, completions=4, context_per_completion=True)
FSDP_ALONE = on_paper.WAYS[:4]


@cache
def large() -> list[Step]:
    return steps()


@cache
def small() -> list[Step]:
    return steps(size_of("quick"), SMALL_LOAD, Cluster(nodes=2, gpus=4))


def of(found: list[Step], way: Way) -> Step:
    return next(step for step in found if step.way == way)


def test_the_documentation_has_the_tables_that_are_calculated_now() -> None:
    root = readme.readme_file().parent
    text = (root / readme.PERFORMANCE).read_text(encoding="utf-8")
    again = readme.ON_PAPER.renewed(text, root / "benchmarks" / "results", root)
    assert text == again, "run `sdcore bench --readme`"


def test_the_model_is_the_one_that_is_named() -> None:
    # As its card says.
    assert large()[0].parameters.all / 1e9 == pytest.approx(70.55, rel=1e-3)


def test_layers_embedding_and_head_are_all_parameters() -> None:
    step = small()[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(step.config)
    norm = model.model.norm.weight.numel()
    assert step.layers == sum(p.numel() for p in model.model.layers.parameters()) + norm
    assert step.embedding == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize("way", FSDP_ALONE, ids=lambda way: way.name)
def test_what_one_gpu_holds_beside_weights_is_what_the_estimate_of_one_gpu_says(way: Way) -> None:
    step = of(large(), way)
    parts = predict(step.config, LOAD, step.setting, parameters=step.parameters).parts
    found = step.bytes()
    assert found["activations"] == parts["activations"]
    assert found["keys and values of the prompt"] == parts["prompt cache"]
    assert found["workspace of the loss or the teacher's pass"] == pytest.approx(parts["workspace"], abs=1)
    assert found["logits"] == parts["logits"]


def test_shards_are_sixteen_bytes_of_a_parameter_over_all_gpus() -> None:
    step = large()[0]
    shards = sum(count for name, count in step.bytes().items() if "shard" in name)
    assert shards == pytest.approx(16 * step.parameters.all / 64)


def test_fusing_leaves_no_logits_and_sharing_fewer_activations() -> None:
    plain, fused = of(large(), Way(False, False)).bytes(), of(large(), Way(True, False)).bytes()
    assert plain["logits"] > 0 == fused["logits"]
    assert of(large(), Way(True, True)).bytes()["activations"] < 0.5 * fused["activations"]
    sliced = of(large(), Way(True, True, 8)).bytes()
    assert sliced["the head's gradient"] * 8 == fused["the head's gradient"]


def test_a_head_in_slices_makes_the_same_products() -> None:
    whole, sliced = of(large(), Way(True, True)), of(large(), Way(True, True, 8))
    assert whole.flops() == sliced.flops()
    assert whole.flops()["output layer"] == 8 * LOAD.rows * 8192 * 128256


def test_neither_sharing_nor_fusing_changes_what_is_sent() -> None:
    assert len({tuple(of(large(), way).transfers()) for way in FSDP_ALONE}) == 1


def test_what_is_received_and_how_long_it_takes_by_hand() -> None:
    """Two nodes of four: each GPU receives 7/8 of the whole, 1/2 of it through the cards of its node's four GPUs."""
    rates = Cluster(nodes=2, gpus=4, nvlink=1000.0, network=100.0)
    step = replace(of(small(), Way(True, True)), cluster=rates)
    head = step.transfers()[-1]
    whole = (BF16 + FP32) * step.parameters.head
    assert head.bytes == whole * 7 / 8
    assert head.seconds == pytest.approx(max(whole * 7 / 8 / 1000, whole / 2 / 4 / 100))
    assert step.transfers()[0].bytes == 3 * BF16 * step.layers * 7 / 8
    slow = replace(step, cluster=replace(rates, network=1.0))
    assert slow.transfers()[-1].seconds == pytest.approx(whole / 2 / 4)


def test_a_sliced_head_by_hand() -> None:
    rates = Cluster(nodes=2, gpus=4, nvlink=1000.0, network=100.0)
    step = replace(of(small(), Way(True, True)), cluster=rates, way=Way(True, True, 4))
    own, states, statistics, gradient = step.transfers()[-4:]
    rows, hidden = 4 * SMALL_LOAD.rows, 32
    assert (own.bytes, own.seconds) == (6 * step.parameters.head / 4 / 2, 6 * step.parameters.head / 4 / 2 / 100)
    assert states.bytes == 2 * 2 * rows * hidden * 3 / 4
    assert statistics.bytes == 64 * rows * 3  # of three others
    assert (gradient.bytes, gradient.seconds) == (2 * 4 * rows * hidden * 3 / 4, 2 * 4 * rows * hidden * 3 / 4 / 1000)


def test_what_the_code_sends_of_a_row_is_what_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"gather": 0, "add_up_": 0}
    for name in sent:
        real = getattr(Shards, name)

        def spy(self: Shards, part: torch.Tensor, name: str = name, real=real) -> object:  # type: ignore[no-untyped-def]
            sent[name] += part.nbytes
            return real(self, part)

        monkeypatch.setattr(Shards, name, spy)
    rows, hidden = 12, 8
    generator = torch.Generator().manual_seed(0)
    states, taught = (torch.randn(rows, hidden, generator=generator).bfloat16() for _ in range(2))
    weight = torch.randn(50, hidden, generator=generator).bfloat16().requires_grad_()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        linear_divergence(states.requires_grad_(), weight, taught, alpha=0.5, process_group=group).loss.backward()
    finally:
        dist.destroy_process_group()
    assert sent == {"gather": 8 * ROW_STATISTICS * rows, "add_up_": FP32 * rows * hidden}


def test_time_is_counts_over_rates() -> None:
    step = of(small(), Way(True, True))
    times = step.times()
    assert times["student: products"] == step.flops()["student"] / step.cluster.flops
    assert times["loss: memory traffic"] == 30 * 64 * 300 / step.cluster.memory
    assert times["communication"] == sum(transfer.seconds for transfer in step.transfers())
