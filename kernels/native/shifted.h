// ../shifted.py has the equation and this operator's reference. Images are NHWC, float32.

#pragma once

#include "vectors.h"
#include "worker.h"

namespace {

// x [n, area, c], shift [copies, shift_rows, c] with n rows or one -> out [copies, n, area, c].
struct ShiftedCall {
    const float *x, *shift;
    float* out;
    int64_t copies, n, area, c, shift_rows;
};

inline int64_t shifted_floats(const ShiftedCall&, int64_t) { return 0; }

inline void shifted(const ShiftedCall& call, Worker& worker) {
    const int64_t pixels = call.n * call.area;
    const auto own = worker.share(call.copies * pixels);
    for (int64_t i = own.first; i < own.last; ++i) {
        const int64_t copy = i / pixels, pixel = i % pixels, image = pixel / call.area;
        const float* from = call.x + pixel * call.c;
        const float* plus = call.shift + (copy * call.shift_rows + (call.shift_rows > 1 ? image : 0)) * call.c;
        for (int64_t c = 0; c < call.c; c += LANES) {
            store(call.out + i * call.c + c, load(from + c, call.c - c) + load(plus + c, call.c - c), call.c - c);
        }
    }
}

}  // namespace
