/* The Balancer: statistics of channels, and what it adds to their gradients. R rows, C channels. */
#include "mathematics.h"

#include <math.h>
#include <stdlib.h>

/* Sum over the rows of x (R, C) of x, or with means of (x - mean)^2, divided by R. */
static void mean_of(const float *x, const float *mean, float *result, int64_t rows, int64_t channels, int64_t stride) {
    float *parts = calloc(PARTS * channels, sizeof *parts);
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t part = 0; part < PARTS; part++) {
        float *sum = parts + part * channels;
        for (int64_t row = part * rows / PARTS; row < (part + 1) * rows / PARTS; row++) {
            const float *in = x + row * stride;
            if (mean) {
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) sum[c] += (in[c] - mean[c]) * (in[c] - mean[c]);
            } else {
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) sum[c] += in[c];
            }
        }
    }
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0.0;
        for (int64_t part = 0; part < PARTS; part++) sum += parts[part * channels + c];
        result[c] = (float)(sum / rows);
    }
    free(parts);
}

/* Mean and variance of each channel of x, whose rows are `stride` values apart. */
void moments(const float *x, float *mean, float *variance, int64_t rows, int64_t channels, int64_t stride) {
    mean_of(x, 0, mean, rows, channels, stride);
    /* A difference of sums of squares would cancel where a channel hardly varies. */
    mean_of(x, mean, variance, rows, channels, stride);
}

/* result = grad + |grad| (constant + slope (x - mean)), which may be written over grad. */
void balance(const float *restrict x, const float *restrict constant, const float *restrict slope,
             const float *restrict mean, const float *grad, float *result, int64_t rows, int64_t channels,
             int64_t x_stride, int64_t grad_stride, int64_t result_stride) {
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * x_stride, *g = grad + row * grad_stride;
        float *out = result + row * result_stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            out[c] = g[c] + fabsf(g[c]) * (constant[c] + slope[c] * (in[c] - mean[c]));
    }
}
