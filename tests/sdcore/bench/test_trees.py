"""The benchmark of conversations draws what it says, and its dense mask is what each token of a tree sees."""

from __future__ import annotations

import pytest
import torch

from sdcore.bench.options import Options
from sdcore.bench.suites import trees
from sdcore.bench.suites.prefix import STEP, STUDENT
from sdcore.bench.suites.trees import QUICK, SUITE, VIEWS, WORKLOADS, Workload


def drawn(workload: Workload) -> tuple[torch.Tensor, list[list[trees.Turn]]]:
    return trees.conversations(workload, torch.Generator().manual_seed(0), 1000)


@pytest.mark.parametrize("name", WORKLOADS)
def test_turns_have_the_lengths_that_are_said(name: str) -> None:
    workload = WORKLOADS[name]
    prompt, conversations = drawn(workload)
    assert len(prompt) == workload.prompt
    assert {len(turns) for turns in conversations} == {workload.turns}
    for turn in (turn for turns in conversations for turn in turns):
        assert workload.own[0] <= len(turn.own) <= workload.own[1]
        assert workload.other[0] <= len(turn.other) <= workload.other[1]


def test_a_search_has_every_path_and_attempts_fork_after_a_turn() -> None:
    _, paths = drawn(WORKLOADS["search"])
    assert len(paths) == 3**6
    # Equal turns are one object, so that a level has as many as it has nodes.
    assert [len({id(turns[level].own) for turns in paths}) for level in range(6)] == [3, 9, 27, 81, 243, 729]
    _, attempts = drawn(WORKLOADS["forks"])
    assert len(attempts) == 8
    assert len({id(turns[0].own) for turns in attempts}) == 1
    assert len({id(turns[-1].own) for turns in attempts}) == 8


def test_the_cases_are_those_of_the_issue_and_a_quick_run_has_the_same_works() -> None:
    works = {("turns", VIEWS), ("turns", STEP), ("search", STUDENT), ("forks", STUDENT)}
    for quick in (False, True):
        assert {(case.workload, case.work) for case in trees.own_cases("cpu", quick=quick)} == works
    assert [(QUICK[name].context > 0, QUICK[name].branching > 1, QUICK[name].attempts > 1) for name in WORKLOADS] == [
        (workload.context > 0, workload.branching > 1, workload.attempts > 1) for workload in WORKLOADS.values()
    ]


def test_layers_are_cut_and_a_model_is_taken() -> None:
    options = Options(suite="trees", model="qwen3-0.6b", shapes=("L=2",))
    assert {case.model for case in SUITE.cases(options, "cpu")} == {"qwen3-0.6b, 2 layers"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_dense_mask_shows_each_token_the_path_to_it(name: str) -> None:
    case = next(case for case in trees.own_cases("cpu", quick=True) if case.workload == name)
    setup = trees.make_setup(case)
    for tree in (*setup.plan.student, *(tree.alone for tree in setup.plan.teacher)):
        visible = trees.dense_mask(tree)
        for i, start in enumerate(tree.starts[:-1]):
            seen = [at for node in tree.path(i) for at in range(tree.starts[node], tree.starts[node + 1])]
            for at in range(start, tree.starts[i + 1]):
                assert visible[at].nonzero().flatten().tolist() == [k for k in seen if k <= at]


def test_a_row_for_every_turn_asks_for_the_same_states_in_the_same_order() -> None:
    for case in trees.own_cases("cpu", quick=True):
        setup = trees.make_setup(case)
        assert torch.equal(setup.per_turn.target_ids, setup.plan.target_ids)
        rows = len(setup.per_turn.student[0].counts)
        assert rows == sum(len(turns) for turns in drawn(case.drawn)[1])
        assert len(setup.single_turns) == (rows if case.drawn.context else 0)
