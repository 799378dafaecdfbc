// The stages of F(4x4, 3x3), see ../winograd.py for the equations. Images are NHWC, float32.
//
// A block is some tiles of 4x4 pixels: its points V and the products M stay in the second cache between the three
// stages, the weights U stream through. Vectors are along channels, so transforms never exchange lanes.

#pragma once

#include "epilogue.h"
#include "vectors.h"
#include "worker.h"

namespace {

constexpr int PANEL = 32;  // output channels that are done at once, as ../winograd.py packs them
constexpr int TILE = 4, SIDE = 6, POINTS = SIDE * SIDE;
constexpr int64_t BLOCK = 32;  // tiles. 16 to 40 are within 5% at 64 channels; 128 want 24 or more (Xeon 2.5 GHz)
// Channels that are summed in registers: short sums, then their sum, round less (4.6e-7 instead of 7.1e-7, root mean
// square) and cost 4%.
constexpr int64_t CHUNK = 16;
constexpr int64_t STAGGER = LINE;  // points that are a multiple of 4096 bytes apart would share cache sets

struct Shape {
    int64_t n, h, w;
    int64_t down() const { return (h + TILE - 1) / TILE; }
    int64_t across() const { return (w + TILE - 1) / TILE; }
    int64_t tiles() const { return n * down() * across(); }
};

struct Place {
    int64_t image, top, left;
    Place(const Shape& s, int64_t tile)
        : image(tile / (s.down() * s.across())),
          top(tile / s.across() % s.down() * TILE),
          left(tile % s.across() * TILE) {}
};

// B^T d
inline void to_points(const Vec d[SIDE], Vec v[SIDE]) {
    const Vec a = d[3] - d[1], b = d[4] - d[2];
    v[0] = (d[0] + d[4]) - 2.f * d[2] + 1.5f * a;
    v[1] = (d[4] + 2.5f * d[3]) + (.5f * d[2] - d[1]);
    v[2] = (d[4] + .5f * d[3]) + (d[1] - 2.5f * d[2]);
    v[3] = b + 2.f * a;
    v[4] = b - .5f * a;
    v[5] = (d[1] + d[5]) - 2.f * d[3] + 1.5f * b;
}

// A^T m
inline void to_pixels(const Vec m[SIDE], Vec y[TILE]) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    y[0] = m[0] + sum + m[3] + m[4];
    y[1] = difference + .5f * m[3] - 2.f * m[4];
    y[2] = sum + .25f * m[3] + 4.f * m[4];
    y[3] = difference + .125f * m[3] - 8.f * m[4] + m[5];
}

// One row of V at every point, from the 6x6 pixels around a tile. outside: a pixel of zeros.
inline void gather(const float* x, const Shape& s, int64_t channels, const Place& place, const float* outside, float* v,
                   int64_t stride) {
    const float* at[SIDE][SIDE];
    for (int i = 0; i < SIDE; ++i) {
        const int64_t y = place.top + i - 1;
        for (int j = 0; j < SIDE; ++j) {
            const int64_t z = place.left + j - 1;
            const bool inside = y >= 0 && y < s.h && z >= 0 && z < s.w;
            at[i][j] = inside ? x + ((place.image * s.h + y) * s.w + z) * channels : outside;
        }
    }
    for (int64_t c = 0; c < channels; c += LANES) {
        Vec lines[SIDE][SIDE];
        for (int i = 0; i < SIDE; ++i) {
            Vec pixels[SIDE];
            for (int j = 0; j < SIDE; ++j) pixels[j] = load(at[i][j] + c);
            to_points(pixels, lines[i]);
        }
        for (int j = 0; j < SIDE; ++j) {
            Vec column[SIDE], points[SIDE];
            for (int i = 0; i < SIDE; ++i) column[i] = lines[i][j];
            to_points(column, points);
            for (int i = 0; i < SIDE; ++i) store(v + (i * SIDE + j) * stride + c, points[i]);
        }
    }
}

// M [R, PANEL] = V [R, c] U [c, PANEL] at one point, `onto` what is in M. next: U that is wanted soon, of which LINES
// lines are asked for at every second channel.
template <int R, int LINES>
inline void multiply(const float* v, const float* u, float* m, int64_t c, bool onto, const float* next) {
    constexpr int N = PANEL / LANES;
    constexpr int WIDE = 2;  // vectors of a row that are summed at once
    for (int first = 0; first < N; first += WIDE) {
        Vec totals[R][WIDE];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDE; ++j) totals[r][j] = onto ? load(m + r * PANEL + (first + j) * LANES) : Vec{};
        for (int64_t from = 0; from < c; from += CHUNK) {
            Vec sums[R][WIDE] = {};
            for (int64_t k = from; k < from + CHUNK; ++k) {
                if (first == 0 && k % 2 == 0) {
                    for (int i = 0; i < LINES; ++i) __builtin_prefetch(next + k / 2 * (LINES * LINE) + i * LINE);
                }
                Vec right[WIDE];
                for (int j = 0; j < WIDE; ++j) right[j] = load(u + k * PANEL + (first + j) * LANES);
                for (int r = 0; r < R; ++r)
                    for (int j = 0; j < WIDE; ++j) sums[r][j] += v[r * c + k] * right[j];
            }
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < WIDE; ++j) totals[r][j] += sums[r][j];
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < WIDE; ++j) store(m + r * PANEL + (first + j) * LANES, totals[r][j]);
    }
}

template <int R>
inline void multiply(const float* v, const float* u, float* m, int64_t c, bool onto, int64_t group, int64_t groups) {
    // The next point's weights, a part by each of the groups of rows: from the third cache they arrive too late otherwise
    // (5% of a convolution with 64 channels, 16% with 128; Xeon 2.5 GHz).
    const float* next = u + c * PANEL;
    if (groups >= 4) return multiply<R, 1>(v, u, m, c, onto, next + group % 4 * (c / 2 * LINE));
    if (groups >= 2) return multiply<R, 2>(v, u, m, c, onto, next + group % 2 * (c * LINE));
    multiply<R, 4>(v, u, m, c, onto, next);
}

// All rows at one point.
inline void multiply_rows(const float* v, const float* u, float* m, int64_t c, int64_t rows, bool onto) {
    const int64_t groups = split(rows, ROWS);
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) multiply<ROWS>(v + r * c, u, m + r * PANEL, c, onto, r / ROWS, groups);
    if (r + 2 <= rows) multiply<2>(v + r * c, u, m + r * PANEL, c, onto, r / ROWS, groups), r += 2;
    if (r < rows) multiply<1>(v + r * c, u, m + r * PANEL, c, onto, r / ROWS, groups);
}

// One source of a convolution: images, transformed weights [k / 32, 36, c, 32], channels. Null images: there is none.
struct Source {
    const float *x, *u;
    int64_t c;
};

// A convolution of s.n * copies images. All copies, one behind the other, share the s.n images of `skip`.
struct Convolving {
    Source x, skip;
    Epilogue after;
    Shape s;
    int64_t copies;

    int64_t panels() const { return after.k / PANEL; }
    // Of scratch for `tiles` tiles at once.
    int64_t floats(int64_t tiles) const {
        const int64_t rows = tiles * copies;
        return std::max(x.c, skip.c) + POINTS * (rows * (x.c + PANEL) + tiles * skip.c + 3 * STAGGER);
    }
};

// One tile's pixels in the PANEL channels from `channel`, from its row of M at every point.
inline void scatter(const float* m, int64_t stride, const Epilogue& after, const Place& place, int64_t channel) {
    const int64_t height = std::min<int64_t>(TILE, after.h - place.top);
    const int64_t width = std::min<int64_t>(TILE, after.w - place.left);
    for (int64_t c = 0; c < PANEL; c += LANES) {
        Vec lines[TILE][SIDE], above[TILE];
        for (int j = 0; j < SIDE; ++j) {
            Vec points[SIDE], pixels[TILE];
            for (int i = 0; i < SIDE; ++i) points[i] = load(m + (i * SIDE + j) * stride + c);
            to_pixels(points, pixels);
            for (int i = 0; i < TILE; ++i) lines[i][j] = pixels[i];
        }
        for (int64_t i = 0; i < height; ++i) {
            Vec pixels[TILE];
            int64_t at[TILE];
            to_pixels(lines[i], pixels);
            for (int64_t j = 0; j < TILE; ++j) at[j] = (place.top + i) * after.w + place.left + std::min(j, width - 1);
            after.finish(pixels, place.image, at, channel + c, LANES);
            float* to = after.at(place.image, place.top + i, place.left, channel + c);
            if (after.then != POOL) {
                for (int64_t j = 0; j < width; ++j) store(to + j * after.k, pixels[j]);
            } else if (i % 2) {
                for (int64_t j = 0; j < width; j += 2) {
                    const Vec upper = largest(above[j], above[j + 1]), lower = largest(pixels[j], pixels[j + 1]);
                    store(to + j / 2 * after.k, largest(upper, lower));
                }
            } else {
                std::copy(pixels, pixels + TILE, above);
            }
        }
    }
}

// Tiles [first, first + tiles) of every copy, in the panels [from, to). memory: `floats(tiles)`.
inline void convolve(const Convolving& of, int64_t first, int64_t tiles, int64_t from, int64_t to, float* memory) {
    const int64_t rows = tiles * of.copies, area = of.s.h * of.s.w, c = of.x.c, skip_c = of.skip.c;
    const int64_t v_stride = rows * c + STAGGER, m_stride = rows * PANEL + STAGGER, stride = tiles * skip_c + STAGGER;
    float *outside = memory, *v = outside + std::max(c, skip_c), *m = v + POINTS * v_stride, *shared = m + POINTS * m_stride;
    std::fill_n(outside, std::max(c, skip_c), 0.f);
    for (int64_t row = 0; row < rows; ++row) {
        const Place place(of.s, first + row % tiles);
        gather(of.x.x + row / tiles * of.s.n * area * c, of.s, c, place, outside, v + row * c, v_stride);
        if (of.skip.x && row < tiles) gather(of.skip.x, of.s, skip_c, place, outside, shared + row * skip_c, stride);
    }
    for (int64_t panel = from; panel < to; ++panel) {
        for (int point = 0; point < POINTS; ++point) {
            const int64_t at = (panel * POINTS + point) * PANEL;
            float* sums = m + point * m_stride;
            if (of.skip.x) {
                multiply_rows(shared + point * stride, of.skip.u + at * skip_c, sums, skip_c, tiles, false);
                for (int64_t row = tiles; row < rows; row += tiles) std::copy_n(sums, tiles * PANEL, sums + row * PANEL);
            }
            multiply_rows(v + point * v_stride, of.x.u + at * c, sums, c, rows, of.skip.x != nullptr);
        }
        for (int64_t row = 0; row < rows; ++row) {
            Place place(of.s, first + row % tiles);
            place.image += row / tiles * of.s.n;
            scatter(m + row * PANEL, m_stride, of.after, place, panel * PANEL);
        }
    }
}

// How one convolution is dealt out: blocks of tiles, each with `parts` parts of its panels.
struct Deal {
    int64_t block, blocks, parts;
    Deal(const Convolving& of, int64_t threads) {
        const int64_t tiles = of.s.tiles(), most = std::max(BLOCK / of.copies, int64_t(1)), c = of.x.c + of.skip.c;
        // Few tiles a thread, many weights: each reads a part of these alone and computes all points (1.3 to 1.5 times
        // as fast for 256 channels with 4 and 8 tiles a thread, slower for 64 with 8; Zen 4, weights from L3).
        const bool by_panels = of.panels() >= threads && tiles * 16 < c * threads;
        const int64_t share = by_panels ? std::min(tiles, most) : split(tiles, split(tiles, most * threads) * threads);
        block = split(share, ROWS) * ROWS;
        blocks = split(tiles, block);
        parts = by_panels ? threads : blocks < threads ? std::min(of.panels(), split(threads, blocks)) : 1;
    }
};

// This thread's share of a convolution.
inline void convolve_share(const Convolving& of, const Worker& worker) {
    const Deal deal(of, worker.threads);
    const auto own = worker.share(deal.blocks * deal.parts);
    for (int64_t work = own.first; work < own.last; ++work) {
        const int64_t first = work % deal.blocks * deal.block, part = work / deal.blocks;
        convolve(of, first, std::min(deal.block, of.s.tiles() - first), of.panels() * part / deal.parts,
                 of.panels() * (part + 1) / deal.parts, worker.memory);
    }
}

// Floats of scratch of each thread, however many there are.
inline int64_t convolve_floats(const Convolving& of) {
    const int64_t most = std::max(BLOCK / of.copies, int64_t(1));
    return of.floats(split(std::min(of.s.tiles(), most), ROWS) * ROWS);
}

}  // namespace
