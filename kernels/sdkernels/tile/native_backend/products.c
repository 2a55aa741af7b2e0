/* Products with float32 sums and a head in float32, bfloat16 or float16, where AVX-512 is: the head is widened while it
 * is packed, so that 16 bits cost no more than 32, and nothing but packed pieces of it is ever wide. Where the processor
 * multiplies pairs of bfloat16 (AVX512_BF16) and both factors are in it, they are packed as they are, PAIRS: a word of
 * 32 bits holds two summands, so that everything that counts depth counts words.
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

enum { FLOAT32, BFLOAT16, FLOAT16, PAIRS };

INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

/* Summands in a word, and words that so many take. */
INLINE int64_t summands(int dtype) { return dtype == PAIRS ? 2 : 1; }
INLINE int64_t words(int64_t depth, int dtype) { return (depth + summands(dtype) - 1) / summands(dtype); }

INLINE const char *at(const void *x, int dtype, int64_t i) {
    return (const char *)x + i * (dtype == FLOAT32 || dtype == PAIRS ? 4 : 2);
}

/* The first row of x, its numbers `stride` apart from row to row, that is in word p of the depth. */
INLINE const char *row_at(const void *x, int dtype, int64_t stride, int64_t p) {
    return (const char *)x + (dtype == FLOAT32 ? 4 : 2) * summands(dtype) * p * stride;
}

/* Numbers i to i + 15, those outside the mask 0 and not touched. */
INLINE __m512 load(const void *x, int dtype, int64_t i, __mmask16 mask) {
    const char *from = at(x, dtype, i);
    if (dtype == FLOAT32 || dtype == PAIRS)
        return _mm512_maskz_loadu_ps(mask, from);
    __m256i half = _mm256_maskz_loadu_epi16(mask, from);
    if (dtype == FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 multiply_add(__m512 x, __m512 y, __m512 sum, int dtype) {
#ifdef __AVX512BF16__
    if (dtype == PAIRS)
        return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y);
#endif
    return _mm512_fmadd_ps(x, y, sum);
}

INLINE void add_products(const float *left, const float *right, __m512 sums[TILE_ROWS][2], int dtype) {
    __m512 low = _mm512_load_ps(right), high = _mm512_load_ps(right + 16);
    UNROLLED
    for (int m = 0; m < TILE_ROWS; m++) {
        __m512 x = _mm512_set1_ps(left[m]);
        sums[m][0] = multiply_add(x, low, sums[m][0], dtype);
        sums[m][1] = multiply_add(x, high, sums[m][1], dtype);
    }
}

/* `out` (rows, columns) of at most a tile = or += scale times left . right, with TILE_ROWS numbers of the left factor and
 * TILE_COLUMNS of the right one for each summand. What is added to is fetched a row at a time while the sums are made: all
 * of it at once would take all the places for lines on their way into the cache. */
INLINE void tile(const float *left, const float *right, int64_t depth, float *out, int64_t stride, int64_t rows,
                 int64_t columns, int add, float scale, int dtype) {
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
                add_products(left + k * TILE_ROWS, right + k * TILE_COLUMNS, sums, dtype);
        } else {
            for (int k = 0; k < depth - i; k++)
                add_products(left + k * TILE_ROWS, right + k * TILE_COLUMNS, sums, dtype);
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
            __m512 sum = _mm512_mul_ps(sums[m][half], _mm512_set1_ps(scale));
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

/* Numbers j to j + 15 of row i of x; of pairs those of rows 2 i and 2 i + 1, of which there are `rows`. `stride` counts
 * numbers. */
INLINE __m512 load_row(const void *x, int dtype, int64_t stride, int64_t rows, int64_t i, int64_t j, __mmask16 mask) {
    if (dtype != PAIRS)
        return load(x, dtype, i * stride + j, mask);
    const uint16_t *from = (const uint16_t *)x + 2 * i * stride + j;
    __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), other = _mm512_setzero_si512();
    if (2 * i + 1 < rows)
        other = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + stride));
    return _mm512_castsi512_ps(_mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
}

/* A right factor x (rows, columns): panels of TILE_COLUMNS columns, the last one filled up with zeros. */
INLINE void pack_right(const void *x, int dtype, int64_t stride, int64_t rows, int64_t columns, float *out) {
    int64_t depth = words(rows, dtype);
    for (int64_t i = 0; i < depth; i++)
        for (int64_t j = 0; j < multiple(columns, TILE_COLUMNS); j += 16)
            _mm512_store_ps(out + j / TILE_COLUMNS * TILE_COLUMNS * depth + i * TILE_COLUMNS + j % TILE_COLUMNS,
                            load_row(x, dtype, stride, rows, i, j, first(columns - j)));
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
                             rows - m, wide - n, p > 0, 1.0f, dtype);
            }
        }
}

/* Summed in tiles that lie one after the other, and written to `out` at the end. The gradient is in float32, or in
 * bfloat16 for PAIRS. `vocab` counts numbers, `p` words. */
INLINE void hidden_gradient(const void *gradient, int64_t gradient_stride, int64_t rows, const void *weight, int dtype,
                            int64_t weight_stride, int64_t columns, int64_t vocab, float *scratch, float *out,
                            int64_t out_stride) {
    int64_t depth = words(vocab, dtype), size = dtype == FLOAT32 ? 4 : 2;
    float *left = scratch, *right = left + sdkernels_left_entries(rows, least(depth, DEPTH));
    float *sums = right + sdkernels_project_scratch(depth, columns);
    int64_t high = multiple(rows, TILE_ROWS);
    for (int64_t p = 0; p < depth; p += DEPTH) {
        int64_t deep = least(DEPTH, depth - p), left_over = vocab - p * summands(dtype);
        /* Words as they are. */
        pack_left(at(gradient, FLOAT32, p), FLOAT32, gradient_stride / summands(dtype), rows, deep, left);
        for (int64_t j = 0; j < columns; j += BLOCK_COLUMNS) {
            int64_t wide = least(BLOCK_COLUMNS, columns - j);
            pack_right(row_at(weight, dtype, weight_stride, p) + size * j, dtype, weight_stride,
                       least(deep * summands(dtype), left_over), wide, right);
            for (int64_t n = 0; n < wide; n += TILE_COLUMNS)
                for (int64_t m = 0; m < rows; m += TILE_ROWS)
                    tile(left + m * deep, right + n * deep, deep, sums + (j + n) * high + m * TILE_COLUMNS, TILE_COLUMNS,
                         TILE_ROWS, TILE_COLUMNS, p > 0, 1.0f, dtype);
        }
    }
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
        for (int64_t m = 0; m < rows; m++)
            memcpy(out + m * out_stride + j, sums + j * high + m * TILE_COLUMNS,
                   least(TILE_COLUMNS, columns - j) * sizeof(float));
}

INLINE void weight_gradient(const void *gradient, int dtype, int64_t gradient_stride, int64_t rows, int64_t vocab,
                            const float *packed, int64_t columns, float *scratch, float *out, int64_t out_stride,
                            float scale, int add) {
    int64_t depth = words(rows, dtype), size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t v = 0; v < vocab; v += BLOCK_ROWS)
        for (int64_t p = 0; p < depth; p += DEPTH) {
            int64_t high = least(BLOCK_ROWS, vocab - v), deep = least(DEPTH, depth - p);
            const char *from = row_at(gradient, dtype, gradient_stride, p) + size * v;
            for (int64_t i = 0; i < deep; i++)
                for (int64_t m = 0; m < high; m += TILE_ROWS)
                    _mm512_mask_storeu_ps(scratch + m * deep + i * TILE_ROWS, first(TILE_ROWS),
                                          load_row(from, dtype, gradient_stride, rows - p * summands(dtype), i, m,
                                                   first(least(TILE_ROWS, high - m))));
            for (int64_t n = 0; n < columns; n += TILE_COLUMNS)
                for (int64_t m = 0; m < high; m += TILE_ROWS)
                    tile(scratch + m * deep, packed + sdkernels_right_entries(p, columns) + n * deep, deep,
                         out + (v + m) * out_stride + n, out_stride, high - m, columns - n, add || p > 0, scale, dtype);
        }
}

/* One copy of `call` for each dtype, so that no loop asks for it. */
#define OF(code, call)                                                                                                \
    case code: {                                                                                                      \
        enum { DTYPE = code };                                                                                        \
        call;                                                                                                         \
        break;                                                                                                        \
    }
#define FOR_EACH_DTYPE(call)                                                                                          \
    switch (dtype) { OF(FLOAT32, call) OF(BFLOAT16, call) OF(FLOAT16, call) OF(PAIRS, call) }

int sdkernels_has_products(void) { return 1; }
#ifdef __AVX512BF16__
int sdkernels_has_pairs(void) { return 1; }
#else
int sdkernels_has_pairs(void) { return 0; }
#endif

/* A left factor x (rows, depth) for sdkernels_project. Of pairs, stride and depth count words here and there. */
void sdkernels_pack_left(const void *x, int dtype, int64_t stride, int64_t rows, int64_t depth, float *out) {
    for (int64_t p = 0; p < depth; p += DEPTH)
        FOR_EACH_DTYPE(pack_left(at(x, DTYPE, p), DTYPE, stride, rows, least(DEPTH, depth - p),
                                 out + sdkernels_left_entries(rows, p)))
}

/* A right factor x (rows, columns) for sdkernels_weight_gradient. */
void sdkernels_pack_right(const void *x, int dtype, int64_t stride, int64_t rows, int64_t columns, float *out) {
    for (int64_t p = 0; p < words(rows, dtype); p += DEPTH)
        FOR_EACH_DTYPE(pack_right(row_at(x, DTYPE, stride, p), DTYPE, stride,
                                  least(DEPTH * summands(DTYPE), rows - p * summands(DTYPE)), columns,
                                  out + sdkernels_right_entries(p, columns)))
}

/* outs[side] (rows, columns) = packed[side] (rows, depth) . weight (columns, depth), transposed. */
void sdkernels_project(int sides, const float *const *packed, int64_t rows, const void *weight, int dtype,
                       int64_t weight_stride, int64_t columns, int64_t depth, float *scratch, float *const *outs,
                       int64_t out_stride) {
    FOR_EACH_DTYPE(project(sides, packed, rows, weight, DTYPE, weight_stride, columns, depth, scratch, outs, out_stride))
}

/* out (rows, columns) = gradient (rows, vocab) . weight (vocab, columns). */
void sdkernels_hidden_gradient(const void *gradient, int64_t gradient_stride, int64_t rows, const void *weight,
                               int dtype, int64_t weight_stride, int64_t columns, int64_t vocab, float *scratch,
                               float *out, int64_t out_stride) {
    FOR_EACH_DTYPE(hidden_gradient(gradient, gradient_stride, rows, weight, DTYPE, weight_stride, columns, vocab,
                                   scratch, out, out_stride))
}

/* out (vocab, columns) = or += scale times gradient (rows, vocab), transposed . packed (rows, columns). */
void sdkernels_weight_gradient(const void *gradient, int dtype, int64_t gradient_stride, int64_t rows, int64_t vocab,
                               const float *packed, int64_t columns, float *scratch, float *out, int64_t out_stride,
                               float scale, int add) {
    FOR_EACH_DTYPE(weight_gradient(gradient, DTYPE, gradient_stride, rows, vocab, packed, columns, scratch, out,
                                   out_stride, scale, add))
}
#else
int sdkernels_has_products(void) { return 0; }
int sdkernels_has_pairs(void) { return 0; }
#endif
