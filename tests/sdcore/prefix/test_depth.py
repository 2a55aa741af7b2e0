"""Trees of any depth: `cached` and `two_phase` give the states and gradients of naive, and compute each token once."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from sdcore.models import Body, find_body
from sdcore.prefix import Plan
from sdcore.prefix.choice import STRATEGIES as MODULES
from sdcore.prefix.strategies import cached
from sdcore.prefix.strategies.two_phase import micro_batches
from sdcore.prefix.trajectories import plan_trajectories
from sdkernels.live_bytes import LiveBytes
from tests.sdcore.prefix.models import (
    CONFIGS,
    HYBRIDS,
    assert_same_gradients,
    checkpointed,
    double_precision,
    gradients,
    tiny,
    tokens_of,
)
from tests.sdcore.prefix.trees import conversations

MICRO_BATCH = 2


def random_trajectories(seed: int, depth: int, *, views: bool = True) -> Plan:
    """Trees of this depth, with views that leave them at any place, of which several may begin alike."""
    made = conversations(Random(seed), depth, unscored=0.0, wide=True)
    return made.plan if views else plan_trajectories(made.trajectories, made.masks)


def weights_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


def student_pass(
    strategy: str, body: Body, planned: Plan, *, record: Any = False
) -> tuple[Tensor, list[tuple[int, Any]]]:
    """(N, H) of a pass whose backward has been run, and what a teacher reads, by group."""
    weights = weights_of(planned.num_rows, body.hidden_size)
    if strategy == "two_phase":
        hidden, read = torch.full_like(weights, torch.nan), {}
        for part in micro_batches(body, planned.student, micro_batch=MICRO_BATCH, record=record):
            assert hidden[part.rows].isnan().all()
            hidden[part.rows] = part.hidden.detach()
            part.attach((part.hidden * weights[part.rows]).sum()).backward()
            read.setdefault(part.group, part.prompts)
        return hidden, list(read.items())
    hidden, prompts = MODULES[strategy].hidden_states(body, planned.student, record=record)
    (hidden * weights).sum().backward()
    return hidden.detach(), [(-1, prompts)]


def assert_same_states(hidden: Tensor, expected: Tensor) -> None:
    assert hidden.shape == expected.shape
    assert float((hidden - expected).abs().max()) < 1e-10


def cases(names: Any = CONFIGS) -> list[Any]:
    """Every model runs two trees, of which the depths are 1 to 6 over all of them."""
    return [pytest.param(name, seed, id=f"{name}-{seed}") for seed, name in enumerate(names)]


def plans_of(seed: int, **options: Any) -> list[Plan]:
    return [random_trajectories(seed + more, depth=1 + (seed + more) % 6, **options) for more in (0, 3)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("name", "seed"), cases())
@pytest.mark.parametrize("strategy", ["cached", "two_phase"])
def test_trees_of_any_depth_give_naives_states_and_gradients(
    strategy: str, name: str, seed: int, checkpointing: bool
) -> None:
    for planned in plans_of(seed + checkpointing, views=False):
        expected, model = tiny(name), tiny(name)
        with double_precision():
            wanted, _ = student_pass("naive", find_body(expected), planned)
            hidden, _ = student_pass(strategy, find_body(checkpointed(model) if checkpointing else model), planned)
        assert_same_states(hidden, wanted)
        assert_same_gradients(gradients(model), gradients(expected))


@pytest.mark.parametrize(("name", "seed"), cases())
@pytest.mark.parametrize("strategy", ["cached", "two_phase"])
def test_a_live_teacher_reads_the_students_states_at_any_node(strategy: str, name: str, seed: int) -> None:
    """And the student's gradients stay what they are."""
    for planned in plans_of(seed):
        expected, model = tiny(name), tiny(name)
        body = find_body(model)
        record = [tree.reads for tree in planned.teacher]
        with double_precision():
            wanted, _ = student_pass("naive", find_body(expected), planned)
            hidden, read = student_pass(strategy, body, planned, record=record)
            with torch.no_grad():
                teacher, _ = MODULES["naive"].hidden_states(body, planned.teacher)
                other, _ = MODULES[strategy].hidden_states(body, planned.teacher)
                own = []
                for group, prompts in read:
                    trees = planned.teacher if group < 0 else planned.teacher[group : group + 1]
                    own.append(MODULES[strategy].hidden_states(body, trees, prompts=prompts)[0])
        assert_same_states(hidden, wanted)
        assert_same_gradients(gradients(model), gradients(expected))
        assert_same_states(other, teacher)
        order = torch.cat([tree.places.sort().values for tree in planned.teacher]).argsort()
        assert_same_states(torch.cat(own) if strategy == "cached" else torch.cat(own)[order], teacher)


@pytest.mark.parametrize(("name", "seed"), cases())
def test_each_token_is_computed_once_at_any_depth(name: str, seed: int) -> None:
    """Of a teacher those that the student does not have. Leaves run singly, or there would be padding."""
    for planned in plans_of(seed):
        model = tiny(name)
        body, seen = find_body(model), tokens_of(model)
        record = [tree.reads for tree in planned.teacher]
        with torch.no_grad():
            _, prompts = cached.hidden_states(body, planned.student, record=record, micro_batch=1)
            student = sum(seen)
            cached.hidden_states(body, planned.teacher, prompts=prompts, micro_batch=1)
        teacher = sum(seen) - student
        wanted = [
            sum(tree.tokens(read_shared=shared) for tree in trees)
            for trees, shared in ((planned.student, False), (planned.teacher, True))
        ]
        if name not in HYBRIDS:
            assert [student, teacher] == wanted
            continue
        # A leaf of one token is padded by one, and a state may be kept a token or two before it is wanted.
        assert wanted[0] <= student <= wanted[0] + sum(len(ids) == 1 for tree in planned.student for ids in tree.spans)
        assert wanted[1] <= teacher <= wanted[1] + 3 * sum(len(tree.spans) for tree in planned.teacher)


@pytest.mark.parametrize("name", ["llama", *sorted(HYBRIDS)])
@pytest.mark.parametrize("strategy", ["cached", "two_phase"])
def test_a_node_of_one_token_is_right_though_recurrent_layers_run_it_with_each_child(strategy: str, name: str) -> None:
    """One below another, with loss on what follows it and on itself; one trajectory ends there."""
    ends = [[7], [7, 8], [7, 8, 9, 3], [7, 8, 2, 5, 6], [7, 1], [7, 6, 6], [5, 5, 2]]
    trajectories = [[1, 2, 3, 4, *end] for end in ends]
    planned = plan_trajectories(trajectories, [[False, *[True] * (len(ids) - 1)] for ids in trajectories])
    assert {1} < {len(ids) for ids in planned.student[0].spans}
    expected, model = tiny(name), tiny(name)
    with double_precision():
        wanted, _ = student_pass("naive", find_body(expected), planned)
        hidden, _ = student_pass(strategy, find_body(model), planned)
    assert_same_states(hidden, wanted)
    assert_same_gradients(gradients(model), gradients(expected))


def search_tree(depth: int, branching: int, length: int) -> Plan:
    """Every node has `branching` children of so many tokens; each path is a trajectory, all of it with loss."""
    paths = [[1] * length]
    for level in range(depth):
        paths = [[*path, child] + [level] * (length - 1) for path in paths for child in range(branching)]
    return plan_trajectories(paths, [[False] + [True] * (len(path) - 1) for path in paths])


def test_two_phase_keeps_a_path_alive_and_not_the_tree() -> None:
    planned = search_tree(6, 3, 4)
    assert planned.student[0].depth == 6

    def peak(strategy: str) -> int:
        model = tiny("llama")
        body = find_body(model)
        with LiveBytes(uncounted_bytes=[weight.nbytes for weight in model.parameters()]) as probe:
            if strategy == "two_phase":
                for part in micro_batches(body, planned.student, micro_batch=3):
                    part.attach(part.hidden.sum()).backward()
            else:
                hidden, _ = MODULES[strategy].hidden_states(body, planned.student)
                hidden.sum().backward()
        return probe.peak_bytes

    assert peak("two_phase") < peak("packed") / 4
