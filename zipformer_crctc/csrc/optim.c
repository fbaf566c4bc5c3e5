/* ScaledAdam. A stack is `count` parameters of `size` values each; `values` and `grads` have an address for every
   parameter, stack after stack. A parameter belongs to one thread, so results do not depend on the number of threads. */
#include <math.h>

#include "mathematics.h"

/* So many values are added up in float32, in the lanes of vector registers, before they go to a sum in float64. */
#define BLOCK 1024

struct stack {
    int64_t count, size;
    float *delta, *square;                 /* (count, size) */
    float *rms, *size_square, *size_grads; /* (count,), (count,), (period, count); null for one-element parameters */
};

struct settings {
    double factor, beta1, beta2, size_beta2, eps;
    double rate, scalar_rate, size_rate;  /* negative */
    double correction, scalar_correction; /* factors on the root of the averaged squared gradient */
    double min_rms, max_rms, scalar_max;
};

/* Parameters, and whether they have so many values that other threads should help. */
static int64_t parameters(const struct stack *stacks, int64_t n, int *many) {
    int64_t count = 0, values = 0;
    for (int64_t s = 0; s < n; s++) {
        count += stacks[s].count;
        values += stacks[s].count * stacks[s].size;
    }
    *many = values > PARALLEL_FROM;
    return count;
}

/* Norm of the gradient of each parameter times its rms, of a one-element parameter times scalar_weight. */
void scaled_adam_norms(const struct stack *stacks, int64_t n, const float *const *grads, float *norms,
                       float scalar_weight) {
    int many;
    parameters(stacks, n, &many);
#pragma omp parallel if (many)
    for (int64_t s = 0, first = 0; s < n; first += stacks[s++].count) {
        const struct stack *stack = stacks + s;
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < stack->count; i++) {
            const float *grad = grads[first + i];
            double total = 0.0;
            for (int64_t start = 0; start < stack->size; start += BLOCK) {
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = start; k < smaller(start + BLOCK, stack->size); k++) sum += grad[k] * grad[k];
                total += sum;
            }
            norms[first + i] = (float)sqrt(total) * (stack->rms ? stack->rms[i] : scalar_weight);
        }
    }
}

/* The sum of value times gradient, and the rms of the value. */
static void compare(const float *value, const float *grad, int64_t size, float factor, float *product, float *rms) {
    double products = 0.0, squares = 0.0;
    for (int64_t start = 0; start < size; start += BLOCK) {
        float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
        for (int64_t k = start; k < smaller(start + BLOCK, size); k++) {
            a += value[k] * grad[k];
            b += value[k] * value[k];
        }
        products += a;
        squares += b;
    }
    /* A factor of zero is for infinite gradients; zero times infinity would be NaN. */
    *product = factor == 0.0f ? 0.0f : factor * (float)products;
    *rms = (float)sqrt(squares / size);
}

/* The step that makes parameter i of a stack larger or smaller as a whole, relative to its size. */
static float size_step(const struct stack *stack, int64_t i, int64_t period, const struct settings *set) {
    const float rms = stack->rms[i], beta2 = set->size_beta2, rest2 = 1.0 - set->size_beta2;
    float sum = 0.0f, squares = 0.0f;
    for (int64_t t = 0; t < period; t++) {
        const float grad = stack->size_grads[t * stack->count + i];
        sum += grad;
        squares += grad * grad;
    }
    stack->size_square[i] = beta2 * stack->size_square[i] + rest2 * (squares / period);
    float step = (float)set->size_rate * sum / (sqrtf(stack->size_square[i]) + (float)set->eps);
    if (rms < (float)set->min_rms) step = 0.0f;
    const float limit = ((float)set->max_rms - rms) / rms;
    return limit < step ? limit : step;
}

/* One-element parameters. The limit comes before the step. */
static void update_scalars(const struct stack *stack, float *const *values, const float *const *grads,
                           const struct settings *set) {
    const float factor = set->factor, beta1 = set->beta1, beta2 = set->beta2, rest2 = 1.0 - set->beta2;
    const float limit = set->scalar_max;
    for (int64_t i = 0; i < stack->count; i++) {
        const float g = factor == 0.0f ? 0.0f : factor * grads[i][0], value = values[i][0];
        stack->square[i] = beta2 * stack->square[i] + rest2 * g * g;
        const float root = sqrtf(stack->square[i]) * (float)set->scalar_correction + (float)set->eps;
        stack->delta[i] = beta1 * stack->delta[i] + (float)set->scalar_rate * (g / root);
        values[i][0] = (value > limit ? limit : value < -limit ? -limit : value) + stack->delta[i];
    }
}

/* One step of all parameters. `slot` of `period`: the place of this step in size_grads. */
void scaled_adam_update(const struct stack *stacks, int64_t n, float *const *values, const float *const *grads,
                        int64_t slot, int64_t period, const struct settings *set) {
    const float factor = set->factor, beta1 = set->beta1, rest1 = 1.0 - set->beta1;
    const float beta2 = set->beta2, rest2 = 1.0 - set->beta2;
    const float correction = set->correction, eps = set->eps, min_rms = set->min_rms;
    int many;
    const int64_t count = parameters(stacks, n, &many);
    /* Backwards, because the gradients that the norms have read last are still in the caches. */
#pragma omp parallel if (many)
    for (int64_t s = n - 1, first = count; s >= 0; s--) {
        const struct stack *stack = stacks + s;
        first -= stack->count;
        if (!stack->rms) {
#pragma omp single nowait
            update_scalars(stack, values + first, grads + first, set);
            continue;
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < stack->count; i++) {
            const int64_t size = stack->size;
            float *restrict value = values[first + i], *restrict delta = stack->delta + i * size;
            float *restrict square = stack->square + i * size;
            const float *restrict grad = grads[first + i];
            float rms, resize = 0.0f;
            compare(value, grad, size, factor, stack->size_grads + slot * stack->count + i, &rms);
            if (slot == period - 1) {
                stack->rms[i] = rms;
                resize = rest1 * size_step(stack, i, period, set);
            }
            const float rate = (float)set->rate * (stack->rms[i] < min_rms ? min_rms : stack->rms[i]);
#pragma omp simd
            for (int64_t k = 0; k < size; k++) {
                const float g = factor == 0.0f ? 0.0f : factor * grad[k];
                square[k] = beta2 * square[k] + rest2 * g * g;
                const float direction = g / (sqrtf(square[k]) * correction + eps);
                delta[k] = beta1 * delta[k] + resize * value[k] + rate * direction;
                value[k] += delta[k];
            }
        }
    }
}
