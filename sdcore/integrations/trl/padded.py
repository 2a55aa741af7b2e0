"""Turns TRL's padded batches into plans: which positions have a loss, what they read, where values go back to.

    padded = plan_padded(prompt_ids, prompt_mask, completion_ids, completion_mask, loss_mask=loss_mask,
                         teacher_input_ids=teacher_ids, teacher_attention_mask=teacher_mask)
    out = distill_step(model, padded.plan, token_weights=padded.gather(weights), backward=None)
    per_token = padded.scatter(out.rows["per_token"])                                             # (B, C)

Prompts are padded on the left, completions on the right, and the teacher's rows are its prompts, padded on the left,
with the same completions. Neighbouring rows with equal prompts are one group, which computes its prompt once.

What differs from the obvious: a completion is computed up to its last token with a loss and no further, and one without
any is not computed at all. Holes in its mask are what a tool wrote: it is read, and has no loss. A padded batch that is
read without `position_ids`, as in TRL, starts its rows at position `number of pads`; a plan starts them at 0. For
rotary embeddings, which are relative, that is the same.

Not covered: holes in a prompt's mask, several completions in one row, and models with absolute positions, which the
planner cannot see (`docs/integrations/trl.md`).

Letters: B rows of the batch, P prompt, C completion, T the teacher's prompt, N rows of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ...errors import PlanError
from ...prefix.planner import Plan, plan


@dataclass(frozen=True, kw_only=True, eq=False)
class PaddedPlan:
    """Holds a plan, and which of a batch's positions its rows are."""

    plan: Plan
    shape: tuple[int, int]  # (B, C)
    index: Tensor  # (N,) int64 into the flattened (B, C), ascending: row by row, position by position

    def gather(self, values: Tensor) -> Tensor:
        """Takes (B, C) to (N,), in the order of `plan.target_ids`; in the graph."""
        return values.reshape(-1)[self.index]

    @property
    def completion_of(self) -> Tensor:
        """Says, (N,) int64, which of the B completions each token is of."""
        return self.index // self.shape[1]

    def scatter(self, rows: Tensor) -> Tensor:
        """Takes (N,) to (B, C), 0 where nothing was computed; in the graph."""
        return rows.new_zeros(self.shape[0] * self.shape[1]).index_put((self.index,), rows).view(self.shape)


def plan_padded(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    loss_mask: Tensor | None = None,
    teacher_input_ids: Tensor | None = None,
    teacher_attention_mask: Tensor | None = None,
) -> PaddedPlan:
    """Plans what a padded batch has to compute.

    Args:
        prompt_ids, prompt_mask: (B, P), padded on the left.
        completion_ids, completion_mask: (B, C), padded on the right. A row of the mask may be all 0, and have holes.
        loss_mask: (B, C), not 0 where a token has a loss; within `completion_mask`. None: that one.
        teacher_input_ids, teacher_attention_mask: (B, T + C), the teacher's prompts and the same completions. None: a
            plan of the student's pass alone.

    Ids are int64, masks of any dtype. Costs two synchronisations on a GPU. Raises `PlanError`, which names the argument
    and the row, before anything is computed.
    """
    shape = (completion_ids.shape[0], completion_ids.shape[-1])
    if completion_ids.dim() != 2 or prompt_ids.dim() != 2 or prompt_ids.shape[0] != shape[0] or shape[0] == 0:
        raise PlanError(
            f"prompt_ids and completion_ids must be (B, P) and (B, C) with B > 0, got {tuple(prompt_ids.shape)} and "
            f"{tuple(completion_ids.shape)}"
        )
    _require_like("prompt_mask", prompt_mask, prompt_ids)
    _require_like("completion_mask", completion_mask, completion_ids)
    loss_mask = completion_mask if loss_mask is None else loss_mask
    _require_like("loss_mask", loss_mask, completion_ids)
    masks = [prompt_mask != 0, completion_mask != 0, loss_mask != 0]
    given = [prompt_ids]
    if (teacher_input_ids is None) != (teacher_attention_mask is None):
        raise PlanError("teacher_input_ids and teacher_attention_mask must be given together, got one of them")
    if teacher_input_ids is not None and teacher_attention_mask is not None:
        _require_like("teacher_attention_mask", teacher_attention_mask, teacher_input_ids)
        if teacher_input_ids.dim() != 2 or teacher_input_ids.shape[0] != shape[0]:
            raise PlanError(f"teacher_input_ids must be (B={shape[0]}, T + C), got {tuple(teacher_input_ids.shape)}")
        if teacher_input_ids.shape[1] <= shape[1]:
            raise PlanError(
                f"teacher_input_ids must have a prompt before its C={shape[1]} completion tokens, got "
                f"{teacher_input_ids.shape[1]} tokens"
            )
        masks.append(teacher_attention_mask != 0)
        given += [teacher_input_ids, completion_ids]
    # All at once to the host, where the planner works too.
    widths = [tensor.shape[1] for tensor in (*masks, *given)]
    host = torch.cat([tensor.to(torch.int64) for tensor in (*masks, *given)], dim=1).cpu().split(widths, dim=1)
    prompt_on, completion_on, loss_on = (mask.bool() for mask in host[:3])
    starts = _left_padded("prompt_mask", prompt_on)
    require_none("loss_mask", loss_on & ~completion_on, "be 0 wherever completion_mask is")
    ended = completion_on.flip(1).cumsum(1).bool().flip(1)  # (B, C) up to the last token
    lengths = ended.sum(1).tolist()

    teachers: list[Tensor] = []
    if teacher_input_ids is not None:
        teacher_on, (_, teacher_ids, completions) = host[3].bool(), host[4:]
        width = teacher_ids.shape[1] - shape[1]
        require_none(
            "teacher_attention_mask", teacher_on[:, width:] != completion_on, "end with completion_mask, row by row"
        )
        read = (teacher_ids[:, width:] != completions) & ended
        require_none("teacher_input_ids", read, "end with the completions that the student reads")
        begins = _left_padded("teacher_attention_mask", teacher_on[:, :width])
        teachers = [teacher_input_ids[row, begin:width] for row, begin in enumerate(begins)]

    host_prompts = host[3] if len(given) == 1 else host[4]
    prompts = [host_prompts[row, start:].tolist() for row, start in enumerate(starts)]
    groups = [list(rows) for _, rows in groupby(range(len(prompts)), prompts.__getitem__)]
    planned = plan(
        [prompt_ids[group[0], starts[group[0]] :] for group in groups],
        [[completion_ids[row, : lengths[row]] for row in group] for group in groups],
        [[teachers[row] for row in group] for group in groups] if teachers else None,
        masks=[[loss_on[row, : lengths[row]] for row in group] for group in groups],
    )
    index = loss_on.reshape(-1).nonzero()[:, 0].to(planned.device)
    return PaddedPlan(plan=planned, shape=shape, index=index)


def _require_like(name: str, mask: Tensor, ids: Tensor) -> None:
    if mask.shape != ids.shape or mask.device != ids.device:
        raise PlanError(
            f"{name} must be as its ids, {tuple(ids.shape)} on {ids.device}, got {tuple(mask.shape)} on {mask.device}"
        )


def require_none(name: str, wrong: Tensor, wanted: str) -> None:
    """Raises `PlanError`, which names the first row and position that is `wrong`, (B, ·) bool."""
    if bool(wrong.any()):
        row, position = wrong.nonzero()[0].tolist()
        raise PlanError(f"{name} must {wanted}; row {row} does not, at position {position}")


def _left_padded(name: str, on: Tensor) -> list[int]:
    """Returns where each row starts; its tokens reach to the end."""
    require_none(name, on[:, :-1] & ~on[:, 1:], "be padded on the left only, without holes")
    starts = (on.shape[1] - on.sum(dim=1)).tolist()
    empty = next((row for row, start in enumerate(starts) if start == on.shape[1]), None)
    if empty is not None:
        raise PlanError(f"{name} must have at least one token in each prompt; row {empty} has none")
    return starts
