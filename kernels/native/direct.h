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

// Pixels that are summed at once, in two vectors each: as many as there are registers for.
constexpr int PIXELS = LANES == 16 ? 8 : 4;
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

// PIXELS pixels of the n images. Pooled, four neighbours that become one follow each other.
struct Rows {
    int64_t image[PIXELS], y[PIXELS], x[PIXELS], count;
    int64_t pixel[PIXELS], to[PIXELS];  // in its image; where its outputs begin

    void start(const Summing& of, int64_t first) {
        count = std::min<int64_t>(PIXELS, of.pixels() - first);
        // Sides are 1 << half: divisions would take longer than the sums.
        const int half = of.after.then == POOL ? 1 : 0;
        const int64_t last = (1 << 2 * half) - 1, down = of.after.h >> half, across = of.after.w >> half;
        const int64_t cell = first >> 2 * half;
        int64_t place = cell / (down * across), cy = cell / across % down, cx = cell % across;
        for (int64_t r = 0; r < PIXELS; ++r) {
            image[r] = place, y[r] = (cy << half) + ((r & last) >> half), x[r] = (cx << half) + (r & half);
            // Those beyond the last are it, or its neighbours, again.
            if ((r & last) != last || r + 1 >= count) continue;
            if (++cx == across) cx = 0, ++cy;
            if (cy == down) cy = 0, ++place;
        }
        for (int64_t r = 0; r < PIXELS; ++r) {
            pixel[r] = y[r] * of.after.w + x[r];
            to[r] = of.after.at(image[r], y[r], x[r], 0) - of.after.out;
        }
    }

    // Where each tap reads in the images of one copy: [taps, PIXELS].
    void addresses(const Summing& of, const Summand& from, int64_t copy, const float* outside, const float** at) const {
        const int64_t h = of.after.h, w = of.after.w, reach = of.taps == 1 ? 0 : 1;
        const float* middle[PIXELS];
        for (int r = 0; r < PIXELS; ++r) middle[r] = from.x + ((copy * of.n + image[r]) * h * w + pixel[r]) * from.c;
        for (int64_t dy = -reach; dy <= reach; ++dy) {
            for (int64_t dx = -reach; dx <= reach; ++dx, at += PIXELS) {
                for (int r = 0; r < PIXELS; ++r) {
                    const bool inside = (uint64_t(y[r] + dy) < uint64_t(h)) & (uint64_t(x[r] + dx) < uint64_t(w));
                    const float* there = middle[r] + (dy * w + dx) * from.c;
                    at[r] = inside ? there : outside;
                }
            }
        }
    }

    // Finish and store one vector of each pixel, of `lanes` channels from `channel`. before: images before those here.
    void put(const Epilogue& after, Vec (&v)[PIXELS], int64_t before, int64_t channel, int64_t lanes,
             const Spread& spread) const {
        if (image[0] == image[PIXELS - 1]) {
            after.finish(v, before + image[0], pixel, channel, lanes);
        } else {
            for (int r = 0; r < PIXELS; ++r) {
                Vec one[1] = {v[r]};
                const int64_t of_one[1] = {pixel[r]};
                after.finish(one, before + image[r], of_one, channel, lanes);
                v[r] = one[0];
            }
        }
        float* out = after.at(before, 0, 0, 0);
        if (count == PIXELS && lanes >= LANES && after.then != POOL && spread.whole >= 0) {
            const int64_t place = after.then == SPREAD ? spread.whole : channel;
            for (int r = 0; r < PIXELS; ++r) store(out + to[r] + place, v[r]);
            return;
        }
        if (after.then == SPREAD) {
            for (int64_t r = 0; r < count; ++r) spread.put(v[r], out + to[r]);
            return;
        }
        const int64_t step = after.then == POOL ? 4 : 1;
        for (int64_t r = 0; r < count; r += step) {
            const Vec value = step == 1 ? v[r] : largest(largest(v[r], v[r + 1]), largest(v[r + 2], v[r + 3]));
            float* at = out + to[r] + channel;
            lanes < LANES ? store(at, value, lanes) : store(at, value);
        }
    }
};

// What is added up: where taps read, at [taps, PIXELS], and their weights from the wanted vectors on, [taps, c, 32].
struct Part {
    const float* const* at;
    const float* weight;
    int64_t c;
};

// to [PIXELS][W vectors] = from (null: zeros) + the products of all taps of all parts. A function of its own, so that
// addresses have registers: inlined, GCC 12 moves them to vectors and back.
template <int W>
__attribute__((noinline)) void add_products(const Part* parts, int count, int64_t taps, const Vec (*from)[W],
                                            Vec (*to)[W]) {
    Vec sums[PIXELS][W];
    for (int r = 0; r < PIXELS; ++r)
        for (int j = 0; j < W; ++j) sums[r][j] = from ? from[r][j] : Vec{};
    for (const Part* part = parts; part < parts + count; ++part) {
        const float* weight = part->weight;
        for (int64_t tap = 0; tap < taps; ++tap) {
            const float* pixels[PIXELS];
            for (int r = 0; r < PIXELS; ++r) pixels[r] = part->at[tap * PIXELS + r];
            for (int64_t i = 0; i < part->c; ++i, weight += WIDTH) {
                Vec right[W];
                for (int j = 0; j < W; ++j) right[j] = load(weight + j * LANES);
                for (int r = 0; r < PIXELS; ++r)
                    for (int j = 0; j < W; ++j) sums[r][j] += pixels[r][i] * right[j];
            }
        }
    }
    for (int r = 0; r < PIXELS; ++r)
        for (int j = 0; j < W; ++j) to[r][j] = sums[r][j];
}

// W vectors of the channels from `channel`, of every copy. at: x's addresses of each copy, then those of the skip.
template <int W>
inline void sum_wide(const Summing& of, const Rows& rows, const float* const* at, int64_t channel,
                     const Spread (&spreads)[W]) {
    const int64_t panel = channel / WIDTH, offset = channel % WIDTH, step = of.taps * PIXELS;
    const auto part = [&](const Summand& from, int64_t copy) {
        return Part{at + copy * step, from.weight + panel * of.taps * from.c * WIDTH + offset, from.c};
    };
    const int skips = of.skip.x != nullptr;
    Part parts[2];
    if (skips) parts[0] = part(of.skip, of.copies);
    const bool shares = skips && of.copies > 1;
    Vec shared[PIXELS][W], sums[PIXELS][W];
    if (shares) add_products<W>(parts, 1, of.taps, nullptr, shared);
    for (int64_t copy = 0; copy < of.copies; ++copy) {
        parts[skips] = part(of.x, copy);
        add_products<W>(parts + shares, 1 + skips - shares, of.taps, shares ? shared : nullptr, sums);
        for (int j = 0; j < W; ++j) {
            Vec v[PIXELS];
            for (int r = 0; r < PIXELS; ++r) v[r] = sums[r][j];
            const int64_t from = channel + j * LANES;
            rows.put(of.after, v, copy * of.n, from, std::min<int64_t>(LANES, of.after.k - from), spreads[j]);
        }
    }
}

// to [PIXELS][K] = from (null: zeros) + the products of all taps, lane by lane. weight [K, taps, filled].
template <int K>
__attribute__((noinline)) void add_dots(const float* const* at, const float* weight, int64_t taps, int64_t c,
                                        const Vec (*from)[K], Vec (*to)[K]) {
    const int64_t filled = split(c, FILLED) * FILLED, whole = c / LANES * LANES;
    Vec sums[PIXELS][K];
    for (int r = 0; r < PIXELS; ++r)
        for (int k = 0; k < K; ++k) sums[r][k] = from ? from[r][k] : Vec{};
    for (int64_t tap = 0; tap < taps; ++tap) {
        const float *column = weight + tap * filled, *pixels[PIXELS];
        for (int r = 0; r < PIXELS; ++r) pixels[r] = at[tap * PIXELS + r];
        for (int64_t i = 0; i < whole; i += LANES) {
            Vec right[K];
            for (int k = 0; k < K; ++k) right[k] = load(column + k * taps * filled + i);
            for (int r = 0; r < PIXELS; ++r)
                for (int k = 0; k < K; ++k) sums[r][k] += load(pixels[r] + i) * right[k];
        }
    }
    // In a loop of its own: within the one above it takes the registers of the sums.
    for (int64_t tap = 0; whole < c && tap < taps; ++tap) {
        const float* column = weight + tap * filled + whole;
        for (int r = 0; r < PIXELS; ++r) {
            const Vec left = load(at[tap * PIXELS + r] + whole, c - whole);
            for (int k = 0; k < K; ++k) sums[r][k] += left * load(column + k * taps * filled);
        }
    }
    for (int r = 0; r < PIXELS; ++r)
        for (int k = 0; k < K; ++k) to[r][k] = sums[r][k];
}

// All K outputs of every copy.
template <int K>
inline void sum_narrow(const Summing& of, const Rows& rows, const float* const* at) {
    const int64_t step = of.taps * PIXELS;
    Vec shared[PIXELS][K], sums[PIXELS][K], v[PIXELS];
    if (of.skip.x) {
        add_dots<K>(at + of.copies * step, of.skip.weight, of.taps, of.skip.c, nullptr, shared);
    }
    for (int64_t copy = 0; copy < of.copies; ++copy) {
        add_dots<K>(at + copy * step, of.x.weight, of.taps, of.x.c, of.skip.x ? shared : nullptr, sums);
        for (int r = 0; r < PIXELS; ++r) {
            float values[LANES] = {};
            for (int k = 0; k < K; ++k) values[k] = total(sums[r][k]);
            v[r] = load(values);
        }
        rows.put(of.after, v, copy * of.n, 0, K, Spread{});
    }
}

// PIXELS pixels from `first` on with the addresses of all that they read, in the `slot`th part of `memory`.
struct Reading {
    Rows rows;
    const float** at;

    void start(const Summing& of, int64_t first, float* memory, int64_t slot) {
        rows.start(of, first);
        at = reinterpret_cast<const float**>(memory + of.widest()) + slot * (of.copies + 1) * of.taps * PIXELS;
        for (int64_t copy = 0; copy < of.copies; ++copy) {
            rows.addresses(of, of.x, copy, memory, at + copy * of.taps * PIXELS);
        }
        if (of.skip.x) rows.addresses(of, of.skip, 0, memory, at + of.copies * of.taps * PIXELS);
    }
};

// Pixels [first, last), at most GROUP, in the output channels [from, to): weights are read once for all of them.
inline void wide_rows(const Summing& of, int64_t first, int64_t last, int64_t from, int64_t to, float* memory) {
    Reading readings[GROUP / PIXELS];
    const int64_t count = split(last - first, PIXELS);
    for (int64_t i = 0; i < count; ++i) readings[i].start(of, first + i * PIXELS, memory, i);
    const auto spread = [&](int64_t channel) {
        const int64_t lanes = std::min<int64_t>(LANES, of.after.k - channel);
        return of.after.then == SPREAD ? Spread(of.after, channel, lanes) : Spread{};
    };
    for (int64_t channel = from; channel < to; channel += 2 * LANES) {
        if (to - channel > LANES) {
            const Spread both[2] = {spread(channel), spread(channel + LANES)};
            for (int64_t i = 0; i < count; ++i) sum_wide<2>(of, readings[i].rows, readings[i].at, channel, both);
        } else {
            const Spread one[1] = {spread(channel)};
            for (int64_t i = 0; i < count; ++i) sum_wide<1>(of, readings[i].rows, readings[i].at, channel, one);
        }
    }
}

// PIXELS pixels from `first` on, of up to four outputs.
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
        const auto own = worker.share(pixels, PIXELS);
        for (int64_t first = own.first; first < own.last; first += PIXELS) narrow_rows(of, first, worker.memory);
        return;
    }
    // Few rows: their output channels are split, so that no thread reads all weights for little work.
    const int64_t parts = pixels < FEW_PIXELS * worker.threads ? std::min(panels, worker.threads) : 1;
    const int64_t share = split(split(pixels, parts > 1 ? 1 : worker.threads), PIXELS) * PIXELS;
    const int64_t block = std::min(share, GROUP), blocks = split(pixels, block);
    const auto own = worker.share(parts * blocks);
    for (int64_t work = own.first; work < own.last; ++work) {
        const int64_t part = work / blocks, first = work % blocks * block;
        const int64_t from = panels * part / parts * WIDTH, to = panels * (part + 1) / parts * WIDTH;
        wide_rows(of, first, std::min(first + block, pixels), from, std::min(to, of.after.k), worker.memory);
    }
}

}  // namespace
