// Attention for heads of a few numbers, HEAD of them (a constant for the compiler), which are too narrow for matrix products.
//
// The innermost loops run over the keys, one number of the head at a time, so that the compiler makes vectors of neighbouring keys. For them keys
// and values are copied to [HEAD][T], without those that are masked. The scores of one query live in the nearest cache; none is kept for the backward
// pass, which computes them again from the logarithm of their sum (Dao et al. 2022, arXiv:2205.14135). A thread computes whole heads, so the sums
// are the same on any number of threads.
//
// B sequences, H heads, M queries, T keys.

#include <math.h>

typedef struct { float *data; long batch, head, row; } tensor;  // [B, H, M or T, HEAD]; the strides of the first three, the last is 1

#define AT(x, b, h, i) ((x).data + (b) * (x).batch + (h) * (x).head + (i) * (x).row)

static const float LOG2_E = 1.44269504f;  // exp(x) = 2^(x LOG2_E)

// 2^x for x <= 0, to 2e-7 of it: a power of the whole part, put together from bits, times the series of the rest. NaN stays NaN.
static inline float power_of_2(float x) {
    x = x < -126 ? -126 : x;  // below is the end of fp32
    float whole = rintf(x), rest = x - whole;
    union { int bits; float value; } power = {((int)whole + 127) << 23};
    return power.value * (1 + rest * (0.693147181f + rest * (0.240226507f + rest * (0.0555041087f + rest * (0.00961812911f
                              + rest * (0.00133335581f + rest * 0.000154035304f))))));
}

// Copies the real ones of a head's T rows, and returns how many they are. is_real: [T], or NULL where all are.
static long gather(long T, const float *rows, long stride, const unsigned char *is_real, float to[HEAD][T]) {
    long n = 0;
    for (long j = 0; j < T; j++)
        if (!is_real || is_real[j]) {
            for (int c = 0; c < HEAD; c++) to[c][n] = rows[j * stride + c];
            n++;
        }
    return n;
}

// The reverse: the rows that are not real become 0.
static void scatter(long T, float from[HEAD][T], const unsigned char *is_real, float *rows, long stride) {
    long n = 0;
    for (long j = 0; j < T; j++) {
        int real = !is_real || is_real[j];
        for (int c = 0; c < HEAD; c++) rows[j * stride + c] = real ? from[c][n] : 0;
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
            float k[HEAD][T], v[HEAD][T], weight[T];
            long n = gather(T, AT(key, b, h, 0), key.row, real, k);
            gather(T, AT(value, b, h, 0), value.row, real, v);
            for (long i = 0; i < M; i++) {
                float q[HEAD], largest = -INFINITY, sum = 0;
                for (int c = 0; c < HEAD; c++) q[c] = AT(query, b, h, i)[c] * scale;
                #pragma omp simd reduction(max : largest)
                for (long j = 0; j < n; j++) {
                    float score = 0;
                    for (int c = 0; c < HEAD; c++) score += q[c] * k[c][j];
                    weight[j] = score;
                    largest = score > largest ? score : largest;
                }
                #pragma omp simd reduction(+ : sum)
                for (long j = 0; j < n; j++) sum += weight[j] = power_of_2(weight[j] - largest);
                for (int c = 0; c < HEAD; c++) {
                    float total = 0;
                    #pragma omp simd reduction(+ : total)
                    for (long j = 0; j < n; j++) total += weight[j] * v[c][j];
                    AT(output, b, h, i)[c] = total / sum;
                }
                log_sum[(b * H + h) * M + i] = largest + log2f(sum);
            }
        }
}

// Fills the gradients of query, key and value.
void backward(int threads, long B, long H, long M, long T, tensor query, tensor key, tensor value, const unsigned char *is_real, tensor output,
              const float *log_sum, tensor output_grad, tensor query_grad, tensor key_grad, tensor value_grad) {
    const float scale = 1 / sqrtf(HEAD);
    #pragma omp parallel for collapse(2) num_threads(threads)
    for (long b = 0; b < B; b++)
        for (long h = 0; h < H; h++) {
            const unsigned char *real = is_real ? is_real + b * T : 0;
            float k[HEAD][T], v[HEAD][T], k_grad[HEAD][T], v_grad[HEAD][T], score_grad[T];
            long n = gather(T, AT(key, b, h, 0), key.row, real, k);
            gather(T, AT(value, b, h, 0), value.row, real, v);
            for (int c = 0; c < HEAD; c++)
                for (long j = 0; j < n; j++) k_grad[c][j] = v_grad[c][j] = 0;
            for (long i = 0; i < M; i++) {
                float q[HEAD], out_grad[HEAD], mean = 0, log_total = log_sum[(b * H + h) * M + i];
                for (int c = 0; c < HEAD; c++) {
                    q[c] = AT(query, b, h, i)[c] * scale;
                    out_grad[c] = AT(output_grad, b, h, i)[c];
                    mean += out_grad[c] * AT(output, b, h, i)[c];
                }
                #pragma omp simd
                for (long j = 0; j < n; j++) {
                    float score = 0, weight_grad = -mean;
                    for (int c = 0; c < HEAD; c++) {
                        score += q[c] * k[c][j];
                        weight_grad += out_grad[c] * v[c][j];
                    }
                    float weight = power_of_2(LOG2_E * score - log_total);
                    score_grad[j] = weight * weight_grad;
                    for (int c = 0; c < HEAD; c++) {
                        v_grad[c][j] += weight * out_grad[c];
                        k_grad[c][j] += score_grad[j] * q[c];
                    }
                }
                for (int c = 0; c < HEAD; c++) {
                    float total = 0;
                    #pragma omp simd reduction(+ : total)
                    for (long j = 0; j < n; j++) total += score_grad[j] * k[c][j];
                    AT(query_grad, b, h, i)[c] = total * scale;
                }
            }
            scatter(T, k_grad, real, AT(key_grad, b, h, 0), key_grad.row);
            scatter(T, v_grad, real, AT(value_grad, b, h, 0), value_grad.row);
        }
}
