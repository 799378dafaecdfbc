// The noise contract of ../philox.py in vectors: words bit for bit, normals within 1e-6 of its formula. A normal's bits
// depend on its words alone, not on where in a vector it is drawn, nor (by fused products throughout) on their length.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

// Half as many lanes of 64 bits, for products of 32 by 32 bits. What is above the low 32 bits of a factor is ignored.
typedef uint64_t Wide __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(float)), may_alias));

#if defined(__AVX512F__)
inline Wide product(Wide a, Wide b) { return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
inline Wide exclusive(Wide a, Wide b, Wide c) {
    return (Wide)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
inline Vec root(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec to_float(Words a) { return _mm512_cvtepu32_ps((__m512i)a); }
inline Vec low_pairs(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
inline Vec high_pairs(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
inline Vec low_halves(Vec a, Vec b) { return (Vec)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
inline Vec high_halves(Vec a, Vec b) { return (Vec)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
#else
inline Wide product(Wide a, Wide b) { return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
inline Wide exclusive(Wide a, Wide b, Wide c) { return a ^ b ^ c; }
inline Vec root(Vec a) { return _mm256_sqrt_ps(a); }
// Two exact halves, so that their sum is rounded once.
inline Vec to_float(Words a) {
    const Vec high = _mm256_cvtepi32_ps((__m256i)(a >> 16)), low = _mm256_cvtepi32_ps((__m256i)(a & 0xffff));
    return fused(high, Vec{} + 65536.f, low);
}
inline Vec low_pairs(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
inline Vec high_pairs(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
inline Vec low_halves(Vec a, Vec b) { return (Vec)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
inline Vec high_halves(Vec a, Vec b) { return (Vec)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }
#endif

constexpr uint64_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
constexpr uint32_t W0 = 0x9E3779B9, W1 = 0xBB67AE85;
constexpr int ROUNDS = 10, WORDS = 4;

// Streams, see philox.Stream.
constexpr int64_t SAMPLING = 1, TRAINING_NOISE = 2, TIMESTEP = 3, AUGMENTATION = 6;

inline uint32_t last_word(int64_t sample, int64_t stream) { return uint32_t(sample >> 32) << 8 | uint32_t(stream); }

// Word 0 of a sample at step 0.
inline uint32_t first_word(int64_t seed, int64_t sample, int64_t stream) {
    uint32_t c[WORDS] = {0, 0, uint32_t(sample), last_word(sample, stream)};
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int i = 0; i < ROUNDS; ++i, k0 += W0, k1 += W1) {
        const uint64_t p0 = c[0] * M0, p1 = c[2] * M1;
        c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
        c[1] = uint32_t(p1);
        c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
        c[3] = uint32_t(p0);
    }
    return c[0];
}

// A lane's place among the LANES blocks of a vector: as `in_order` takes them.
constexpr int place_of(int lane) { return lane % WORDS * (LANES / WORDS) + lane / WORDS; }

// What an operator draws: the blocks (four words) of all samples, one sample's after the other's.
struct Noise {
    const int64_t *samples, *steps;  // steps: of each sample its own if step_stride is 1, one for all if it is 0
    int64_t step_stride, stream, n, blocks;
    Wide key[ROUNDS][2];
    Words places;

    Noise(int64_t seed, const int64_t* samples, const int64_t* steps, int64_t step_stride, int64_t stream, int64_t n,
          int64_t blocks)
        : samples(samples), steps(steps), step_stride(step_stride), stream(stream), n(n), blocks(blocks) {
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int i = 0; i < ROUNDS; ++i, k0 += W0, k1 += W1) {
            key[i][0] = Wide{} + uint64_t(k0);
            key[i][1] = Wide{} + uint64_t(k1);
        }
        for (int lane = 0; lane < LANES; ++lane) places[lane] = place_of(lane);
    }

    // The words of LANES blocks from `first`; beyond the last sample anything.
    void words(int64_t first, Words w[WORDS]) const {
        const int64_t row = first / blocks, block = first % blocks;
        if (block + LANES <= blocks) {
            w[0] = places + uint32_t(block);
            fill(w, row);
        } else {
            uint32_t each[WORDS][LANES];
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t q = block + place_of(lane), at = std::min(row + q / blocks, n - 1);
                each[0][lane] = uint32_t(q % blocks);
                each[1][lane] = uint32_t(steps[at * step_stride]);
                each[2][lane] = uint32_t(samples[at]);
                each[3][lane] = last_word(samples[at], stream);
            }
            for (int k = 0; k < WORDS; ++k) w[k] = *reinterpret_cast<const Loose*>(each[k]);
        }
        Wide even[WORDS], odd[WORDS];
        for (int k = 0; k < WORDS; ++k) even[k] = (Wide)w[k], odd[k] = (Wide)w[k] >> 32;
        for (int i = 0; i < ROUNDS; ++i) {
            round(even, key[i]);
            round(odd, key[i]);
        }
        for (int k = 0; k < WORDS; ++k) w[k] = (Words)((even[k] & 0xffffffff) | odd[k] << 32);
    }

    // The words of blocks [first, first + count), in their order, or the normals made of them: 4 count of them and up to
    // 4 LANES - 4 of anything behind.
    template <bool NORMALS>
    void draw(int64_t first, int64_t count, float* to) const {
        for (int64_t i = 0; i < count; i += LANES) {
            Words w[WORDS];
            Vec z[WORDS];
            words(first + i, w);
            if (NORMALS) {
                box_muller(w[0], w[1], z[0], z[1]);
                box_muller(w[2], w[3], z[2], z[3]);
            } else {
                for (int k = 0; k < WORDS; ++k) z[k] = (Vec)w[k];
            }
            in_order(z, to + i * WORDS);
        }
    }

  private:
    typedef uint32_t Loose __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(uint32_t)), may_alias));

    void fill(Words w[WORDS], int64_t row) const {
        w[1] = Words{} + uint32_t(steps[row * step_stride]);
        w[2] = Words{} + uint32_t(samples[row]);
        w[3] = Words{} + last_word(samples[row], stream);
    }

    static void round(Wide c[WORDS], const Wide key[2]) {
        const Wide p0 = product(c[0], Wide{} + M0), p1 = product(c[2], Wide{} + M1);
        c[0] = exclusive(p1 >> 32, c[1], key[0]);
        c[1] = p1;
        c[2] = exclusive(p0 >> 32, c[3], key[1]);
        c[3] = p0;
    }

    // -2 ln u for u in (0, 1], relative to the last bits also next to 1. (Moshier: Cephes, logf.)
    static Vec minus_two_log(Vec u) {
        constexpr float P[] = {3.3333331174e-1f,  -2.4999993993e-1f, 2.0000714765e-1f,  -1.6668057665e-1f, 1.4249322787e-1f,
                               -1.2420140846e-1f, 1.1676998740e-1f,  -1.1514610310e-1f, 7.0376836292e-2f};
        constexpr float LN2_HIGH = -2 * 0.693359375f, LN2_LOW = 2 * 2.12194440e-4f;
        const Integers bits = reinterpret_cast<Integers>(u), exponent = (bits - 0x3f3504f3) >> 23;  // of sqrt(1/2)
        const Vec f = reinterpret_cast<Vec>(bits - (exponent << 23)) - 1.f, e = __builtin_convertvector(exponent, Vec);
        Vec p = Vec{} + P[8];
        for (int i = 7; i >= 0; --i) p = fused(p, f, Vec{} + P[i]);
        const Vec square = f * f;
        Vec log = fused(square * f, -2.f * p, fused(e, Vec{} + LN2_LOW, square));
        return fused(e, Vec{} + LN2_HIGH, fused(f, Vec{} - 2.f, log));
    }

    // sqrt(-2 ln u1) times cosine and sine of 2 pi u2. These by the distance of u2 from a quarter. (Cephes, sinf, cosf.)
    static void box_muller(Words r0, Words r1, Vec& z0, Vec& z1) {
        constexpr float TWO_PI = 6.28318530717958647692f, UNIT = 1.f / 4294967296.f;
        constexpr float ROUNDING = 3 << 22;  // a float of [0, 2^22) added to it is rounded to an integer, in its low bits
        const Vec radius = root(minus_two_log(fused(to_float(r0), Vec{} + UNIT, Vec{} + UNIT / 2)));
        const Vec u2 = to_float(r1) * UNIT, shifted = fused(u2, Vec{} + 4.f, Vec{} + ROUNDING);
        const Integers quarter = reinterpret_cast<Integers>(shifted);
        const Vec x = fused(shifted - ROUNDING, Vec{} - .25f, u2) * TWO_PI, s = x * x;
        Vec sine = fused(s, Vec{} - 1.9515295891e-4f, Vec{} + 8.3321608736e-3f);
        sine = fused(sine, s, Vec{} - 1.6666654611e-1f);
        sine = fused(sine, s * x, x);
        Vec cosine = fused(s, Vec{} + 2.443315711809948e-5f, Vec{} - 1.388731625493765e-3f);
        cosine = fused(cosine, s, Vec{} + 4.166664568298827e-2f);
        cosine = fused(fused(cosine, s, Vec{} - .5f), s, Vec{} + 1.f);
        const Integers crossed = -(quarter & 1);
        const Vec first = crossed ? sine : cosine, second = crossed ? cosine : sine;
        z0 = radius * reinterpret_cast<Vec>(reinterpret_cast<Integers>(first) ^ ((quarter + 1) & 2) << 30);
        z1 = radius * reinterpret_cast<Vec>(reinterpret_cast<Integers>(second) ^ (quarter & 2) << 30);
    }

    // Four vectors, of one word each, in the order of blocks: 4 by 4 transposes within 128 bits.
    static void in_order(const Vec z[WORDS], float* to) {
        const Vec a = low_pairs(z[0], z[1]), b = low_pairs(z[2], z[3]);
        const Vec c = high_pairs(z[0], z[1]), d = high_pairs(z[2], z[3]);
        store(to, low_halves(a, b));
        store(to + LANES, high_halves(a, b));
        store(to + 2 * LANES, low_halves(c, d));
        store(to + 3 * LANES, high_halves(c, d));
    }
};

}  // namespace
