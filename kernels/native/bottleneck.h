// ../bottleneck.py has the equations and this operator's reference. Images are NHWC, float32.
//
// Weights are read as they lie, [c, area * c], by strips of columns that stay in the second cache for all images.

#pragma once

#include <cmath>

#include "vectors.h"
#include "worker.h"

namespace {

constexpr int64_t FOUR = 4;  // images that a strip's weights are multiplied with at once; untuned

// x [n, area, c] -> out [copies, n, area, c]; scale [copies, n or 1, c] or null, shift [n or 1, c].
struct BottleneckCall {
    const float *x, *up_weight, *up_bias, *norm_weight, *norm_bias, *scale, *shift;
    float* out;
    int64_t n, area, c, groups, copies, scale_rows, shift_rows;
    double eps;

    int64_t group() const { return c / groups; }
    int64_t columns() const { return area * c; }
    int64_t up_floats() const { return split(n * columns(), LINE) * LINE; }
};

// All products in the first thread's memory; behind them each thread's pooled features and one group.
inline int64_t bottleneck_floats(const BottleneckCall& call, int64_t) {
    return call.up_floats() + call.n * call.c + call.area * call.group();
}

// GELU of the mean over pixels: [area, c] -> [c].
inline void pool(const BottleneckCall& call, const float* x, float* pooled) {
    for (int64_t i = 0; i < call.c; i += LANES) {
        Vec sum = {};
        for (int64_t p = 0; p < call.area; ++p) sum += load(x + p * call.c + i, call.c - i);
        store(pooled + i, gelu(sum / float(call.area)), call.c - i);
    }
}

// V vectors of up [R, columns] = pooled [R, c] weight [c, columns], of which the last may have fewer lanes.
template <int R, int V>
inline void product(const BottleneckCall& call, const float* pooled, const float* weight, float* up, int64_t lanes) {
    Vec sums[R][V] = {};
    for (int64_t k = 0; k < call.c; ++k) {
        for (int j = 0; j < V; ++j) {
            const float* from = weight + k * call.columns() + j * LANES;
            const Vec right = V > 1 ? load(from) : load(from, lanes);
            for (int r = 0; r < R; ++r) sums[r][j] += pooled[r * call.c + k] * right;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < V; ++j) store(up + r * call.columns() + j * LANES, sums[r][j], V > 1 ? LANES : lanes);
}

// R images in the columns [from, to).
template <int R, int V>
inline void product_strip(const BottleneckCall& call, const float* pooled, float* up, int64_t from, int64_t to) {
    int64_t i = from;
    for (; i + V * LANES <= to; i += V * LANES) product<R, V>(call, pooled, call.up_weight + i, up + i, LANES);
    for (; i < to; i += LANES) product<R, 1>(call, pooled, call.up_weight + i, up + i, to - i);
}

// Bias, GroupNorm, ReLU and FiLM of the group from channel `first` of an image, to every copy. own: [area, group].
inline void normalise(const BottleneckCall& call, const float* up, int64_t image, int64_t first, float* own) {
    const int64_t group = call.group(), count = call.area * group;
    for (int64_t p = 0; p < call.area; ++p) {
        for (int64_t c = 0; c < group; ++c) own[p * group + c] = up[p * call.c + first + c] + call.up_bias[first + c];
    }
    Vec sum = {}, squares = {};
    for (int64_t i = 0; i < count; i += LANES) sum += load(own + i, count - i);
    const float mean = total(sum) / float(count);
    for (int64_t i = 0; i < count; i += LANES) {
        store(own + i, load(own + i, count - i) - mean, count - i);
        const Vec apart = load(own + i, count - i);
        squares += apart * apart;
    }
    const float scaling = float(1 / std::sqrt(total(squares) / double(count) + call.eps));
    const float* shift = call.shift + (call.shift_rows > 1 ? image * call.c : 0) + first;
    const float *weight = call.norm_weight + first, *bias = call.norm_bias + first;
    for (int64_t copy = 0; copy < call.copies; ++copy) {
        const int64_t row = copy * call.scale_rows + (call.scale_rows > 1 ? image : 0);
        const float* scale = call.scale ? call.scale + row * call.c + first : nullptr;
        for (int64_t p = 0; p < call.area; ++p) {
            float* to = call.out + ((copy * call.n + image) * call.area + p) * call.c + first;
            for (int64_t c = 0; c < group; ++c) {
                const float y = own[p * group + c] * (scaling * weight[c]) + bias[c], positive = y < 0 ? 0 : y;
                to[c] = (scale ? scale[c] * positive : positive) + shift[c];
            }
        }
    }
}

inline void bottleneck(const BottleneckCall& call, Worker& worker) {
    constexpr int64_t STRIP = LANES * LANES;  // columns
    float *up = worker.memory_of(0), *pooled = worker.memory + call.up_floats(), *own = pooled + call.n * call.c;
    // Few images: the threads share the columns, so that none reads all weights for little work.
    const bool few = call.n < FOUR * worker.threads;
    const auto images = few ? Worker::Range{0, call.n} : worker.share(call.n);
    const auto columns = few ? worker.share(call.columns(), LANES) : Worker::Range{0, call.columns()};
    for (int64_t i = images.first; i < images.last; ++i) pool(call, call.x + i * call.columns(), pooled + i * call.c);
    for (int64_t from = columns.first; from < columns.last; from += STRIP) {
        const int64_t to = std::min(from + STRIP, columns.last);
        int64_t i = images.first;
        for (; i + FOUR <= images.last; i += FOUR) {
            product_strip<FOUR, LANES / 4>(call, pooled + i * call.c, up + i * call.columns(), from, to);
        }
        for (; i < images.last; ++i) {
            product_strip<1, LANES>(call, pooled + i * call.c, up + i * call.columns(), from, to);
        }
    }
    worker.barrier();
    const auto work = worker.share(call.n * call.groups);
    for (int64_t i = work.first; i < work.last; ++i) {
        const int64_t image = i / call.groups, first = i % call.groups * call.group();
        normalise(call, up + image * call.columns(), image, first, own);
    }
}

}  // namespace
