/* What Balancer, Whiten and limits of parameters do to gradients. R rows, C channels. */
#include "mathematics.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK 256 /* rows whose sum is a float: more of them would lose what is small beside the mean */

/* Sum over the rows of x (R, C) of x, or with means of (x - mean)^2, divided by R. */
static void mean_of(const float *x, const float *mean, float *result, int64_t rows, int64_t channels, int64_t stride) {
    double *totals = calloc(PARTS * channels, sizeof *totals);
    float *sums = malloc(PARTS * channels * sizeof *sums);
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t part = 0; part < PARTS; part++) {
        double *total = totals + part * channels;
        float *sum = sums + part * channels;
        const int64_t end = part_begin(part + 1, rows);
        for (int64_t from = part_begin(part, rows); from < end; from += BLOCK) {
            memset(sum, 0, channels * sizeof *sum);
            for (int64_t row = from; row < smaller(from + BLOCK, end); row++) {
                const float *in = x + row * stride;
                if (mean) {
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) sum[c] += (in[c] - mean[c]) * (in[c] - mean[c]);
                } else {
#pragma omp simd
                    for (int64_t c = 0; c < channels; c++) sum[c] += in[c];
                }
            }
            for (int64_t c = 0; c < channels; c++) total[c] += sum[c];
        }
    }
    for (int64_t c = 0; c < channels; c++) {
        double sum = 0.0;
        for (int64_t part = 0; part < PARTS; part++) sum += totals[part * channels + c];
        result[c] = (float)(sum / rows);
    }
    free(totals);
    free(sums);
}

/* Mean and variance of each channel of x, whose rows are `stride` values apart. */
void moments(const float *x, float *mean, float *variance, int64_t rows, int64_t channels, int64_t stride) {
    mean_of(x, 0, mean, rows, channels, stride);
    /* A difference of sums of squares would cancel where a channel hardly varies. */
    mean_of(x, mean, variance, rows, channels, stride);
}

static inline float at_least(float x, float minimum) { return x < minimum ? minimum : x; }

static inline float beyond(float x, float minimum, float maximum) { return (float)(x > maximum) - (float)(x < minimum); }

/* result = grad + |grad| G with G = constant + slope (x - mean) of each channel, the gradient that pushes its mean / std
 * and its rms into their limits, scaled to that rms; result may be grad. `work` has room for 2 C values. */
void balance(const float *restrict x, const float *restrict mean, const float *restrict variance, const float *grad,
             float *result, float *restrict work, int64_t rows, int64_t channels, int64_t x_stride, int64_t grad_stride,
             int64_t result_stride, float scale, float min_ratio, float max_ratio, float min_rms, float max_rms) {
    float *constant = work, *slope = work + channels;
    for (int64_t c = 0; c < channels; c++) {
        float std = sqrtf(at_least(variance[c], 1e-20f)), square = at_least(variance[c] + mean[c] * mean[c], 1e-20f);
        float of_ratio = beyond(mean[c] / std, min_ratio, max_ratio), of_rms = beyond(sqrtf(square), min_rms, max_rms);
        float value = of_ratio / std + of_rms * mean[c] / square;
        float rise = of_rms / square - of_ratio * mean[c] / (std * std * std);
        float size = hypotf(value, rise * sqrtf(variance[c]));
        /* A channel within its limits, or all zero, is left alone. */
        float factor = size > 1e-20f ? scale / size : 0.0f;
        constant[c] = value * factor;
        slope[c] = rise * factor;
    }
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * x_stride, *g = grad + row * grad_stride;
        float *out = result + row * result_stride;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++)
            out[c] = g[c] + fabsf(g[c]) * (constant[c] + slope[c] * (in[c] - mean[c]));
    }
}

/* result (R, C) = x less the mean of each channel, for which `mean` has room. */
void centred(const float *restrict x, float *restrict mean, float *restrict result, int64_t rows, int64_t channels,
             int64_t stride) {
    mean_of(x, 0, mean, rows, channels, stride);
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) result[row * channels + c] = x[row * stride + c] - mean[c];
}

/* The whitening metric of centred channels from their covariance (C, C), of which the blocks of groups count. Covariance
 * becomes what the centred channels are multiplied by for the gradient of the metric. */
void whitening(float *covariance, float *metric, int64_t channels, int64_t groups) {
    int64_t size = channels / groups;
    double trace = 0.0, squares = 0.0;
    for (int64_t i = 0; i < channels; i++) {
        float *row = covariance + i * channels, sum = 0.0f;
        int64_t first = i / size * size, end = first + size;
        for (int64_t j = 0; j < first; j++) row[j] = 0.0f;
        for (int64_t j = end; j < channels; j++) row[j] = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first; j < end; j++) sum += row[j] * row[j];
        squares += sum;
        trace += row[i];
    }
    double mean = trace / channels, denominator = mean * mean + 1e-20;
    double value = squares / channels / denominator, factor = 4.0 / (channels * denominator);
    for (int64_t i = 0; i < channels; i++) {
        float *row = covariance + i * channels;
        row[i] -= (float)(value * mean);
        for (int64_t j = i / size * size; j < (i / size + 1) * size; j++) row[j] *= (float)factor;
    }
    *metric = (float)value;
}

static double norm_of(const float *x, int64_t count) {
    double parts[PARTS];
#pragma omp parallel for if (count > PARALLEL_FROM)
    for (int64_t part = 0; part < PARTS; part++) {
        const int64_t end = part_begin(part + 1, count);
        double total = 0.0;
        for (int64_t from = part_begin(part, count); from < end; from += 1024) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = from; i < smaller(from + 1024, end); i++) sum += x[i] * x[i];
            total += sum;
        }
        parts[part] = total;
    }
    double total = 0.0;
    for (int64_t part = 0; part < PARTS; part++) total += parts[part];
    return sqrt(total);
}

/* result = grad + push, push scaled to `scale` times the norm of grad. */
void pushed(const float *restrict grad, const float *restrict push, float *restrict result, int64_t count,
            float scale) {
    float size = (float)(scale * norm_of(grad, count) / (norm_of(push, count) + 1e-20));
#pragma omp parallel for simd if (count > PARALLEL_FROM)
    for (int64_t i = 0; i < count; i++) result[i] = grad[i] + size * push[i];
}

/* result = grad, its sign changed where it would move a value of x that is outside the limits further away. */
void limited(const float *restrict x, const float *restrict grad, float *restrict result, int64_t count, float minimum,
             float maximum) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        int outwards = (x[i] < minimum && grad[i] > 0.0f) || (x[i] > maximum && grad[i] < 0.0f);
        result[i] = outwards ? -grad[i] : grad[i];
    }
}
