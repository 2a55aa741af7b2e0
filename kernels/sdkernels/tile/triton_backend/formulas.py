"""Does what the kernels do to an element in registers: logits from projections, and the terms of a divergence.

With `u = log q - log p`, every quantity is of second order in `u` and none may come from a difference of first-order
terms, or a teacher near its student drowns in rounding. float64 is slow on a GPU, so the two functions that cancel,

    phi(u) = e^u - 1 - u            rho(a) = a - log(1 + a)

are polynomials for |u| < 1/2, and the far side is exact enough as it stands. There the larger of p and q is one
exponential and the other is it times `e^-|u|`: nothing overflows, and an error of the exponential is common to both, so
that it does not show in `q - p`.

An entry without probability counts 0 (`0 · log 0 = 0`): a logit of -inf is a legitimate way to forbid a token, on one
side or on both, and is what lanes beyond the vocabulary get. NaN and +inf go through to the row's results; where a
comparison or `tl.maximum` drops a NaN, the weight beside it still has it.

The passes are as much bound by instructions as by memory (configs.py), so the exponential is `exp2`, which is two
instructions where Triton's `exp` takes care of denormal results with three more.

Names: b_ values in registers, `lp` and `lq` log-probabilities of student and teacher, `m = (1 - alpha) p + alpha q`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Families of divergences: alpha 0, alpha 1, and all between.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)

# The series below are cut where the next term is under half a unit in the last place at this |u|.
NEAR = tl.constexpr(0.5)
LOG2E = tl.constexpr(1.4426950408889634)
# tanh saturates in float32 long before; e^(2·15) and its square do not overflow.
TANH_SATURATES = tl.constexpr(15.0)


@triton.jit
def exp(b_x):
    """Returns `e^x`, with results below 2^-126 flushed to 0."""
    return tl.exp2(b_x * LOG2E)


@triton.jit
def phi_near(b_u):
    """Returns `e^u - 1 - u` for |u| < NEAR: Taylor, relative error 4e-8."""
    b_series = 1 / 5040 + b_u * (1 / 40320)
    b_series = 1 / 720 + b_u * b_series
    b_series = 1 / 120 + b_u * b_series
    b_series = 1 / 24 + b_u * b_series
    b_series = 1 / 6 + b_u * b_series
    return b_u * b_u * (0.5 + b_u * b_series)


@triton.jit
def rho_near(b_a, b_s):
    """Returns `a - log(1 + a)` of `s = a / (2 + a)`, |s| < 0.25, by log(1 + a) = 2 artanh(s): relative error 6e-8.

    The first term is `a - 2s = a·s`, without a difference.
    """
    b_square = b_s * b_s
    b_series = 1 / 9 + b_square * (1 / 11)
    b_series = 1 / 7 + b_square * b_series
    b_series = 1 / 5 + b_square * b_series
    b_series = 1 / 3 + b_square * b_series
    return b_a * b_s - 2 * b_s * b_square * b_series


@triton.jit
def tanh(b_y):
    """Divides two polynomials (the continued fraction, cut) for |y| < 1, exponentials beyond."""
    b_square = b_y * b_y
    near = tl.abs(b_y) < 1
    b_clipped = tl.where(b_y > TANH_SATURATES, TANH_SATURATES, tl.where(b_y < -TANH_SATURATES, -TANH_SATURATES, b_y))
    b_exp = exp(2 * b_clipped)
    b_above = tl.where(near, b_y * (945 + b_square * (105 + b_square)), b_exp - 1)
    b_below = tl.where(near, 945 + b_square * (420 + b_square * 15), b_exp + 1)
    return b_above / b_below


@triton.jit
def transformed(b_x, p_bias, o_v, m_v, gain, cap, SOFTCAP: tl.constexpr, EXCLUDE: tl.constexpr = False):
    """Returns final logits of raw projections, -inf where `m_v` is off, and their derivative.

    Without soft-cap `gain` is scale / temperature. With it `gain` is scale / softcap, `cap` softcap / temperature.
    EXCLUDE: a raw projection of -inf stays -inf under a soft-cap.
    """
    b_z = b_x
    if p_bias is not None:
        b_z += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_z *= gain
    b_slope = tl.zeros_like(b_z) + gain
    if SOFTCAP:
        b_tanh = tanh(b_z)
        b_z = tl.where(m_v, b_tanh * cap, -float("inf"))
        if EXCLUDE:
            b_z = tl.where(b_x == -float("inf"), -float("inf"), b_z)
        b_slope = gain * cap * ((1 - b_tanh) * (1 + b_tanh))
    return b_z, b_slope


@triton.jit
def columns(o_v, V, PADDED: tl.constexpr):
    """Returns which columns `o_v` may be touched: with PADDED those up to the next multiple of 16 too.

    Triton makes accesses of 16 bytes only under a mask whose bound it knows to be such a multiple.
    """
    if PADDED:
        m_touched = o_v < (V + 15) // 16 * 16
    else:
        m_touched = o_v < V
    return m_touched


@triton.jit
def final_logits(
    p_row, p_bias, o_v, V, gain, cap, SOFTCAP: tl.constexpr, PADDED: tl.constexpr, EXCLUDE: tl.constexpr = False
):
    """Loads entries `o_v` of a row of raw projections, `transformed`; whatever the padding holds, it counts as -inf."""
    b_x = tl.load(p_row + o_v, mask=columns(o_v, V, PADDED), other=-float("inf"))
    if PADDED:
        b_x = tl.where(o_v < V, b_x, -float("inf"))
    return transformed(b_x, p_bias, o_v, o_v < V, gain, cap, SOFTCAP, EXCLUDE)


@triton.jit
def logit_at(p_row, p_bias, i_v, V, gain, cap, SOFTCAP: tl.constexpr):
    """Loads the one entry `i_v`, as `final_logits`; -inf where it is none of the row."""
    m_v = (i_v >= 0) & (i_v < V)
    b_x = tl.load(p_row + i_v, mask=m_v, other=-float("inf"))
    return transformed(b_x, p_bias, i_v, m_v, gain, cap, SOFTCAP)


@triton.jit
def log_ratio(b_student, b_teacher, shift):
    """Takes `u` of final logits; `shift` is the teacher's log-sum-exp minus the student's. Finite for -inf of both."""
    return tl.where(b_student == b_teacher, 0.0, b_teacher - b_student) - shift


@triton.jit
def mass_times(b_mass, b_log):
    """Returns `mass · log` with `0 · inf = 0`."""
    return tl.where(b_mass == 0, 0.0, b_mass * b_log)


@triton.jit
def divergence_terms(b_lp, b_lq, b_u, alpha, FAMILY: tl.constexpr):
    """Returns per entry p, loss, slope, constant, textbook entry, and d entry / d log p.

    The gradient with respect to the final logits is `slope - p · sum(constant)`; the loss is the sum of `loss`. Both
    are before the factor of `normalize`. Whatever the caller does not use, the compiler leaves out.
    """
    student_less = b_u > 0
    b_larger = exp(tl.where(student_less, b_lq, b_lp))
    b_ratio = exp(-tl.abs(b_u))
    b_smaller = b_larger * b_ratio
    b_p = tl.where(student_less, b_smaller, b_larger)
    b_q = tl.where(student_less, b_larger, b_smaller)
    b_pu, b_qu = mass_times(b_p, b_u), mass_times(b_q, b_u)
    near = tl.abs(b_u) < NEAR
    b_phi = phi_near(b_u)
    b_t = b_u + b_phi  # q/p - 1 where near
    b_gap = tl.where(near, b_p * b_t, b_q - b_p)
    if FAMILY == FORWARD_KL:
        # q phi(-u) = p (u t - phi)
        b_loss = tl.where(near, b_p * (b_u * b_t - b_phi), b_p - b_q + b_qu)
        b_slope, b_constant = -b_gap, tl.zeros_like(b_gap)
        b_entry, b_entry_slope = b_qu, -b_q
    elif FAMILY == REVERSE_KL:
        b_loss = tl.where(near, b_p * b_phi, b_gap - b_pu)
        b_slope, b_constant = -b_pu, b_loss
        b_entry, b_entry_slope = -b_pu, b_p - b_pu
    else:
        b_a = alpha * b_t  # m/p - 1 where near
        b_rho = rho_near(b_a, b_a / (2 + b_a))
        b_far_log = tl.log(
            tl.where(student_less, alpha, 1 - alpha) + tl.where(student_less, 1 - alpha, alpha) * b_ratio
        )  # log m minus the log of the larger of p and q
        b_r = tl.where(near, b_a - b_rho, tl.where(student_less, b_u, 0.0) + b_far_log)  # log(m/p)
        b_pr = mass_times(b_p, b_r)
        b_constant = tl.where(near, b_p * b_rho, alpha * b_gap - b_pr)  # KL(p‖m) = Σ p rho(m/p - 1)
        # v = u - r = log(q/m), free of first-order differences where near.
        b_v = tl.where(near, (1 - alpha) * b_u + (b_rho - alpha * b_phi), tl.where(student_less, 0.0, b_u) - b_far_log)
        b_qv = mass_times(b_q, b_v)
        # KL(q‖m) = Σ q v + m - q, and p (1 + t) v + p (a - t) = p (t v + rho - phi) where near.
        b_to_mixture = tl.where(near, b_p * (b_t * b_v + (b_rho - b_phi)), b_qv - (1 - alpha) * b_gap)
        b_loss = alpha * b_to_mixture + (1 - alpha) * b_constant
        b_slope = -(1 - alpha) * b_pr
        b_constant = (1 - alpha) * b_constant
        b_entry, b_entry_slope = alpha * b_qv + b_slope, b_slope
    return b_p, b_loss, b_slope, b_constant, b_entry, b_entry_slope
