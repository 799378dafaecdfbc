// What follows a convolution before it is stored: bias, GELU, FiLM, a sum, a change of shape (../convolution.py).

#pragma once

#include <cstring>

#include "vectors.h"
#include "worker.h"

namespace {

enum Then : int64_t { KEEP, POOL, SPREAD };

// Every pointer but `out` may be null. Images are NHWC with k channels and h x w pixels before the change of shape.
struct Epilogue {
    const float* bias;                   // [k]
    const float *scale, *shift;          // [rows, k], a row for each image or one for all
    const float* onto;                   // [onto_images, h, w, k], whose images repeat
    float* out;
    int64_t k, h, w, scale_rows, shift_rows, onto_images;
    bool gelu;
    Then then;
    int64_t first_image = 0;  // what the first image is to `onto`

    // COUNT vectors of the channels from `channel`, `lanes` of them, each of a pixel of the image.
    template <int COUNT>
    void finish(Vec (&v)[COUNT], int64_t image, const int64_t (&pixel)[COUNT], int64_t channel, int64_t lanes) const {
        const auto of = [&](const float* from) { return lanes >= LANES ? load(from) : load(from, lanes); };
        if (bias) {
            const Vec plus = of(bias + channel);
            for (int i = 0; i < COUNT; ++i) v[i] += plus;
        }
        if (gelu) {
            for (int i = 0; i < COUNT; ++i) v[i] = ::gelu(v[i]);
        }
        if (scale) {
            const Vec by = of(scale + (scale_rows > 1 ? image * k : 0) + channel);
            for (int i = 0; i < COUNT; ++i) v[i] *= by;
        }
        if (shift) {
            const Vec plus = of(shift + (shift_rows > 1 ? image * k : 0) + channel);
            for (int i = 0; i < COUNT; ++i) v[i] += plus;
        }
        if (onto) {
            const float* from = onto + (first_image + image) % onto_images * h * w * k + channel;
            for (int i = 0; i < COUNT; ++i) v[i] += of(from + pixel[i] * k);
        }
    }

    // Where a finished vector goes that is kept, or that is the maximum of the pixels around (y, x).
    float* at(int64_t image, int64_t y, int64_t x, int64_t channel) const {
        const int64_t side = then == POOL ? 2 : 1;
        return out + ((image * (h / side) + y / side) * (w / side) + x / side) * k + channel;
    }

    // Channels (dy, dx, c) of a pixel become c of 2x2 pixels.
    void spread(Vec v, int64_t image, int64_t y, int64_t x, int64_t channel, int64_t lanes) const {
        const int64_t own = k / 4;
        float values[LANES];
        store(values, v);
        for (int64_t done = 0; done < lanes;) {
            const int64_t part = (channel + done) / own, c = (channel + done) % own;
            const int64_t count = std::min(lanes - done, own - c);
            float* to = out + ((image * 2 * h + 2 * y + part / 2) * 2 * w + 2 * x + part % 2) * own + c;
            std::memcpy(to, values + done, count * sizeof(float));
            done += count;
        }
    }
};

}  // namespace
