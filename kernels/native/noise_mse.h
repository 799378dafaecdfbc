// ../noise_mse.py has the equations and the reference.

#pragma once

#include "elements.h"

namespace {

struct NoiseMseCall {
    const float* pred;
    const int64_t *seed, *samples;
    const float* weight;  // [n] or null
    const float* grad;    // of the loss: out is the gradient [n, ...]; null: out is the loss
    float* out;
    int64_t n, area, channels;

    Samples shape() const { return {n, area, channels}; }
};

// A double for each unit: their sums are added in one order, however many threads there are.
inline int64_t noise_mse_floats(const NoiseMseCall& call, int64_t) {
    return call.shape().floats() + (call.grad ? 0 : 2 * (call.shape().units() + 1));
}

inline double* sums_of(const NoiseMseCall& call, float* memory) {
    return reinterpret_cast<double*>(memory + split(call.shape().floats(), 2) * 2);
}

// The sum of (pred - eps)^2.
inline double squares(const float* pred, const float* z, int64_t count) {
    Vec sums[4] = {};
    in_vectors(count, [&](int64_t i, auto lanes) {
        const Vec error = load(pred + i, lanes) - load(z + i, lanes);
        Vec& sum = sums[i / LANES % 4];
        sum = fused(error, error, sum);
    });
    return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline void noise_mse(const NoiseMseCall& call, Worker& worker) {
    const Samples s = call.shape();
    const int64_t zero = 0;
    const Noise noise(*call.seed, call.samples, &zero, 0, TRAINING_NOISE, s.n, s.blocks());
    const float scale = call.grad ? *call.grad * 2.f / float(s.n * s.numel()) : 0.f;
    double* sums = sums_of(call, worker.memory);
    const auto units = worker.share(s.units());
    for (int64_t unit = units.first; unit < units.last; ++unit) {
        double sum = 0;
        in_rows(s, unit, &noise, worker.memory, [&](int64_t row, int64_t first, int64_t count, const float* z) {
            const float weight = call.weight ? call.weight[row] : 1.f;
            const int64_t start = row * s.numel() + first;
            const float* pred = call.pred + start;
            if (!call.grad) {
                sum += weight * squares(pred, z, count);
                return;
            }
            in_vectors(count, [&](int64_t i, auto lanes) {
                store(call.out + start + i, times(weight, times(scale, load(pred + i, lanes) - load(z + i, lanes))), lanes);
            });
        });
        if (!call.grad) sums[unit - units.first] = sum;
    }
    if (call.grad) return;
    worker.barrier();
    if (worker.thread) return;
    double total = 0;
    for (int64_t thread = 0; thread < worker.threads; ++thread) {
        Worker other = worker;
        other.thread = thread;
        const auto theirs = other.share(s.units());
        const double* sum = sums_of(call, worker.memory_of(thread));
        for (int64_t i = 0; i < theirs.last - theirs.first; ++i) total += sum[i];
    }
    *call.out = float(total / double(s.n * s.numel()));
}

}  // namespace
