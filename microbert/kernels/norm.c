// Layer norm (Ba et al. 2016, arXiv:1607.06450) of rows of D numbers (a small compile-time constant, so that the compiler
// vectorises whole rows).
//
// The backward pass recomputes mean and deviation. Each thread accumulates the gradients of weight and bias over a
// contiguous range of rows; the results are added in the order of the threads.
//
// Multiplications and additions are not fused: which loop runs depends on the distance between the arrays in memory, and
// each loop would fuse differently.
//
// N rows.

#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <math.h>

// normed: the row before weight and bias. Returns 1 / standard deviation.
static inline float normalize(const float *x, float eps, float *normed) {
    float mean = 0, variance = 0;
    for (int c = 0; c < D; c++) mean += x[c] / D;
    for (int c = 0; c < D; c++) variance += (x[c] - mean) * (x[c] - mean) / D;
    float factor = 1 / sqrtf(variance + eps);
    for (int c = 0; c < D; c++) normed[c] = (x[c] - mean) * factor;
    return factor;
}

// x, output: [N, D]. weight, bias: [D].
void forward(int threads, long N, float eps, const float *x, const float *weight, const float *bias, float *output) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < N; i++) {
        float normed[D];
        normalize(x + i * D, eps, normed);
        for (int c = 0; c < D; c++) output[i * D + c] = normed[c] * weight[c] + bias[c];
    }
}

// output_grad, x_grad: [N, D]. parameter_grads: [2, D], of weight, then bias.
void backward(int threads, long N, float eps, const float *x, const float *weight, const float *output_grad, float *x_grad, float *parameter_grads) {
    float sums[threads][2 * D];
    #pragma omp parallel for num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float weight_grad[D] = {0}, bias_grad[D] = {0};  // in registers
        for (long i = N * t / threads, end = N * (t + 1) / threads; i < end; i++) {
            float normed[D], normed_grad[D], mean = 0, slope = 0;
            float factor = normalize(x + i * D, eps, normed);
            for (int c = 0; c < D; c++) {
                float grad = output_grad[i * D + c];
                weight_grad[c] += grad * normed[c];
                bias_grad[c] += grad;
                normed_grad[c] = grad * weight[c];
            }
            for (int c = 0; c < D; c++) {
                mean += normed_grad[c] / D;
                slope += normed_grad[c] * normed[c] / D;
            }
            for (int c = 0; c < D; c++) x_grad[i * D + c] = (normed_grad[c] - mean - normed[c] * slope) * factor;
        }
        for (int c = 0; c < D; c++) {
            sums[t][c] = weight_grad[c];
            sums[t][D + c] = bias_grad[c];
        }
    }
    for (int c = 0; c < 2 * D; c++) {
        parameter_grads[c] = 0;
        for (int t = 0; t < threads; t++) parameter_grads[c] += sums[t][c];
    }
}
