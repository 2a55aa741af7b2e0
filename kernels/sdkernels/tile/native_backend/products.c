/* float32 products with a head in float32, bfloat16 or float16, where AVX-512 is: the head is widened while it is packed,
 * so that 16 bits cost no more than 32, and nothing but packed pieces of it is ever wide.
 *
 * A product is made of tiles of TILE_ROWS x TILE_COLUMNS sums, which stay in registers over up to DEPTH summands. The
 * left factor of a tile is read one number at a time, the right one TILE_COLUMNS numbers at a time. Both are packed
 * into panels in which they lie in the order in which a tile reads them. A block of the right factor fills half of a
 * second-level cache of 1 MiB.
 *
 * `build.py` says how large tiles and blocks are. Every function does one thread's share. `scratch` and packed factors
 * start on 64 bytes.
 */
#include <stdint.h>
#include <string.h>

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t multiple(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

/* Floats of a packed left factor (rows, depth), and of a packed right one (depth, columns). */
int64_t sdkernels_left_entries(int64_t rows, int64_t depth) {
    return multiple(multiple(rows, TILE_ROWS) * depth, 16);
}
int64_t sdkernels_right_entries(int64_t depth, int64_t columns) { return depth * multiple(columns, TILE_COLUMNS); }

/* Floats of scratch that the three products need. */
int64_t sdkernels_project_scratch(int64_t depth, int64_t columns) {
    return sdkernels_right_entries(least(depth, DEPTH), least(columns, BLOCK_COLUMNS));
}
int64_t sdkernels_hidden_gradient_scratch(int64_t rows, int64_t depth, int64_t columns) {
    return sdkernels_left_entries(rows, least(depth, DEPTH)) + sdkernels_project_scratch(depth, columns) +
           sdkernels_right_entries(multiple(rows, TILE_ROWS), columns);
}
int64_t sdkernels_weight_gradient_scratch(int64_t rows) {
    return sdkernels_left_entries(BLOCK_ROWS, least(rows, DEPTH));
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))
enum { STEPS = 8 };
#define UNROLLED _Pragma("GCC unroll 16")

enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

INLINE const char *at(const void *x, int dtype, int64_t i) {
    return (const char *)x + i * (dtype == FLOAT32 ? 4 : 2);
}

/* Numbers i to i + 15, those outside the mask 0 and not touched. */
INLINE __m512 load(const void *x, int dtype, int64_t i, __mmask16 mask) {
    const char *from = at(x, dtype, i);
    if (dtype == FLOAT32)
        return _mm512_maskz_loadu_ps(mask, from);
    __m256i half = _mm256_maskz_loadu_epi16(mask, from);
    if (dtype == FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE void add_products(const float *left, const float *right, __m512 sums[TILE_ROWS][2]) {
    __m512 low = _mm512_load_ps(right), high = _mm512_load_ps(right + 16);
    UNROLLED
    for (int m = 0; m < TILE_ROWS; m++) {
        __m512 x = _mm512_set1_ps(left[m]);
        sums[m][0] = _mm512_fmadd_ps(x, low, sums[m][0]);
        sums[m][1] = _mm512_fmadd_ps(x, high, sums[m][1]);
    }
}

/* `out` (rows, columns) of at most a tile = or += left . right, with TILE_ROWS numbers of the left factor and TILE_COLUMNS
 * of the right one for each summand. What is added to is fetched a row at a time while the sums are made: all of it at
 * once would take all the places for lines on their way into the cache. */
INLINE void tile(const float *left, const float *right, int64_t depth, float *out, int64_t stride, int64_t rows,
                 int64_t columns, int add) {
    __m512 sums[TILE_ROWS][2];
    UNROLLED
    for (int m = 0; m < TILE_ROWS; m++)
        sums[m][0] = sums[m][1] = _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; i += STEPS, left += STEPS * TILE_ROWS, right += STEPS * TILE_COLUMNS) {
        const float *place = out + least(i / STEPS, rows - 1) * stride;
        _mm_prefetch((const char *)place, _MM_HINT_T0);
        _mm_prefetch((const char *)(place + 16), _MM_HINT_T0);
        if (i + STEPS <= depth) {
            UNROLLED
            for (int k = 0; k < STEPS; k++)
                add_products(left + k * TILE_ROWS, right + k * TILE_COLUMNS, sums);
        } else {
            for (int k = 0; k < depth - i; k++)
                add_products(left + k * TILE_ROWS, right + k * TILE_COLUMNS, sums);
        }
    }
    UNROLLED
    for (int m = 0; m < TILE_ROWS; m++) {
        if (m >= rows)
            return;
        UNROLLED
        for (int half = 0; half < 2; half++) {
            float *place = out + m * stride + 16 * half;
            __mmask16 mask = first(columns - 16 * half);
            __m512 sum = sums[m][half];
            _mm512_mask_storeu_ps(place, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, place), sum) : sum);
        }
    }
}

INLINE void transpose(__m512 x[16]) {
    __m512 y[16];
    UNROLLED
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    UNROLLED
    for (int i = 0; i < 16; i += 4)
        UNROLLED
        for (int k = 0; k < 2; k++) {
            __m512d one = _mm512_castps_pd(y[i + k]), other = _mm512_castps_pd(y[i + k + 2]);
            x[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other));
            x[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
        }
    UNROLLED
    for (int i = 0; i < 16; i += 8)
        UNROLLED
        for (int k = 0; k < 4; k++) {
            y[i + k] = _mm512_shuffle_f32x4(x[i + k], x[i + k + 4], 0x88);
            y[i + k + 4] = _mm512_shuffle_f32x4(x[i + k], x[i + k + 4], 0xdd);
        }
    UNROLLED
    for (int k = 0; k < 8; k++) {
        x[k] = _mm512_shuffle_f32x4(y[k], y[k + 8], 0x88);
        x[k + 8] = _mm512_shuffle_f32x4(y[k], y[k + 8], 0xdd);
    }
}

/* A left factor: panels of TILE_ROWS rows, one after the other, the last one filled up with zeros. */
INLINE void pack_left(const void *x, int dtype, int64_t stride, int64_t rows, int64_t depth, float *out) {
    for (int64_t m = 0; m < rows; m += TILE_ROWS)
        for (int64_t i = 0; i < depth; i += 16) {
            float *panel = out + m * depth + i * TILE_ROWS;
            __m512 square[16];
            UNROLLED
            for (int k = 0; k < 16; k++)
                square[k] = load(x, dtype, (m + k) * stride + i, k < least(TILE_ROWS, rows - m) ? first(depth - i) : 0);
            transpose(square);
            UNROLLED
            for (int k = 0; k < 16; k++)
                if (i + k < depth)
                    _mm512_mask_storeu_ps(panel + k * TILE_ROWS, first(TILE_ROWS), square[k]);
        }
}

/* A right factor: panels of TILE_COLUMNS columns, the last one filled up with zeros. Row i is multiplied by factors[i]. */
INLINE void pack_right(const void *x, int dtype, int64_t stride, int64_t depth, int64_t columns, const float *factors,
                       float *out) {
    for (int64_t i = 0; i < depth; i++)
        for (int64_t j = 0; j < multiple(columns, TILE_COLUMNS); j += 16) {
            __m512 entries = load(x, dtype, i * stride + j, first(columns - j));
            if (factors)
                entries = _mm512_mul_ps(entries, _mm512_set1_ps(factors[i]));
            _mm512_store_ps(out + j / TILE_COLUMNS * TILE_COLUMNS * depth + i * TILE_COLUMNS + j % TILE_COLUMNS, entries);
        }
}

/* The transpose of x (columns, depth) as a right factor. */
INLINE void pack_right_transposed(const void *x, int dtype, int64_t stride, int64_t columns, int64_t depth,
                                  float *out) {
    for (int64_t j = 0; j < multiple(columns, TILE_COLUMNS); j += 16) {
        float *panel = out + j / TILE_COLUMNS * TILE_COLUMNS * depth + j % TILE_COLUMNS;
        for (int64_t i = 0; i < depth; i += 16) {
            __m512 square[16];
            UNROLLED
            for (int k = 0; k < 16; k++)
                square[k] = load(x, dtype, (j + k) * stride + i, j + k < columns ? first(depth - i) : 0);
            transpose(square);
            UNROLLED
            for (int k = 0; k < 16; k++)
                if (i + k < depth)
                    _mm512_store_ps(panel + (i + k) * TILE_COLUMNS, square[k]);
        }
    }
}

INLINE void project(int sides, const float *const *packed, int64_t rows, const void *weight, int dtype,
                    int64_t weight_stride, int64_t columns, int64_t depth, float *scratch, float *const *outs,
                    int64_t out_stride) {
    for (int64_t j = 0; j < columns; j += BLOCK_COLUMNS)
        for (int64_t p = 0; p < depth; p += DEPTH) {
            int64_t wide = least(BLOCK_COLUMNS, columns - j), deep = least(DEPTH, depth - p);
            pack_right_transposed(at(weight, dtype, j * weight_stride + p), dtype, weight_stride, wide, deep, scratch);
            for (int side = 0; side < sides; side++) {
                const float *left = packed[side] + sdkernels_left_entries(rows, p);
                for (int64_t n = 0; n < wide; n += TILE_COLUMNS)
                    for (int64_t m = 0; m < rows; m += TILE_ROWS)
                        tile(left + m * deep, scratch + n * deep, deep, outs[side] + m * out_stride + j + n, out_stride,
                             rows - m, wide - n, p > 0);
            }
        }
}

/* Summed in tiles that lie one after the other, and written to `out` at the end. */
INLINE void hidden_gradient(const float *gradient, int64_t gradient_stride, int64_t rows, const void *weight, int dtype,
                            int64_t weight_stride, int64_t columns, int64_t depth, float *scratch, float *out,
                            int64_t out_stride) {
    float *left = scratch, *right = left + sdkernels_left_entries(rows, least(depth, DEPTH));
    float *sums = right + sdkernels_project_scratch(depth, columns);
    int64_t high = multiple(rows, TILE_ROWS);
    for (int64_t p = 0; p < depth; p += DEPTH) {
        int64_t deep = least(DEPTH, depth - p);
        pack_left(gradient + p, FLOAT32, gradient_stride, rows, deep, left);
        for (int64_t j = 0; j < columns; j += BLOCK_COLUMNS) {
            int64_t wide = least(BLOCK_COLUMNS, columns - j);
            pack_right(at(weight, dtype, p * weight_stride + j), dtype, weight_stride, deep, wide, NULL, right);
            for (int64_t n = 0; n < wide; n += TILE_COLUMNS)
                for (int64_t m = 0; m < rows; m += TILE_ROWS)
                    tile(left + m * deep, right + n * deep, deep, sums + (j + n) * high + m * TILE_COLUMNS, TILE_COLUMNS,
                         TILE_ROWS, TILE_COLUMNS, p > 0);
        }
    }
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
        for (int64_t m = 0; m < rows; m++)
            memcpy(out + m * out_stride + j, sums + j * high + m * TILE_COLUMNS,
                   least(TILE_COLUMNS, columns - j) * sizeof(float));
}

/* One copy of `call` for each dtype, so that no loop asks for it. */
#define FOR_EACH_DTYPE(call)                                                                                          \
    switch (dtype) {                                                                                                  \
    case FLOAT32: { enum { DTYPE = FLOAT32 }; call; break; }                                                          \
    case BFLOAT16: { enum { DTYPE = BFLOAT16 }; call; break; }                                                        \
    case FLOAT16: { enum { DTYPE = FLOAT16 }; call; break; }                                                          \
    }

int sdkernels_has_products(void) { return 1; }

/* A left factor x (rows, depth) for sdkernels_project. */
void sdkernels_pack_left(const void *x, int dtype, int64_t stride, int64_t rows, int64_t depth, float *out) {
    for (int64_t p = 0; p < depth; p += DEPTH)
        FOR_EACH_DTYPE(pack_left(at(x, DTYPE, p), DTYPE, stride, rows, least(DEPTH, depth - p),
                                 out + sdkernels_left_entries(rows, p)))
}

/* A right factor x (depth, columns), its rows times `factors`, for sdkernels_weight_gradient. */
void sdkernels_pack_right(const void *x, int dtype, int64_t stride, int64_t depth, int64_t columns,
                          const float *factors, float *out) {
    for (int64_t p = 0; p < depth; p += DEPTH)
        FOR_EACH_DTYPE(pack_right(at(x, DTYPE, p * stride), DTYPE, stride, least(DEPTH, depth - p), columns,
                                  factors + p, out + sdkernels_right_entries(p, columns)))
}

/* outs[side] (rows, columns) = packed[side] (rows, depth) . weight (columns, depth), transposed. */
void sdkernels_project(int sides, const float *const *packed, int64_t rows, const void *weight, int dtype,
                       int64_t weight_stride, int64_t columns, int64_t depth, float *scratch, float *const *outs,
                       int64_t out_stride) {
    FOR_EACH_DTYPE(project(sides, packed, rows, weight, DTYPE, weight_stride, columns, depth, scratch, outs, out_stride))
}

/* out (rows, columns) = gradient (rows, depth) . weight (depth, columns). */
void sdkernels_hidden_gradient(const float *gradient, int64_t gradient_stride, int64_t rows, const void *weight,
                               int dtype, int64_t weight_stride, int64_t columns, int64_t depth, float *scratch,
                               float *out, int64_t out_stride) {
    FOR_EACH_DTYPE(hidden_gradient(gradient, gradient_stride, rows, weight, DTYPE, weight_stride, columns, depth,
                                   scratch, out, out_stride))
}

/* out (vocab, columns) = or += gradient (rows, vocab), transposed . packed (rows, columns). */
void sdkernels_weight_gradient(const float *gradient, int64_t gradient_stride, int64_t rows, int64_t vocab,
                               const float *packed, int64_t columns, float *scratch, float *out, int64_t out_stride,
                               int add) {
    for (int64_t v = 0; v < vocab; v += BLOCK_ROWS)
        for (int64_t p = 0; p < rows; p += DEPTH) {
            int64_t high = least(BLOCK_ROWS, vocab - v), deep = least(DEPTH, rows - p);
            for (int64_t i = 0; i < deep; i++)
                for (int64_t m = 0; m < high; m += TILE_ROWS) {
                    const float *from = gradient + (p + i) * gradient_stride + v + m;
                    _mm512_mask_storeu_ps(scratch + m * deep + i * TILE_ROWS, first(TILE_ROWS),
                                          _mm512_maskz_loadu_ps(first(least(TILE_ROWS, high - m)), from));
                }
            for (int64_t n = 0; n < columns; n += TILE_COLUMNS)
                for (int64_t m = 0; m < high; m += TILE_ROWS)
                    tile(scratch + m * deep, packed + sdkernels_right_entries(p, columns) + n * deep, deep,
                         out + (v + m) * out_stride + n, out_stride, high - m, columns - n, add || p > 0);
        }
}
#else
int sdkernels_has_products(void) { return 0; }
#endif
