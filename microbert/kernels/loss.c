// Cross-entropy over a vocabulary with its gradients, a few rows at a time, while their logits are in cache.
//
// Logits are exponents of 2, not of e. Gradients of logits stay multiplied by their row's sum of powers: the factor
// 1 / sum is applied on the narrow side. Each thread accumulates gradients over a contiguous range of rows; the results
// are added in the order of the threads.
//
// N rows of D numbers, V tokens in the vocabulary, STRIDE: V rounded up to whole vectors. The bias is -infinity after V.

#include <string.h>

#include "vectors.h"

enum { ROWS = 4, BLOCK = 4 };  // rows and numbers per row at a time: their ROWS x BLOCK sums stay in registers

// Replaces n rows of logits, x: [ROWS, STRIDE], by their gradients times the row's sum. factor: 1 / sum, or 0 without a
// label. Returns the loss in units of ln 2.
static double softmax(int n, long STRIDE, float *x, const long long *labels, float *factor, float *bias_grad) {
    vec most[ROWS], total[ROWS];
    float largest[ROWS];
    double loss = 0;
    for (int r = 0; r < ROWS; r++) {
        total[r] = all(0);
        most[r] = all(-INFINITY);
    }
    for (long v = 0; v < STRIDE; v += LANES)
        for (int r = 0; r < ROWS; r++) most[r] = larger(*at(x, r * STRIDE + v), most[r]);
    for (int r = 0; r < ROWS; r++) {
        largest[r] = largest_of(most[r]);
        factor[r] = 0;
        if (r < n && labels[r] >= 0) loss -= x[r * STRIDE + labels[r]] - largest[r];
    }
    for (long v = 0; v < STRIDE; v += LANES)
        for (int r = 0; r < ROWS; r++) total[r] += *at(x, r * STRIDE + v) = power_of_2(*at(x, r * STRIDE + v) - largest[r]);
    for (int r = 0; r < n; r++)
        if (labels[r] >= 0) {
            float sum = sum_of(total[r]);
            loss += log2f(sum);
            x[r * STRIDE + labels[r]] -= sum;
            factor[r] = 1 / sum;
        }
    for (long v = 0; v < STRIDE; v += LANES) {
        vec sum = *at(bias_grad, v);
        for (int r = 0; r < ROWS; r++) sum += factor[r] * *at(x, r * STRIDE + v);
        *at(bias_grad, v) = sum;
    }
    return loss;
}

// Copies numbers: [n, D], scaled by each row's factor, to `to`: [ROWS, width], padded with 0.
static void scale_rows(int n, int D, int width, const float *numbers, const float *factor, float *to) {
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < width; c++) to[r * width + c] = r < n && c < D ? numbers[r * D + c] * factor[r] : 0;
}

// Computes gradients and returns the loss of n rows of hidden states. width: D rounded up to blocks. weight, weight_grad:
// [width, STRIDE]. Adds to weight_grad and bias_grad.
static double thin_rows(int n, int D, int width, long STRIDE, const float *hidden, const float *weight, const float *bias, const long long *labels,
                        float *hidden_grad, float *weight_grad, float *bias_grad, float *x) {
    float h[ROWS * width], factor[ROWS];
    for (int r = 0; r < ROWS; r++) factor[r] = LOG2_E;
    scale_rows(n, D, width, hidden, factor, h);
    for (long v = 0; v < STRIDE; v += LANES) {
        vec sum[ROWS];
        for (int r = 0; r < ROWS; r++) sum[r] = *at(bias, v);
        for (int c = 0; c < width; c++) {
            vec w = *at(weight, c * STRIDE + v);
            for (int r = 0; r < ROWS; r++) sum[r] += h[r * width + c] * w;
        }
        for (int r = 0; r < ROWS; r++) *at(x, r * STRIDE + v) = sum[r];
    }
    double loss = softmax(n, STRIDE, x, labels, factor, bias_grad);
    scale_rows(n, D, width, hidden, factor, h);
    for (int first = 0; first < width; first += BLOCK) {
        vec h_grad[ROWS][BLOCK];
        memset(h_grad, 0, sizeof h_grad);
        for (long v = 0; v < STRIDE; v += LANES) {
            vec x_grad[ROWS];
            for (int r = 0; r < ROWS; r++) x_grad[r] = *at(x, r * STRIDE + v);
            for (int c = 0; c < BLOCK; c++) {
                long i = (first + c) * STRIDE + v;
                vec w = *at(weight, i), w_grad = *at(weight_grad, i);
                for (int r = 0; r < ROWS; r++) {
                    h_grad[r][c] += x_grad[r] * w;
                    w_grad += h[r * width + first + c] * x_grad[r];
                }
                *at(weight_grad, i) = w_grad;
            }
        }
        for (int r = 0; r < n; r++)
            for (int c = 0; c < BLOCK && first + c < D; c++) hidden_grad[r * D + first + c] = sum_of(h_grad[r][c]) * factor[r];
    }
    return loss;
}

static int min(long a, long b) { return a < b ? a : b; }

// Sums n numbers over the threads. parts: n numbers for each thread, starting `apart` numbers from the next thread's.
// sum: [n].
static void sum_threads(int threads, long n, const float *parts, long apart, float *sum) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < n; i++) {
        sum[i] = 0;
        for (int t = 0; t < threads; t++) sum[i] += parts[t * apart + i];
    }
}

// The size of a thread's scratch memory, in numbers.
long scratch(int width, long STRIDE) { return (ROWS + width + 1) * STRIDE; }

// Loss and gradients for narrow hidden states. hidden, hidden_grad: [N, D]. weight: [width, STRIDE]. gradients:
// [width + 1, STRIDE], of the weights, then the bias. room: [threads, scratch]. losses: [threads], in units of ln 2.
void thin(int threads, long N, int D, int width, long STRIDE, const float *hidden, const float *weight, const float *bias, const long long *labels,
          float *hidden_grad, float *gradients, double *losses, float *room) {
    #pragma omp parallel for num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float *x = room + t * scratch(width, STRIDE), *mine = x + ROWS * STRIDE;
        memset(mine, 0, (width + 1) * STRIDE * sizeof *mine);
        losses[t] = 0;
        for (long i = N * t / threads, end = N * (t + 1) / threads; i < end; i += ROWS)
            losses[t] += thin_rows(min(end - i, ROWS), D, width, STRIDE, hidden + i * D, weight, bias, labels + i, hidden_grad + i * D, mine,
                                   mine + width * STRIDE, x);
    }
    sum_threads(threads, (width + 1) * STRIDE, room + ROWS * STRIDE, scratch(width, STRIDE), gradients);
}

// bf16 is fp32 without its last 16 bits, rounded to nearest, ties to even.
static float from_bf16(unsigned short x) {
    union { unsigned bits; float value; } wide = {(unsigned)x << 16};
    return wide.value;
}

static unsigned short to_bf16(float x) {
    union { float value; unsigned bits; } wide = {x};
    return x == x ? (wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16 : 0x7fc0;
}

// Replaces logits without bias, [N, V] in fp32 or bf16, by their gradients times the row's sum. factor: [N]. bias_grad:
// [STRIDE]. losses: [threads], in units of ln 2. room: [threads, scratch of width 0].
void softmax_of(int threads, long N, long V, long STRIDE, void *logits, int is_bf16, const float *bias, const long long *labels, float *factor,
                float *bias_grad, double *losses, float *room) {
    #pragma omp parallel for num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float *x = room + t * scratch(0, STRIDE), *mine = x + ROWS * STRIDE, factors[ROWS];
        memset(mine, 0, STRIDE * sizeof *mine);
        losses[t] = 0;
        for (long i = N * t / threads, end = N * (t + 1) / threads; i < end; i += ROWS) {
            int n = min(end - i, ROWS);
            for (int r = 0; r < ROWS; r++) {
                float *row = x + r * STRIDE, *wide = (float *)logits + (i + r) * V;
                unsigned short *narrow = (unsigned short *)logits + (i + r) * V;
                memcpy(row, bias, STRIDE * sizeof *row);
                if (r >= n) continue;
                if (is_bf16) for (long v = 0; v < V; v++) row[v] += from_bf16(narrow[v]) * LOG2_E;
                else for (long v = 0; v < V; v++) row[v] += wide[v] * LOG2_E;
            }
            losses[t] += softmax(n, STRIDE, x, labels + i, factors, mine);
            for (int r = 0; r < n; r++) {
                float *row = x + r * STRIDE, *wide = (float *)logits + (i + r) * V;
                unsigned short *narrow = (unsigned short *)logits + (i + r) * V;
                if (is_bf16) for (long v = 0; v < V; v++) narrow[v] = to_bf16(row[v]);
                else memcpy(wide, row, V * sizeof *wide);
                factor[i + r] = factors[r];
            }
        }
    }
    sum_threads(threads, STRIDE, room + ROWS * STRIDE, scratch(0, STRIDE), bias_grad);
}
