/* Loss, entropies and gradient of rows of logits: what `elementwise.py` does in thirty passes over a block, in four over
 * a row that stays in cache.
 *
 * Written as plain loops that a compiler turns into vector instructions (-O3 -march=native -fopenmp-simd). Sums are in
 * double, summands in float. No summand is a difference of larger numbers: with u = log q - log p and
 *
 *     f(x) = e^x - 1 - x,    r = log(m/p) = log(1 + alpha (e^u - 1)),    s = log(m/q) = r - u
 *
 *     KL(p||q) = sum p f(u)                      since sum p (q/p - 1) = 0
 *     KL(q||p) = sum p (u e^u - (e^u - 1))
 *     alpha KL(q||m) + (1 - alpha) KL(p||m) = sum p (alpha e^u f(s) + (1 - alpha) f(r))
 *
 * and f of a small x comes from its own series. Gradients with respect to the logits:
 *
 *     KL(p||q): -p (u + loss)    KL(q||p): -p (e^u - 1)    Jensen-Shannon: (1 - alpha) p (sum p r - r)
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* Differences of final logits below this leave e^d - 1 its digits next to 1; see CLOSE in elementwise.py. */
#define CLOSE 4.0f
/* Above this log-ratio e^u is out of reach of float; see FAR in elementwise.py. */
#define FAR 40.0f
/* Where a formula in differences has lost nothing yet. */
#define LARGE 1.0f
/* e^x of less is of no weight, and of more is out of float's range. */
#define LEAST -87.0f
#define MOST 88.0f

/* All that is needed of e^x, each with float's relative precision. */
typedef struct {
    float exp, expm1, f;
} Exponential;

INLINE float power_of_two(int32_t n) {
    int32_t bits = (n + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* x = n log 2 + r with |r| < 0.35, and a minimax polynomial in r (the coefficients of Cephes' expf). */
INLINE Exponential exponential(float x) {
    /* Written so that NaN stays NaN. */
    float inside = x < LEAST ? LEAST : x;
    inside = inside > MOST ? MOST : inside;
    float n = rintf(inside * 1.44269504088896341f);
    float r = inside - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * r + 1.3981999507e-3f;
    series = series * r + 8.3334519073e-3f;
    series = series * r + 4.1665795894e-2f;
    series = series * r + 1.6666665459e-1f;
    series = series * r + 5.0000001201e-1f;
    series = series * r * r;
    float power = power_of_two((int32_t)n);
    float expm1 = power * (series + r) + (power - 1.0f);
    Exponential result = {power * (1.0f + (series + r)), expm1, n == 0.0f ? series : expm1 - x};
    return result;
}

/* log(1 + x) for x > -1: 1 + x = 2^k (1 + g), and a polynomial in g (the coefficients of Cephes' logf). */
INLINE float log1p_(float x) {
    float y = 1.0f + x;
    int32_t bits;
    memcpy(&bits, &y, sizeof bits);
    int32_t k = (bits - 0x3f3504f3) >> 23; /* mantissa from sqrt(1/2) to sqrt(2) */
    bits -= k << 23;
    float m;
    memcpy(&m, &bits, sizeof m);
    /* What was rounded off 1 + x; for k = 0 the x itself. */
    float g = k == 0 ? x : (m - 1.0f) + (x - (y - 1.0f)) * power_of_two(-k);
    float series = 7.0376836292e-2f;
    series = series * g - 1.1514610310e-1f;
    series = series * g + 1.1676998740e-1f;
    series = series * g - 1.2420140846e-1f;
    series = series * g + 1.4249322787e-1f;
    series = series * g - 1.6668057665e-1f;
    series = series * g + 2.0000714765e-1f;
    series = series * g - 2.4999993993e-1f;
    series = series * g + 3.3333331174e-1f;
    float square = g * g;
    return (float)k * 0.693147180559945f + (g - 0.5f * square + square * g * series);
}

typedef struct {
    double loss, student_log_sum, teacher_log_sum, student_entropy, teacher_entropy;
} Values;

/* How a row's teacher is given. A gap between two sides that are not close is taken as LOGITS are: rounded to a logit. */
enum { LOGITS, FAR_GAP, CLOSE_GAP };
enum { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON };

typedef struct {
    const float *student, *teacher;
    float student_gain, teacher_gain;
    int64_t vocab;
} Row;

/* Both sides of one normalised row. */
typedef struct {
    float top, teacher_top;       /* largest final logits */
    double total, teacher_total;  /* sums of exponentials relative to them; those of a close gap are relative to `top` */
    double difference;            /* log-sum of the teacher minus the student's */
} Normaliser;

INLINE float student_logit(Row row, int64_t i) { return row.student[i] * row.student_gain; }

INLINE float teacher_logit(Row row, int mode, float z, int64_t i) {
    float given = row.teacher[i] * row.teacher_gain;
    return mode == LOGITS ? given : z + given;
}

INLINE float gap(Row row, int mode, float z, int64_t i) {
    return mode == CLOSE_GAP ? row.teacher[i] * row.teacher_gain : teacher_logit(row, mode, z, i) - z;
}

/* What the second and third loop take from the first. */
typedef struct {
    float share, teacher_share; /* what exponentials are multiplied by to be probabilities */
    /* Doubles in two parts: they may be large where what is left of a difference with them is small. */
    float shift, shift_rest;   /* log-sum of the teacher minus the student's */
    float growth, growth_rest; /* of a close gap: the mean of e^d - 1 under p */
    float shrink;              /* and 1 / (1 + growth) */
} Scale;

INLINE float log_ratio(Row row, int mode, Scale by, float z, int64_t i) {
    return gap(row, mode, z, i) - by.shift - by.shift_rest;
}

/* e^u - 1. Of a close gap with the very numbers that the mean was made of: where one token has all the mass the rest is
 * their difference from it. */
INLINE float ratio_minus_1(Row row, int mode, Scale by, float z, int64_t i) {
    if (mode == CLOSE_GAP)
        return (exponential(gap(row, mode, z, i)).expm1 - by.growth - by.growth_rest) * by.shrink;
    return exponential(log_ratio(row, mode, by, z, i)).expm1;
}

INLINE int is_close(Row row) {
    float widest = 0.0f;
#pragma omp simd reduction(max : widest)
    for (int64_t i = 0; i < row.vocab; i++) {
        float size = fabsf(row.teacher[i] * row.teacher_gain);
        widest = size > widest ? size : widest;
    }
    return widest < CLOSE;
}

INLINE Normaliser normalise(Row row, int mode, Values *values) {
    float top = -INFINITY, teacher_top = -INFINITY;
#pragma omp simd reduction(max : top, teacher_top)
    for (int64_t i = 0; i < row.vocab; i++) {
        float z = student_logit(row, i);
        top = z > top ? z : top;
        if (mode != CLOSE_GAP) {
            float t = teacher_logit(row, mode, z, i);
            teacher_top = t > teacher_top ? t : teacher_top;
        }
    }
    double total = 0.0, weighted = 0.0, teacher_total = 0.0, teacher_weighted = 0.0, difference;
#pragma omp simd reduction(+ : total, weighted, teacher_total, teacher_weighted)
    for (int64_t i = 0; i < row.vocab; i++) {
        float z = student_logit(row, i), x = z - top, e = exponential(x).exp;
        total += e;
        weighted += e * x;
        if (mode == CLOSE_GAP) { /* what the teacher has more than the student */
            float d = gap(row, mode, z, i), growth = e * exponential(d).expm1;
            teacher_total += growth;
            teacher_weighted += (e + growth) * (x + d);
        } else {
            float t = teacher_logit(row, mode, z, i) - teacher_top, q = exponential(t).exp;
            teacher_total += q;
            teacher_weighted += q * t;
        }
    }
    double log_sum = log(total), teacher_log_sum;
    if (mode == CLOSE_GAP) {
        difference = log1p(teacher_total / total);
        teacher_total += total;
        teacher_log_sum = log_sum + difference;
    } else {
        teacher_log_sum = log(teacher_total);
        difference = teacher_log_sum - log_sum + ((double)teacher_top - (double)top);
    }
    values->student_log_sum = log_sum + top;
    values->teacher_log_sum = values->student_log_sum + difference;
    values->student_entropy = log_sum - weighted / total;
    values->teacher_entropy = teacher_log_sum - teacher_weighted / teacher_total;
    return (Normaliser){top, teacher_top, total, teacher_total, difference};
}

/* The gradient is written over `logits`, the row's student. Returns 0, with nothing written, where float falls short. */
INLINE int divergence(Row row, float *logits, int mode, int kind, float alpha, float loss_factor,
                      float gradient_factor, Values *values) {
    Normaliser n = normalise(row, mode, values);
    double growth = n.teacher_total / n.total - 1.0;
    Scale by = {(float)(1.0 / n.total), (float)(1.0 / n.teacher_total), (float)n.difference, 0.0f, (float)growth, 0.0f,
                (float)(1.0 / (1.0 + growth))};
    by.shift_rest = (float)(n.difference - by.shift);
    by.growth_rest = (float)(growth - by.growth);
    float largest = -INFINITY, rest = 1.0f - alpha;
    double loss = 0.0, centre = 0.0;
#pragma omp simd reduction(+ : loss, centre) reduction(max : largest)
    for (int64_t i = 0; i < row.vocab; i++) {
        float z = student_logit(row, i), u = log_ratio(row, mode, by, z, i), t = ratio_minus_1(row, mode, by, z, i);
        float p = exponential(z - n.top).exp * by.share;
        /* p e^u has the rounding of u in it, which is large where u is. */
        float q = mode == CLOSE_GAP
                      ? p + p * t
                      : exponential(teacher_logit(row, mode, z, i) - n.teacher_top).exp * by.teacher_share;
        int small = fabsf(u) < LARGE;
        if (kind == FORWARD_KL) {
            loss += small ? p * (u * t - exponential(u).f) : q * u - (q - p);
        } else if (kind == REVERSE_KL) {
            loss += small ? p * exponential(u).f : (q - p) - p * u;
        } else {
            float r = log1p_(alpha * t), s = log1p_(-rest * t / (1.0f + t));
            float near = p * (alpha * (1.0f + t) * exponential(s).f + rest * exponential(r).f);
            float far = -alpha * q * (r - u) - rest * p * r;
            loss += small ? near : far;
            centre += p * r;
        }
        largest = u > largest ? u : largest;
    }
    values->loss = loss > 0.0 ? loss * loss_factor : loss < 0.0 ? 0.0 : loss; /* NaN stays */
    if (largest > FAR)
        return 0;
    if (gradient_factor == 0.0f)
        return 1;
    float middle = kind == REVERSE_KL ? (float)loss : (float)centre;
#pragma omp simd
    for (int64_t i = 0; i < row.vocab; i++) {
        float z = student_logit(row, i), p = exponential(z - n.top).exp * by.share, gradient;
        if (kind == REVERSE_KL) {
            gradient = -p * (log_ratio(row, mode, by, z, i) + middle);
        } else if (kind == JENSEN_SHANNON) {
            gradient = p * (middle - log1p_(alpha * ratio_minus_1(row, mode, by, z, i)));
        } else {
            gradient = -p * ratio_minus_1(row, mode, by, z, i);
            if (mode != CLOSE_GAP && fabsf(log_ratio(row, mode, by, z, i)) >= LARGE)
                gradient = p - exponential(teacher_logit(row, mode, z, i) - n.teacher_top).exp * by.teacher_share;
        }
        logits[i] = gradient * gradient_factor;
    }
    return 1;
}

/* Rows of `stride` floats, the first `vocab` of which are looked at. The gradient takes the place of the logits. */
void sdkernels_divergence(float *logits, int64_t stride, float gain, const float *teacher, int64_t teacher_stride,
                          float teacher_gain, int teacher_is_gap, int64_t rows, int64_t vocab, int kind, float alpha,
                          float loss_factor, float gradient_factor, double *values, uint8_t *done) {
    for (int64_t i = 0; i < rows; i++) {
        float *z = logits + i * stride;
        Row row = {z, teacher + i * teacher_stride, gain, teacher_gain, vocab};
        int mode = !teacher_is_gap ? LOGITS : is_close(row) ? CLOSE_GAP : FAR_GAP;
        /* One copy of the loops for each pair of constants, so that no loop has a branch. */
#define CASE(KIND, MODE)                                                                                              \
    if (kind == KIND && mode == MODE)                                                                                 \
        done[i] = divergence(row, z, MODE, KIND, alpha, loss_factor, gradient_factor, (Values *)values + i);
#define CASES(KIND) CASE(KIND, LOGITS) CASE(KIND, FAR_GAP) CASE(KIND, CLOSE_GAP)
        CASES(FORWARD_KL) CASES(REVERSE_KL) CASES(JENSEN_SHANNON)
    }
}
