// How operators on [n, ...] elements deal them out, with their noise in the order of the memory; and parts of vectors.

#pragma once

#include <cstring>
#include <type_traits>

#include "philox.h"
#include "worker.h"

namespace {

// A product as it is rounded: no compiler may fuse it with a sum. So operators round as PyTorch's do, one operation after
// the other, and solver_step has the bits of its reference.
inline Vec rounded(Vec product) {
#if defined(__AVX512F__)
    asm("" : "+v"(product));
#else
    asm("" : "+x"(product));
#endif
    return product;
}
inline Vec times(float a, Vec b) { return rounded((Vec{} + a) * b); }

// A whole vector where others are the beginning of one.
typedef std::integral_constant<int64_t, LANES> Whole;
inline Vec load(const float* from, Whole) { return load(from); }
inline void store(float* to, Vec value, Whole) { store(to, value); }
// Pixels 0..255 as -1..1.
template <class Count>
inline Vec load(const uint8_t* from, Count count) {
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes bytes = {};
    std::memcpy(&bytes, from, count);
    return __builtin_convertvector(bytes, Vec) / 127.5f - 1.f;
}

// body(i, count) for vectors of elements from i on: of LANES, and one of fewer at the end.
template <class Body>
inline void in_vectors(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(i, Whole());
    if (i < count) body(i, count - i);
}

// n samples of `channels` channels of `area` elements. In memory an element's channels are beside each other; where all
// is in the order of the noise contract, that is one channel of all elements.
struct Samples {
    int64_t n, area, channels;

    // Elements of a unit of work, so that its normals stay in the first cache. Untuned.
    static constexpr int64_t UNIT = 2048;

    int64_t numel() const { return area * channels; }
    int64_t blocks() const { return split(numel(), WORDS); }
    bool whole() const { return numel() <= UNIT; }                          // units of whole samples
    int64_t rows() const { return UNIT / (WORDS * blocks()) + 1; }          // as many
    int64_t pixels() const { return std::max<int64_t>(UNIT / channels / 64, 1) * 64; }  // or of so many pixels of one
    int64_t units() const {
        if (!numel()) return 0;
        return whole() ? split(n, rows()) : n * split(area, pixels());
    }
    // Scratch memory for normals: as they are drawn, and woven into pixels.
    int64_t drawn() const { return WORDS * (LANES + (whole() ? rows() * blocks() : pixels() / WORDS + 2)); }
    int64_t floats() const { return numel() ? drawn() + (channels > 1 ? (whole() ? area : pixels()) * channels : 0) : 0; }
};

// One unit: of each of its rows (sample numbers) the elements [first, first + count) in memory, and their normals.
// body(row, first, count, normals). noise: null if there are none to draw.
template <bool NORMALS = true, class Body>
inline void in_rows(const Samples& s, int64_t unit, const Noise* noise, float* memory, Body body) {
    float *drawn = memory, *woven = memory + s.drawn();
    const auto weave = [&](const float* from, int64_t channel, int64_t count) {
        for (int64_t pixel = 0; pixel < count; ++pixel) woven[pixel * s.channels + channel] = from[pixel];
    };
    if (s.whole()) {
        const int64_t first = unit * s.rows(), last = std::min(first + s.rows(), s.n), padded = WORDS * s.blocks();
        if (noise) noise->draw<NORMALS>(first * s.blocks(), (last - first) * s.blocks(), drawn);
        for (int64_t row = first; row < last; ++row) {
            const float* z = drawn + (row - first) * padded;
            if (noise && s.channels > 1) {
                for (int64_t c = 0; c < s.channels; ++c) weave(z + c * s.area, c, s.area);
                z = woven;
            }
            body(row, 0, s.numel(), z);
        }
        return;
    }
    const int64_t parts = split(s.area, s.pixels()), row = unit / parts, first = unit % parts * s.pixels();
    const int64_t count = std::min(s.pixels(), s.area - first);
    const float* z = woven;
    for (int64_t c = 0; noise && c < s.channels; ++c) {
        const int64_t element = c * s.area + first, block = element / WORDS, before = element % WORDS;
        noise->draw<NORMALS>(row * s.blocks() + block, split(before + count, WORDS), drawn);
        if (s.channels > 1) weave(drawn + before, c, count);
        else z = drawn + before;
    }
    body(row, first * s.channels, count * s.channels, z);
}

}  // namespace
