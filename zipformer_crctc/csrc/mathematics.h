/* What the kernels share. Elementary functions are such that compilers vectorise them, to one or two units in the last
   place of float32. */
#ifndef ZIPFORMER_MATHEMATICS_H
#define ZIPFORMER_MATHEMATICS_H

#include <stdint.h>
#include <string.h>

/* Fewer values than this are not worth waking other threads for. */
#define PARALLEL_FROM 4096
/* Sums over rows are made in so many parts, which are added in turn: they do not depend on the number of threads. */
#define PARTS 16

/* Values of float32 in a vector register. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

/* The first row of a part of so many rows. */
static inline int64_t part_begin(int64_t part, int64_t rows) { return part * rows / PARTS; }

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float from_bits(int32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline int32_t to_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* exp(x): x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial for exp(r), and n added to the exponent. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    float n = x * 1.44269504f + shift;
    int32_t exponent = to_bits(n) << 23;
    n -= shift;
    float r = x - n * 0.693359375f;
    r += n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return from_bits(to_bits(p) + exponent);
}

/* ln(1 + e) for e from 0 to 1. */
static inline float log1p_of_share(float e) {
    int halved = e > 0.41421356f;
    float f = halved ? 0.5f * e - 0.5f : e;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * f * f - 0.5f * f * f + f;
    return halved ? p + 0.69314718f : p;
}

static inline float sigmoid_(float x) {
    float e = exp_(x < 0.0f ? x : -x);
    float r = 1.0f / (1.0f + e);
    return x < 0.0f ? e * r : r;
}

static inline float tanh_(float x) {
    float e = exp_(x < 0.0f ? 2.0f * x : -2.0f * x);
    float y = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -y : y;
}

#endif
