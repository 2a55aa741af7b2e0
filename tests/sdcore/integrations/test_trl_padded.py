"""Padded batches become plans that read the same tokens, and values find their way back."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdcore.errors import PlanError
from sdcore.integrations.trl.padded import PaddedPlan, plan_padded

ID = st.integers(1, 6)


@st.composite
def batches(draw: Any) -> dict[str, list[list[int]]]:
    """Draws ragged rows: few prompts, so that neighbours are often equal; masks and losses with holes or empty."""
    count = draw(st.integers(1, 5))
    prompts = draw(st.lists(st.lists(ID, min_size=1, max_size=4), min_size=1, max_size=2))
    rows: dict[str, list[list[int]]] = {name: [] for name in ("prompts", "completions", "teachers", "masks", "losses")}
    for _ in range(count):
        rows["prompts"].append(draw(st.sampled_from(prompts)))
        completion = draw(st.lists(ID, max_size=5))
        rows["completions"].append(completion)
        rows["teachers"].append(draw(st.lists(ID, min_size=1, max_size=6)))
        mask, losses = (draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in [len(completion)] * 2)
        rows["masks"].append([*mask[:-1], 1] if mask else [])
        rows["losses"].append([on * own for on, own in zip(losses, rows["masks"][-1], strict=True)])
    return rows


def pad(rows: list[list[int]], *, left: bool, fill: int = 0) -> Tensor:
    width = max(1, max(map(len, rows)))
    return torch.tensor([[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows])


def padded(rows: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    completion_ids = pad(rows["completions"], left=False)
    completion_mask = pad(rows["masks"], left=False)
    return {
        "prompt_ids": pad(rows["prompts"], left=True),
        "prompt_mask": pad([[1] * len(r) for r in rows["prompts"]], left=True),
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "loss_mask": pad(rows["losses"], left=False),
        "teacher_input_ids": torch.cat([pad(rows["teachers"], left=True), completion_ids], dim=1),
        "teacher_attention_mask": torch.cat(
            [pad([[1] * len(r) for r in rows["teachers"]], left=True), completion_mask], dim=1
        ),
    }


def counts_of(planned: PaddedPlan) -> list[int]:
    """How many tokens of each completion have a loss."""
    return [count for tree in planned.plan.student for count in tree.counts]


@given(batches())
def test_each_row_of_the_plan_reads_and_predicts_what_its_padded_row_does(rows: dict[str, list[list[int]]]) -> None:
    planned = plan_padded(**padded(rows))
    assert counts_of(planned) == [sum(losses) for losses in rows["losses"]]
    row = 0
    for tree, taught in zip(planned.plan.student, planned.plan.teacher, strict=True):
        for i, count in enumerate(tree.counts):
            completion, losses = rows["completions"][row], rows["losses"][row]
            with_loss = [j for j, on in enumerate(losses) if on]
            for own, prompt in ((tree, rows["prompts"][row]), (taught, rows["teachers"][row])):
                assert own.positions[own.slices[i]].tolist() == [len(prompt) + j - 1 for j in with_loss]
                if count:
                    assert own.sequence(i).tolist() == prompt + completion[: with_loss[-1]]
            row += 1
    pairs = [zip(ids, on, strict=True) for ids, on in zip(rows["completions"], rows["losses"], strict=True)]
    wanted = [token for of_row in pairs for token, on in of_row if on]
    assert planned.plan.target_ids.tolist() == wanted


@given(batches())
def test_neighbours_with_equal_prompts_are_one_group(rows: dict[str, list[list[int]]]) -> None:
    planned = plan_padded(**padded(rows))
    starts = [0, *accumulate(len(tree.counts) for tree in planned.plan.student)][:-1]
    changes = [r for r in range(len(rows["prompts"])) if r == 0 or rows["prompts"][r] != rows["prompts"][r - 1]]
    assert starts == changes


@given(batches())
def test_values_come_back_to_where_they_were_taken_from(rows: dict[str, list[list[int]]]) -> None:
    batch = padded(rows)
    planned = plan_padded(**batch)
    values = torch.randn(planned.shape, requires_grad=True)
    back = planned.scatter(planned.gather(values))
    assert torch.equal(back, torch.where(batch["loss_mask"] != 0, values, 0.0))
    back.sum().backward()
    assert torch.equal(values.grad, batch["loss_mask"].float())
    assert torch.equal(planned.gather(batch["completion_ids"]), planned.plan.target_ids)
    owners = torch.arange(planned.shape[0])[:, None].expand(planned.shape)
    assert torch.equal(planned.completion_of, planned.gather(owners))


ROWS = {
    "prompts": [[1, 2], [3]],
    "completions": [[4, 5, 6], [4]],
    "teachers": [[1], [2, 3]],
    "masks": [[1, 1, 1], [1]],
    "losses": [[1, 1, 1], [1]],
}


def test_a_row_without_a_loss_is_not_computed() -> None:
    batch = padded(ROWS)
    batch["loss_mask"][0] = 0
    planned = plan_padded(**batch)
    assert counts_of(planned) == [0, 1]
    assert [tree.active for tree in planned.plan.student] == [(), (0,)]


def test_no_loss_at_all_is_an_empty_plan() -> None:
    batch = padded(ROWS)
    batch["loss_mask"][:] = 0
    planned = plan_padded(**batch)
    assert planned.plan.num_rows == 0
    assert planned.scatter(torch.zeros(0)).shape == planned.shape


def test_masks_of_any_dtype_mean_the_same() -> None:
    batch = padded(ROWS)
    other = {name: values.bool() if "mask" in name else values for name, values in batch.items()}
    assert torch.equal(plan_padded(**batch).index, plan_padded(**other).index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_mask": [[1, 0], [0, 1]]},
            "prompt_mask must be padded on the left only, without holes; row 0 does not, at position 0",
        ),
        ({"prompt_mask": [[1, 1], [1, 0]]}, "prompt_mask must be padded on the left only.*row 1"),
        ({"prompt_mask": [[1, 1], [0, 0]]}, "prompt_mask must have at least one token in each prompt; row 1 has none"),
        ({"prompt_mask": [[1], [0]]}, r"prompt_mask must be as its ids, \(2, 2\)"),
        ({"completion_mask": [[1], [1]]}, r"completion_mask must be as its ids, \(2, 3\)"),
        (
            {"loss_mask": [[1, 1, 1], [1, 0, 1]]},
            "loss_mask must be 0 wherever completion_mask is; row 1 does not, at position 2",
        ),
        (
            {"teacher_input_ids": [[0, 1, 4, 6, 6], [2, 3, 4, 0, 0]]},
            "teacher_input_ids must end with the completions.*row 0 does not, at position 1",
        ),
        (
            {"teacher_attention_mask": [[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]]},
            "teacher_attention_mask must end with completion_mask.*row 1 does not, at position 2",
        ),
        (
            {"teacher_attention_mask": [[0, 1, 1, 1, 1], [1, 0, 1, 0, 0]]},
            "teacher_attention_mask must be padded on the left only.*row 1",
        ),
        (
            {"teacher_input_ids": [[4, 5, 6], [4, 0, 0]], "teacher_attention_mask": [[1, 1, 1], [1, 0, 0]]},
            "teacher_input_ids must have a prompt before its C=3 completion tokens, got 3",
        ),
        ({"teacher_attention_mask": None}, "teacher_input_ids and teacher_attention_mask must be given together"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    spoilt = {name: None if values is None else torch.tensor(values) for name, values in changes.items()}
    with pytest.raises(PlanError, match=message):
        plan_padded(**padded(ROWS) | spoilt)


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(PlanError, match="B > 0"):
        plan_padded(**{name: values[:0] for name, values in padded(ROWS).items()})
