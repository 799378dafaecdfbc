// Convolutions by the sum itself, for what winograd.h does not take: 1x1, and any number of channels.
//
// A row is a pixel; pixels outside are read from a pixel of zeros, so every tap is only another address. Wide outputs:
// vectors along output channels, packed [k / 32, taps, c, 32] and filled up with zeros. Few outputs: vectors along input
// channels, packed [k, taps, c filled up to a multiple of 16], and a sum of lanes at the end.

#pragma once

#include "epilogue.h"
#include "vectors.h"
#include "worker.h"

namespace {

constexpr int64_t WIDTH = 32;       // output channels that lie beside each other
constexpr int DIRECT = LANES / 2;   // rows that are summed at once with two vectors each: half of the registers
constexpr int NARROW = 4;           // rows that are summed at once with few outputs, and the most of these
constexpr int64_t FILLED = 16;      // channels of few outputs are a multiple of it
constexpr int64_t TAPS = 9;

// Images [.., h, w, c] and packed weights; null images: there is no such source.
struct Summand {
    const float *x, *weight;
    int64_t c;
};

// A convolution of n * copies images. All copies, one behind the other, share the n images of `skip`.
struct Summing {
    Summand x, skip;
    Epilogue after;
    int64_t n, copies, taps;

    int64_t pixels() const { return n * after.h * after.w; }
    int64_t panels() const { return split(after.k, WIDTH); }
    // Of scratch: a pixel of zeros, and addresses, each as long as two floats.
    int64_t floats() const {
        const int64_t addresses = (copies + 1) * TAPS * std::max(DIRECT, NARROW);
        return split(std::max(x.c, skip.c), LINE) * LINE + addresses * 2;
    }
};

// R pixels of the n images. Pooled, four neighbours that become one follow each other.
template <int R>
struct Rows {
    int64_t image[R], y[R], x[R], count;

    Rows(const Summing& of, int64_t first) : count(std::min<int64_t>(R, of.pixels() - first)) {
        const int64_t h = of.after.h, w = of.after.w;
        for (int64_t r = 0; r < R; ++r) {
            const int64_t m = first + std::min(r, count - 1);  // those beyond the last are it again
            image[r] = m / (h * w);
            const int64_t place = m % (h * w), cell = place / 4, corner = place % 4;
            const bool pooled = of.after.then == POOL;
            y[r] = pooled ? cell / (w / 2) * 2 + corner / 2 : place / w;
            x[r] = pooled ? cell % (w / 2) * 2 + corner % 2 : place % w;
        }
    }

    // Where each tap reads in the images of one copy: [taps, R].
    void addresses(const Summing& of, const Summand& from, int64_t copy, const float* outside, const float** at) const {
        const int64_t h = of.after.h, w = of.after.w;
        for (int64_t tap = 0; tap < of.taps; ++tap) {
            const int64_t dy = of.taps == 1 ? 0 : tap / 3 - 1, dx = of.taps == 1 ? 0 : tap % 3 - 1;
            for (int r = 0; r < R; ++r) {
                const int64_t py = y[r] + dy, px = x[r] + dx;
                const bool inside = py >= 0 && py < h && px >= 0 && px < w;
                const int64_t pixel = ((copy * of.n + image[r]) * h + py) * w + px;
                at[tap * R + r] = inside ? from.x + pixel * from.c : outside;
            }
        }
    }

    // Finish and store one vector of each pixel, of `lanes` channels.
    void put(const Epilogue& after, Vec (&v)[R], int64_t before, int64_t channel, int64_t lanes) const {
        if (image[0] == image[R - 1]) {
            int64_t pixel[R];
            for (int r = 0; r < R; ++r) pixel[r] = y[r] * after.w + x[r];
            after.finish(v, before + image[0], pixel, channel, lanes);
        } else {
            for (int r = 0; r < R; ++r) {
                Vec one[1] = {v[r]};
                const int64_t pixel[1] = {y[r] * after.w + x[r]};
                after.finish(one, before + image[r], pixel, channel, lanes);
                v[r] = one[0];
            }
        }
        const int64_t step = after.then == POOL ? 4 : 1;
        for (int64_t r = 0; r < count; r += step) {
            const Vec value = step == 1 ? v[r] : largest(largest(v[r], v[r + 1]), largest(v[r + 2], v[r + 3]));
            if (after.then == SPREAD) {
                after.spread(value, before + image[r], y[r], x[r], channel, lanes);
            } else {
                store(after.at(before + image[r], y[r], x[r], channel), value, lanes);
            }
        }
    }
};

// sums [R][W vectors] += the products of all taps. at [taps, R]; weight [taps, c, 32] from the wanted vectors on.
template <int R, int W>
inline void add_products(const float* const* at, const float* weight, int64_t taps, int64_t c, Vec (&sums)[R][W]) {
    for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from[R];
        for (int r = 0; r < R; ++r) from[r] = at[tap * R + r];
        for (int64_t i = 0; i < c; ++i, weight += WIDTH) {
            Vec right[W];
            for (int j = 0; j < W; ++j) right[j] = load(weight + j * LANES);
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < W; ++j) sums[r][j] += from[r][i] * right[j];
        }
    }
}

// W vectors of the channels from `channel`, of every copy. at: x's addresses of each copy, then those of the skip.
template <int W>
inline void sum_wide(const Summing& of, const Rows<DIRECT>& rows, const float* const* at, int64_t channel) {
    const int64_t panel = channel / WIDTH, offset = channel % WIDTH, step = of.taps * DIRECT;
    const auto weight = [&](const Summand& from) { return from.weight + panel * of.taps * from.c * WIDTH + offset; };
    Vec shared[DIRECT][W] = {};
    if (of.skip.x) add_products<DIRECT, W>(at + of.copies * step, weight(of.skip), of.taps, of.skip.c, shared);
    for (int64_t copy = 0; copy < of.copies; ++copy) {
        Vec sums[DIRECT][W];
        std::copy(&shared[0][0], &shared[0][0] + DIRECT * W, &sums[0][0]);
        add_products<DIRECT, W>(at + copy * step, weight(of.x), of.taps, of.x.c, sums);
        for (int j = 0; j < W; ++j) {
            Vec v[DIRECT];
            for (int r = 0; r < DIRECT; ++r) v[r] = sums[r][j];
            const int64_t from = channel + j * LANES;
            rows.put(of.after, v, copy * of.n, from, std::min<int64_t>(LANES, of.after.k - from));
        }
    }
}

// sums [R][K] += the products of all taps, lane by lane. weight [K, taps, filled].
template <int R, int K>
inline void add_dots(const float* const* at, const float* weight, int64_t taps, int64_t c, Vec (&sums)[R][K]) {
    const int64_t filled = split(c, FILLED) * FILLED;
    for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t i = 0; i < c; i += LANES) {
            Vec left[R];
            for (int r = 0; r < R; ++r) left[r] = load(at[tap * R + r] + i, c - i);
            for (int k = 0; k < K; ++k) {
                const Vec right = load(weight + (k * taps + tap) * filled + i);
                for (int r = 0; r < R; ++r) sums[r][k] += left[r] * right;
            }
        }
    }
}

// All K outputs of every copy.
template <int K>
inline void sum_narrow(const Summing& of, const Rows<NARROW>& rows, const float* const* at) {
    const int64_t step = of.taps * NARROW;
    Vec shared[NARROW][K] = {};
    if (of.skip.x) add_dots<NARROW, K>(at + of.copies * step, of.skip.weight, of.taps, of.skip.c, shared);
    for (int64_t copy = 0; copy < of.copies; ++copy) {
        Vec sums[NARROW][K], v[NARROW];
        std::copy(&shared[0][0], &shared[0][0] + NARROW * K, &sums[0][0]);
        add_dots<NARROW, K>(at + copy * step, of.x.weight, of.taps, of.x.c, sums);
        for (int r = 0; r < NARROW; ++r) {
            float values[LANES] = {};
            for (int k = 0; k < K; ++k) values[k] = total(sums[r][k]);
            v[r] = load(values);
        }
        rows.put(of.after, v, copy * of.n, 0, K);
    }
}

// R pixels from `first` on with the addresses of all that they read, in `memory`.
template <int R>
struct Reading {
    Rows<R> rows;
    const float** at;

    Reading(const Summing& of, int64_t first, float* memory)
        : rows(of, first),
          at(reinterpret_cast<const float**>(memory + split(std::max(of.x.c, of.skip.c), LINE) * LINE)) {
        for (int64_t copy = 0; copy < of.copies; ++copy) {
            rows.addresses(of, of.x, copy, memory, at + copy * of.taps * R);
        }
        if (of.skip.x) rows.addresses(of, of.skip, 0, memory, at + of.copies * of.taps * R);
    }
};

// DIRECT pixels from `first` on, in the output channels [from, to).
inline void wide_rows(const Summing& of, int64_t first, int64_t from, int64_t to, float* memory) {
    const Reading<DIRECT> reading(of, first, memory);
    for (int64_t channel = from; channel < to; channel += 2 * LANES) {
        if (to - channel > LANES) {
            sum_wide<2>(of, reading.rows, reading.at, channel);
        } else {
            sum_wide<1>(of, reading.rows, reading.at, channel);
        }
    }
}

// NARROW pixels from `first` on, of up to NARROW outputs.
inline void narrow_rows(const Summing& of, int64_t first, float* memory) {
    const Reading<NARROW> reading(of, first, memory);
    if (of.after.k == 1) return sum_narrow<1>(of, reading.rows, reading.at);
    if (of.after.k == 2) return sum_narrow<2>(of, reading.rows, reading.at);
    if (of.after.k == 3) return sum_narrow<3>(of, reading.rows, reading.at);
    sum_narrow<4>(of, reading.rows, reading.at);
}

// This thread's share of a convolution.
inline void sum_share(const Summing& of, bool narrow, const Worker& worker) {
    std::fill_n(worker.memory, std::max(of.x.c, of.skip.c), 0.f);
    if (narrow) {
        const auto own = worker.share(of.pixels(), NARROW);
        for (int64_t first = own.first; first < own.last; first += NARROW) narrow_rows(of, first, worker.memory);
        return;
    }
    const int64_t blocks = split(of.pixels(), DIRECT), panels = of.panels();
    // Few rows: their output channels are split, so that no thread reads all weights for little work.
    const int64_t parts = blocks < 4 * worker.threads ? panels : 1;
    const auto own = worker.share(parts * blocks);
    for (int64_t work = own.first; work < own.last; ++work) {
        const int64_t part = work / blocks, from = panels * part / parts * WIDTH, to = panels * (part + 1) / parts * WIDTH;
        wide_rows(of, work % blocks * DIRECT, from, std::min(to, of.after.k), worker.memory);
    }
}

}  // namespace
