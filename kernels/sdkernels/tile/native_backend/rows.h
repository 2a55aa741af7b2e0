/* Rows of logits of two sides, and what is asked of them: how threads share them out, and a row's largest logits and
 * sums of exponentials. */
#ifndef SDKERNELS_ROWS_H
#define SDKERNELS_ROWS_H

#include "vectors.h"

/* How a row's teacher is given. A gap between two sides that are not close is taken as LOGITS are: rounded to a logit.
 * What is CLOSE, and log-ratios that are too FAR, elementwise.py says; `build.py` hands both over. */
enum { LOGITS, FAR_GAP, CLOSE_GAP, NO_TEACHER };
enum { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON };

typedef struct {
    double loss, student_log_sum, teacher_log_sum, student_entropy, teacher_entropy;
} Values;

typedef struct {
    float *student, *teacher;
    float student_gain, teacher_gain; /* from what lies there to final logits */
    int64_t vocab;
} Row;

/* What all threads work on; `Job` in build.py has the same fields. Strides are in entries. */
typedef struct {
    float *student, *teacher; /* no teacher: NULL */
    int64_t student_stride, teacher_stride, rows, vocab;
    float student_gain, teacher_gain;
    int32_t teacher_is_gap, kind, tail, choose;
    double alpha, loss_factor, gradient_factor; /* no gradient: 0 */
    int64_t k;       /* entries of a row that are listed; 0: all of the vocabulary counts */
    int64_t *ids;    /* (rows, k); not given: NULL, and `choose` says whose largest they are to be */
    float *logprobs; /* (rows, k) of a teacher that is known by its listed log-probabilities alone */
    double *values;
    uint8_t *done;
    int64_t next; /* the first row that nobody has taken */
} Job;

enum { OF_STUDENT, OF_TEACHER };

/* The next row that is this thread's, or one past the last. */
INLINE int64_t take_row(Job *job) { return __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED); }

INLINE Row row_of(const Job *job, int64_t i) {
    return (Row){job->student + i * job->student_stride,
                 job->teacher ? job->teacher + i * job->teacher_stride : NULL,
                 job->student_gain, job->teacher_gain, job->vocab};
}

/* Of a row's final logits, and of the gap: given, or the difference of the two sides. */
typedef struct {
    float top, teacher_top, low, high;
} Extremes;

INLINE Extremes extremes(Row row, int has_teacher, int is_gap) {
    Floats top = all(-INFINITY), teacher_top = top, low = -top, high = top;
    for (int64_t i = 0; i < row.vocab; i += WIDTH) {
        Floats z = load(row.student + i, row.vocab - i, row.student[0]) * row.student_gain;
        top = larger(z, top);
        if (!has_teacher)
            continue;
        Floats given = load(row.teacher + i, row.vocab - i, row.teacher[0]) * row.teacher_gain;
        Floats gap = is_gap ? given : given - z;
        teacher_top = larger(is_gap ? z + given : given, teacher_top);
        low = smaller(gap, low);
        high = larger(gap, high);
    }
    return (Extremes){largest_of(top), largest_of(teacher_top), -largest_of(-low), largest_of(high)};
}

/* Of a row with a teacher, or without: its mode, and what that needs to know. */
static int survey(Row row, int is_gap, Extremes *found) {
    if (!row.teacher) {
        *found = extremes(row, 0, 0);
        return NO_TEACHER;
    }
    *found = is_gap ? extremes(row, 1, 1) : extremes(row, 1, 0);
    return !is_gap ? LOGITS : found->low > -CLOSE && found->high < CLOSE ? CLOSE_GAP : FAR_GAP;
}

/* Of exponentials relative to the largest; those of a close gap's teacher are what it has more than the student. */
typedef struct {
    double total, weighted, teacher_total, teacher_weighted;
} Sums;

/* What becomes of a row while its sums are made. In place of the student's logits come its exponentials; in place of
 * a teacher's logits the gaps; and in `spare` the teacher's exponentials or, where it is close, e^gap - 1. */
enum { KEEP_LOGITS, KEEP_EXPONENTIALS, KEEP_BOTH };

/* Vectors that a sum in float may take up before it goes into one in double. */
#define RUN 8

/* e^(z - top); with `flush` exactly 0 where that is next to nothing. */
INLINE Floats relative_exp(Floats x, int flush) {
    Floats e = exp_of(exponential(x));
    return flush ? choose(less(x, all(LEAST)), all(0.0f), e) : e;
}

INLINE Sums exponential_sums(Row row, int mode, Extremes by, int keep, int flush, float *spare) {
    Sum total = {0}, weighted = {0}, teacher_total = {0}, teacher_weighted = {0};
    for (int64_t i = 0; i < row.vocab;) {
        int64_t stop = row.vocab - i > RUN * WIDTH ? i + RUN * WIDTH : row.vocab;
        /* Summands of one sign, or rounded by as much already. Not totals: what is left of one token's may be small. */
        Floats run = {0}, teacher_run = {0};
        for (; i < stop; i += WIDTH) {
            int64_t left = row.vocab - i;
            Floats z = load(row.student + i, left, -INFINITY) * row.student_gain;
            Floats x = z - by.top, e = relative_exp(x, flush), second;
            x = larger(all(LEAST), x);
            add(&total, e);
            run += e * x;
            if (keep)
                store(row.student + i, left, e);
            if (mode == NO_TEACHER)
                continue;
            Floats given = load(row.teacher + i, left, mode == LOGITS ? -INFINITY : 0.0f) * row.teacher_gain;
            if (mode == CLOSE_GAP) {
                second = expm1_of(exponential(given));
                Floats growth = e * second;
                add(&teacher_total, growth);
                teacher_run += (e + growth) * (x + given);
            } else {
                Floats t = mode == LOGITS ? given : z + given, y = t - by.teacher_top;
                second = relative_exp(y, flush);
                add(&teacher_total, second);
                teacher_run += second * larger(all(LEAST), y);
                if (keep)
                    store(row.teacher + i, left, t - z);
            }
            if (keep == KEEP_BOTH)
                store(spare + i, left, second);
        }
        add(&weighted, run);
        add(&teacher_weighted, teacher_run);
    }
    return (Sums){total_of(total), total_of(weighted), total_of(teacher_total), total_of(teacher_weighted)};
}

/* Log-sums and entropies of both sides; returns the teacher's log-sum less the student's. A close gap's teacher total
 * becomes a total like the others, relative to the student's largest. */
INLINE double normalise(Sums *sums, int mode, Extremes by, Values *values) {
    double log_sum = log(sums->total), teacher_log_sum, difference;
    values->student_log_sum = log_sum + by.top;
    values->student_entropy = log_sum - sums->weighted / sums->total;
    if (mode == NO_TEACHER)
        return 0.0;
    if (mode == CLOSE_GAP) {
        difference = log1p(sums->teacher_total / sums->total);
        sums->teacher_total += sums->total;
        teacher_log_sum = log_sum + difference;
    } else {
        teacher_log_sum = log(sums->teacher_total);
        difference = teacher_log_sum - log_sum + ((double)by.teacher_top - (double)by.top);
    }
    values->teacher_log_sum = values->student_log_sum + difference;
    values->teacher_entropy = teacher_log_sum - sums->teacher_weighted / sums->teacher_total;
    return difference;
}

#endif
