"""A strategy that disagrees with naive is noticed on first use, or on every plan, and one that is right is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.errors import UnsupportedModelError
from sdcore.models import Body, find_body
from sdcore.prefix.attention.segments import BORROWED, ROW, Block, Node, Row, pack
from sdcore.prefix.choice import STRATEGIES
from sdcore.prefix.runner import run
from sdcore.prefix.strategies import cached, caches, packed
from sdcore.prefix.strategies.caches import PrefixCache, TrunkStates
from sdcore.prefix.strategies.packed import PackedRow, PromptStates
from sdcore.prefix.verification import departure, disagreement, forget
from sdcore.teachers import Frozen
from tests.sdcore.prefix.models import CONFIGS, HYBRIDS, tiny, tokens_of
from tests.sdcore.prefix.trees import conversations, random_plan, short_plan, turns

pytestmark = pytest.mark.usefixtures("first_use")


def position_off_by_one(patch: pytest.MonkeyPatch) -> None:
    original, of_row = caches.positions, packed._row_of

    def positions(start: int, tokens: Tensor) -> Tensor:
        return original(start + (start > 0), tokens)

    def row_of(*args: Any) -> Any:
        row = of_row(*args)
        for node in row.row.nodes:
            if node.parent >= 0:
                row.position_ids[node.span.start : node.span.stop] += 1
        return row

    patch.setattr(caches, "positions", positions)
    patch.setattr(packed, "_row_of", row_of)


def first_prefix_token_missing(patch: pytest.MonkeyPatch) -> None:
    blocks = Row.blocks

    def run_reading(body: Body, tokens: Tensor, prefix: TrunkStates) -> Tensor:
        layers = tuple(tuple(state[:, :, 1:] for state in layer) for layer in prefix.layers)
        short = replace(prefix, layers=layers, length=prefix.length - 1)
        return caches._run(body, tokens, PrefixCache(body, short, batch=len(tokens), recording=False), prefix.length)

    def without_first(self: Row, *args: Any, **kwargs: Any) -> list[Block]:
        trunks = {node.span.start for node in self.nodes if node.after.length and node.span.length > 1}
        return [
            block._replace(key=block.key + 1, keys=block.keys - 1, offset=block.offset - 1)
            if block.key in trunks and block.query not in trunks and block.source == ROW
            else block
            for block in blocks(self, *args, **kwargs)
        ]

    patch.setattr(cached, "run_reading", run_reading)
    patch.setattr(Row, "blocks", without_first)


def completions_not_isolated(patch: pytest.MonkeyPatch) -> None:
    of_row = packed._row_of

    def run_reading(body: Body, tokens: Tensor, prefix: TrunkStates) -> Tensor:
        """All branches in one row, each after those before it, at the right positions."""
        places = caches.positions(prefix.length, tokens).reshape(1, -1)
        states = PrefixCache(body, prefix, batch=1, recording=False)
        with body.keeping_caches():
            hidden = body(tokens.reshape(1, -1), position_ids=places, cache=states)
        return hidden.reshape(*tokens.shape, -1)

    def row_of(*args: Any) -> Any:
        row = of_row(*args)
        nodes: list[Node] = []
        became = {-1: -1}
        for i, node in enumerate(row.row.nodes):
            last = nodes[-1] if nodes else node
            if nodes and not node.after.length and not last.after.length and last.parent == became[node.parent]:
                # The leaves behind a node are one.
                nodes[-1] = last._replace(span=last.span._replace(length=node.span.stop - last.span.start))
            else:
                nodes.append(node._replace(parent=became[node.parent]))
            became[i] = len(nodes) - 1
        places = [node.span.start if node.source == BORROWED else -1 for node in nodes]
        return row._replace(row=pack([node.parent for node in nodes], [node.span.length for node in nodes], places))

    patch.setattr(cached, "run_reading", run_reading)
    patch.setattr(packed, "_row_of", row_of)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma3", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", ["packed", "cached"])
@pytest.mark.parametrize("plant", [position_off_by_one, first_prefix_token_missing, completions_not_isolated])
def test_planted_faults_are_caught_on_first_use(
    plant: Callable[[pytest.MonkeyPatch], None],
    strategy: str,
    name: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny(name).to(dtype)
    body = find_body(model)
    assert disagreement(body, STRATEGIES[strategy], short_plan(), "once") is None
    forget()
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"strategy '{strategy}' disagrees with naive: .* differ by"):
        run(model, short_plan(), strategy=strategy)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="strategy naive.*differ by"):
        report = run(model, short_plan()).report
    assert report.student.strategy == "naive"
    assert [fallback.strategy for fallback in report.fallbacks] == ["packed", "cached"]


def below(row: PackedRow) -> list[Node]:
    """The nodes of a row behind a node that is itself behind another one."""
    nodes = row.row.nodes
    return [node for node in nodes if node.parent >= 0 and nodes[node.parent].parent >= 0]


def position_off_by_one_at_an_inner_node(patch: pytest.MonkeyPatch) -> None:
    of_row = packed._row_of

    def row_of(*args: Any) -> Any:
        row = of_row(*args)
        for node in [node for node in below(row) if node.source == ROW and node.after.length][:1]:
            row.position_ids[node.span.start : node.span.stop] += 1
        return row

    patch.setattr(packed, "_row_of", row_of)


def an_inner_node_unseen(patch: pytest.MonkeyPatch) -> None:
    """Of the nodes in the middle what comes after them sees all but the first token."""
    blocks = Row.blocks

    def without_first(self: Row, *args: Any, **kwargs: Any) -> list[Block]:
        inner = {node.span.start for node in self.nodes if node.parent >= 0 and node.source == ROW}
        return [
            block._replace(key=block.key + 1, keys=block.keys - 1, offset=block.offset - 1)
            if not block.opens and block.source == ROW and block.key in inner and block.keys > 1
            else block
            for block in blocks(self, *args, **kwargs)
        ]

    patch.setattr(Row, "blocks", without_first)


def borrowed_from_the_token_before(patch: pytest.MonkeyPatch) -> None:
    place_of = PromptStates.place_of

    def before(self: PromptStates, tree: int, start: int, length: int) -> int | None:
        place = place_of(self, tree, start, length)
        return place if place is None or start < 9 else place - 1

    patch.setattr(PromptStates, "place_of", before)


@pytest.mark.parametrize(
    "plant", [position_off_by_one_at_an_inner_node, an_inner_node_unseen, borrowed_from_the_token_before]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_faults_at_inner_nodes_are_caught_on_first_use(
    plant: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama").to(dtype)
    body = find_body(model)
    assert disagreement(body, packed, turns(), "once") is None
    forget()
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=r"strategy 'packed' disagrees with naive: .* differ by"):
        run(model, turns(), strategy="packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_right_passes_the_check(name: str, dtype: torch.dtype) -> None:
    body = find_body(tiny(name).to(dtype))
    for strategy in ("cached", *(() if name in HYBRIDS else ("packed",))):
        assert disagreement(body, STRATEGIES[strategy], short_plan(), "once") is None
        assert disagreement(body, STRATEGIES[strategy], random_plan(3), "always") is None


def long_trunks_go_wrong(patch: pytest.MonkeyPatch) -> None:
    """A fault that the sequences of the first use are too short for."""
    original = packed.hidden_states

    def hidden_states(body: Body, trees: Any, **kwargs: Any) -> Any:
        states, prompts = original(body, trees, **kwargs)
        return states * (2.0 if len(trees[0].spans[0]) > 18 else 1.0), prompts

    patch.setattr(packed, "hidden_states", hidden_states)


@pytest.mark.parametrize("strategy", ["packed", "cached"])
def test_always_looks_at_every_teacher_and_needs_none(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    module, body = STRATEGIES[strategy], find_body(tiny("llama"))
    made = conversations(Random(8), 2, teachers=2, unscored=0.1).plan
    assert disagreement(body, module, made, "always") is None
    assert disagreement(body, module, replace(made, teachers=()), "always") is None
    original = module.hidden_states
    for wrong in made.teachers:

        def of_one_wrong(body: Body, trees: Any, wrong: Any = wrong, **options: Any) -> Any:
            hidden, prompts = original(body, trees, **options)
            return hidden + 0.1 * (trees is wrong), prompts

        monkeypatch.setattr(module, "hidden_states", of_one_wrong)
        assert "hidden states differ" in (disagreement(body, module, made, "always") or "")


def test_always_verifies_every_plan_once_the_first_and_off_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    forwards = tokens_of(model)

    def count(verify: Any) -> int:
        forwards.clear()
        run(model, short_plan(), verify=verify)
        return len(forwards)

    assert count("off") == 2
    assert count("once") > 2
    assert count("once") == 2
    assert count("always") == count("always") > 2
    long_trunks_go_wrong(monkeypatch)
    assert run(model, short_plan(), verify="once").report.student.strategy == "packed"
    with pytest.raises(UnsupportedModelError, match="disagrees with naive"):
        run(model, short_plan(), strategy="packed", verify="always")
    assert run(model, short_plan(), verify="always").report.student.strategy == "cached"


def test_a_teachers_own_model_is_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = packed.hidden_states

    def hidden_states(body: Body, trees: Any, **kwargs: Any) -> Any:
        states, prompts = original(body, trees, **kwargs)
        return states * (2.0 if body.name == "Qwen2ForCausalLM" else 1.0), prompts

    monkeypatch.setattr(packed, "hidden_states", hidden_states)
    teacher = Frozen(tiny("qwen2", seed=1))
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM .*differ by"):
        report = run(tiny("llama"), short_plan(), teacher).report
    assert report.teacher is not None
    assert (report.student.strategy, report.teacher.strategy) == ("packed", "naive")


def test_what_a_model_raised_while_it_was_checked_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def raises(*_: object, **__: object) -> None:
        calls.append(1)
        raise TypeError("an argument that this model does not take")

    monkeypatch.setattr(packed, "hidden_states", raises)
    monkeypatch.setattr(cached, "hidden_states", raises)
    model = tiny("llama")
    with pytest.warns(UserWarning, match="without sharing prefixes"):
        chosen = [run(model, short_plan()).report.student.strategy for _ in range(3)]
    assert (chosen, len(calls)) == (["naive"] * 3, 2)  # one for each strategy


def test_float32_products_of_fewer_digits_are_held_to_their_own_rounding() -> None:
    body, rows = find_body(tiny("llama")), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    compared = [(rows * 1.001, rows, rows)]
    assert departure(body, compared, torch.float32)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not departure(body, compared, torch.float32)[0]
    finally:
        torch.set_float32_matmul_precision(before)
    assert departure(body, compared, torch.float32)[0]
