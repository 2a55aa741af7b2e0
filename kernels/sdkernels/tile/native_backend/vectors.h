/* Vectors of floats as wide as the processor's, e^x and log(1 + x) of them, and sums in double.
 *
 * Written with the vector types of GCC and clang, so that one source serves AVX-512, AVX2 and NEON; in intrinsics is
 * only what these types have no word for. NaN stays NaN throughout.
 */
#ifndef SDKERNELS_VECTORS_H
#define SDKERNELS_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef float HalfFloats __attribute__((vector_size(2 * WIDTH)));
typedef double Doubles __attribute__((vector_size(4 * WIDTH)));

INLINE Floats all(float value) { return (Floats){0} + value; }

#ifdef __AVX512F__

typedef __mmask16 Mask;

INLINE Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ); }
INLINE Mask is_zero(Ints n) { return _mm512_testn_epi32_mask((__m512i)n, (__m512i)n); }
INLINE Floats choose(Mask mask, Floats yes, Floats no) {
    return (Floats)_mm512_mask_blend_ps(mask, (__m512)no, (__m512)yes);
}
/* The second where either is NaN. */
INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE Mask first_lanes(int64_t n) { return n >= WIDTH ? 0xffff : (Mask)((1u << n) - 1); }
/* Bits of the lanes above a limit. */
INLINE uint32_t lanes_above(Ints v, int32_t limit) {
    return _mm512_cmpgt_epi32_mask((__m512i)v, _mm512_set1_epi32(limit));
}
/* The first n of what lies there; of no more than n is anything read or written. */
INLINE Floats load(const float *from, int64_t n, float filler) {
    return (Floats)_mm512_mask_loadu_ps((__m512)all(filler), first_lanes(n), from);
}
INLINE void store(float *to, int64_t n, Floats v) { _mm512_mask_storeu_ps(to, first_lanes(n), (__m512)v); }
/* GCC 12 makes a conversion of eight floats out of two of four. */
INLINE Doubles low_half(Floats v) { return (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)); }
INLINE Doubles high_half(Floats v) {
    return (Doubles)_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
}

#else

typedef Ints Mask;

INLINE Mask less(Floats a, Floats b) { return a < b; }
INLINE Mask is_zero(Ints n) { return n == 0; }
INLINE Floats choose(Mask mask, Floats yes, Floats no) { return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no)); }
INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }
INLINE Floats smaller(Floats a, Floats b) { return choose(a < b, a, b); }

INLINE uint32_t lanes_above(Ints v, int32_t limit) {
    Ints above = v > limit;
    int64_t words[WIDTH / 2], any = 0;
    memcpy(words, &above, sizeof words);
    for (int word = 0; word < WIDTH / 2; word++)
        any |= words[word];
    uint32_t bits = 0;
    for (int lane = 0; any && lane < WIDTH; lane++)
        bits |= (above[lane] & 1u) << lane;
    return bits;
}

/* Not inlined: a vector with an address would go through memory in the whole loop. */
static __attribute__((noinline)) Floats load_part(const float *from, int64_t n, float filler) {
    Floats v = all(filler);
    memcpy(&v, from, (size_t)n * sizeof(float));
    return v;
}
static __attribute__((noinline)) void store_part(float *to, int64_t n, Floats v) {
    memcpy(to, &v, (size_t)n * sizeof(float));
}
INLINE Floats load_whole(const float *from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}
INLINE Floats load(const float *from, int64_t n, float filler) {
    return n >= WIDTH ? load_whole(from) : load_part(from, n, filler);
}
INLINE void store(float *to, int64_t n, Floats v) {
    if (n >= WIDTH)
        memcpy(to, &v, sizeof v);
    else
        store_part(to, n, v);
}
INLINE Doubles low_half(Floats v) {
    HalfFloats half;
    memcpy(&half, &v, sizeof half);
    return __builtin_convertvector(half, Doubles);
}
INLINE Doubles high_half(Floats v) {
    HalfFloats half;
    memcpy(&half, (char *)&v + sizeof half, sizeof half);
    return __builtin_convertvector(half, Doubles);
}

#endif

INLINE Mask is_small(Floats x, float limit) { return less(x, all(limit)) & less(all(-limit), x); }

INLINE float largest_of(Floats v) {
    float most = v[0];
    for (int lane = 1; lane < WIDTH; lane++)
        most = v[lane] > most ? v[lane] : most;
    return most;
}

/* A sum in double of every float that is added. */
typedef struct {
    Doubles low, high;
} Sum;

INLINE void add(Sum *sum, Floats v) {
    sum->low += low_half(v);
    sum->high += high_half(v);
}

INLINE double total_of(Sum sum) {
    Doubles both = sum.low + sum.high;
    double total = 0.0;
    for (int lane = 0; lane < WIDTH / 2; lane++)
        total += both[lane];
    return total;
}

/* e^x of less is of no weight. */
#define LEAST -87.0f

/* Polynomials are taken in pairs of terms: in Horner's order each step waits for the one before.
 *
 * x = n log 2 + r with |r| < 0.35, e^r = 1 + r + series. For x up to 88. */
typedef struct {
    Floats power, r, series;
    Ints n;
} Exponential;

/* A minimax polynomial in r (the coefficients of Cephes' expf). */
INLINE Exponential exponential(Floats x) {
    /* What is added leaves no room for a fraction; the integer is in the last bits. */
    const float magic = 12582912.0f;
    Floats rounded = larger(all(LEAST), x) * 1.44269504088896341f + magic, n = rounded - magic;
    Floats r = larger(all(LEAST), x) - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats square = r * r, first = r * 1.6666665459e-1f + 5.0000001201e-1f;
    Floats second = r * 8.3334519073e-3f + 4.1665795894e-2f, third = r * 1.9875691500e-4f + 1.3981999507e-3f;
    Floats series = ((third * square + second) * square + first) * square;
    Ints exponent = (Ints)rounded << 23;
    return (Exponential){(Floats)(exponent + (127 << 23)), r, series, exponent};
}

INLINE Floats exp_of(Exponential e) { return e.power * (e.r + e.series) + e.power; }

INLINE Floats expm1_of(Exponential e) { return e.power * (e.r + e.series) + (e.power - 1.0f); }

/* e^x - 1 - x, with its own relative precision. */
INLINE Floats remainder_of(Exponential e, Floats x) { return choose(is_zero(e.n), e.series, expm1_of(e) - x); }

/* log(1 + x), and x - log(1 + x) with its own relative precision. */
typedef struct {
    Floats log, rest;
} Logarithm;

/* For x > -1: 1 + x = 2^k (1 + g), and a polynomial in g (the coefficients of Cephes' logf). */
INLINE Logarithm log1p_(Floats x) {
    Floats y = 1.0f + x;
    Ints bits = (Ints)y, k = (bits - 0x3f3504f3) >> 23; /* mantissa from sqrt(1/2) to sqrt(2) */
    Mask near = is_zero(k);
    Floats m = (Floats)(bits - (k << 23));
    /* What was rounded off 1 + x; for k = 0 the x itself. */
    Floats g = choose(near, x, (m - 1.0f) + (x - (y - 1.0f)) * (Floats)((127 - k) << 23));
    Floats square = g * g;
    Floats first = 3.3333331174e-1f - g * 2.4999993993e-1f, second = 2.0000714765e-1f - g * 1.6668057665e-1f;
    Floats third = 1.4249322787e-1f - g * 1.2420140846e-1f, fourth = 1.1676998740e-1f - g * 1.1514610310e-1f;
    Floats upper = (square * 7.0376836292e-2f + fourth) * square + third;
    Floats rest = square * (0.5f - g * ((upper * square + second) * square + first));
    Floats log = __builtin_convertvector(k, Floats) * 0.693147180559945f + (g - rest);
    return (Logarithm){log, choose(near, rest, x - log)};
}

#endif
