// ../convolution.py has the equations and this operator's reference. Images are NHWC, float32.

#pragma once

#include "direct.h"
#include "winograd.h"
#include "worker.h"

namespace {

enum Kind : int64_t { SUMS, WINOGRAD, FEW };

// x [n, h, w, c], skip [skip_images, h, w, skip_c] or null, onto [onto_images, h, w, k] or null, both of whose images
// repeat; weights of either as the kind has them packed. bias [k], scale and shift [rows, k], each or null.
struct ConvolutionCall {
    const float *x, *weight, *bias, *skip, *skip_weight, *scale, *shift, *onto;
    float* out;
    int64_t n, h, w, c, skip_c, k, taps, kind, skip_images, onto_images, scale_rows, shift_rows, gelu, then;

    int64_t images() const { return skip ? skip_images : n; }
    Epilogue after() const {
        return {bias, scale, shift, onto, out, k, h, w, scale_rows, shift_rows, onto_images, gelu != 0, Then(then)};
    }
    Convolving convolving() const {
        return {{x, weight, c}, {skip, skip_weight, skip_c}, after(), {images(), h, w}, n / images()};
    }
    Summing summing() const {
        return {{x, weight, c}, {skip, skip_weight, skip_c}, after(), images(), n / images(), taps};
    }
};

inline int64_t convolution_floats(const ConvolutionCall& call, int64_t) {
    return call.kind == WINOGRAD ? convolve_floats(call.convolving()) : call.summing().floats();
}

inline void convolution(const ConvolutionCall& call, Worker& worker) {
    if (call.kind == WINOGRAD) {
        convolve_share(call.convolving(), worker);
    } else {
        sum_share(call.summing(), call.kind == FEW, worker);
    }
}

}  // namespace
