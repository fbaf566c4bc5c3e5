/* Attention weights, and averages by them, forward and backward.

   H heads, N utterances, T frames, C channels of a head. Sequences are (T, N, H * C), their channels side by side; each
   comes with the distances from a frame to the next and from an utterance to the next. Weights are (H, N, T, T) without
   gaps. Threads share out pairs of a head and an utterance, or blocks of their rows, so results do not depend on them. */
#include <stdlib.h>

#include "mathematics.h"

#define TILE_ROWS (LANES == 16 ? 8 : 4)
#define PANEL (2 * LANES) /* columns of a tile */
#define BLOCK 32          /* target frames whose scores are in a core's cache at a time */
#define MASKED_SCORE -1000.0f
#define ALWAYS_INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

/* Distance between rows of this length: an odd number of cache lines, so that a column is spread over the cache. */
static int64_t row_stride(int64_t length) { return (rounded_up(length, 16) / 16 | 1) * 16; }

static float *allocate(int64_t count) {
    float *x = aligned_alloc(64, rounded_up(count, 16) * sizeof(float) + 64);
    if (!x) abort();
    return x;
}

static float *zeros(int64_t count) { return memset(allocate(count), 0, count * sizeof(float)); }

/* A tile of a product: c[r][j] = (add ? c[r][j] : 0) + sum over k of a[r][k] b[k][j]. */
ALWAYS_INLINE void tile(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, float *c,
                        int64_t c_row, int64_t depth, int add, const int rows, const int vectors) {
    vector sum[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) sum[r][v] = add ? *(vector *)(c + r * c_row + v * LANES) : (vector){0};
    for (int64_t k = 0; k < depth; k++) {
        vector right[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) right[v] = *(const vector *)(b + k * b_step + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) sum[r][v] += a[r * a_row + k * a_step] * right[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) *(vector *)(c + r * c_row + v * LANES) = sum[r][v];
}

/* c = a b, or c += a b. Columns are rounded up to whole vectors, in b and in c.

   a: (rows, depth), rows a_row and columns a_step apart. b: (depth, columns) in panels of PANEL columns that begin b_panel
   apart, rows b_step apart. c: (rows, columns), rows c_row apart. */
__attribute__((noinline)) static void product(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_step, int64_t b_panel,
                    float *c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, int add) {
    for (int64_t j = 0; j < columns; j += PANEL, b += b_panel, c += PANEL) {
        int64_t r = 0;
#define TILES(count)                                                                                                   \
    for (; r + count <= rows; r += count)                                                                              \
        if (columns - j > LANES)                                                                                       \
            tile(a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row, depth, add, count, 2);                 \
        else                                                                                                           \
            tile(a + r * a_row, a_row, a_step, b, b_step, c + r * c_row, c_row, depth, add, count, 1)
#if LANES == 16
        TILES(8);
#endif
        TILES(4);
        TILES(2);
        TILES(1);
#undef TILES
    }
}

/* Copies of rows that are from_row apart, to_row apart. */
static void copy_rows(float *restrict to, int64_t to_row, const float *restrict from, int64_t from_row, int64_t rows,
                      int64_t columns) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * to_row, from + r * from_row, columns * sizeof(float));
}

/* A sequence from sums with a row of frames for each channel. */
static void scatter(float *restrict to, int64_t frame, const float *restrict sums, int64_t row, int64_t frames,
                    int64_t channels) {
    for (int64_t t = 0; t < frames; t++)
        for (int64_t c = 0; c < channels; c++) to[t * frame + c] = sums[c * row + t];
}

static float dot(const float *restrict x, const float *restrict y, int64_t count) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += x[i] * y[i];
    return sum;
}

/* Width of the panels of a right factor with so many columns. */
static int64_t panel_width(int64_t columns) { return columns <= LANES ? LANES : PANEL; }

/* Frames of a sequence as the rows of a right factor: panels of (frames, width), filled up with zeros. */
static void pack_rows(float *restrict to, const float *restrict from, int64_t frame, int64_t frames, int64_t channels) {
    const int64_t width = panel_width(channels);
    for (int64_t first = 0; first < channels; first += width)
        for (int64_t t = 0; t < frames; t++, to += width) {
            const int64_t count = smaller(width, channels - first);
            memcpy(to, from + t * frame + first, count * sizeof(float));
            memset(to + count, 0, (width - count) * sizeof(float));
        }
}

/* Frames of a sequence as the columns of a right factor: panels of (depth, PANEL), filled up with zeros. */
static void pack_columns(float *restrict to, const float *restrict from, int64_t frame, int64_t frames,
                         int64_t channels, int64_t depth) {
    for (int64_t first = 0; first < frames; first += PANEL, to += depth * PANEL) {
        const int64_t count = smaller(PANEL, frames - first);
        for (int64_t c = 0; c < channels; c++) {
            for (int64_t t = 0; t < count; t++) to[c * PANEL + t] = from[(first + t) * frame + c];
            for (int64_t t = count; t < PANEL; t++) to[c * PANEL + t] = 0.0f;
        }
    }
}

/* Positional keys (2T - 1, H * channels) as (H, channels, row), each row filled up with zeros. */
static void pack_positions(float *restrict to, int64_t row, const float *restrict pos_key, int64_t offsets,
                           int64_t heads, int64_t channels) {
    memset(to, 0, heads * channels * row * sizeof(float));
    for (int64_t o = 0; o < offsets; o++)
        for (int64_t c = 0; c < heads * channels; c++) to[c * row + o] = pos_key[o * heads * channels + c];
}

/* Target t and source s meet at offset T - 1 - t + s. In a block of scores, rows `row` apart, an offset is on a diagonal:
   with rows taken to be row + 1 apart, it is a column. The first offset of a block and where it is in its first row: */
static int64_t first_offset(int64_t frames, int64_t first, int64_t rows) { return frames - first - rows; }

static float *skewed(float *block, int64_t rows) { return block + 1 - rows; }

/* In place of masked scores. */
static void mask_row(float *restrict x, const uint8_t *restrict padding, const uint8_t *restrict forbidden,
                     int64_t frames, float value) {
    if (padding)
#pragma omp simd
        for (int64_t s = 0; s < frames; s++) x[s] = padding[s] ? value : x[s];
    if (forbidden)
#pragma omp simd
        for (int64_t s = 0; s < frames; s++) x[s] = forbidden[s] ? value : x[s];
}

static void softmax_row(float *restrict x, float *restrict y, int64_t frames) {
    float largest = x[0], sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t s = 0; s < frames; s++) largest = x[s] > largest ? x[s] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < frames; s++) {
        const float z = x[s] - largest;
        const float e = exp_(z);
        x[s] = z < -87.0f ? 0.0f : e; /* masked sources have no weight at all */
        sum += x[s];
    }
    const float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t s = 0; s < frames; s++) y[s] = x[s] * scale;
}

/* Gradient of the scores of a target from its weights w and their gradient, which it may be written over. */
static void softmax_row_gradient(const float *w, const float *grad, float *y, int64_t frames) {
    const float mean = dot(w, grad, frames);
#pragma omp simd
    for (int64_t s = 0; s < frames; s++) y[s] = w[s] * (grad[s] - mean);
}

/* weights = softmax(query key + pos_query pos_key, masked).

   pos_query and pos_key are null for no positions; pos_key is (2T - 1, H * pos_channels). padding is (N, T), forbidden
   (T, T) or, forbidden_utterance apart, (N, T, T), not zero for masked; each may be null. large is null or gets the signs
   of the scores beyond the limit, in the shape of the weights. */
void attention_weights(const float *query, const float *key, const float *pos_query, const float *pos_key,
                       const uint8_t *padding, const uint8_t *forbidden, int8_t *large, float *weights, int64_t heads,
                       int64_t utterances, int64_t frames, int64_t channels, int64_t pos_channels, int64_t query_frame,
                       int64_t query_utterance, int64_t key_frame, int64_t key_utterance, int64_t forbidden_utterance,
                       float limit) {
    const int64_t pairs = heads * utterances, blocks = (frames + BLOCK - 1) / BLOCK;
    const int64_t key_size = rounded_up(frames, PANEL) * channels, pos_row = row_stride(2 * frames + LANES);
    const int64_t row = row_stride(2 * BLOCK + frames + LANES);
    float *keys = allocate(pairs * key_size);
    float *positions = pos_key ? allocate(heads * pos_channels * pos_row) : NULL;
    if (pos_key) pack_positions(positions, pos_row, pos_key, 2 * frames - 1, heads, pos_channels);
#pragma omp parallel if (pairs * frames * frames > PARALLEL_FROM)
    {
        float *scores = allocate(BLOCK * row);
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++)
            pack_columns(keys + pair * key_size,
                         key + pair % utterances * key_utterance + pair / utterances * channels, key_frame, frames,
                         channels, channels);
#pragma omp for collapse(2)
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t h = pair / utterances, n = pair % utterances, first = block * BLOCK;
                const int64_t rows = smaller(BLOCK, frames - first);
                const int64_t place = first * query_frame + n * query_utterance;
                float *x = scores + BLOCK;
                if (pos_key)
                    product(pos_query + place + h * pos_channels, query_frame, 1,
                            positions + h * pos_channels * pos_row + first_offset(frames, first, rows), pos_row, PANEL,
                            skewed(x, rows), row + 1, rows, frames + rows - 1, pos_channels, 0);
                product(query + place + h * channels, query_frame, 1, keys + pair * key_size, PANEL, channels * PANEL,
                        x, row, rows, frames, channels, pos_key != NULL);
                for (int64_t r = 0; r < rows; r++, x += row) {
                    const int64_t target = pair * frames + first + r;
                    if (large)
#pragma omp simd
                        for (int64_t s = 0; s < frames; s++)
                            large[target * frames + s] = (x[s] > limit) - (x[s] < -limit);
                    mask_row(x, padding ? padding + n * frames : NULL,
                             forbidden ? forbidden + n * forbidden_utterance + (first + r) * frames : NULL, frames,
                             MASKED_SCORE);
                    softmax_row(x, weights + target * frames, frames);
                }
            }
        free(scores);
    }
    free(keys);
    free(positions);
}

/* averages = weights values, both (T, N, H * C). */
void attention_averages(const float *weights, const float *values, float *averages, int64_t heads, int64_t utterances,
                        int64_t frames, int64_t channels, int64_t values_frame, int64_t values_utterance) {
    const int64_t pairs = heads * utterances, blocks = (frames + BLOCK - 1) / BLOCK;
    const int64_t averages_frame = utterances * heads * channels;
    const int64_t width = panel_width(channels), row = rounded_up(channels, width);
    float *packed = allocate(pairs * row * frames);
#pragma omp parallel if (pairs * frames * frames > PARALLEL_FROM)
    {
        float *sums = allocate(BLOCK * row);
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++)
            pack_rows(packed + pair * row * frames,
                      values + pair % utterances * values_utterance + pair / utterances * channels, values_frame, frames,
                      channels);
#pragma omp for collapse(2)
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t h = pair / utterances, n = pair % utterances, first = block * BLOCK;
                const int64_t rows = smaller(BLOCK, frames - first);
                product(weights + (pair * frames + first) * frames, frames, 1, packed + pair * row * frames, width,
                        width * frames, sums, row, rows, channels, frames, 0);
                copy_rows(averages + first * averages_frame + (n * heads + h) * channels, averages_frame, sums, row,
                          rows, channels);
            }
        free(sums);
    }
    free(packed);
}

/* Gradient of the values from that of the averages, grad; both (T, N, H * C), that of the values without gaps. */
void attention_averages_gradient(const float *weights, const float *grad, float *grad_values, int64_t heads,
                                 int64_t utterances, int64_t frames, int64_t channels, int64_t grad_frame,
                                 int64_t grad_utterance) {
    const int64_t pairs = heads * utterances, row = row_stride(frames);
#pragma omp parallel if (pairs * frames * frames > PARALLEL_FROM)
    {
        float *sums = allocate(channels * row), *grads = allocate(BLOCK * channels), *block = zeros(BLOCK * row);
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t h = pair / utterances, n = pair % utterances;
            for (int64_t first = 0; first < frames; first += BLOCK) {
                const int64_t rows = smaller(BLOCK, frames - first);
                copy_rows(grads, channels, grad + first * grad_frame + n * grad_utterance + h * channels, grad_frame,
                          rows, channels);
                /* Read in order: a panel's rows, straight from memory, are too far apart to be fetched ahead. */
                copy_rows(block, row, weights + (pair * frames + first) * frames, frames, rows, frames);
                product(grads, 1, channels, block, row, PANEL, sums, row, channels, frames, rows, first > 0);
            }
            scatter(grad_values + (n * heads + h) * channels, utterances * heads * channels, sums, row, frames, channels);
        }
        free(sums);
        free(grads);
        free(block);
    }
}

/* Averages by the heads from first_head that the weights were used for. */
typedef struct {
    int64_t grad, values; /* addresses of the gradient of the averages and of the values, (T, N, heads * channels) */
    int64_t first_head, heads, channels;
    int64_t grad_frame, grad_utterance, values_frame, values_utterance;
} Use;

/* Channels per head of a use, none for a head that it is not for. */
static int64_t use_channels(const Use *use, int64_t h) {
    return h >= use->first_head && h < use->first_head + use->heads ? use->channels : 0;
}

static int64_t total_channels(const Use *uses, int64_t num_uses, int64_t h) {
    int64_t total = 0;
    for (int64_t i = 0; i < num_uses; i++) total += use_channels(uses + i, h);
    return total;
}

/* Values of all uses by a head, side by side, as the columns of a right factor. */
static void pack_values(float *to, const Use *uses, int64_t num_uses, int64_t h, int64_t n, int64_t frames) {
    const int64_t total = total_channels(uses, num_uses, h);
    for (const Use *use = uses; use < uses + num_uses; use++) {
        const int64_t channels = use_channels(use, h);
        const float *values = (const float *)(intptr_t)use->values + n * use->values_utterance;
        if (channels)
            pack_columns(to, values + (h - use->first_head) * channels, use->values_frame, frames, channels, total);
        to += channels * PANEL;
    }
}

/* Gradients of the averages of all uses by a head, side by side, for a block of targets. */
static void gather_grads(float *to, const Use *uses, int64_t num_uses, int64_t h, int64_t n, int64_t first,
                         int64_t rows) {
    const int64_t total = total_channels(uses, num_uses, h);
    for (const Use *use = uses; use < uses + num_uses; use++) {
        const int64_t channels = use_channels(use, h);
        const float *grad = (const float *)(intptr_t)use->grad + first * use->grad_frame + n * use->grad_utterance;
        if (channels) copy_rows(to, total, grad + (h - use->first_head) * channels, use->grad_frame, rows, channels);
        to += channels;
    }
}

/* Gradients of what `attention_weights` takes, from that of the weights: grad_weights or, where this is null, the sum of
   those of all uses. Gradients of queries, keys and positional queries have distances of their own. */
void attention_weights_gradient(const float *weights, const float *grad_weights, const Use *uses, int64_t num_uses,
                                const float *query, const float *key, const float *pos_query, const float *pos_key,
                                const uint8_t *padding, const uint8_t *forbidden, const int8_t *large,
                                float *grad_query, float *grad_key, float *grad_pos_query, float *grad_pos_key,
                                int64_t heads, int64_t utterances, int64_t frames, int64_t channels,
                                int64_t pos_channels, int64_t query_frame, int64_t query_utterance, int64_t key_frame,
                                int64_t key_utterance, int64_t forbidden_utterance, int64_t grad_query_frame,
                                int64_t grad_query_utterance, int64_t grad_key_frame, int64_t grad_key_utterance,
                                float penalty) {
    const int64_t pairs = heads * utterances, row = row_stride(2 * BLOCK + frames + LANES);
    const int64_t pos_row = row_stride(2 * frames + LANES), pos_size = pos_channels * pos_row;
    const int64_t width = panel_width(channels), key_row = rounded_up(channels, width), sum_row = row_stride(frames);
    int64_t most = 0;
    for (int64_t h = 0; h < heads; h++) {
        const int64_t total = total_channels(uses, num_uses, h);
        most = total > most ? total : most;
    }
    float *positions = pos_key ? allocate(heads * pos_size) : NULL, *pos_sums = pos_key ? zeros(pairs * pos_size) : NULL;
    if (pos_key) pack_positions(positions, pos_row, pos_key, 2 * frames - 1, heads, pos_channels);
#pragma omp parallel if (pairs * frames * frames > PARALLEL_FROM)
    {
        float *values = allocate(rounded_up(frames, PANEL) * most), *grads = allocate(BLOCK * most);
        float *scores = zeros(BLOCK * row); /* gradients of a block of scores, between margins of zeros */
        float *keys = allocate(frames * key_row), *key_sums = allocate(channels * sum_row);
        float *queries = allocate(BLOCK * channels), *query_sums = allocate(BLOCK * key_row);
#pragma omp for
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int64_t h = pair / utterances, n = pair % utterances, total = total_channels(uses, num_uses, h);
            pack_values(values, uses, num_uses, h, n, frames);
            pack_rows(keys, key + n * key_utterance + h * channels, key_frame, frames, channels);
            for (int64_t first = 0; first < frames; first += BLOCK) {
                const int64_t rows = smaller(BLOCK, frames - first);
                const int64_t place = first * query_frame + n * query_utterance;
                const int64_t grad_place = first * grad_query_frame + n * grad_query_utterance;
                float *x = scores + BLOCK;
                if (!grad_weights) {
                    gather_grads(grads, uses, num_uses, h, n, first, rows);
                    product(grads, total, 1, values, PANEL, total * PANEL, x, row, rows, frames, total, 0);
                }
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t target = (pair * frames + first + r) * frames;
                    float *y = x + r * row;
                    softmax_row_gradient(weights + target, grad_weights ? grad_weights + target : y, y, frames);
                    mask_row(y, padding ? padding + n * frames : NULL,
                             forbidden ? forbidden + n * forbidden_utterance + (first + r) * frames : NULL, frames,
                             0.0f);
                    if (large)
#pragma omp simd
                        for (int64_t s = 0; s < frames; s++) y[s] += penalty * large[target + s];
                }

                copy_rows(queries, channels, query + place + h * channels, query_frame, rows, channels);
                product(queries, 1, channels, x, row, PANEL, key_sums, sum_row, channels, frames, rows, first > 0);
                product(x, row, 1, keys, width, width * frames, query_sums, key_row, rows, channels, frames, 0);
                copy_rows(grad_query + grad_place + h * channels, grad_query_frame, query_sums, key_row, rows, channels);
                if (!pos_key) continue;
                product(pos_query + place + h * pos_channels, 1, query_frame, skewed(x, rows), row + 1, PANEL,
                        pos_sums + pair * pos_size + first_offset(frames, first, rows), pos_row, pos_channels,
                        frames + rows - 1, rows, 1);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t c = 0; c < pos_channels; c++)
                        grad_pos_query[grad_place + r * grad_query_frame + h * pos_channels + c] =
                            dot(x + r * row, positions + h * pos_size + c * pos_row + frames - 1 - first - r, frames);
            }
            scatter(grad_key + n * grad_key_utterance + h * channels, grad_key_frame, key_sums, sum_row, frames, channels);
        }
        free(values);
        free(grads);
        free(scores);
        free(keys);
        free(key_sums);
        free(queries);
        free(query_sums);
    }
    if (pos_key) {
        /* In the order of the utterances, whichever thread had them. */
        for (int64_t pair = 0; pair < pairs; pair++)
            if (pair % utterances)
                for (int64_t i = 0; i < pos_size; i++)
                    pos_sums[pair / utterances * utterances * pos_size + i] += pos_sums[pair * pos_size + i];
        for (int64_t h = 0; h < heads; h++)
            scatter(grad_pos_key + h * pos_channels, heads * pos_channels, pos_sums + h * utterances * pos_size, pos_row,
                    2 * frames - 1, pos_channels);
    }
    free(positions);
    free(pos_sums);
}
