#include "elements.h"

namespace {

struct PhiloxCall {
    const int64_t *seed, *samples, *steps;
    int64_t step_stride;  // 1: a step for each sample, 0: one for all
    int64_t stream;
    void* out;            // [n, numel]: normals, float32, or words, int64
    int64_t normals, n, numel;

    Samples shape() const { return {n, numel, 1}; }
};

int64_t philox_floats(const PhiloxCall& call, int64_t) { return call.shape().floats(); }

void philox(const PhiloxCall& call, Worker& worker) {
    const Samples s = call.shape();
    const Noise noise(*call.seed, call.samples, call.steps, call.step_stride, call.stream, s.n, s.blocks());
    const auto units = worker.share(s.units());
    for (int64_t unit = units.first; unit < units.last; ++unit) {
        if (call.normals) {
            in_rows(s, unit, &noise, worker.memory, [&](int64_t row, int64_t first, int64_t count, const float* z) {
                std::copy_n(z, count, static_cast<float*>(call.out) + row * call.numel + first);
            });
        } else {
            in_rows<false>(s, unit, &noise, worker.memory, [&](int64_t row, int64_t first, int64_t count, const float* z) {
                int64_t* to = static_cast<int64_t*>(call.out) + row * call.numel + first;
                for (int64_t i = 0; i < count; ++i) {
                    uint32_t word;
                    std::memcpy(&word, z + i, sizeof word);
                    to[i] = word;
                }
            });
        }
    }
}

}  // namespace

NATIVE_OPERATOR(philox, PhiloxCall)
