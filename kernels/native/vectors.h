// What every kernel for CPUs with AVX2 or AVX-512 is made of: vectors of float, and GELU of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <immintrin.h>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
inline __m512 least(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
#else
constexpr int LANES = 8;
inline __m256 least(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
#endif

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(float))));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

// a b + c, rounded once. Which products are fused with sums the compiler otherwise chooses anew wherever a function is
// inlined, by what stands around it: GELU had other bits for an image in a batch than alone.
#if defined(__AVX512F__)
inline Vec fused(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#else
inline Vec fused(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#endif

// The first `count` lanes alone, others zero; no other memory is touched.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
// One by one: into instructions that take a mask the compiler's sanitizers do not look.
inline Vec load(const float* from, int64_t count) {
    Vec values = {};
    for (int i = 0; i < LANES && i < count; ++i) values[i] = from[i];
    return values;
}
inline void store(float* to, Vec values, int64_t count) {
    for (int i = 0; i < LANES && i < count; ++i) to[i] = values[i];
}
#elif defined(__AVX512F__)
inline __mmask16 lanes(int64_t count) { return __mmask16(count < LANES ? (1u << count) - 1 : 0xffffu); }
inline Vec load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), from); }
inline void store(float* to, Vec value, int64_t count) { _mm512_mask_storeu_ps(to, lanes(count), value); }
#else
inline __m256i lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load(const float* from, int64_t count) { return _mm256_maskload_ps(from, lanes(count)); }
inline void store(float* to, Vec value, int64_t count) { _mm256_maskstore_ps(to, lanes(count), value); }
#endif

// The sum of all lanes.
inline float total(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}

// The larger one, or NaN if either is.
inline Vec largest(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }

// Phi(a) - 1/2 for 0 <= a <= LIMIT, where it is 1/2 to 4e-8. In float32 the error is at most 2.2e-7 (AVX2: 1.3e-7).
constexpr float LIMIT = 5.4f;

#if defined(__AVX512F__)
// A cubic on each of 32 intervals, picked by permutations: 14 operations instead of the polynomial's 22. A convolution
// with 64 channels then takes no longer than without GELU, by the polynomial 12% longer (Xeon 2.5 GHz).
struct Cubics {
    static constexpr int COUNT = 32;
    static constexpr float SCALE = (COUNT - 1) / LIMIT;
    alignas(64) float c[4][COUNT];  // of powers of the distance from the middle, i / SCALE, in units of 1 / SCALE

    // By interpolation at Chebyshev's nodes.
    Cubics() {
        for (int i = 0; i < COUNT; ++i) {
            double t[4] = {};  // of Chebyshev's polynomials
            for (int k = 0; k < 4; ++k) {
                const double angle = std::acos(-1.) * (2 * k + 1) / 8;
                const double value = std::erf((i + std::cos(angle) / 2) / SCALE / std::sqrt(2.)) / 2;
                for (int j = 0; j < 4; ++j) t[j] += value * std::cos(j * angle) / (j ? 2 : 4);
            }
            c[0][i] = i + 1 < COUNT ? t[0] - t[2] : .5;  // exact beyond LIMIT
            c[1][i] = 2 * (t[1] - 3 * t[3]);
            c[2][i] = 8 * t[2];
            c[3][i] = 32 * t[3];
        }
    }
};
const Cubics CUBICS;

inline Vec half_erf(Vec a) {
    constexpr float ROUNDING = 3 << 22;  // a float of [0, 2^22) added to it is rounded to an integer, in its low bits
    const Vec scale = Vec{} + Cubics::SCALE, shifted = fused(a, scale, Vec{} + ROUNDING);
    const Vec distance = fused(a, scale, ROUNDING - shifted);
    Vec h = {};
    for (int power = 3; power >= 0; --power) {
        const __m512 low = _mm512_load_ps(CUBICS.c[power]), high = _mm512_load_ps(CUBICS.c[power] + LANES);
        const Vec c = _mm512_permutex2var_ps(low, _mm512_castps_si512(shifted), high);
        h = power == 3 ? c : fused(h, distance, c);
    }
    return h;
}
#else
// a q(a^2); q is the minimax polynomial of degree 14 in s = 2 a^2 / LIMIT^2 - 1.
inline Vec half_erf(Vec a) {
    constexpr float Q[] = {1.309281126e-01f, -6.532805488e-02f, 4.849959172e-02f, -3.920681298e-02f, 3.211659117e-02f,
                           -2.574645809e-02f, 1.964516947e-02f, -1.396331550e-02f, 9.651121341e-03f, -6.715348498e-03f,
                           3.659034586e-03f, -1.186400228e-03f, 8.748502121e-04f, -1.028372572e-03f, 3.928831231e-04f};
    const Vec s = fused(a * a, Vec{} + 2.f / (LIMIT * LIMIT), Vec{} - 1.f);
    Vec q = Vec{} + Q[14];
    for (int i = 13; i >= 0; --i) q = fused(q, s, Vec{} + Q[i]);
    return a < LIMIT ? a * q : Vec{} + .5f;
}
#endif

// x Phi(x)
inline Vec gelu(Vec x) {
    const Vec size = reinterpret_cast<Vec>(reinterpret_cast<Integers>(x) & 0x7fffffff);
    return fused(size, half_erf(least(size, Vec{} + LIMIT)), .5f * x);
}

}  // namespace
