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
constexpr int64_t GROUP = 32;       // rows that weights are read for at once, from the first cache; untuned
constexpr int64_t FEW_PIXELS = 64;  // for each thread, below which threads split outputs; untuned
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
    int64_t widest() const { return split(std::max(x.c, skip.c), LINE) * LINE; }
    // Of scratch: a pixel of zeros, and addresses, each as long as two floats.
    int64_t floats() const { return widest() + (copies + 1) * TAPS * GROUP * 2; }
};

// ROWS pixels of the n images. Pooled, four neighbours that become one follow each other.
struct Rows {
    int64_t image[ROWS], y[ROWS], x[ROWS], count;

    void start(const Summing& of, int64_t first) {
        count = std::min<int64_t>(ROWS, of.pixels() - first);
        const int64_t side = of.after.then == POOL ? 2 : 1, corners = side * side;
        const int64_t down = of.after.h / side, across = of.after.w / side, cell = first / corners;
        int64_t place = cell / (down * across), cy = cell / across % down, cx = cell % across;
        for (int64_t r = 0; r < ROWS; ++r) {
            image[r] = place, y[r] = cy * side + r % corners / side, x[r] = cx * side + r % corners % side;
            // Those beyond the last are it, or its neighbours, again.
            if ((r + 1) % corners || r + 1 >= count) continue;
            if (++cx == across) cx = 0, ++cy;
            if (cy == down) cy = 0, ++place;
        }
    }

    // Where each tap reads in the images of one copy: [taps, ROWS].
    void addresses(const Summing& of, const Summand& from, int64_t copy, const float* outside, const float** at) const {
        const int64_t h = of.after.h, w = of.after.w, reach = of.taps == 1 ? 0 : 1;
        for (int r = 0; r < ROWS; ++r) {
            const float* middle = from.x + (((copy * of.n + image[r]) * h + y[r]) * w + x[r]) * from.c;
            for (int64_t dy = -reach, tap = 0; dy <= reach; ++dy) {
                const bool inside = uint64_t(y[r] + dy) < uint64_t(h);
                for (int64_t dx = -reach; dx <= reach; ++dx, ++tap) {
                    const bool there = inside && uint64_t(x[r] + dx) < uint64_t(w);
                    at[tap * ROWS + r] = there ? middle + (dy * w + dx) * from.c : outside;
                }
            }
        }
    }

    // Finish and store one vector of each pixel, of `lanes` channels.
    void put(const Epilogue& after, Vec (&v)[ROWS], int64_t before, int64_t channel, int64_t lanes) const {
        if (image[0] == image[ROWS - 1]) {
            int64_t pixel[ROWS];
            for (int r = 0; r < ROWS; ++r) pixel[r] = y[r] * after.w + x[r];
            after.finish(v, before + image[0], pixel, channel, lanes);
        } else {
            for (int r = 0; r < ROWS; ++r) {
                Vec one[1] = {v[r]};
                const int64_t pixel[1] = {y[r] * after.w + x[r]};
                after.finish(one, before + image[r], pixel, channel, lanes);
                v[r] = one[0];
            }
        }
        if (after.then == SPREAD) {
            const Spread spread(after, channel, lanes);
            for (int64_t r = 0; r < count; ++r) spread.put(v[r], before + image[r], y[r], x[r]);
            return;
        }
        const int64_t step = after.then == POOL ? 4 : 1;
        for (int64_t r = 0; r < count; r += step) {
            const Vec value = step == 1 ? v[r] : largest(largest(v[r], v[r + 1]), largest(v[r + 2], v[r + 3]));
            float* to = after.at(before + image[r], y[r], x[r], channel);
            lanes < LANES ? store(to, value, lanes) : store(to, value);
        }
    }
};

// to [ROWS][W vectors] = from (null: zeros) + the products of all taps. at [taps, ROWS]; weight [taps, c, 32] from the
// wanted vectors on. A function of its own, so that addresses have registers: inlined, GCC 12 moves them to vectors and
// back.
template <int W>
__attribute__((noinline)) void add_products(const float* const* at, const float* weight, int64_t taps, int64_t c,
                                            const Vec (*from)[W], Vec (*to)[W]) {
    Vec sums[ROWS][W];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < W; ++j) sums[r][j] = from ? from[r][j] : Vec{};
    for (int64_t tap = 0; tap < taps; ++tap) {
        const float* pixels[ROWS];
        for (int r = 0; r < ROWS; ++r) pixels[r] = at[tap * ROWS + r];
        for (int64_t i = 0; i < c; ++i, weight += WIDTH) {
            Vec right[W];
            for (int j = 0; j < W; ++j) right[j] = load(weight + j * LANES);
            for (int r = 0; r < ROWS; ++r)
                for (int j = 0; j < W; ++j) sums[r][j] += pixels[r][i] * right[j];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < W; ++j) to[r][j] = sums[r][j];
}

// W vectors of the channels from `channel`, of every copy. at: x's addresses of each copy, then those of the skip.
template <int W>
inline void sum_wide(const Summing& of, const Rows& rows, const float* const* at, int64_t channel) {
    const int64_t panel = channel / WIDTH, offset = channel % WIDTH, step = of.taps * ROWS;
    const auto add = [&](const Summand& to_add, const float* const* read, const Vec(*from)[W], Vec(*to)[W]) {
        const float* weight = to_add.weight + panel * of.taps * to_add.c * WIDTH + offset;
        add_products<W>(read, weight, of.taps, to_add.c, from, to);
    };
    Vec shared[ROWS][W], sums[ROWS][W];
    if (of.skip.x) add(of.skip, at + of.copies * step, nullptr, shared);
    for (int64_t copy = 0; copy < of.copies; ++copy) {
        add(of.x, at + copy * step, of.skip.x ? shared : nullptr, sums);
        for (int j = 0; j < W; ++j) {
            Vec v[ROWS];
            for (int r = 0; r < ROWS; ++r) v[r] = sums[r][j];
            const int64_t from = channel + j * LANES;
            rows.put(of.after, v, copy * of.n, from, std::min<int64_t>(LANES, of.after.k - from));
        }
    }
}

// to [ROWS][K] = from (null: zeros) + the products of all taps, lane by lane. weight [K, taps, filled].
template <int K>
__attribute__((noinline)) void add_dots(const float* const* at, const float* weight, int64_t taps, int64_t c,
                                        const Vec (*from)[K], Vec (*to)[K]) {
    const int64_t filled = split(c, FILLED) * FILLED;
    Vec sums[ROWS][K];
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < K; ++k) sums[r][k] = from ? from[r][k] : Vec{};
    for (int64_t tap = 0; tap < taps; ++tap, weight += filled) {
        const float* pixels[ROWS];
        for (int r = 0; r < ROWS; ++r) pixels[r] = at[tap * ROWS + r];
        int64_t i = 0;
        const auto add = [&](auto read) {
            Vec right[K];
            for (int k = 0; k < K; ++k) right[k] = load(weight + k * taps * filled + i);
            for (int r = 0; r < ROWS; ++r) {
                const Vec left = read(pixels[r] + i);
                for (int k = 0; k < K; ++k) sums[r][k] += left * right[k];
            }
        };
        for (; i + LANES <= c; i += LANES) add([](const float* at_once) { return load(at_once); });
        if (i < c) add([&](const float* last) { return load(last, c - i); });
    }
    for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < K; ++k) to[r][k] = sums[r][k];
}

// All K outputs of every copy.
template <int K>
inline void sum_narrow(const Summing& of, const Rows& rows, const float* const* at) {
    const int64_t step = of.taps * ROWS;
    Vec shared[ROWS][K], sums[ROWS][K], v[ROWS];
    if (of.skip.x) {
        add_dots<K>(at + of.copies * step, of.skip.weight, of.taps, of.skip.c, nullptr, shared);
    }
    for (int64_t copy = 0; copy < of.copies; ++copy) {
        add_dots<K>(at + copy * step, of.x.weight, of.taps, of.x.c, of.skip.x ? shared : nullptr, sums);
        for (int r = 0; r < ROWS; ++r) {
            float values[LANES] = {};
            for (int k = 0; k < K; ++k) values[k] = total(sums[r][k]);
            v[r] = load(values);
        }
        rows.put(of.after, v, copy * of.n, 0, K);
    }
}

// ROWS pixels from `first` on with the addresses of all that they read, in the `slot`th part of `memory`.
struct Reading {
    Rows rows;
    const float** at;

    void start(const Summing& of, int64_t first, float* memory, int64_t slot) {
        rows.start(of, first);
        at = reinterpret_cast<const float**>(memory + of.widest()) + slot * (of.copies + 1) * of.taps * ROWS;
        for (int64_t copy = 0; copy < of.copies; ++copy) {
            rows.addresses(of, of.x, copy, memory, at + copy * of.taps * ROWS);
        }
        if (of.skip.x) rows.addresses(of, of.skip, 0, memory, at + of.copies * of.taps * ROWS);
    }
};

// Pixels [first, last), at most GROUP, in the output channels [from, to): weights are read once for all of them.
inline void wide_rows(const Summing& of, int64_t first, int64_t last, int64_t from, int64_t to, float* memory) {
    Reading readings[GROUP / ROWS];
    const int64_t count = split(last - first, ROWS);
    for (int64_t i = 0; i < count; ++i) readings[i].start(of, first + i * ROWS, memory, i);
    for (int64_t channel = from; channel < to; channel += 2 * LANES) {
        for (int64_t i = 0; i < count; ++i) {
            if (to - channel > LANES) {
                sum_wide<2>(of, readings[i].rows, readings[i].at, channel);
            } else {
                sum_wide<1>(of, readings[i].rows, readings[i].at, channel);
            }
        }
    }
}

// ROWS pixels from `first` on, of up to four outputs.
inline void narrow_rows(const Summing& of, int64_t first, float* memory) {
    Reading reading;
    reading.start(of, first, memory, 0);
    if (of.after.k == 1) return sum_narrow<1>(of, reading.rows, reading.at);
    if (of.after.k == 2) return sum_narrow<2>(of, reading.rows, reading.at);
    if (of.after.k == 3) return sum_narrow<3>(of, reading.rows, reading.at);
    sum_narrow<4>(of, reading.rows, reading.at);
}

// This thread's share of a convolution.
inline void sum_share(const Summing& of, bool narrow, const Worker& worker) {
    std::fill_n(worker.memory, of.widest(), 0.f);
    const int64_t pixels = of.pixels(), panels = of.panels();
    if (narrow) {
        const auto own = worker.share(pixels, ROWS);
        for (int64_t first = own.first; first < own.last; first += ROWS) narrow_rows(of, first, worker.memory);
        return;
    }
    // Few rows: their output channels are split, so that no thread reads all weights for little work.
    const int64_t parts = pixels < FEW_PIXELS * worker.threads ? std::min(panels, worker.threads) : 1;
    const int64_t share = split(split(pixels, parts > 1 ? 1 : worker.threads), ROWS) * ROWS;
    const int64_t block = std::min(share, GROUP), blocks = split(pixels, block);
    const auto own = worker.share(parts * blocks);
    for (int64_t work = own.first; work < own.last; ++work) {
        const int64_t part = work / blocks, first = work % blocks * block;
        const int64_t from = panels * part / parts * WIDTH, to = panels * (part + 1) / parts * WIDTH;
        wide_rows(of, first, std::min(first + block, pixels), from, std::min(to, of.after.k), worker.memory);
    }
}

}  // namespace
