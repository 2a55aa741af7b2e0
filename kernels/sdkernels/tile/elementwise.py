"""Does what is done to every entry of a block of logits, in place through scratch, and sums over its columns.

The columns are the whole vocabulary (`torch_backend`) or one rank's part of it (`vocab_parallel`). So nothing here uses
a sum over the vocabulary before the caller, who may have to add other ranks' parts to it, hands it in.

What differs from the obvious: every loss is summed from terms of second order in `u = log q - log p`, in float64 where
u is small, and its gradient comes as numerators and one number a row: `numerators - p · centre`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import in_float64
from .tiling import block_rows
from .topk import bucket_terms

# Above this log-ratio u, e^u is out of reach of float32, and p·(e^u - 1) has to be taken as q - p.
FAR = 40.0
# A loss below this is summed again in float64. In float32 it may be off by 1e-7 over the root mean square of u, which
# is about the root of twice the loss.
NEAR = 1e-2
# Gaps between the two sides' logits up to this size leave e^gap - 1 its digits next to 1.
CLOSE = 4.0
# Sums of e^z between these are taken as they are: nothing overflows, and what underflows is below 1e-27 of the sum,
# which a log-ratio of up to `FAR` leaves below 1e-9.
ORDINARY = 1e-10, 1e30


class Scratch(NamedTuple):
    """Holds the buffers of one block of rows in the compute dtype."""

    neg_p: Tensor
    u: Tensor  # not the teacher's logits: what is only read of a tile is not written back to memory
    a: Tensor
    b: Tensor


class Sums(NamedTuple):
    """What one side of a block adds up to over the columns at hand, (rows, 1) each."""

    total: Tensor  # Σ e^z
    weighted: Tensor  # Σ e^z z
    shift: Tensor | None  # what z was lowered by, in place, before that; None for nothing


class Terms(NamedTuple):
    """Sums up the columns at hand. The gradient is `(numerators - p · centre) · factor`, all columns' centre.

    The numerators lie in z.
    """

    loss: Tensor  # (rows,); rounding may take that of some columns below 0
    centre: Tensor | None  # (rows,) what these columns add to the centre; None where it is 0, or taken off altogether
    factor: float
    taken_off: Tensor | None = None  # (rows,) the part of the centre that the numerators are already without


def blocks_of(logits: Tensor) -> list[tuple[slice, Scratch]]:
    """Cuts rows (C, V) into blocks of a few, with the scratch that all blocks share."""
    count, vocab = logits.shape
    size = min(block_rows(vocab, logits.device.type), max(count, 1))
    whole = [logits.new_empty((size, vocab)) for _ in Scratch._fields]
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return [(block, Scratch(*(buffer[: block.stop - block.start] for buffer in whole))) for block in blocks]


def finalise_(z: Tensor, head: tuple[float, float | None, float], bias: Tensor | None) -> Tensor | None:
    """Turns raw projections into final logits in place; returns the soft-cap's derivative where there is one."""
    transform_(z, head, bias)
    return slope_of(z, head)


def slope_of(z: Tensor, head: tuple[float, float | None, float]) -> Tensor | None:
    """Returns the soft-cap's derivative at final logits of any shape."""
    _, softcap, temperature = head
    return None if softcap is None else (z * (temperature / softcap)).square_().neg_().add_(1.0)


def chain_(gradient: Tensor, head: tuple[float, float | None, float], slope: Tensor | None) -> None:
    """Turns the gradient with respect to final logits into that with respect to raw projections, in place."""
    scale, _, temperature = head
    if slope is not None:
        gradient.mul_(slope)
    if scale != temperature:
        gradient.mul_(scale / temperature)


def narrow_(block: Tensor, view: Tensor) -> None:
    """Writes a block of the gradient where `gradient_view` has it, over its own memory."""
    if view.dtype != block.dtype:
        view.copy_(block.to(view.dtype))


def exponential_sums(z: Tensor, exponentials: Tensor, spare: Tensor) -> Sums:
    """Writes `e^z` of final logits (rows, V) into `exponentials`, and adds up."""
    total = torch.exp(z, out=exponentials).sum(-1, keepdim=True)
    low, high = total.aminmax()
    shift = None
    # Logits of usual size need no shift to a maximum of 0, which would cost two more passes.
    if not (float(low) > ORDINARY[0] and float(high) < ORDINARY[1]):
        shift = z.amax(-1, keepdim=True)
        z.sub_(shift)
        total = torch.exp(z, out=exponentials).sum(-1, keepdim=True)
    return Sums(total, torch.mul(exponentials, z, out=spare).sum(-1, keepdim=True), shift)


def is_close(gap: Tensor) -> bool:
    """True where all differences of final logits, teacher minus student, are small; synchronises a GPU once."""
    low, high = gap.aminmax()
    return float(low) > -CLOSE and float(high) < CLOSE


def growth_sums(z: Tensor, gap: Tensor, masses: Tensor, growths: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `m (e^gap - 1)` and `m e^gap (z + gap)` over masses m of the student's, (rows, 1) each.

    `e^gap - 1` is left in `growths`. No difference of anything larger than it is enters the first sum.
    """
    growths = torch.expm1(gap, out=growths)
    growth = torch.mul(growths, masses, out=spare).sum(-1, keepdim=True)
    products = torch.add(z, gap, out=spare).mul_(masses)
    return growth, products.sum(-1, keepdim=True).add_(products.mul_(growths).sum(-1, keepdim=True))


def divergence_terms(
    z: Tensor, u: Tensor, t: Tensor | None, scratch: Scratch, alpha: float, normalize: bool, share: Tensor | None = None
) -> Terms:
    """Sums over the full vocabulary and overwrites z. `t` is `q/p - 1` in `scratch.a`; None has it made of u.

    `share` (rows,) is these columns' part of p's mass. None for all of it: the loss is then complete, and with
    `alpha=1`, where the loss is the centre, the gradient too.
    """
    # The summands are divided by p, and their first orders in u cancel.
    neg_p, spare = scratch.neg_p, scratch.b
    t, r = (torch.expm1(u, out=z), scratch.a) if t is None else (t, z)
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
    if (loss.amin() < NEAR * scale) if share is None else (loss < share * (NEAR * scale)).any():
        loss = _near_loss(u, neg_p, alpha).mul_(scale)
    if share is None:
        loss.clamp_(min=0.0)
    if alpha == 0.0:
        torch.mul(t, neg_p, out=z)
        return Terms(loss, None, 1.0)
    if alpha == 1.0:
        # The gradient of a row is small beside its loss where one u has all the mass: so the centre of these columns'
        # own distribution goes first.
        own = loss if share is None else loss / share.clamp(min=torch.finfo(loss.dtype).tiny)
        torch.mul(u.add_(own[:, None]), neg_p, out=z)
        return Terms(loss, None, 1.0) if share is None else Terms(loss, loss, 1.0, own)
    return Terms(loss, torch.mul(r, neg_p, out=z).sum(-1), scale * (1 - alpha) / alpha)


def far_terms(z: Tensor, log_p: Tensor, log_q: Tensor, alpha: float, normalize: bool) -> Terms:
    """Does so from float64 log-probabilities, for log-ratios that float32 cannot hold the exponential of."""
    _, loss, numerators, centre = bucket_terms(log_p, log_q, alpha, normalize)
    z.copy_(numerators)
    return Terms(loss.to(z.dtype), None if centre is None else centre.to(z.dtype), 1.0)


def capped_terms(z: Tensor, log_p: Tensor, log_q: Tensor, alpha: float, normalize: bool, entry_clip: float) -> Terms:
    """Caps each entry's summand, from float64 log-probabilities: such sums are of first order in everything."""
    loss, numerators = clipped_terms(log_p, log_q, alpha, normalize, entry_clip)
    z.copy_(numerators)
    return Terms(loss.to(z.dtype), numerators.sum(-1).to(z.dtype), 1.0)


def centre_(numerators: Tensor, neg_p: Tensor, centre: Tensor | None, factor: float = 1.0) -> None:
    """Makes the gradient with respect to the final logits, in place, of numerators and the centre of all columns."""
    if centre is not None:
        numerators.addcmul_(neg_p, centre[:, None])
    if factor != 1.0:
        numerators.mul_(factor)


def logprob_gradient_(
    z: Tensor, neg_p: Tensor, level: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> None:
    """Puts the gradient of log-probabilities and entropy, but for the target's own entry, in place of z.

    `z + level` (rows, 1) is log p plus the entropy, of which `-p (log p + H)` is the derivative; that of log p(y) is
    `onehot(y) - p`. The upstream gradients are (rows, 1).
    """
    if grad_entropy is not None:
        z.add_(level).mul_(grad_entropy)
    else:
        z.zero_()
    if grad_logprobs is not None:
        z.add_(grad_logprobs)
    z.mul_(neg_p)


def _near_loss(u: Tensor, neg_p: Tensor, alpha: float) -> Tensor:
    """Sums as `divergence_terms` does, in float64, where the first order of a small u cancels to 1e-16."""
    wide = in_float64(u)
    ratio = wide.exp()  # q/p
    if alpha == 0.0:
        summands = wide.sub_(1.0).mul_(ratio).add_(1.0)
    elif alpha == 1.0:
        summands = ratio.sub_(wide).sub_(1.0)
    else:
        log_mixture = (ratio * alpha).add_(1 - alpha).log_()  # log(m/p)
        summands = wide.sub_(log_mixture).mul_(ratio).sub_(log_mixture, alpha=(1 - alpha) / alpha)
    return summands.to(u).mul_(neg_p).sum(-1).neg_()


def clipped_terms(
    student: Tensor, teacher: Tensor, alpha: float, normalize: bool, entry_clip: float
) -> tuple[Tensor, Tensor]:
    """Returns the loss (rows,) Σ min(entry, entry_clip), and numerators (rows, V) as `bucket_terms` has them.

    The centre is the numerators' sum.

    The entries are the textbook summands, which may be negative (OPSD, arXiv:2601.18734); `student` and `teacher` are
    log-probabilities (rows, V) in float64.
    """
    p, q = student.exp(), teacher.exp()
    level = 0.0
    if alpha == 0.0:
        entries, slopes, level = q * (teacher - student), -q, -1.0
    elif alpha == 1.0:
        entries = p * (student - teacher)
        slopes, level = entries + p, 1.0
    else:
        mixture = torch.logaddexp(student + math.log1p(-alpha), teacher + math.log(alpha))
        scale = 1 / (alpha * (1 - alpha)) if normalize else 1.0
        slopes = scale * (1 - alpha) * p * (student - mixture)
        entries = scale * alpha * q * (teacher - mixture) + slopes
    # The slopes are d entry / d log p. Without caps they are near to a multiple of p, which the centre would take off.
    return entries.clamp(max=entry_clip).sum(-1), torch.where(entries < entry_clip, slopes, 0.0) - level * p


def transform_(z: Tensor, head: tuple[float, float | None, float], bias: Tensor | None) -> None:
    """Turns raw projections into final logits, in place."""
    scale, softcap, temperature = head
    if bias is not None:
        z.add_(bias)
    if softcap is not None:
        z.mul_(scale / softcap).tanh_().mul_(softcap / temperature)
    elif scale != temperature:
        z.mul_(scale / temperature)


def column_squares(tile: Tensor, weights: Tensor) -> Tensor:
    """Returns the sums of squares (V,) of a tile's columns, row i times `weights[i]`, in float32 like these."""
    sums = weights.new_empty(tile.shape[1])
    step = block_rows(tile.shape[0], tile.device.type)  # of columns
    for start in range(0, len(sums), step):
        part = tile[:, start : start + step].float()
        torch.mv(part.square().t(), weights, out=sums[start : start + step])
    return sums
