/* Sums of squares of a tile's columns, which say how much of a gradient each of them carries. */
#include <stdint.h>
#include <string.h>

#include "vectors.h"

/* Columns of which the sums stay in the first-level cache while the rows go by. */
#define STRIP 2048

INLINE float of_bfloat16(uint16_t x) {
    uint32_t wide = (uint32_t)x << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* out[j] = sum over the rows of weights[i] x[i, j]^2, x in float32 or in bfloat16. One thread's share. */
void sdkernels_column_squares(const void *x, int is_bfloat16, int64_t stride, int64_t rows, int64_t columns,
                              const float *weights, float *out) {
    for (int64_t start = 0; start < columns; start += STRIP) {
        int64_t wide = columns - start < STRIP ? columns - start : STRIP;
        float *sums = out + start;
        memset(sums, 0, (size_t)wide * sizeof *sums);
        for (int64_t i = 0; i < rows; i++) {
            const float *single = (const float *)x + i * stride + start;
            const uint16_t *half = (const uint16_t *)x + i * stride + start;
            if (is_bfloat16) {
#pragma omp simd
                for (int64_t j = 0; j < wide; j++)
                    sums[j] += weights[i] * of_bfloat16(half[j]) * of_bfloat16(half[j]);
            } else {
#pragma omp simd
                for (int64_t j = 0; j < wide; j++)
                    sums[j] += weights[i] * single[j] * single[j];
            }
        }
    }
}
