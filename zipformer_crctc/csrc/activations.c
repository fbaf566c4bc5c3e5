/* Swoosh with dropout, and gates. R rows, C channels; rows are (frame, utterance) pairs, utterances side by side. */
#include "mathematics.h"

/* y = Swoosh(x) * mask: x and y (R, C), mask (N, C) of R % N or null. */
void swoosh(const float *restrict x, const float *restrict mask, float *restrict y, int64_t rows, int64_t utterances,
            int64_t channels, float shift, float offset) {
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * channels;
        float *out = y + row * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            float z = in[c] - shift;
            float e = exp_(z < 0.0f ? z : -z);
            out[c] = (z > 0.0f ? z : 0.0f) + log1p_of_share(e) - 0.08f * in[c] - offset;
        }
        if (mask) {
            const float *keep = mask + row % utterances * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) out[c] *= keep[c];
        }
    }
}

/* The same again from x where y is no null, and the gradient of x from that of y, which it may overwrite. */
void swoosh_gradient(const float *restrict x, const float *restrict mask, const float *grad, float *restrict y,
                     float *grad_x, int64_t rows, int64_t utterances, int64_t channels, float shift, float offset) {
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * channels, *g = grad + row * channels;
        float *gx = grad_x + row * channels;
        if (y) {
            float *out = y + row * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                float z = in[c] - shift;
                float e = exp_(z < 0.0f ? z : -z);
                float share = 1.0f / (1.0f + e);
                out[c] = (z > 0.0f ? z : 0.0f) + log1p_of_share(e) - 0.08f * in[c] - offset;
                gx[c] = g[c] * ((z < 0.0f ? e * share : share) - 0.08f);
            }
        } else {
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) gx[c] = g[c] * (sigmoid_(in[c] - shift) - 0.08f);
        }
        if (mask) {
            const float *keep = mask + row % utterances * channels;
            float *out = y ? y + row * channels : 0;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) gx[c] *= keep[c];
            for (int64_t c = 0; out && c < channels; c++) out[c] *= keep[c];
        }
    }
}

/* What x is multiplied by. */
#define OPENING(value) (with_tanh ? tanh_(value) : sigmoid_(value))

/* Whether a row is padding: places (N, T), strides in bytes, true at padding; null for none. */
static inline int is_padding(const uint8_t *padding, int64_t row, int64_t utterances, int64_t by_n, int64_t by_t) {
    return padding && padding[row % utterances * by_n + row / utterances * by_t];
}

static inline void gate_row(const float *restrict x, const float *restrict gate, float *restrict y, int64_t channels,
                            int with_tanh) {
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) y[c] = x[c] * OPENING(gate[c]);
}

static inline void gate_gradient_row(const float *restrict x, const float *restrict gate, const float *restrict grad,
                                     float *restrict grad_x, float *restrict grad_gate, int64_t channels,
                                     int with_tanh) {
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
        float opening = OPENING(gate[c]);
        float slope = with_tanh ? 1.0f - opening * opening : opening * (1.0f - opening);
        grad_x[c] = grad[c] * opening;
        grad_gate[c] = grad[c] * x[c] * slope;
    }
}

/* y = x * sigmoid(gate), or x * tanh(gate), zero at padding. y (R, C); rows of x and gate are `stride` values apart. */
void gate(const float *x, const float *gate, const uint8_t *padding, float *y, int64_t rows, int64_t utterances,
          int64_t channels, int64_t x_stride, int64_t gate_stride, int64_t by_n, int64_t by_t, int64_t with_tanh) {
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * x_stride, *by = gate + row * gate_stride;
        float *out = y + row * channels;
        if (is_padding(padding, row, utterances, by_n, by_t))
            memset(out, 0, channels * sizeof *out);
        else if (with_tanh)
            gate_row(in, by, out, channels, 1);
        else
            gate_row(in, by, out, channels, 0);
    }
}

/* Gradients of x and gate from that of y, all (R, C). */
void gate_gradient(const float *x, const float *gate, const uint8_t *padding, const float *grad, float *grad_x,
                   float *grad_gate, int64_t rows, int64_t utterances, int64_t channels, int64_t x_stride,
                   int64_t gate_stride, int64_t by_n, int64_t by_t, int64_t with_tanh) {
#pragma omp parallel for if (rows * channels > PARALLEL_FROM)
    for (int64_t row = 0; row < rows; row++) {
        const float *in = x + row * x_stride, *by = gate + row * gate_stride, *g = grad + row * channels;
        float *gx = grad_x + row * channels, *gg = grad_gate + row * channels;
        if (is_padding(padding, row, utterances, by_n, by_t)) {
            memset(gx, 0, channels * sizeof *gx);
            memset(gg, 0, channels * sizeof *gg);
        } else if (with_tanh)
            gate_gradient_row(in, by, g, gx, gg, channels, 1);
        else
            gate_gradient_row(in, by, g, gx, gg, channels, 0);
    }
}
