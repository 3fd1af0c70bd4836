// GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): x times the share of a normal distribution below x.
//
// The share is formula 7.1.26 of Abramowitz and Stegun's Handbook of Mathematical Functions, accurate to 1e-7: a
// polynomial times exp(-x^2 / 2), which the slope needs too.
//
// N rows of D numbers. Rows of x start `stride` numbers apart: x may be a slice of a wider array.

#include <string.h>

#include "vectors.h"

// bell: exp(-x^2 / 2)
static inline vec share_below(vec x, vec *bell) {
    vec size = larger(x, -x), t = 1 / (1 + 0.231641889f * size);
    *bell = power_of_2(-0.5f * LOG2_E * x * x);
    vec tail = *bell * t * (0.127414796f + t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
    int_vec is_below = x < 0;
    return (vec)((is_below & (int_vec)tail) | (~is_below & (int_vec)(1 - tail)));
}

static inline vec gelu(vec x) {
    vec bell;
    return x * share_below(x, &bell);
}

static inline vec slope(vec x) {
    vec bell, share = share_below(x, &bell);
    return share + 0.398942280f * x * bell;  // the density is bell / sqrt(2 pi)
}

void forward(int threads, long N, long D, long stride, const float *x, float *output) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < N; i++) {
        const float *row = x + i * stride;
        float *of_row = output + i * D;
        long c = 0;
        for (; c + LANES <= D; c += LANES) *at(of_row, c) = gelu(*at(row, c));
        vec last = all(0);
        memcpy(&last, row + c, (D - c) * sizeof *x);
        last = gelu(last);
        memcpy(of_row + c, &last, (D - c) * sizeof *x);
    }
}

// output_grad, x_grad: [N, D]
void backward(int threads, long N, long D, long stride, const float *x, const float *output_grad, float *x_grad) {
    #pragma omp parallel for num_threads(threads)
    for (long i = 0; i < N; i++) {
        const float *row = x + i * stride, *grad = output_grad + i * D;
        float *to = x_grad + i * D;
        long c = 0;
        for (; c + LANES <= D; c += LANES) *at(to, c) = *at(grad, c) * slope(*at(row, c));
        vec last = all(0);
        memcpy(&last, row + c, (D - c) * sizeof *x);
        last = slope(last);
        for (long n = 0; c + n < D; n++) to[c + n] = grad[c + n] * last[n];
    }
}
