// ../guidance_rescale.py has the equations and the reference.

#pragma once

#include "elements.h"

namespace {

struct GuidanceRescaleCall {
    const float *m, *m_uncond, *guidance;
    int64_t by_sample;     // guidance is one for all if it is 0, one for each if it is 1
    const float* rescale;
    float* out;
    int64_t n, numel;
};

inline int64_t guidance_rescale_floats(const GuidanceRescaleCall&, int64_t) { return 0; }

// What is left of a vector of which these lanes are elements.
inline Vec only(Vec value, Whole) { return value; }
inline Vec only(Vec value, int64_t count) {
    float part[LANES];
    store(part, value);
    return load(part, count);
}

// The sum of value(i, count) over all elements: in float over groups, their sums in double.
template <class Value>
inline double sum_of(int64_t numel, Value value) {
    constexpr int64_t GROUP = 16 * LANES;
    double sum = 0;
    for (int64_t start = 0; start < numel; start += GROUP) {
        Vec part = {};
        in_vectors(std::min(GROUP, numel - start), [&](int64_t i, auto count) {
            part += only(value(start + i, count), count);
        });
        sum += total(part);
    }
    return sum;
}

// The root of the mean square of an output's distance from its mean; 0 exactly where all elements are the same.
template <class Value>
inline double deviation(int64_t numel, Value value) {
    const float first = value(0, int64_t(1))[0];
    const double mean = sum_of(numel, [&](int64_t i, auto count) { return value(i, count) - first; }) / double(numel);
    const float middle = float(mean);
    const double squares = sum_of(numel, [&](int64_t i, auto count) {
        const Vec apart = value(i, count) - first - middle;
        return apart * apart;
    });
    return std::sqrt(squares / double(numel));
}

inline void guidance_rescale(const GuidanceRescaleCall& call, Worker& worker) {
    const auto rows = worker.share(call.n);
    const float phi = *call.rescale;
    for (int64_t row = rows.first; row < rows.last; ++row) {
        const float *m = call.m + row * call.numel, *m_uncond = call.m_uncond + row * call.numel;
        const float w = call.guidance[row * call.by_sample];
        const auto guided = [&](int64_t i, auto count) {
            const Vec uncond = load(m_uncond + i, count);
            return uncond + times(w, load(m + i, count) - uncond);
        };
        const auto conditional = [&](int64_t i, auto count) { return load(m + i, count); };
        const double spread = deviation(call.numel, guided);
        const float ratio = spread > 0 ? float(deviation(call.numel, conditional) / spread) : 1.f;
        const float factor = phi * ratio + (1.f - phi);
        float* out = call.out + row * call.numel;
        in_vectors(call.numel, [&](int64_t i, auto count) { store(out + i, times(factor, guided(i, count)), count); });
    }
}

}  // namespace
