"""Padded batches become plans that read the same tokens, and values find their way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdcore.errors import PlanError
from sdcore.integrations.trl.padded import plan_padded

ID = st.integers(1, 6)


@st.composite
def batches(draw: Any) -> dict[str, list[list[int]]]:
    """Ragged rows: few prompts, so that neighbours are often equal; losses with holes and without any."""
    count = draw(st.integers(1, 5))
    prompts = draw(st.lists(st.lists(ID, min_size=1, max_size=4), min_size=1, max_size=2))
    rows: dict[str, list[list[int]]] = {"prompts": [], "completions": [], "teachers": [], "losses": []}
    for _ in range(count):
        rows["prompts"].append(draw(st.sampled_from(prompts)))
        completion = draw(st.lists(ID, max_size=5))
        rows["completions"].append(completion)
        rows["teachers"].append(draw(st.lists(ID, min_size=1, max_size=6)))
        rows["losses"].append(draw(st.lists(st.integers(0, 1), min_size=len(completion), max_size=len(completion))))
    return rows


def pad(rows: list[list[int]], *, left: bool, fill: int = 0) -> Tensor:
    width = max(1, max(map(len, rows)))
    return torch.tensor([[fill] * (width - len(r)) + r if left else r + [fill] * (width - len(r)) for r in rows])


def padded(rows: dict[str, list[list[int]]]) -> dict[str, Tensor]:
    completion_ids = pad(rows["completions"], left=False)
    completion_mask = pad([[1] * len(r) for r in rows["completions"]], left=False)
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


@given(batches())
def test_each_row_of_the_plan_reads_and_predicts_what_its_padded_row_does(rows: dict[str, list[list[int]]]) -> None:
    found = plan_padded(**padded(rows))
    assert sum(found.sizes) == len(rows["prompts"])
    row = 0
    for tree, taught in zip(found.plan.student, found.plan.teacher, strict=True):
        for i, count in enumerate(tree.rows):
            completion, losses = rows["completions"][row], rows["losses"][row]
            assert count == found.lengths[row] == (max((j + 1 for j, on in enumerate(losses) if on), default=0))
            if count:
                assert tree.sequence(i).tolist() == rows["prompts"][row] + completion[: count - 1]
                assert taught.sequence(i).tolist() == rows["teachers"][row] + completion[: count - 1]
            row += 1
    wanted = [c[j] for c, n in zip(rows["completions"], found.lengths, strict=True) for j in range(n)]
    assert found.plan.target_ids.tolist() == wanted


@given(batches())
def test_neighbours_with_equal_prompts_are_one_group(rows: dict[str, list[list[int]]]) -> None:
    found = plan_padded(**padded(rows))
    starts = [sum(found.sizes[:g]) for g in range(len(found.sizes))]
    changes = [r for r in range(len(rows["prompts"])) if r == 0 or rows["prompts"][r] != rows["prompts"][r - 1]]
    assert starts == changes


@given(batches())
def test_values_come_back_to_where_they_were_taken_from(rows: dict[str, list[list[int]]]) -> None:
    batch = padded(rows)
    found = plan_padded(**batch)
    values = torch.randn(found.shape, requires_grad=True)
    back = found.scatter(found.gather(values))
    computed = torch.arange(found.shape[1]) < torch.tensor(found.lengths)[:, None]
    assert torch.equal(back, torch.where(computed, values, 0.0))
    back.sum().backward()
    assert torch.equal(values.grad, computed.float())
    assert torch.equal(found.gather(batch["completion_ids"]), found.plan.target_ids)
    owners = torch.arange(found.shape[0])[:, None].expand(found.shape)
    assert torch.equal(found.completion_of, found.gather(owners))
    assert torch.equal(found.gather_completions(torch.arange(found.shape[0])), found.completion_of)


ROWS = {
    "prompts": [[1, 2], [3]],
    "completions": [[4, 5, 6], [4]],
    "teachers": [[1], [2, 3]],
    "losses": [[1, 1, 1], [1]],
}


def test_a_row_without_a_loss_is_not_computed() -> None:
    batch = padded(ROWS)
    batch["loss_mask"][0] = 0
    found = plan_padded(**batch)
    assert found.lengths == (0, 1)
    assert [tree.active for tree in found.plan.student] == [(), (0,)]


def test_no_loss_at_all_is_an_empty_plan() -> None:
    batch = padded(ROWS)
    batch["loss_mask"][:] = 0
    found = plan_padded(**batch)
    assert found.plan.num_rows == 0
    assert found.scatter(torch.zeros(0)).shape == found.shape


def test_masks_of_any_dtype_mean_the_same() -> None:
    batch = padded(ROWS)
    other = {name: one.bool() if "mask" in name else one for name, one in batch.items()}
    assert torch.equal(plan_padded(**batch).index, plan_padded(**other).index)


def hole(batch: dict[str, Tensor]) -> None:
    batch["prompt_mask"] = torch.tensor([[1, 0], [0, 1]])


def right_padded_prompt(batch: dict[str, Tensor]) -> None:
    batch["prompt_mask"] = torch.tensor([[1, 1], [1, 0]])


def no_prompt(batch: dict[str, Tensor]) -> None:
    batch["prompt_mask"][1] = 0


def hole_in_completion(batch: dict[str, Tensor]) -> None:
    batch["completion_mask"][0, 1] = 0


def loss_on_padding(batch: dict[str, Tensor]) -> None:
    batch["loss_mask"][1, 2] = 1


def other_completion(batch: dict[str, Tensor]) -> None:
    batch["teacher_input_ids"][0, -2] = 6


def other_completion_mask(batch: dict[str, Tensor]) -> None:
    batch["teacher_attention_mask"][1, -1] = 1


def hole_in_teacher(batch: dict[str, Tensor]) -> None:
    batch["teacher_attention_mask"][1, :2] = torch.tensor([1, 0])


def teacher_without_prompt(batch: dict[str, Tensor]) -> None:
    for name in ("teacher_input_ids", "teacher_attention_mask"):
        batch[name] = batch[name][:, 2:]


def one_of_two(batch: dict[str, Tensor]) -> None:
    del batch["teacher_attention_mask"]


def narrow_mask(batch: dict[str, Tensor]) -> None:
    batch["prompt_mask"] = batch["prompt_mask"][:, :1]


def no_rows(batch: dict[str, Tensor]) -> None:
    for name in batch:
        batch[name] = batch[name][:0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (hole, "prompt_mask must be padded on the left only, without holes; row 0 does not, at position 0"),
        (right_padded_prompt, "prompt_mask must be padded on the left only.*row 1"),
        (no_prompt, "prompt_mask must have at least one token in each prompt; row 1 has none"),
        (hole_in_completion, "completion_mask must be padded on the right only.*row 0 does not, at position 1"),
        (loss_on_padding, "loss_mask must be 0 wherever completion_mask is; row 1 does not, at position 2"),
        (other_completion, "teacher_input_ids must end with the completions.*row 0 does not, at position 1"),
        (other_completion_mask, "teacher_attention_mask must end with completion_mask.*row 1 does not, at position 2"),
        (hole_in_teacher, "teacher_attention_mask must be padded on the left only.*row 1"),
        (teacher_without_prompt, "teacher_input_ids must have a prompt before its C=3 completion tokens, got 3"),
        (one_of_two, "teacher_input_ids and teacher_attention_mask must be given together"),
        (narrow_mask, r"prompt_mask must be as its ids, \(2, 2\)"),
        (no_rows, "B > 0"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(spoil: Any, message: str) -> None:
    batch = padded(ROWS)
    spoil(batch)
    with pytest.raises(PlanError, match=message):
        plan_padded(**batch)
