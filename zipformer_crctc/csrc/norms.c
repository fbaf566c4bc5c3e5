/* BiasNorm and Bypass, alone and together. R rows, C channels; rows are (frame, utterance) pairs, N utterances. */
#include "mathematics.h"

#include <math.h>
#include <stdlib.h>

/* Adds up PARTS arrays of `size` values. */
static void add_parts(const float *parts, float *sum, int64_t size) {
    for (int64_t i = 0; i < size; i++) sum[i] = 0.0f;
    for (int64_t part = 0; part < PARTS; part++)
        for (int64_t i = 0; i < size; i++) sum[i] += parts[part * size + i];
}

/* norm = x factor with factor = gain / rms(x - bias) of each row, and y = norm, or with an original
 * y = original + (norm - original) * scale, scale (S, C) of row % S. Writes the factors (R). */
void bias_norm(const float *restrict x, const float *restrict bias, const float *restrict original,
               const float *restrict scale, float *restrict y, float *restrict factors, const float *gain_of,
               int64_t rows, int64_t scales, int64_t channels) {
    const float gain = *gain_of;
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * channels;
        float *out = y + row * channels, squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < channels; c++) squares += (in[c] - bias[c]) * (in[c] - bias[c]);
        float factor = gain / sqrtf(squares / channels);
        factors[row] = factor;
        if (original) {
            const float *from = original + row * channels, *by = scale + row % scales * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) out[c] = from[c] + (in[c] * factor - from[c]) * by[c];
        } else {
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) out[c] = in[c] * factor;
        }
    }
}

/* Gradients of what bias_norm was given, from that of y; grad_gain (1) is that of ln(gain). */
void bias_norm_gradient(const float *restrict x, const float *restrict bias, const float *restrict original,
                        const float *restrict scale, const float *restrict factors, const float *restrict grad,
                        float *restrict grad_x, float *restrict grad_bias, float *restrict grad_original,
                        float *restrict grad_scale, float *restrict grad_gain, const float *gain_of, int64_t rows,
                        int64_t scales, int64_t channels) {
    const float gain = *gain_of;
    int64_t scale_size = original ? scales * channels : 0, size = channels + 1 + scale_size;
    float *parts = calloc(PARTS * size, sizeof *parts), *sums = malloc(size * sizeof *sums);
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t part = 0; part < PARTS; part++) {
        float *of_bias = parts + part * size, *of_gain = of_bias + channels, *of_scale = of_gain + 1;
        for (int64_t row = part_begin(part, rows); row < part_begin(part + 1, rows); row++) {
            const float *in = x + row * channels, *g = grad + row * channels;
            float *gx = grad_x + row * channels, factor = factors[row], along = 0.0f;
            if (original) {
                const float *from = original + row * channels, *by = scale + row % scales * channels;
                float *go = grad_original + row * channels, *gs = of_scale + row % scales * channels;
#pragma omp simd reduction(+ : along)
                for (int64_t c = 0; c < channels; c++) {
                    float through = g[c] * by[c]; /* the gradient of norm */
                    go[c] = g[c] - through;
                    gs[c] += g[c] * (in[c] * factor - from[c]);
                    gx[c] = through;
                    along += through * in[c];
                }
            } else {
#pragma omp simd reduction(+ : along)
                for (int64_t c = 0; c < channels; c++) {
                    gx[c] = g[c];
                    along += g[c] * in[c];
                }
            }
            *of_gain += along * factor;
            /* factor = gain / rms: its derivative by x[c] is -factor^3 (x[c] - bias[c]) / (C gain^2) */
            float pull = along * factor * factor * factor / (channels * gain * gain);
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                float inwards = pull * (in[c] - bias[c]);
                gx[c] = gx[c] * factor - inwards;
                of_bias[c] += inwards;
            }
        }
    }
    add_parts(parts, sums, size);
    memcpy(grad_bias, sums, channels * sizeof *sums);
    *grad_gain = sums[channels];
    if (original) memcpy(grad_scale, sums + channels + 1, scale_size * sizeof *sums);
    free(parts);
    free(sums);
}

/* y = original + (x - original) * scale, scale (S, C) of row % S; each frame of x serves `repeat` frames of y. */
void bypass(const float *restrict original, const float *restrict x, const float *restrict scale, float *restrict y,
            int64_t frames, int64_t utterances, int64_t channels, int64_t scales, int64_t repeat) {
#pragma omp parallel for collapse(2) if (frames * utterances * channels > PARALLEL_FROM)
    for (int64_t t = 0; t < frames; t++)
        for (int64_t n = 0; n < utterances; n++) {
            int64_t place = (t * utterances + n) * channels;
            const float *from = original + place, *to = x + (t / repeat * utterances + n) * channels;
            const float *by = scale + n % scales * channels;
            float *out = y + place;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) out[c] = from[c] + (to[c] - from[c]) * by[c];
        }
}

/* Gradients of original, x and scale from that of y; x has low frames, ceil(frames / repeat). */
void bypass_gradient(const float *restrict original, const float *restrict x, const float *restrict scale,
                     const float *restrict grad, float *restrict grad_original, float *restrict grad_x,
                     float *restrict grad_scale, int64_t frames, int64_t utterances, int64_t channels, int64_t scales,
                     int64_t repeat) {
    int64_t size = scales * channels, low = (frames + repeat - 1) / repeat, rows = low * utterances;
    float *parts = calloc(PARTS * size, sizeof *parts);
#pragma omp parallel for if (frames * utterances * channels > PARALLEL_FROM)
    for (int64_t part = 0; part < PARTS; part++)
        for (int64_t row = part_begin(part, rows); row < part_begin(part + 1, rows); row++) {
            int64_t n = row % utterances, first = row / utterances * repeat;
            int64_t last = first + repeat < frames ? first + repeat : frames;
            const float *to = x + row * channels, *by = scale + n % scales * channels;
            float *gx = grad_x + row * channels, *gs = parts + part * size + n % scales * channels;
            for (int64_t t = first; t < last; t++) {
                int64_t place = (t * utterances + n) * channels;
                const float *from = original + place, *g = grad + place;
                float *go = grad_original + place;
                if (t == first) memset(gx, 0, channels * sizeof *gx);
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) {
                    float through = g[c] * by[c];
                    go[c] = g[c] - through;
                    gx[c] += through;
                    gs[c] += g[c] * (to[c] - from[c]);
                }
            }
        }
    add_parts(parts, grad_scale, size);
    free(parts);
}
