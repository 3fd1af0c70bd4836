// Vectors of neighbouring numbers, as wide as the processor's. They need no alignment in memory.

#include <math.h>

#if defined __AVX512F__
#include <immintrin.h>
enum { LANES = 16 };
#define MAX _mm512_max_ps
#define MIN _mm512_min_ps
#elif defined __AVX__
#include <immintrin.h>
enum { LANES = 8 };
#define MAX _mm256_max_ps
#define MIN _mm256_min_ps
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int int_vec __attribute__((vector_size(4 * LANES), aligned(4)));

static const float LOG2_E = 1.44269504f;  // exp(x) = 2^(x LOG2_E)

static inline vec *at(const float *numbers, long i) { return (vec *)(numbers + i); }

static inline vec all(float x) { return (vec){0} + x; }

static inline vec larger(vec a, vec b) {  // returns a if either is NaN
#ifdef MAX
    return (vec)MAX(b, a);  // the instruction returns its second operand if either is NaN
#else
    int_vec is_b = b > a;
    return (vec)((is_b & (int_vec)b) | (~is_b & (int_vec)a));
#endif
}

static inline vec smaller(vec a, vec b) {  // returns a if either is NaN
#ifdef MIN
    return (vec)MIN(b, a);
#else
    return -larger(-a, -b);
#endif
}

static inline float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline float largest_of(vec x) {
    float largest = x[0];
    for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

// 2^x for x < 128, with a relative error of 2e-7: a polynomial of the fraction, with the integer part added to the bits
// of the exponent. The coefficients minimise the largest relative error in [-0.5, 0.5]. NaN stays NaN.
static inline vec power_of_2(vec x) {
    const float rounder = 3 << 22;  // a sum with it has no fraction bits, and the integer part in its last bits
    x = larger(x, all(-126));  // below this, fp32 ends
    vec sum = x + rounder, rest = x - (sum - rounder);
    vec series = 1 + rest * (0.6931469776f + rest * (0.2402224208f + rest * (0.0555073374f + rest * (0.0096715128f + rest * 0.0013264727f))));
    return (vec)((int_vec)series + ((int_vec)sum << 23));
}
