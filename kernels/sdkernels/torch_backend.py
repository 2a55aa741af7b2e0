"""Row values and gradient tile from a tile of logits, in plain torch operations.

What differs from the obvious: the element-wise part runs over a few rows at a time through preallocated scratch, so
that on a CPU its dozens of passes stay in cache; and every loss is summed from terms of second order in
`u = log q - log p`, in float64 where u is small. The gradient overwrites the student's logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .support import LEAST_MASS, bucket_divergence, clipped_divergence, gradient_view, transform_, with_tail
from .tiling import BLOCK_BYTES_PER_ENTRY, block_rows
from .types import Objective, RowValues, TileRows

# Above this log-ratio u, e^u is out of reach of float32, and p·(e^u - 1) has to be taken as q - p.
FAR = 40.0
# A loss below this is summed again in float64. In float32 it may be off by 1e-7 over the root mean square of u, which
# is about the root of twice the loss.
NEAR = 1e-2
# Gaps between the two sides' logits up to this size leave e^gap - 1 its digits next to 1.
CLOSE = 4.0
# What `HeadWalk` may project as the teacher: see `TileRows.teacher_is_gap`.
TAKES_GAP = True
# Sums of e^z between this and its inverse are taken as they are: neither they nor their parts over- or underflow.
ORDINARY = 1e30


def scratch_bytes(rows: int, vocab: int, device_type: str, topk: int) -> tuple[int, int]:
    """Bytes needed beside the logits of a tile: once, and per row of it."""
    return BLOCK_BYTES_PER_ENTRY * vocab * min(max(rows, 1), block_rows(vocab, device_type)), 0


def divergence_tile(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    rows: TileRows,
    objective: Objective,
    *,
    want_gradient: bool,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[RowValues, Tensor | None]:
    """Both logits (C, V) are destroyed; the gradient, with respect to the raw projection, lies in `student_logits`."""
    parts = []
    gradient = gradient_view(student_logits, gradient_dtype) if want_gradient else None
    for block, scratch in _blocks(student_logits):
        parts.append(
            _divergence_block(
                student_logits[block],
                None if teacher_logits is None else teacher_logits[block],
                _rows_of(rows, block),
                objective,
                scratch,
                want_gradient,
            )
        )
        if gradient is not None:
            _narrow(student_logits[block], gradient[block])
    values = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return RowValues._make(values), gradient


def logprob_tile(
    logits: Tensor,
    rows: TileRows,
    objective: Objective,
    *,
    grad_logprobs: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Log-probabilities of `rows.target_ids` (C,), entropy (C,), and the gradient tile for the given upstream ones."""
    logprobs, entropies = [], []
    want_gradient = grad_logprobs is not None or grad_entropy is not None
    gradient = gradient_view(logits, gradient_dtype) if want_gradient else None
    for block, scratch in _blocks(logits):
        z, target_ids = logits[block], None if rows.target_ids is None else rows.target_ids[block]
        slope = _transform_(z, objective.student, rows.student_bias)
        side = _normalise(z, scratch.neg_p, scratch.a)
        scratch.neg_p.mul_(-1.0 / side.total)
        entropies.append(side.entropy)
        if target_ids is not None:
            logprobs.append(side.logprobs_at(target_ids))
        if gradient is None:
            continue
        # d entropy / dz = -p (log p + H), d log p(y) / dz = onehot(y) - p; z still holds log p + log_sum.
        if grad_entropy is not None:
            upstream = grad_entropy[block][:, None]
            z.add_(side.entropy[:, None] - side.log_sum).mul_(upstream)
        else:
            z.zero_()
        if grad_logprobs is not None and target_ids is not None:
            upstream = grad_logprobs[block][:, None]
            z.add_(upstream).mul_(scratch.neg_p).scatter_add_(1, target_ids[:, None], upstream)
        else:
            z.mul_(scratch.neg_p)
        _chain_(z, objective.student, slope)
        _narrow(z, gradient[block])
    return torch.cat(logprobs) if logprobs else None, torch.cat(entropies), gradient


def topk_tile(logits: Tensor, rows: TileRows, objective: Objective, k: int) -> tuple[Tensor, Tensor]:
    """The k most likely ids (C, k), most likely first, and their log-probabilities (C, k)."""
    _transform_(logits, objective.student, rows.student_bias)
    values, ids = logits.topk(k, dim=-1)
    return ids, values - torch.logsumexp(logits, dim=-1, keepdim=True)


class Scratch(NamedTuple):
    """Buffers of one block of rows in the compute dtype."""

    neg_p: Tensor
    u: Tensor  # not the teacher's logits: what is only read of a tile is not written back to memory
    a: Tensor
    b: Tensor


class Side(NamedTuple):
    """One distribution of a block: its final logits, shifted where they had to be, and their normalisation."""

    z: Tensor  # (rows, V)
    total: Tensor  # (rows, 1) sum of the exponentials
    log_sum: Tensor  # (rows, 1) its logarithm
    entropy: Tensor  # (rows,) nats

    def logprobs_at(self, ids: Tensor) -> Tensor:
        """(rows,) for ids (rows,)."""
        return (self.z.gather(1, ids[:, None]) - self.log_sum)[:, 0]


class Teacher(NamedTuple):
    """The teacher of a block in relation to its student; either `t` or `side` is there."""

    u: Tensor  # (rows, V) log q - log p
    t: Tensor | None  # (rows, V) q/p - 1, where the two are close
    side: Side | None  # where they may not be; its exponentials are then in scratch.a
    entropy: Tensor  # (rows,) nats


def _blocks(logits: Tensor) -> list[tuple[slice, Scratch]]:
    count, vocab = logits.shape
    size = min(block_rows(vocab, logits.device.type), max(count, 1))
    whole = [logits.new_empty((size, vocab)) for _ in Scratch._fields]
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return [(block, Scratch(*(buffer[: block.stop - block.start] for buffer in whole))) for block in blocks]


def _rows_of(rows: TileRows, block: slice) -> TileRows:
    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[block]

    return TileRows(
        student_bias=rows.student_bias,
        teacher_bias=rows.teacher_bias,
        target_ids=part(rows.target_ids),
        teacher_ids=part(rows.teacher_ids),
        teacher_logprobs=part(rows.teacher_logprobs),
        teacher_is_gap=rows.teacher_is_gap,
    )


def _transform_(z: Tensor, head: tuple[float, float | None, float], bias: Tensor | None) -> Tensor | None:
    """From raw projections to final logits in place; returns the soft-cap's derivative where there is one."""
    transform_(z, head, bias)
    _, softcap, temperature = head
    return None if softcap is None else (z * (temperature / softcap)).square_().neg_().add_(1.0)


def _chain_(gradient: Tensor, head: tuple[float, float | None, float], slope: Tensor | None) -> None:
    """From the gradient with respect to final logits to that with respect to raw projections, in place."""
    scale, _, temperature = head
    if slope is not None:
        gradient.mul_(slope)
    if scale != temperature:
        gradient.mul_(scale / temperature)


def _narrow(block: Tensor, view: Tensor) -> None:
    """Write a block of the gradient where `gradient_view` has it, over its own memory."""
    if view.dtype != block.dtype:
        view.copy_(block.to(view.dtype))


def _normalise(z: Tensor, exponentials: Tensor, spare: Tensor) -> Side:
    """Write `e^z` of final logits (rows, V) into `exponentials`, and normalise."""
    total = torch.exp(z, out=exponentials).sum(-1, keepdim=True)
    low, high = total.aminmax()
    # Logits of usual size need no shift to a maximum of 0, which would cost two more passes.
    if not (float(low) > 1 / ORDINARY and float(high) < ORDINARY):
        z.sub_(z.amax(-1, keepdim=True))
        total = torch.exp(z, out=exponentials).sum(-1, keepdim=True)
    log_sum = total.log()
    entropy = log_sum - torch.mul(exponentials, z, out=spare).sum(-1, keepdim=True) / total
    return Side(z, total, log_sum, entropy[:, 0])


def _divergence_block(
    z: Tensor,
    z_teacher: Tensor | None,
    rows: TileRows,
    objective: Objective,
    scratch: Scratch,
    want_gradient: bool,
) -> RowValues:
    slope = _transform_(z, objective.student, rows.student_bias)
    student = _normalise(z, scratch.neg_p, scratch.a)
    scratch.neg_p.mul_(-1.0 / student.total)
    teacher = None if z_teacher is None else _teacher(student, z_teacher, rows, objective, scratch)
    ids = rows.target_ids
    student_logprobs = None if ids is None else student.logprobs_at(ids)
    gap = None if ids is None or teacher is None else teacher.u.gather(1, ids[:, None])[:, 0]

    if teacher is None or objective.support == "topk":
        loss = _top_k(student, teacher, rows, objective, scratch)
    elif student_logprobs is not None and gap is not None and objective.support == "sampled":
        loss = _sampled(student, student_logprobs, -gap, rows, scratch)
    else:
        loss = _full_vocabulary(student, teacher, objective, scratch)
    if want_gradient:
        _chain_(z, objective.student, slope)
    return RowValues(
        loss,
        student_logprobs,
        None if gap is None or student_logprobs is None else student_logprobs + gap,
        student.entropy,
        None if teacher is None else teacher.entropy,
    )


def _teacher(student: Side, z_teacher: Tensor, rows: TileRows, objective: Objective, scratch: Scratch) -> Teacher:
    """The teacher of a block from its raw projection, or from that of the difference of the hidden states."""
    if not rows.teacher_is_gap:
        _transform_(z_teacher, objective.teacher, rows.teacher_bias)
    else:
        scale, _, temperature = objective.student
        gap = z_teacher if scale == temperature else z_teacher.mul_(scale / temperature)
        low, high = gap.aminmax()
        if float(low) > -CLOSE and float(high) < CLOSE:
            return _close_teacher(student, gap, scratch)
        z_teacher.add_(student.z)
    side = _normalise(z_teacher, scratch.a, scratch.b)
    u = torch.sub(side.z, student.z, out=scratch.u).sub_((side.total / student.total).log_())
    return Teacher(u, None, side, side.entropy)


def _close_teacher(student: Side, gap: Tensor, scratch: Scratch) -> Teacher:
    """From `gap`, teacher's minus student's final logits, without a difference of anything larger than it is.

    With `g = e^gap - 1` and `G = Σ p g`: `u = gap - log(1 + G)` and `q/p - 1 = (g - G) / (1 + G)`.
    """
    neg_p, spare = scratch.neg_p, scratch.b
    t = torch.expm1(gap, out=scratch.a)
    growth = torch.mul(t, neg_p, out=spare).sum(-1, keepdim=True).neg_()
    shift = growth.log1p()
    u = torch.sub(gap, shift, out=scratch.u)
    t.sub_(growth).div_(1 + growth)
    # Entropy of q = p (1 + t), whose logits are the student's plus the gap.
    products = torch.add(student.z, gap, out=spare).mul_(neg_p)
    mean = products.sum(-1, keepdim=True).add_(products.mul_(t).sum(-1, keepdim=True)).neg_()
    return Teacher(u, t, None, (student.log_sum + shift - mean)[:, 0])


def _full_vocabulary(student: Side, teacher: Teacher, objective: Objective, scratch: Scratch) -> Tensor:
    """Loss (rows,); the student's z becomes its gradient with respect to the final logits."""
    alpha, normalize, z, u = objective.alpha, objective.normalize, student.z, teacher.u
    if objective.entry_clip is not None:
        # Clipped sums are of first order: here an error in the normalisers counts.
        log_p = z.double().log_softmax(-1)
        log_q = log_p + u if teacher.side is None else teacher.side.z.double().log_softmax(-1)
        loss, gradient = clipped_divergence(log_p, log_q, alpha, normalize, objective.entry_clip)
        z.copy_(gradient)
        return loss.to(z.dtype)
    if teacher.t is None and u.amax() > FAR:
        log_p = z.double() - student.log_sum
        loss, gradient = bucket_divergence(log_p, log_p + u, alpha, normalize)
        z.copy_(gradient)
        return loss.to(z.dtype)

    # The summands below are divided by p, and their first orders in u cancel.
    neg_p, spare = scratch.neg_p, scratch.b
    t, r = (torch.expm1(u, out=z), scratch.a) if teacher.t is None else (teacher.t, z)
    scale = 1.0
    if alpha == 0.0:
        summands = torch.addcmul(u, u, t, out=spare).sub_(t)
    elif alpha == 1.0:
        summands = torch.sub(t, u, out=spare)
    else:
        scale = 1 / (1 - alpha) if normalize else alpha
        torch.mul(t, alpha, out=r).log1p_()  # log(m/p)
        from_mixture = torch.sub(u, r, out=spare)  # log(q/m)
        summands = torch.addcmul(spare, from_mixture, t, out=spare).sub_(r, alpha=(1 - alpha) / alpha)
    loss = summands.mul_(neg_p).sum(-1).mul_(-scale)
    if loss.amin() < NEAR * scale:
        loss = _near_loss(u, neg_p, alpha).mul_(scale)
    loss.clamp_(min=0.0)

    if alpha == 0.0:
        torch.mul(t, neg_p, out=z)
    elif alpha == 1.0:
        torch.mul(u.add_(loss[:, None]), neg_p, out=z)
    else:
        centre = torch.mul(r, neg_p, out=spare).sum(-1, keepdim=True)
        torch.addcmul(spare, neg_p, centre, out=z).mul_(scale * (1 - alpha) / alpha)
    return loss


def _near_loss(u: Tensor, neg_p: Tensor, alpha: float) -> Tensor:
    """The same sums with the summands in float64, where the first order of a small u cancels to 1e-16."""
    wide = u.double()
    ratio = wide.exp()  # q/p
    if alpha == 0.0:
        summands = wide.sub_(1.0).mul_(ratio).add_(1.0)
    elif alpha == 1.0:
        summands = ratio.sub_(wide).sub_(1.0)
    else:
        log_mixture = (ratio * alpha).add_(1 - alpha).log_()  # log(m/p)
        summands = wide.sub_(log_mixture).mul_(ratio).sub_(log_mixture, alpha=(1 - alpha) / alpha)
    return summands.to(u.dtype).mul_(neg_p).sum(-1).neg_()


def _sampled(student: Side, log_p: Tensor, gap: Tensor, rows: TileRows, scratch: Scratch) -> Tensor:
    """sg(log p(y) - log q(y))·log p(y), the score-function form of the reverse KL, given the bracket."""
    torch.mul(scratch.neg_p, gap[:, None], out=student.z)
    if rows.target_ids is not None:
        student.z.scatter_add_(1, rows.target_ids[:, None], gap[:, None])
    return gap * log_p


def _top_k(student: Side, teacher: Teacher | None, rows: TileRows, objective: Objective, scratch: Scratch) -> Tensor:
    """Loss (rows,) over k ids and the tail; the student's z becomes its gradient with respect to the final logits."""
    z = student.z
    ids = rows.teacher_ids
    if ids is None:
        chooser = z
        if teacher is not None and objective.topk_of == "teacher":
            chooser = torch.add(z, teacher.u, out=scratch.b) if teacher.side is None else teacher.side.z
        ids = chooser.topk(objective.topk, dim=-1, sorted=False).indices
    tail = objective.tail and ids.shape[1] < z.shape[1]
    log_p = z.gather(1, ids).double() - student.log_sum
    tail_p = -_mass_outside(ids, scratch.neg_p) if tail else None
    buckets_p = with_tail(log_p, tail_p, tail)
    if teacher is not None:
        log_q = log_p + teacher.u.gather(1, ids)
        tail_q = None
        if tail_p is not None and teacher.side is not None:
            tail_q = _mass_outside(ids, scratch.a) / teacher.side.total[:, 0]
        elif tail_p is not None and teacher.t is not None:
            tail_q = tail_p - torch.mul(scratch.neg_p, teacher.t, out=scratch.b).sum(-1).double()
        buckets_q = with_tail(log_q, tail_q, tail)
    elif rows.teacher_logprobs is not None:
        buckets_q = with_tail(rows.teacher_logprobs.double(), None, tail)
    loss, gradient = bucket_divergence(buckets_p, buckets_q, objective.alpha, objective.normalize)
    gradient = gradient.to(z.dtype)
    if tail_p is not None:
        share = -gradient[:, -1] / tail_p.clamp(min=LEAST_MASS).to(z.dtype)
        torch.mul(scratch.neg_p, share[:, None], out=z)
    else:
        z.zero_()
    z.scatter_(1, ids, gradient[:, : ids.shape[1]])
    return loss.to(z.dtype)


def _mass_outside(ids: Tensor, masses: Tensor) -> Tensor:
    """Sum of each row's masses outside `ids`, which are set to 0: exact where one minus the listed mass is not."""
    return masses.scatter_(1, ids, 0.0).sum(-1).double()
