/* The divergences over the k listed ids of a row and the tail, all other ids together; `_top_k` of torch_backend.py.
 *
 * The tail's masses are sums over the tail, exact where one less the listed mass is not: the listed logits are taken
 * out of the row while it is summed. The buckets, k + 1 a row, are in double as in `support.bucket_terms`.
 */
#include <stdlib.h>

#include "rows.h"

/* The mass that an empty tail is given; see tile/topk.py. */
#define LEAST_MASS 1e-37
/* Of a total: a tail with less may have lost some of it to exponentials that are taken for 0. */
#define LEAST_TAIL 1e-25
/* Candidates beyond twice k before they are sifted. */
#define MORE 64

/* Integers ordered like the floats, and NaN above all; with the index below them, so that of equals the first goes. */
INLINE Ints ordered(Floats v) { return (Ints)v ^ (((Ints)v >> 31) & 0x7fffffff); }
INLINE int64_t candidate(int32_t key, int64_t index) { return (int64_t)key * (1LL << 32) + (UINT32_MAX - index); }

/* The k largest of n different numbers to the front, the least of them last. */
static void sift(int64_t *a, int64_t n, int64_t k) {
    for (int64_t low = 0, high = n - 1; low < high;) {
        int64_t pivot = a[low + (high - low) / 2], i = low, j = high;
        while (i <= j) {
            while (a[i] > pivot)
                i++;
            while (a[j] < pivot)
                j--;
            if (i <= j) {
                int64_t swapped = a[i];
                a[i++] = a[j];
                a[j--] = swapped;
            }
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

/* The ids of the k largest logits of either side. Of `candidates` there is room for 2 k + MORE + WIDTH. */
static void choose_ids(Row row, int choose, int is_gap, int64_t k, int64_t *candidates, int64_t *ids) {
    int64_t room = 2 * k + MORE, found = 0;
    int32_t limit = INT32_MIN;
    for (int64_t i = 0; i < row.vocab; i += WIDTH) {
        int64_t left = row.vocab - i;
        Floats v;
        if (choose == OF_STUDENT)
            v = load(row.student + i, left, 0.0f);
        else if (is_gap)
            v = load(row.student + i, left, 0.0f) * row.student_gain
              + load(row.teacher + i, left, 0.0f) * row.teacher_gain;
        else
            v = load(row.teacher + i, left, 0.0f);
        Ints keys = ordered(v);
        uint32_t lanes = lanes_above(keys, limit) & (left >= WIDTH ? (1u << WIDTH) - 1 : (1u << left) - 1);
        for (; lanes; lanes &= lanes - 1) {
            int lane = __builtin_ctz(lanes);
            candidates[found++] = candidate(keys[lane], i + lane);
        }
        if (found >= room) {
            sift(candidates, found, k);
            found = k;
            limit = (int32_t)(candidates[k - 1] >> 32);
        }
    }
    sift(candidates, found, k);
    for (int64_t j = 0; j < k; j++)
        ids[j] = UINT32_MAX - (candidates[j] & UINT32_MAX);
}

/* Of one thread, for one row at a time. */
typedef struct {
    int64_t *candidates, *ids;
    float *student, *teacher;            /* the listed logits */
    double *log_p, *log_q, *gradient;    /* of the buckets */
} Buffers;

static int allocate(Buffers *found, int64_t k) {
    int64_t room = 2 * k + MORE + WIDTH;
    char *memory = malloc((size_t)((room + k) * 8 + k * 8 + (k + 1) * 24));
    if (!memory)
        return 0;
    found->candidates = (int64_t *)memory;
    found->ids = found->candidates + room;
    found->log_p = (double *)(found->ids + k);
    found->log_q = found->log_p + k + 1;
    found->gradient = found->log_q + k + 1;
    found->student = (float *)(found->gradient + k + 1);
    found->teacher = found->student + k;
    return 1;
}

static Sums tail_sums(Row row, int mode, Extremes by) {
#define MODE(NAME)                                                                                                    \
    if (mode == NAME)                                                                                                 \
        return exponential_sums(row, NAME, by, KEEP_LOGITS, 1, NULL);
    MODE(LOGITS) MODE(FAR_GAP) MODE(CLOSE_GAP)
    return exponential_sums(row, NO_TEACHER, by, KEEP_LOGITS, 1, NULL);
#undef MODE
}

/* The tail's sums with those of the listed logits, in double, for most of the mass is theirs as a rule. The logits
 * relative to the largest go to `log_p` and `log_q`; a close gap's teacher is relative to the student's. */
static Sums with_listed(Sums sums, Row listed, int mode, Extremes by, double *log_p, double *log_q) {
    for (int64_t j = 0; j < listed.vocab; j++) {
        double z = (double)listed.student[j] * listed.student_gain, x = z - by.top, e = exp(x);
        sums.total += e;
        sums.weighted += e * x;
        log_p[j] = x;
        if (mode == NO_TEACHER)
            continue;
        double given = (double)listed.teacher[j] * listed.teacher_gain;
        double y = mode == CLOSE_GAP ? x + given : (mode == LOGITS ? given : z + given) - by.teacher_top;
        double more = mode == CLOSE_GAP ? e * expm1(given) : exp(y);
        sums.teacher_total += more;
        sums.teacher_weighted += (mode == CLOSE_GAP ? e + more : more) * y;
        log_q[j] = y;
    }
    return sums;
}

static double log_sum_exp(const double *logs, int64_t n) {
    double top = -INFINITY, sum = 0.0;
    for (int64_t j = 0; j < n; j++)
        top = logs[j] > top ? logs[j] : top;
    for (int64_t j = 0; j < n; j++)
        sum += exp(logs[j] - top);
    return top + log(sum);
}

static double at_least(double mass) { return mass < LEAST_MASS ? LEAST_MASS : mass; }

/* Loss and, with respect to the student's bucket logits, its gradient. */
static double bucket_divergence(int64_t n, const double *log_p, const double *log_q, double *gradient, int kind,
                                double alpha, double scale) {
    double loss = 0.0, centre = 0.0;
    for (int64_t j = 0; j < n; j++) {
        double u = log_q[j] - log_p[j], p = exp(log_p[j]);
        int is_far = u > FAR; /* q / p may be out of reach */
        double t = is_far ? 0.0 : expm1(u), more = is_far ? exp(log_q[j]) - p : p * t, q = p + more;
        if (kind == FORWARD_KL) {
            gradient[j] = -more;
            loss += q * u - more;
        } else if (kind == REVERSE_KL) {
            gradient[j] = -p * u;
            loss += more - p * u;
        } else {
            double r = is_far ? u + log(alpha) : log1p(alpha * t); /* log(m/p) */
            gradient[j] = -scale * (1.0 - alpha) * p * r;
            loss += scale * alpha * q * (u - r) + gradient[j];
            centre += gradient[j];
        }
    }
    loss = loss < 0.0 ? 0.0 : loss; /* rounding; NaN stays */
    if (kind == REVERSE_KL)
        centre = loss;
    for (int64_t j = 0; kind != FORWARD_KL && j < n; j++)
        gradient[j] -= exp(log_p[j]) * centre;
    return loss;
}

/* From relative logits to log-probabilities, and those of the tail where it counts. Returns 0 where floats do not tell
 * the tail's mass. */
static int fill_buckets(const Job *job, int mode, Sums tail, Sums sums, double difference, const float *logprobs,
                        Buffers to) {
    int64_t k = job->k;
    double log_total = log(sums.total), teacher_log_total = log(sums.teacher_total);
    if (mode == CLOSE_GAP)
        teacher_log_total = log_total + difference;
    for (int64_t j = 0; j < k; j++) {
        to.log_p[j] -= log_total;
        to.log_q[j] = mode == NO_TEACHER ? logprobs[j] : to.log_q[j] - teacher_log_total;
    }
    if (!job->tail) {
        double log_listed = log_sum_exp(to.log_p, k), teacher_log_listed = log_sum_exp(to.log_q, k);
        for (int64_t j = 0; j < k; j++) {
            to.log_p[j] -= log_listed;
            to.log_q[j] -= teacher_log_listed;
        }
        return 1;
    }
    to.log_p[k] = log(tail.total / sums.total);
    if (mode == CLOSE_GAP)
        to.log_q[k] = to.log_p[k] + (log1p(tail.teacher_total / tail.total) - difference);
    else if (mode == NO_TEACHER)
        to.log_q[k] = log(at_least(-expm1(log_sum_exp(to.log_q, k))));
    else
        to.log_q[k] = log(tail.teacher_total / sums.teacher_total);
    int is_lost = mode != CLOSE_GAP && mode != NO_TEACHER && tail.teacher_total < LEAST_TAIL * sums.teacher_total;
    return !(is_lost || tail.total < LEAST_TAIL * sums.total);
}

/* Returns 0, with the row as it was, where float falls short or an id is none. */
static int topk_row(const Job *job, int64_t i, Buffers with, Values *values) {
    Row row = row_of(job, i);
    int64_t k = job->k;
    Extremes by;
    int mode = survey(row, job->teacher_is_gap, &by);
    const int64_t *ids = job->ids ? job->ids + i * k : with.ids;
    if (!job->ids)
        choose_ids(row, job->choose, job->teacher_is_gap, k, with.candidates, with.ids);
    for (int64_t j = 0; j < k; j++)
        if (ids[j] < 0 || ids[j] >= row.vocab)
            return 0;
    Row listed = {with.student, with.teacher, row.student_gain, row.teacher_gain, k};
    for (int64_t j = 0; j < k; j++) {
        with.student[j] = row.student[ids[j]];
        if (mode != NO_TEACHER)
            with.teacher[j] = row.teacher[ids[j]];
    }
    for (int64_t j = 0; j < k; j++) {
        row.student[ids[j]] = -INFINITY;
        if (mode == LOGITS)
            row.teacher[ids[j]] = -INFINITY;
    }
    Sums tail = tail_sums(row, mode, by), sums = with_listed(tail, listed, mode, by, with.log_p, with.log_q);
    for (int64_t j = 0; j < k; j++) {
        row.student[ids[j]] = with.student[j];
        if (mode == LOGITS)
            row.teacher[ids[j]] = with.teacher[j];
    }
    double difference = normalise(&sums, mode, by, values);
    const float *logprobs = mode == NO_TEACHER ? job->logprobs + i * k : NULL;
    if (!fill_buckets(job, mode, tail, sums, difference, logprobs, with))
        return 0;
    values->loss = bucket_divergence(k + (job->tail != 0), with.log_p, with.log_q, with.gradient, job->kind, job->alpha,
                                     job->loss_factor);
    if (job->gradient_factor == 0.0)
        return 1;
    if (!job->tail)
        memset(row.student, 0, (size_t)row.vocab * sizeof(float));
    /* Each token of the tail has its share of the tail's gradient. */
    float share = job->tail ? (float)(with.gradient[k] / tail.total * job->gradient_factor) : 0.0f;
    for (int64_t v = 0; job->tail && v < row.vocab; v += WIDTH) {
        Floats z = load(row.student + v, row.vocab - v, 0.0f) * row.student_gain;
        store(row.student + v, row.vocab - v, exp_of(exponential(z - by.top)) * share);
    }
    for (int64_t j = 0; j < k; j++)
        row.student[ids[j]] = (float)(with.gradient[j] * job->gradient_factor);
    return 1;
}

/* What one thread does; as sdkernels_divergence, over k buckets and the tail. */
void sdkernels_topk_divergence(Job *job) {
    Buffers buffers;
    if (!allocate(&buffers, job->k))
        return;
    for (int64_t i; (i = take_row(job)) < job->rows;)
        job->done[i] = (uint8_t)topk_row(job, i, buffers, (Values *)job->values + i);
    free(buffers.candidates);
}
