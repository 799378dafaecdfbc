// ../q_sample.py and ../q_sample_rows.py have the equations and the references.

#pragma once

#include "elements.h"

namespace {

struct QSampleCall {
    const void* data;       // [N, ...]: float32, or uint8 if `bytes`
    int64_t bytes;
    const int64_t* rows;    // of data [n], or null: all, and then
    const int64_t* given;   // t [n]; else t is drawn, and
    int64_t flip;           // half of the samples mirrored in the last axis
    const float* alpha_bars;
    int64_t timesteps;
    const int64_t *seed, *samples;
    float* x_t;
    int64_t* t;             // [n], written if it is drawn
    float* noise;           // or null
    int64_t n, area, channels, width;  // of the last axis

    Samples shape() const { return {n, area, channels}; }
};

inline int64_t q_sample_floats(const QSampleCall& call, int64_t) {
    const Samples s = call.shape();
    return s.floats() + (call.flip ? s.whole() ? s.numel() : s.pixels() * s.channels : 0);
}

// Elements [first, first + count) of a sample whose rows of pixels are mirrored.
template <class Value>
inline void mirror(const Value* data, const QSampleCall& call, int64_t first, int64_t count, Value* to) {
    int64_t pixel = first / call.channels;
    for (int64_t i = 0; i < count; i += call.channels, ++pixel) {
        const int64_t from = pixel + call.width - 1 - 2 * (pixel % call.width);
        for (int64_t c = 0; c < call.channels; ++c) to[i + c] = data[from * call.channels + c];
    }
}

template <class Value>
inline void q_sample_of(const QSampleCall& call, Worker& worker) {
    const Samples s = call.shape();
    const int64_t zero = 0;
    const Noise noise(*call.seed, call.samples, &zero, 0, TRAINING_NOISE, s.n, s.blocks());
    Value* mirrored = reinterpret_cast<Value*>(worker.memory + s.floats());
    const auto units = worker.share(s.units());
    const auto row_part = [&](int64_t row, int64_t first, int64_t count, const float* z) {
        const int64_t sample = call.samples[row];
        int64_t t = call.given ? call.given[row] : 0;
        if (!call.given) {
            t = 1 + int64_t(uint64_t(first_word(*call.seed, sample, TIMESTEP)) * call.timesteps >> 32);
            if (first == 0) call.t[row] = t;
        }
        const Value* x0 = static_cast<const Value*>(call.data) + (call.rows ? call.rows[row] : row) * s.numel();
        if (call.flip && first_word(*call.seed, sample, AUGMENTATION) >> 31) {
            mirror(x0, call, first, count, mirrored);
            x0 = mirrored;
        } else {
            x0 += first;
        }
        const float signal = std::sqrt(call.alpha_bars[t]), spread = std::sqrt(1.f - call.alpha_bars[t]);
        const int64_t start = row * s.numel() + first;
        in_vectors(count, [&](int64_t i, auto lanes) {
            const Vec eps = load(z + i, lanes);
            store(call.x_t + start + i, times(signal, load(x0 + i, lanes)) + times(spread, eps), lanes);
            if (call.noise) store(call.noise + start + i, eps, lanes);
        });
    };
    for (int64_t unit = units.first; unit < units.last; ++unit) in_rows(s, unit, &noise, worker.memory, row_part);
}

inline void q_sample(const QSampleCall& call, Worker& worker) {
    if (call.bytes) q_sample_of<uint8_t>(call, worker);
    else q_sample_of<float>(call, worker);
}

}  // namespace
