// ../solver_step.py has the equation and the reference.

#pragma once

#include "elements.h"

namespace {

struct SolverStepCall {
    float* x;               // overwritten, as x0_prev
    const float *m, *m_uncond;  // m_uncond: or null
    float* x0_prev;         // or null
    const float* table;     // [S, 8]
    const int64_t *index, *seed, *samples;
    const float* guidance;  // with m_uncond: at index * by_row + sample * by_sample
    int64_t by_row, by_sample;
    double clip;            // 0: none
    int64_t n, area, channels;

    Samples shape() const { return {n, area, channels}; }
};

inline int64_t solver_step_floats(const SolverStepCall& call, int64_t) { return call.shape().floats(); }

template <bool GUIDED, bool RECALLS, bool NOISY>
inline void steps(const SolverStepCall& call, Worker& worker, const float* c, const Noise* noise) {
    const Samples s = call.shape();
    const bool clips = call.clip > 0;
    const Vec bound = Vec{} + float(call.clip);
    const auto units = worker.share(s.units());
    for (int64_t unit = units.first; unit < units.last; ++unit) {
        in_rows(s, unit, noise, worker.memory, [&](int64_t row, int64_t first, int64_t count, const float* z) {
            const int64_t start = row * s.numel() + first;
            float *x = call.x + start, *previous = RECALLS ? call.x0_prev + start : nullptr;
            const float *m = call.m + start, *m_uncond = GUIDED ? call.m_uncond + start : nullptr;
            const float w = GUIDED ? call.guidance[*call.index * call.by_row + row * call.by_sample] : 1.f;
            in_vectors(count, [&](int64_t i, auto lanes) {
                const Vec old = load(x + i, lanes);
                Vec output = load(m + i, lanes);
                if (GUIDED) {
                    const Vec uncond = load(m_uncond + i, lanes);
                    output = uncond + times(w, output - uncond);
                }
                Vec x0 = times(c[0], old) + times(c[1], output);
                if (clips) x0 = least(bound, largest(x0, -bound));  // in this order NaN stays NaN
                Vec now = times(c[2], old) + times(c[3], x0) + times(c[4], output);
                if (RECALLS) {
                    now = now + times(c[5], load(previous + i, lanes));
                    store(previous + i, x0, lanes);
                }
                if (NOISY) now = now + times(c[6], load(z + i, lanes));
                store(x + i, now, lanes);
            });
        });
    }
}

inline void solver_step(const SolverStepCall& call, Worker& worker) {
    const float* c = call.table + *call.index * 8;
    const int64_t step = int64_t(c[7]);
    const bool noisy = c[6] != 0, guided = call.m_uncond, recalls = call.x0_prev;
    const Noise noise(*call.seed, call.samples, &step, 0, SAMPLING, call.n, std::max<int64_t>(call.shape().blocks(), 1));
    const auto run = [&](auto guides, auto remembers) {
        if (noisy) steps<guides, remembers, true>(call, worker, c, &noise);
        else steps<guides, remembers, false>(call, worker, c, nullptr);
    };
    const std::true_type yes;
    const std::false_type no;
    if (guided) recalls ? run(yes, yes) : run(yes, no);
    else recalls ? run(no, yes) : run(no, no);
}

}  // namespace
