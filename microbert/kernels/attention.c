// Attention for heads of HEAD numbers (a compile-time constant), too narrow for matrix products.
//
// Scores stay in registers. The backward pass recomputes them from the logarithm of their sum (Dao et al. 2022,
// arXiv:2205.14135). A vector holds neighbouring queries in the forward pass, so that no sum runs across lanes, and
// neighbouring keys in the backward pass, for a few queries at a time. Unmasked keys and values are gathered first. A
// thread computes whole heads, so the sums do not depend on the number of threads.
//
// B sequences, H heads, M queries, T keys, PADDED: T rounded up to whole vectors.

#include <string.h>

#include "vectors.h"

enum { ROWS = 4 };  // queries at a time in the backward pass
static const float HARMLESS = 60;  // 2 to the power of this, times any number of keys, is well within fp32

typedef struct { float *data; long batch, head, row; } tensor;  // [B, H, M or T, HEAD] with the first three strides; the last is 1

#define AT(x, b, h, i) ((x).data + (b) * (x).batch + (h) * (x).head + (i) * (x).row)

// Copies the real rows of a head's T, number c of row n to to[c * apart + n * beside], and returns their count.
// is_real: [T], or NULL if all are real.
static long gather(long T, const float *rows, long stride, const unsigned char *is_real, float *to, long apart, long beside) {
    long n = 0;
    for (long j = 0; j < T; j++)
        if (!is_real || is_real[j]) {
            for (int c = 0; c < HEAD; c++) to[c * apart + n * beside] = rows[j * stride + c];
            n++;
        }
    return n;
}

// The reverse of gather, from [HEAD, PADDED] and scaled by the factor. Rows that are not real become 0.
static void scatter(long T, long PADDED, const float *from, float factor, const unsigned char *is_real, float *rows, long stride) {
    long n = 0;
    for (long j = 0; j < T; j++) {
        int real = !is_real || is_real[j];
        for (int c = 0; c < HEAD; c++) rows[j * stride + c] = real ? factor * from[c * PADDED + n] : 0;
        n += real;
    }
}

// output: softmax(query . key / sqrt(HEAD)) . value. log_sum: [B, H, M], log2 of the softmax's denominator. is_real: [B, T] or NULL.
void forward(int threads, long B, long H, long M, long T, tensor query, tensor key, tensor value, const unsigned char *is_real, tensor output, float *log_sum) {
    const float scale = LOG2_E / sqrtf(HEAD);
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const unsigned char *real = is_real ? is_real + b * T : 0;
            float k[T][HEAD], v[T][HEAD];
            long n = gather(T, AT(key, b, h, 0), key.row, real, *k, 1, HEAD);
            gather(T, AT(value, b, h, 0), value.row, real, *v, 1, HEAD);
            float longest = 0;  // squared length of the longest key
            for (long j = 0; j < n; j++) {
                float length = 0;
                for (int c = 0; c < HEAD; c++) length += k[j][c] * k[j][c];
                longest = length > longest ? length : longest;
            }
            for (long i = 0; i < M; i += LANES) {
                int queries = M - i < LANES ? M - i : LANES;
                vec q[HEAD], out[HEAD], length = all(0), largest = all(0), sum = all(0);
                memset(q, 0, sizeof q);
                memset(out, 0, sizeof out);
                for (int r = 0; r < queries; r++)
                    for (int c = 0; c < HEAD; c++) q[c][r] = AT(query, b, h, i + r)[c] * scale;
                for (int c = 0; c < HEAD; c++) length += q[c] * q[c];
                if (!(largest_of(length) * longest < HARMLESS * HARMLESS)) {  // Cauchy-Schwarz bounds the scores
                    largest = all(-INFINITY);
                    for (long j = 0; j < n; j++) {
                        vec score = q[0] * k[j][0];
                        for (int c = 1; c < HEAD; c++) score += q[c] * k[j][c];
                        largest = larger(score, largest);
                    }
                }
                for (long j = 0; j < n; j++) {
                    vec score = q[0] * k[j][0] - largest;
                    for (int c = 1; c < HEAD; c++) score += q[c] * k[j][c];
                    vec weight = power_of_2(score);
                    sum += weight;
                    for (int c = 0; c < HEAD; c++) out[c] += weight * v[j][c];
                }
                for (int r = 0; r < queries; r++) {
                    for (int c = 0; c < HEAD; c++) AT(output, b, h, i + r)[c] = out[c][r] / sum[r];
                    log_sum[(b * H + h) * M + i + r] = largest[r] + log2f(sum[r]);
                }
            }
        }
}

// Writes the gradients of query, key and value.
void backward(int threads, long B, long H, long M, long T, tensor query, tensor key, tensor value, const unsigned char *is_real, tensor output,
              const float *log_sum, tensor output_grad, tensor query_grad, tensor key_grad, tensor value_grad) {
    const float scale = LOG2_E / sqrtf(HEAD);
    const long PADDED = (T + LANES - 1) / LANES * LANES;
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const unsigned char *real = is_real ? is_real + b * T : 0;
            float k[HEAD * PADDED], v[HEAD * PADDED], k_grad[HEAD * PADDED], v_grad[HEAD * PADDED];
            memset(k, 0, sizeof k);  // the padding adds nothing to the queries' gradients
            memset(v, 0, sizeof v);
            memset(k_grad, 0, sizeof k_grad);
            memset(v_grad, 0, sizeof v_grad);
            long n = gather(T, AT(key, b, h, 0), key.row, real, k, PADDED, 1);
            gather(T, AT(value, b, h, 0), value.row, real, v, PADDED, 1);
            for (long i = 0; i < M; i += ROWS) {
                int queries = M - i < ROWS ? M - i : ROWS;
                float q[ROWS][HEAD] = {0}, out_grad[ROWS][HEAD] = {0}, mean[ROWS] = {0}, log_total[ROWS] = {0};
                vec q_grad[ROWS][HEAD];
                memset(q_grad, 0, sizeof q_grad);
                for (int r = 0; r < queries; r++) {
                    log_total[r] = log_sum[(b * H + h) * M + i + r];
                    for (int c = 0; c < HEAD; c++) {
                        q[r][c] = AT(query, b, h, i + r)[c] * scale;
                        out_grad[r][c] = AT(output_grad, b, h, i + r)[c];
                        mean[r] += out_grad[r][c] * AT(output, b, h, i + r)[c];
                    }
                }
                for (long j = 0; j < n; j += LANES) {
                    vec weight[ROWS], score_grad[ROWS];
                    for (int r = 0; r < ROWS; r++) {
                        vec score = all(-log_total[r]), weight_grad = all(-mean[r]);
                        for (int c = 0; c < HEAD; c++) {
                            score += q[r][c] * *at(k, c * PADDED + j);
                            weight_grad += out_grad[r][c] * *at(v, c * PADDED + j);
                        }
                        weight[r] = power_of_2(smaller(score, all(0)));  // only the padding exceeds 0, without limit
                        score_grad[r] = weight[r] * weight_grad;
                    }
                    for (int c = 0; c < HEAD; c++) {
                        vec k_sum = *at(k_grad, c * PADDED + j), v_sum = *at(v_grad, c * PADDED + j);
                        for (int r = 0; r < ROWS; r++) {
                            q_grad[r][c] += score_grad[r] * *at(k, c * PADDED + j);
                            k_sum += score_grad[r] * q[r][c];
                            v_sum += weight[r] * out_grad[r][c];
                        }
                        *at(k_grad, c * PADDED + j) = k_sum;
                        *at(v_grad, c * PADDED + j) = v_sum;
                    }
                }
                for (int r = 0; r < queries; r++)
                    for (int c = 0; c < HEAD; c++) AT(query_grad, b, h, i + r)[c] = sum_of(q_grad[r][c]) / sqrtf(HEAD);
            }
            scatter(T, PADDED, k_grad, 1 / LOG2_E, real, AT(key_grad, b, h, 0), key_grad.row);
            scatter(T, PADDED, v_grad, 1, real, AT(value_grad, b, h, 0), value_grad.row);
        }
}
