// What follows a convolution before it is stored: bias, GELU, FiLM, a sum, a change of shape (../convolution.py).

#pragma once

#include "vectors.h"
#include "worker.h"

namespace {

// Rows of a product, pixels or tiles, that are summed at once in two vectors each: eight chains hide the latency of two
// FMA units, and leave registers for as many totals. Twice as many are no faster (Zen 4).
constexpr int ROWS = 4;

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
            const int64_t all = first_image + image, own = all < onto_images ? all : all % onto_images;
            const float* from = onto + own * h * w * k + channel;
            for (int i = 0; i < COUNT; ++i) v[i] += of(from + pixel[i] * k);
        }
    }

    // Where what becomes of the pixel (y, x) goes.
    float* at(int64_t image, int64_t y, int64_t x, int64_t channel) const {
        if (then == SPREAD) return out + ((image * h + y) * w * 2 + x) * 2 * (k / 4) + channel;
        const int half = then == POOL ? 1 : 0;  // as shifts: divisions take longer than the store
        return out + ((image * (h >> half) + (y >> half)) * (w >> half) + (x >> half)) * k + channel;
    }
};

// Channels (dy, dx, c) of a pixel become c of 2x2 pixels: where `lanes` channels from `channel` on go.
struct Spread {
    int64_t own = 1, line = 0, channel = 0, lanes = 0;  // channels of a pixel and of a row of the result
    int64_t whole = 0;  // where the vector goes, from the first of the 2x2 pixels; -1: in parts

    Spread() = default;
    Spread(const Epilogue& after, int64_t channel, int64_t lanes)
        : own(after.k / 4), line(2 * after.w * own), channel(channel), lanes(lanes) {
        whole = channel / own == (channel + lanes - 1) / own ? place(channel) : -1;
    }

    int64_t place(int64_t of) const {
        const int64_t part = of / own;
        return part / 2 * line + part % 2 * own + of % own;
    }

    // to: the first of the 2x2 pixels.
    void put(Vec v, float* to) const {
        if (whole >= 0) return lanes < LANES ? store(to + whole, v, lanes) : store(to + whole, v);
        float values[LANES];
        store(values, v);
        for (int64_t i = 0; i < lanes; ++i) to[place(channel + i)] = values[i];
    }
};

}  // namespace
