"""A step of a 70B model on 64 GPUs, calculated: bytes, FLOPs, communication and time. Nothing here was run.

    print(text())                                   # what docs/performance.md has between its markers

Counted from the package's own models (`sdcore.prefix.cost`, `sdcore.memory`) and from what the code sends: FSDP2
gathers a layer's weights three times a step and reduces its gradient once. For a head that is cut over the vocabulary
(`process_group`) the ranks gather the states of all their rows, of each row three sums a side and two more numbers, and
all-reduce the gradient of the states.

What differs from a measurement: every number. Times are counts divided by rates; latency, imbalance, the allocator and
the optimizer's step are left out, and so is sampling.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ..memory import Load, Parameters, Setting, count_parameters, device_bytes, predict
from ..memory.estimate import (
    BLOCK_ENTRIES,
    DEFAULT_WORKSPACE_MB,
    FUSED_BYTES_PER_ENTRY,
    MIB,
    PLAIN_FLOAT32,
    PLAIN_LOGITS,
    SCRATCH_BYTES_PER_ENTRY,
)
from ..prefix import Cost, cost_of_sizes
from .models import PASS_VOCAB, UNTIED, ModelSize
from .tables import Table

GIB, GB, TERA = 1 << 30, 10**9, 10**12
BF16, FP32 = 2, 4
WIDTH: Final = 120  # of a line of the documentation
MODEL: Final = ModelSize(
    8192, 80, 64, 8, 28672, PASS_VOCAB, 128256, 128, "llama", "meta-llama/Llama-3.1-70B", {**UNTIED}
)
# Of a GPU: one prompt with its completions, each with a context of its own, as SDPO's feedback is.
LOAD: Final = Load(
    prompt_tokens=2048, context_tokens=512, completion_tokens=1024, completions=8, context_per_completion=True
)
# Float64 numbers that a rank sends of a row: three sums of each side, then the loss and the gradient's centre.
ROW_STATISTICS: Final = 3 + 3 + 2
# Bytes of memory traffic per logit and side, see `traffic`.
FUSED_TRAFFIC, PLAIN_TRAFFIC = 30, 2 * (PLAIN_LOGITS * BF16 + PLAIN_FLOAT32 * FP32)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Rates that are assumed, not measured: of an H200 in dense bfloat16 products, and of what connects the GPUs."""

    nodes: int = 8
    gpus: int = 8  # of a node
    flops: float = 790e12  # a second
    memory: float = 4.8e12  # bytes a second
    nvlink: float = 450e9  # bytes a second and direction, of a GPU within its node
    network: float = 50e9  # bytes a second and direction, of a GPU's own card to other nodes
    card: str = "H200"

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus


class Way(NamedTuple):
    """How a step is run."""

    fused: bool  # the loss
    shared: bool  # the prompt
    slices: int = 1  # the head is cut over so many ranks of a node

    @property
    def name(self) -> str:
        loss, prompt = "fused" if self.fused else "plain", "shared" if self.shared else "naive"
        return f"{loss}, {prompt}" + (f", head over {self.slices}" if self.slices > 1 else "")


WAYS: Final = (Way(False, False), Way(True, False), Way(False, True), Way(True, True), Way(True, True, 8))


class Transfer(NamedTuple):
    """What a GPU receives in a step for one purpose."""

    name: str
    bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step on one GPU of a cluster."""

    way: Way
    load: Load
    cluster: Cluster
    config: Any  # transformers'
    parameters: Parameters

    @property
    def setting(self) -> Setting:
        return Setting(
            fused=self.way.fused,
            strategy="packed" if self.way.shared else "naive",
            checkpointing=True,
            dtype="bfloat16",
        )

    @property
    def cost(self) -> Cost:
        load = self.load
        return cost_of_sizes(
            self.config,
            prompt_tokens=load.prompt_tokens,
            context_tokens=load.context_tokens,
            completion_tokens=load.completion_tokens,
            completions=load.completions,
            context_per_completion=load.context_per_completion,
            strategy=self.setting.strategy,
            checkpointing=self.setting.checkpointing,
            dtype_bytes=BF16,
        )

    @property
    def embedding(self) -> int:
        """Parameters that are neither in a layer nor in the head, but for a norm."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layers(self) -> int:
        """Parameters of all layers."""
        return self.parameters.all - self.parameters.head - self.embedding

    def bytes(self, *, checkpointing: bool = True) -> dict[str, float]:
        """Of a GPU at the peak, by what they are for: an upper estimate, like `sdcore.memory`'s."""
        counted, shard = self.cost, self.parameters.all / self.cluster.ranks
        setting = self.setting if checkpointing else Setting(dtype="bfloat16", strategy=self.setting.strategy)
        parts = predict(self.config, self.load, setting, parameters=self.parameters).parts
        layer, head = self.layers / self.config.num_hidden_layers, self.parameters.head / self.way.slices
        workspace, logits = self.loss_bytes()
        assert counted.teacher is not None
        return {
            "weights, float32 shard": FP32 * shard,
            "gradients, float32 shard": FP32 * shard,
            "AdamW's moments, shard": 2 * FP32 * shard,
            "gathered weights: two layers, embedding, head": BF16 * (2 * layer + self.embedding + head),
            "a layer's gradient, until it is reduced": (BF16 + FP32) * layer,
            "the head's gradient": BF16 * head,
            "activations": parts["activations"],
            "keys and values of the prompt": parts["prompt cache"],
            # The teacher's pass is over when the loss begins.
            "workspace of the loss or the teacher's pass": max(workspace, counted.teacher.working_bytes - logits),
            "logits": logits,
        }

    def loss_bytes(self) -> tuple[float, float]:
        """Workspace, with the states of the rows and the float32 sum of the head's gradient, and whole logits.

        With a head in slices a rank has the rows of all, and its slice of the columns.
        """
        rows, columns = self.load.rows * self.way.slices, self.config.vocab_size / self.way.slices
        states, entries = 3 * rows * self.config.hidden_size * BF16, rows * columns
        if not self.way.fused:
            return states, entries * (PLAIN_LOGITS * BF16 + PLAIN_FLOAT32 * FP32)
        head = self.parameters.head / self.way.slices
        budget = max(DEFAULT_WORKSPACE_MB * MIB, BF16 * head)
        needed = FUSED_BYTES_PER_ENTRY * entries + SCRATCH_BYTES_PER_ENTRY * min(entries, BLOCK_ENTRIES)
        return states + FP32 * head + min(budget, needed), 0

    def traffic(self) -> float:
        """Bytes that the loss moves between GPU memory and cores beside its products.

        Fused, of each side's float32 logits: written by the product, read for the statistics and for the gradient; of
        the bfloat16 gradient: written, read by two products. Plain: each of its arrays, written and read once.
        """
        return (FUSED_TRAFFIC if self.way.fused else PLAIN_TRAFFIC) * self.load.rows * self.config.vocab_size

    def flops(self) -> dict[str, int]:
        """Of a GPU."""
        counted = self.cost
        assert counted.teacher is not None
        return {
            "student": counted.student.flops,
            "teacher": counted.teacher.flops,
            "output layer": counted.head_flops,
        }

    def transfers(self) -> list[Transfer]:
        """What a GPU receives, in the order of a step. Sharing and fusing change nothing here."""
        hidden, slices = self.config.hidden_size, self.way.slices
        head, rows = self.parameters.head / slices, self.load.rows * slices
        found = [
            self._everywhere("layers: gather weights, 3 times", 3 * BF16 * self.layers),
            self._everywhere("layers: reduce gradients, float32", FP32 * self.layers),
            self._everywhere("embedding: gather, reduce", (BF16 + FP32) * self.embedding),
        ]
        if slices == 1:
            return [*found, self._everywhere("head: gather, reduce", (BF16 + FP32) * head)]
        return [
            *found,
            self._across("head: gather and reduce a slice", (BF16 + FP32) * head),
            self._within("head: gather states, both sides", 2 * BF16 * rows * hidden),
            self._within("head: row statistics, float64", 8 * ROW_STATISTICS * rows * slices),
            # An all-reduce is a reduction by shards and a gather.
            self._within("head: all-reduce gradient of states", 2 * FP32 * rows * hidden),
        ]

    def times(self) -> dict[str, float]:
        """Seconds."""
        found = {f"{name}: products": flops / self.cluster.flops for name, flops in self.flops().items()}
        found["loss: memory traffic"] = self.traffic() / self.cluster.memory
        found["communication"] = sum(transfer.seconds for transfer in self.transfers())
        return found

    def _everywhere(self, name: str, whole: float) -> Transfer:
        """Over all ranks: a node's share comes through the cards of all its GPUs, and is passed on inside the node."""
        cluster = self.cluster
        received = whole * (1 - 1 / cluster.ranks)
        outside = whole * (1 - 1 / cluster.nodes) / cluster.gpus
        return Transfer(name, received, max(received / cluster.nvlink, outside / cluster.network))

    def _across(self, name: str, whole: float) -> Transfer:
        """Over the GPUs of the same place in each node."""
        received = whole * (1 - 1 / self.cluster.nodes)
        return Transfer(name, received, received / self.cluster.network)

    def _within(self, name: str, whole: float) -> Transfer:
        """Over the GPUs of a node."""
        received = whole * (1 - 1 / self.cluster.gpus)
        return Transfer(name, received, received / self.cluster.nvlink)


def steps(
    size: ModelSize = MODEL, load: Load = LOAD, cluster: Cluster | None = None, ways: Sequence[Way] = WAYS
) -> list[Step]:
    """A step, each way. The model is made on the meta device, without its weights."""
    config = size.config(vocab=size.step_vocab)
    parameters, cluster = count_parameters(config), cluster or Cluster()
    return [Step(way=way, load=load, cluster=cluster, config=config, parameters=parameters) for way in ways]


def bytes_table(found: Sequence[Step]) -> Table:
    table = Table("GiB of a GPU, estimated, by what they are for", ("", *(step.way.name for step in found)))
    columns = [step.bytes() for step in found]
    for name in columns[0]:
        table.add(name, *(_shown(column[name] / GIB) for column in columns))
    table.add("**all**", *(f"**{_shown(sum(column.values()) / GIB)}**" for column in columns))
    table.add(
        "activations without checkpointing instead",
        *(_shown(step.bytes(checkpointing=False)["activations"] / GIB) for step in found),
    )
    return table


def flops_table(found: Sequence[Step]) -> Table:
    """The ways that differ in FLOPs."""
    naive, shared = (next(step for step in found if step.way.shared == is_shared) for is_shared in (False, True))
    table = Table("TFLOPs of a GPU and step, counted", ("", "naive", "shared", "naive / shared"))
    columns = [step.flops() for step in (naive, shared)]
    for column in columns:
        column["**all**"] = sum(column.values())
    for name, before in columns[0].items():
        after = columns[1][name]
        table.add(name, f"{before / TERA:,.0f}", f"{after / TERA:,.0f}", f"{before / after:.2f}×")
    return table


def transfers_table(found: Sequence[Step]) -> Table:
    """Of the ways that differ in what is sent."""
    table = Table(
        "What a GPU receives in a step, counted, and the milliseconds that this takes at the assumed rates",
        ("head", "what", "GB", "ms"),
        text_columns=2,
    )
    for slices in dict.fromkeys(step.way.slices for step in found):
        step = next(step for step in found if step.way.slices == slices)
        label = "FSDP2 alone" if slices == 1 else f"over {slices}"
        for transfer in step.transfers():
            table.add(label, transfer.name, _shown(transfer.bytes / GB), f"{transfer.seconds * 1e3:,.1f}")
        whole = [sum(part) for part in zip(*((one.bytes, one.seconds) for one in step.transfers()), strict=True)]
        table.add(label, "**all**", _shown(whole[0] / GB), f"{whole[1] * 1e3:,.1f}")
    return table


def times_table(found: Sequence[Step]) -> Table:
    table = Table("Seconds of a step, estimated", ("", *(step.way.name for step in found)))
    columns = [step.times() for step in found]
    for name in columns[0]:
        table.add(name, *(f"{column[name]:.2f}" for column in columns))
    table.add("**all, nothing overlapped**", *(f"**{sum(column.values()):.2f}**" for column in columns))
    hidden = [max(sum(column.values()) - column["communication"], column["communication"]) for column in columns]
    table.add("**all, communication hidden where it can be**", *(f"**{one:.2f}**" for one in hidden))
    return table


def text() -> str:
    """Assumptions and tables, as the documentation has them."""
    found = steps()
    load, cluster, counted = found[0].load, found[0].cluster, found[-1].cost
    sequences = cluster.ranks * load.completions
    assumed = (
        f"Assumed: {MODEL.source} (hidden {MODEL.hidden}, {MODEL.layers} layers, {MODEL.kv_heads} key/value heads, "
        f"V={MODEL.step_vocab:,}; {found[0].parameters.all / 1e9:.1f} billion parameters) on {cluster.nodes} nodes of "
        f"{cluster.gpus} {cluster.card}; {cluster.flops / TERA:.0f} TFLOP/s of bfloat16 products, "
        f"{cluster.memory / 1e12:.1f} TB/s of memory, and of a GPU in each direction {cluster.nvlink / GB:.0f} GB/s "
        f"inside its node and {cluster.network / GB:.0f} GB/s to other nodes. A step of SDPO with a live teacher and "
        f"the Jensen–Shannon divergence over the full vocabulary. Each GPU has one prompt of P={load.prompt_tokens}, "
        f"G={load.completions} completions of R={load.completion_tokens}, and for each of them a context of "
        f"C={load.context_tokens}: {sequences} completions a step, and {load.rows:,} rows of the loss on a GPU, whose "
        f"student reads {counted.student.tokens:,} tokens where the prompt is shared and "
        f"{counted.student.naive_tokens:,} where it is not. FSDP2 over all {cluster.ranks} GPUs, with float32 shards, "
        f"bfloat16 weights and gradients reduced in float32; gradient checkpointing."
    )
    fits = f"A card has {device_bytes(cluster.card) / GIB:.1f} GiB."
    tables = [bytes_table(found), flops_table(found), transfers_table(found), times_table(found)]
    tables[0].notes.append(fits)
    paragraph = textwrap.fill(assumed, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join([paragraph, *(table.markdown() for table in tables)])


def _shown(value: float) -> str:
    if value == 0:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


__all__ = ["LOAD", "MODEL", "ROW_STATISTICS", "WAYS", "Cluster", "Step", "Transfer", "Way", "steps", "text"]
