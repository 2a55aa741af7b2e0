/* Loss, entropies and gradient of rows of logits: what `elementwise.py` does in thirty passes over a block, in four
 * over a row that stays in cache. Each exponential is taken once: what later passes need of it is kept where the logits
 * were.
 *
 * No summand is a difference of larger numbers: with u = log q - log p, t = e^u - 1 and
 *
 *     f(x) = e^x - 1 - x,    h(x) = x - log(1 + x) = f(log(1 + x)),    m = p (1 + alpha t)
 *
 *     KL(p||q) = sum p f(u)                      since sum p t = 0
 *     KL(q||p) = sum p (u t - f(u))
 *     alpha KL(q||m) + (1 - alpha) KL(p||m) = sum alpha q h(m/q - 1) + (1 - alpha) p h(m/p - 1)
 *
 * and f and h of a small x come from their own series. Gradients with respect to the logits, with r = log(m/p):
 *
 *     KL(p||q): -p (u + loss)    KL(q||p): -p t    Jensen-Shannon: (1 - alpha) p (sum p r - r)
 */
#include <stdlib.h>

#include "rows.h"

/* Log-ratios up to this lose nothing by a formula in e^u. */
#define LARGE 1.0f

/* The gradient is written over the row's student. Returns 0, with nothing written, where float falls short. */
INLINE int divergence(Row row, int mode, int kind, Extremes by, double alpha, double loss_factor,
                      double gradient_factor, float *spare, Values *values) {
    /* No log-ratio is above the widest difference of two gaps; and where that is wide, the normalisers tell. */
    if (mode != CLOSE_GAP && !(by.high - by.low < FAR)) {
        Sums sums = exponential_sums(row, mode, by, KEEP_LOGITS, 0, spare);
        if (by.high - normalise(&sums, mode, by, values) > FAR)
            return 0;
    }
    int keep = mode == CLOSE_GAP && kind == REVERSE_KL ? KEEP_EXPONENTIALS : KEEP_BOTH;
    Sums sums = exponential_sums(row, mode, by, keep, 0, spare);
    double difference = normalise(&sums, mode, by, values), growth = sums.teacher_total / sums.total - 1.0;
    /* Doubles in two parts: they may be large where what is left of a difference with them is small. */
    float shift = (float)difference, shift_rest = (float)(difference - shift);
    float mean = (float)growth, mean_rest = (float)(growth - mean), shrink = (float)(1.0 / (1.0 + growth));
    float ratio = (float)(sums.total / sums.teacher_total), of_q = (float)alpha, of_p = (float)(1.0 - alpha);
    if (kind == JENSEN_SHANNON)
        gradient_factor *= (1.0 - alpha) * loss_factor;
    float slope = (float)(gradient_factor / sums.total);
    Sum loss = {0}, centre = {0};
    for (int64_t i = 0; i < row.vocab;) {
        int64_t stop = row.vocab - i > RUN * WIDTH ? i + RUN * WIDTH : row.vocab;
        Floats loss_run = {0}, centre_run = {0};
        for (; i < stop; i += WIDTH) {
            int64_t left = row.vocab - i;
            /* p and q times the student's total */
            Floats p = load(row.student + i, left, 0.0f), q, t, u, summand;
            /* Beyond the row u is 0, or near it: another one's e^u may be infinite, and 0 times that no number. */
            float filler = mode == CLOSE_GAP ? 0.0f : shift;
            u = load(row.teacher + i, left, filler) * (mode == CLOSE_GAP ? row.teacher_gain : 1.0f) - shift - shift_rest;
            Exponential e = exponential(u);
            if (mode == CLOSE_GAP) {
                /* With the very numbers that the mean was made of: where one token has all the mass the rest is their
                 * difference from it. */
                t = (load(spare + i, left, 0.0f) - mean - mean_rest) * shrink;
            } else {
                /* p e^u has the rounding of u in it, which is large where u is. */
                q = load(spare + i, left, 0.0f) * ratio;
                t = expm1_of(e);
            }
            Mask small = is_small(u, LARGE);
            if (kind == FORWARD_KL) {
                Floats near = p * (u * expm1_of(e) - remainder_of(e, u)), gradient = p * t;
                summand = near;
                if (mode != CLOSE_GAP) {
                    summand = choose(small, near, q * u - (q - p));
                    gradient = choose(small, gradient, q - p);
                }
                if (slope != 0.0f)
                    store(row.student + i, left, gradient * -slope);
            } else if (kind == REVERSE_KL) {
                Floats near = p * remainder_of(e, u);
                summand = mode == CLOSE_GAP ? near : choose(small, near, (q - p) - p * u);
            } else {
                Logarithm r = log1p_(of_q * t), s = log1p_(-of_p * t / (1.0f + t));
                Floats near = p * (of_q * ((1.0f + t) * s.rest) + of_p * r.rest);
                summand = near;
                if (mode != CLOSE_GAP)
                    summand = choose(small, near, of_q * (q * (u - r.log)) - of_p * (p * r.log));
                centre_run += p * r.log;
                store(row.teacher + i, left, r.log);
            }
            loss_run += summand;
        }
        add(&loss, loss_run);
        add(&centre, centre_run);
    }
    double sum = total_of(loss) / sums.total;
    values->loss = sum > 0.0 ? sum * loss_factor : sum < 0.0 ? 0.0 : sum; /* NaN stays */
    if (kind == FORWARD_KL || gradient_factor == 0.0)
        return 1;
    float middle = (float)(kind == REVERSE_KL ? sum : total_of(centre) / sums.total);
    for (int64_t i = 0; i < row.vocab; i += WIDTH) {
        int64_t left = row.vocab - i;
        Floats p = load(row.student + i, left, 0.0f), second = load(row.teacher + i, left, 0.0f);
        if (kind == REVERSE_KL)
            second = second * (mode == CLOSE_GAP ? row.teacher_gain : 1.0f) - shift - shift_rest;
        Floats from_middle = kind == REVERSE_KL ? -(second + middle) : middle - second;
        store(row.student + i, left, p * slope * from_middle);
    }
    return 1;
}

/* What one thread does. Gradients take the place of the student's logits, and the teacher's are destroyed; but a row
 * that is not `done` is left as it was. */
void sdkernels_divergence(Job *job) {
    float *spare = malloc((size_t)job->vocab * sizeof(float));
    for (int64_t i; spare && (i = take_row(job)) < job->rows;) {
        Row row = row_of(job, i);
        Values *values = (Values *)job->values + i;
        Extremes by;
        int mode = survey(row, job->teacher_is_gap, &by);
        /* One copy of the loops for each pair of constants, so that no loop has a branch. */
#define CASE(KIND, MODE)                                                                                              \
    if (job->kind == KIND && mode == MODE)                                                                            \
        job->done[i] = (uint8_t)divergence(row, MODE, KIND, by, job->alpha, job->loss_factor, job->gradient_factor,   \
                                           spare, values);
#define CASES(KIND) CASE(KIND, LOGITS) CASE(KIND, FAR_GAP) CASE(KIND, CLOSE_GAP)
        CASES(FORWARD_KL) CASES(REVERSE_KL) CASES(JENSEN_SHANNON)
    }
    free(spare);
}
