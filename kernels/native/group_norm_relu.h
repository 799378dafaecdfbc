// ../group_norm_relu.py has the equation and this operator's reference. Images are NHWC, float32.
//
// Moments are those of every channel in every chunk of pixels, then of a group in the whole image: read twice from the
// first cache, no difference of squares, and sums in an order that no number of threads changes.

#pragma once

#include <cmath>

#include "vectors.h"
#include "worker.h"

namespace {

constexpr int64_t PIXELS = 64;  // of a chunk; untuned

// x, out [n, area, c]; weight, bias [c].
struct GroupNormReluCall {
    const float *x, *weight, *bias;
    float* out;
    int64_t n, area, c, groups;
    double eps;

    int64_t chunks() const { return split(area, PIXELS); }
    int64_t padded() const { return split(c, LINE) * LINE; }
};

// The chunks' moments, of all images in the first thread's memory; behind them each thread's mean and gain of a channel.
inline int64_t group_norm_relu_floats(const GroupNormReluCall& call, int64_t) {
    return call.padded() * 2 * (call.n * call.chunks() + 1);
}

// Means and sums of squares about them of `pixels` pixels in each channel.
inline void moments(const float* x, int64_t pixels, int64_t c, float* means, float* squares) {
    constexpr int64_t STEP = 4;  // sums at once
    for (int64_t i = 0; i < c; i += LANES) {
        const auto at = [&](int64_t pixel) { return load(x + pixel * c + i, c - i); };
        const auto sum = [&](auto term) {
            Vec sums[STEP] = {};
            int64_t p = 0;
            for (; p + STEP <= pixels; p += STEP)
                for (int j = 0; j < STEP; ++j) sums[j] += term(p + j);
            for (; p < pixels; ++p) sums[0] += term(p);
            return (sums[0] + sums[1]) + (sums[2] + sums[3]);
        };
        const Vec mean = sum(at) / float(pixels);
        store(means + i, mean);
        store(squares + i, sum([&](int64_t pixel) { return (at(pixel) - mean) * (at(pixel) - mean); }));
    }
}

// Every channel's mean and gain in one image, from its chunks' moments.
inline void gains(const GroupNormReluCall& call, const float* chunk, float* mean, float* gain) {
    const int64_t width = call.c / call.groups, padded = call.padded();
    const auto pixels = [&](int64_t i) { return double(std::min(PIXELS, call.area - i * PIXELS)); };
    for (int64_t first = 0; first < call.c; first += width) {
        const double count = double(width * call.area);
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < call.chunks(); ++i) {
            double own = 0;
            for (int64_t c = first; c < first + width; ++c) own += chunk[2 * i * padded + c];
            sum += own * pixels(i);
        }
        for (int64_t i = 0; i < call.chunks(); ++i) {
            double own = 0, between = 0;
            for (int64_t c = first; c < first + width; ++c) {
                const double distance = chunk[2 * i * padded + c] - sum / count;
                own += chunk[(2 * i + 1) * padded + c];
                between += distance * distance;
            }
            squares += own + between * pixels(i);
        }
        for (int64_t c = first; c < first + width; ++c) {
            mean[c] = float(sum / count);
            gain[c] = float(call.weight[c] / std::sqrt(squares / count + call.eps));
        }
    }
}

inline void group_norm_relu(const GroupNormReluCall& call, Worker& worker) {
    const int64_t chunks = call.chunks(), padded = call.padded(), c = call.c;
    float* shared = worker.memory_of(0);
    const auto own = worker.share(call.n * chunks);
    const auto start = [&](int64_t work) { return (work / chunks * call.area + work % chunks * PIXELS) * c; };
    const auto pixels = [&](int64_t work) { return std::min(PIXELS, call.area - work % chunks * PIXELS); };
    for (int64_t work = own.first; work < own.last; ++work) {
        float* to = shared + 2 * work * padded;
        moments(call.x + start(work), pixels(work), c, to, to + padded);
    }
    worker.barrier();
    float *mean = worker.memory + 2 * call.n * chunks * padded, *gain = mean + padded;
    for (int64_t work = own.first; work < own.last; ++work) {
        if (work == own.first || work % chunks == 0) {
            gains(call, shared + 2 * (work / chunks * chunks) * padded, mean, gain);
        }
        for (int64_t i = 0; i < c; i += LANES) {
            const Vec middle = load(mean + i), by = load(gain + i), plus = load(call.bias + i, c - i);
            for (int64_t p = 0; p < pixels(work); ++p) {
                const int64_t at = start(work) + p * c + i;
                const Vec y = (load(call.x + at, c - i) - middle) * by + plus;
                store(call.out + at, y < 0.f ? Vec{} : y, c - i);
            }
        }
    }
}

}  // namespace
