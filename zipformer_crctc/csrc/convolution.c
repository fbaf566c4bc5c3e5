/* Depthwise convolution of images, and the gradients of its weight and bias.

   Images have N utterances, H rows, W columns and C channels. Channels lie side by side; the other strides are given.
   Sequences are images of one row. Kernels have KH rows and KW columns, together at most MAX_TAPS places, or taps.

   One vector of channels of one utterance is worked on at a time, by tiles. A tile is copied to where its places lie
   side by side, with the zeros around the image: in memory they are some kilobytes apart, and would compete for a few
   lines of the cache. Then sums for several places, or taps, at a time stay in registers. */
#include "mathematics.h"

typedef float vec __attribute__((vector_size(4 * LANES)));

#define TILE 768    /* places that a tile has at most, with those around it */
#define MAX_TAPS 64 /* as in convolution.py */
#define MOST 16     /* sums at a time */
#define BEYOND 3    /* places behind a tile that may be read for sums that nobody wants */
#define GROUP 8     /* vectors of channels that take turns at a tile of their weight's gradient */
#define INLINE static inline __attribute__((always_inline))

/* One utterance of an image. */
typedef struct {
    int64_t rows, columns, row_stride, column_stride;
} plane;

/* Of an image with so many rows and columns, into a number of tiles, some of them across. */
typedef struct {
    int64_t rows, columns, height, width, across, number;
} tiling;

typedef struct {
    int64_t top, left, height, width;
} box;

static inline int64_t parts(int64_t all, int64_t each) { return (all + each - 1) / each; }

/* Tiles of about equal sizes for an output of so many rows and columns. */
static tiling tiles(int64_t rows, int64_t columns, int64_t kernel_rows, int64_t kernel_columns) {
    int64_t width = parts(columns, parts(columns, TILE / (2 * kernel_rows) - kernel_columns));
    int64_t height = parts(rows, parts(rows, TILE / (width + kernel_columns - 1) - kernel_rows + 1));
    int64_t across = parts(columns, width);
    return (tiling){rows, columns, height, width, across, parts(rows, height) * across};
}

static box tile_of(tiling t, int64_t number) {
    int64_t top = number / t.across * t.height, left = number % t.across * t.width;
    return (box){top, left, smaller(t.rows - top, t.height), smaller(t.columns - left, t.width)};
}

/* The first channel of a vector: the last vector overlaps the one before, rather than to be filled in part. */
static inline int64_t channel(int64_t vector, int64_t channels) {
    int64_t last = channels < LANES ? 0 : channels - LANES;
    return smaller(vector * LANES, last);
}

static inline vec load(const float *from, int64_t lanes) {
    vec x = {0};
    if (lanes == LANES)
        memcpy(&x, from, sizeof x);
    else
        for (int64_t c = 0; c < lanes; c++) x[c] = from[c];
    return x;
}

static inline void store(vec x, float *to, int64_t lanes) {
    if (lanes == LANES)
        memcpy(to, &x, sizeof x);
    else
        for (int64_t c = 0; c < lanes; c++) to[c] = x[c];
}

/* Places of an image, some of which may lie outside, where they are zeros. */
static void copy_tile(const float *from, plane p, box b, int64_t lanes, vec *to) {
    const int64_t begin = smaller(b.left < 0 ? -b.left : 0, b.width), end = smaller(p.columns - b.left, b.width);
    for (int64_t i = b.top; i < b.top + b.height; i++, to += b.width) {
        const float *row = from + i * p.row_stride + b.left * p.column_stride;
        int64_t j = 0;
        for (; j < (i < 0 || i >= p.rows ? b.width : begin); j++) to[j] = (vec){0};
        if (lanes == LANES)
            for (; j < end; j++) memcpy(to + j, row + j * p.column_stride, sizeof(vec));
        else
            for (; j < end; j++) to[j] = load(row + j * p.column_stride, lanes);
        for (; j < b.width; j++) to[j] = (vec){0};
    }
    for (int64_t j = 0; j < BEYOND; j++) to[j] = (vec){0};
}

/* Bring the next vector of channels at some places into the cache: processors do not foresee such strides. */
static inline void fetch_next(const float *x, int64_t stride, int64_t number) {
    for (int64_t j = 0; j < number; j++) __builtin_prefetch(x + j * stride + LANES, 0, 2);
}

static vec sum(const vec *x, int64_t number) {
    vec a = {0}, b = {0}, c = {0}, d = {0}; /* each addition waits for the one before */
    int64_t j = 0;
    for (; j + 4 <= number; j += 4) a += x[j], b += x[j + 1], c += x[j + 2], d += x[j + 3];
    for (; j < number; j++) a += x[j];
    return (a + b) + (c + d);
}

/* Where vectors go that belong side by side: so many are wanted, of so many channels. */
typedef struct {
    float *first;
    int64_t stride, wanted, lanes;
} places;

/* Add kernel[k] * x[k + r] to sums[r] for k of some taps. Each x is loaded once. */
INLINE void add_taps(const int count, const int taps, const vec *x, const vec *kernel, vec *sums) {
#pragma GCC unroll 32
    for (int j = 0; j < count + taps - 1; j++) {
        vec value = x[j];
#pragma GCC unroll 4
        for (int k = 0; k < taps; k++)
            if (j >= k && j - k < count) sums[j - k] += kernel[k] * value;
    }
    /* Without this the compiler keeps values for the taps that follow, for which there are not enough registers. */
    __asm__ volatile("" ::: "memory");
}

INLINE int64_t correlate_(const int count, const vec *x, int64_t width, const vec *kernel, int64_t rows,
                          int64_t columns, vec start, places to) {
    vec sums[MOST];
#pragma GCC unroll 32
    for (int r = 0; r < count; r++) sums[r] = start;
    for (int64_t i = 0; i < rows; i++, x += width, kernel += columns) {
        int64_t k = 0;
        for (; k + 4 <= columns; k += 4) add_taps(count, 4, x + k, kernel + k, sums);
        if (k + 3 == columns)
            add_taps(count, 3, x + k, kernel + k, sums);
        else
            for (; k < columns; k++) add_taps(count, 1, x + k, kernel + k, sums);
    }
    /* Both times the same, but here without a condition for each. */
    if (to.lanes == LANES && to.wanted >= count) {
#pragma GCC unroll 32
        for (int r = 0; r < count; r++) memcpy(to.first + r * to.stride, &sums[r], sizeof(vec));
    } else {
#pragma GCC unroll 32
        for (int r = 0; r < count; r++)
            if (r < to.wanted) store(sums[r], to.first + r * to.stride, to.lanes);
    }
    return count;
}

/* For some r from 0: start + the sum over i and j of kernel[i][j] * x[i][j + r]; gives their number.

   Each sum waits for its last addition, so that few at a time are slow; 19 columns and 7 taps divide well here. */
static int64_t correlate(const vec *x, int64_t width, const vec *kernel, int64_t rows, int64_t columns, vec start,
                         places to) {
    const int64_t wanted = to.wanted;
    if (wanted > 20 || (wanted > 12 && wanted <= 16))
        return correlate_(MOST, x, width, kernel, rows, columns, start, to);
    if (wanted > 7) return correlate_(10, x, width, kernel, rows, columns, start, to);
    if (wanted > 4) return correlate_(7, x, width, kernel, rows, columns, start, to);
    return correlate_(4, x, width, kernel, rows, columns, start, to);
}

/* y = bias + the sum over taps of weight * x; with a reversed kernel the gradient of x from that of y.

   weight (C, KH, KW), for which `by_tap` has room, bias (C) or null. Before x come (KH - 1) / 2 rows and `padding`
   columns of zeros. */
void depthwise(const float *x, const float *weight, float *by_tap, const float *bias, float *y, int64_t utterances,
               int64_t channels, int64_t rows, int64_t columns, int64_t columns_y, int64_t kernel_rows,
               int64_t kernel_columns, int64_t padding, int64_t reversed, int64_t x_utterance, int64_t x_row,
               int64_t x_column, int64_t y_utterance, int64_t y_row, int64_t y_column) {
    const int64_t taps = kernel_rows * kernel_columns;
    for (int64_t k = 0; k < taps; k++)
        for (int64_t c = 0; c < channels; c++)
            by_tap[k * channels + c] = weight[c * taps + (reversed ? taps - 1 - k : k)];
    const int64_t vectors = parts(channels, LANES), lanes = smaller(channels, LANES);
    const tiling t = tiles(rows, columns_y, kernel_rows, kernel_columns);
#pragma omp parallel for collapse(3) if (utterances * rows * columns_y * channels > PARALLEL_FROM)
    for (int64_t n = 0; n < utterances; n++)
        for (int64_t number = 0; number < t.number; number++)
            for (int64_t vector = 0; vector < vectors; vector++) {
                const int64_t c = channel(vector, channels);
                const box b = tile_of(t, number);
                const box around = {b.top - (kernel_rows - 1) / 2, b.left - padding, b.height + kernel_rows - 1,
                                    b.width + kernel_columns - 1};
                const float *in = x + n * x_utterance + c;
                float *out = y + n * y_utterance + c;
                vec tile[TILE + BEYOND], kernel[MAX_TAPS], start = bias ? load(bias + c, lanes) : (vec){0};
                for (int64_t k = 0; k < taps; k++) kernel[k] = load(by_tap + k * channels + c, lanes);
                copy_tile(in, (plane){rows, columns, x_row, x_column}, around, lanes, tile);
                for (int64_t i = 0; i < b.height; i++)
                    for (int64_t j = 0, count; j < b.width; j += count) {
                        float *here = out + (b.top + i) * y_row + (b.left + j) * y_column;
                        count = correlate(tile + i * around.width + j, around.width, kernel, kernel_rows,
                                          kernel_columns, start, (places){here, y_column, b.width - j, lanes});
                        if (vector + 1 == vectors) continue;
                        fetch_next(in + (b.top + i) * x_row + (b.left + j) * x_column, x_column, count);
                        fetch_next(here, y_column, count);
                    }
            }
}

/* The gradients of weight (C, KH, KW) and, where asked for, of bias (C) from x and that of y.

   Each utterance has sums of its own, `sums` (N, KH * KW + 1, C), in the last row those of the bias, so that what is
   added in which order does not depend on the threads. */
void depthwise_weight_gradient(const float *x, const float *grad, float *sums, float *grad_weight, float *grad_bias,
                               int64_t utterances, int64_t channels, int64_t rows, int64_t columns, int64_t columns_y,
                               int64_t kernel_rows, int64_t kernel_columns, int64_t padding, int64_t x_utterance,
                               int64_t x_row, int64_t x_column, int64_t y_utterance, int64_t y_row,
                               int64_t y_column) {
    const int64_t taps = kernel_rows * kernel_columns;
    const int64_t vectors = parts(channels, LANES), lanes = smaller(channels, LANES);
    const int64_t groups = parts(vectors, GROUP), each = parts(vectors, groups);
    const tiling t = tiles(rows, columns_y, kernel_rows, kernel_columns);
#pragma omp parallel for collapse(2) if (utterances * rows * columns_y * channels > PARALLEL_FROM)
    for (int64_t n = 0; n < utterances; n++)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t first = group * each, end = smaller(first + each, vectors);
            vec tile[TILE + BEYOND], grad_tile[TILE + BEYOND], total[GROUP][MAX_TAPS + 1];
            for (int64_t vector = first; vector < end; vector++)
                memset(total[vector - first], 0, (taps + 1) * sizeof(vec));
            for (int64_t number = 0; number < t.number; number++)
                for (int64_t vector = first; vector < end; vector++) {
                    const int64_t c = channel(vector, channels);
                    const box b = tile_of(t, number);
                    const box around = {b.top - (kernel_rows - 1) / 2, b.left - padding, b.height + kernel_rows - 1,
                                        b.width + kernel_columns - 1};
                    const float *in = x + n * x_utterance + c, *g = grad + n * y_utterance + c;
                    copy_tile(in, (plane){rows, columns, x_row, x_column}, around, lanes, tile);
                    copy_tile(g, (plane){rows, columns_y, y_row, y_column}, b, lanes, grad_tile);
                    vec of_tile[MAX_TAPS + 1];
                    for (int64_t i = 0; i < kernel_rows; i++) {
                        for (int64_t j = 0; j < kernel_columns;)
                            j += correlate(tile + i * around.width + j, around.width, grad_tile, b.height, b.width,
                                           (vec){0}, (places){(float *)(of_tile + i * kernel_columns + j), LANES,
                                                              kernel_columns - j, LANES});
                        /* Not all at once: what is on its way is limited. */
                        for (int64_t r = b.height * i / kernel_rows; r < b.height * (i + 1) / kernel_rows; r++) {
                            if (vector + 1 == end) break;
                            fetch_next(in + (b.top + r) * x_row + b.left * x_column, x_column, b.width);
                            fetch_next(g + (b.top + r) * y_row + b.left * y_column, y_column, b.width);
                        }
                    }
                    of_tile[taps] = sum(grad_tile, b.height * b.width);
                    for (int64_t k = 0; k <= taps; k++) total[vector - first][k] += of_tile[k];
                }
            for (int64_t vector = first; vector < end; vector++)
                for (int64_t k = 0; k <= taps; k++)
                    store(total[vector - first][k], sums + (n * (taps + 1) + k) * channels + channel(vector, channels),
                          lanes);
        }
    const int64_t size = (taps + 1) * channels;
    for (int64_t n = 1; n < utterances; n++)
        for (int64_t i = 0; i < size; i++) sums[i] += sums[n * size + i];
    for (int64_t c = 0; c < channels; c++)
        for (int64_t k = 0; k < taps; k++) grad_weight[c * taps + k] = sums[k * channels + c];
    if (grad_bias) memcpy(grad_bias, sums + taps * channels, channels * sizeof *grad_bias);
}
