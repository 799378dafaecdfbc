// ../placed.py says what this does. Images are NHWC, float32.

#pragma once

#include "worker.h"

namespace {

// x [n, h, w, c] -> out [n, out_h, out_w, c], whose pixel (top, left) is x's first one; zeros where x is not.
struct PlacedCall {
    const float* x;
    float* out;
    int64_t n, h, w, c, out_h, out_w, top, left;
};

inline int64_t placed_floats(const PlacedCall&, int64_t) { return 0; }

inline void placed(const PlacedCall& call, Worker& worker) {
    const auto own = worker.share(call.n * call.out_h);
    // Of an output row: where x begins and ends.
    const int64_t first = std::clamp<int64_t>(call.left, 0, call.out_w);
    const int64_t last = std::clamp<int64_t>(call.left + call.w, first, call.out_w);
    for (int64_t row = own.first; row < own.last; ++row) {
        const int64_t image = row / call.out_h, y = row % call.out_h - call.top;
        float* to = call.out + row * call.out_w * call.c;
        const bool inside = y >= 0 && y < call.h;
        const int64_t from = inside ? first : call.out_w, until = inside ? last : call.out_w;
        std::fill_n(to, from * call.c, 0.f);
        if (inside) {
            const float* source = call.x + ((image * call.h + y) * call.w + first - call.left) * call.c;
            std::copy_n(source, (until - from) * call.c, to + from * call.c);
        }
        std::fill_n(to + until * call.c, (call.out_w - until) * call.c, 0.f);
    }
}

}  // namespace
