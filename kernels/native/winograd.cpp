// ../winograd.py has the equations and this operator's reference. Images are NHWC, float32.
//
// A block is some tiles of 4x4 pixels: its points V and the products M stay in the second cache between the three
// stages, the weights U stream through. Vectors are along channels, so transforms never exchange lanes. Small images go
// through all layers block by block, so that what is between two layers stays there as well.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <omp.h>
#include <vector>

#include "vectors.h"
#include "worker.h"

namespace {

// With AVX-512 16 of 32 registers are sums, enough to hide the latency of two FMA units; with AVX2 8 of 16, untuned.
constexpr int ROWS = LANES / 2;
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

// V: row `row` of every point, from the 6x6 pixels around a tile. outside: a pixel of zeros.
void gather(const float* x, const Shape& s, int64_t channels, const Place& place, const float* outside, float* v,
            int64_t row, int64_t stride) {
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
            for (int i = 0; i < SIDE; ++i) store(v + (i * SIDE + j) * stride + row * channels + c, points[i]);
        }
    }
}

// M [R, PANEL] = V [R, c] U [c, PANEL] at one point. next: a quarter of what U holds, wanted soon.
template <int R>
inline void multiply(const float* v, const float* u, float* m, int64_t c, const float* next) {
    constexpr int N = PANEL / LANES;
    constexpr int WIDE = 2;  // vectors of a row that are summed at once
    for (int first = 0; first < N; first += WIDE) {
        for (int64_t from = 0; from < c; from += CHUNK) {
            Vec sums[R][WIDE] = {};
            for (int64_t k = from; k < from + CHUNK; ++k) {
                if (first == 0 && k % 2 == 0) __builtin_prefetch(next + k * (LINE / 2));
                Vec right[WIDE];
                for (int j = 0; j < WIDE; ++j) right[j] = load(u + k * PANEL + (first + j) * LANES);
                for (int r = 0; r < R; ++r)
                    for (int j = 0; j < WIDE; ++j) sums[r][j] += v[r * c + k] * right[j];
            }
            for (int r = 0; r < R; ++r) {
                for (int j = 0; j < WIDE; ++j) {
                    float* to = m + r * PANEL + (first + j) * LANES;
                    store(to, from ? load(to) + sums[r][j] : sums[r][j]);
                }
            }
        }
    }
}

// All rows at one point. Eight of them ask for a quarter of the next point's weights, spread over their products: from
// the third cache these arrive too late otherwise (5% of a convolution with 64 channels, 16% with 128; Xeon 2.5 GHz).
void multiply_rows(const float* v, const float* u, float* m, int64_t c, int64_t rows) {
    int64_t r = 0;
    const auto next = [&] { return u + c * PANEL + r / 8 % 4 * (c / 2 * LINE); };
    for (; r + ROWS <= rows; r += ROWS) multiply<ROWS>(v + r * c, u, m + r * PANEL, c, next());
    for (; r + 4 <= rows; r += 4) multiply<4>(v + r * c, u, m + r * PANEL, c, next());
    for (; r < rows; ++r) multiply<1>(v + r * c, u, m + r * PANEL, c, next());
}

// One convolution of a chain. u [k / 32, 36, c, 32]; y = GELU(. + bias) + plus, the latter two and GELU optional.
struct Layer {
    const float *u, *bias, *plus;
    int64_t c, k, plus_images;
    bool gelu;
};

// One tile's pixels in the PANEL channels from `channel`, from row `row` of every point of M. image: of plus.
void scatter(const float* m, int64_t row, int64_t stride, const Shape& s, const Place& place, int64_t channel,
             const Layer& layer, int64_t image, float* y) {
    const int64_t height = std::min<int64_t>(TILE, s.h - place.top), width = std::min<int64_t>(TILE, s.w - place.left);
    const int64_t area = s.h * s.w, pixel = place.top * s.w + place.left;
    const float* plus = layer.plus ? layer.plus + image % layer.plus_images * area * layer.k : nullptr;
    y += place.image * area * layer.k;
    for (int64_t c = 0; c < PANEL; c += LANES) {
        Vec lines[TILE][SIDE];
        for (int j = 0; j < SIDE; ++j) {
            Vec points[SIDE], pixels[TILE];
            for (int i = 0; i < SIDE; ++i) points[i] = load(m + (i * SIDE + j) * stride + row * PANEL + c);
            to_pixels(points, pixels);
            for (int i = 0; i < TILE; ++i) lines[i][j] = pixels[i];
        }
        const Vec bias = layer.bias ? load(layer.bias + channel + c) : Vec{};
        const int64_t offset = pixel * layer.k + channel + c;
        for (int64_t i = 0; i < height; ++i) {
            Vec pixels[TILE];
            to_pixels(lines[i], pixels);
            for (int j = 0; j < TILE; ++j) pixels[j] += bias;
            for (int j = 0; j < TILE && layer.gelu; ++j) pixels[j] = gelu(pixels[j]);
            for (int64_t j = 0; j < width; ++j) {
                const int64_t at = offset + (i * s.w + j) * layer.k;
                store(y + at, plus ? pixels[j] + load(plus + at) : pixels[j]);
            }
        }
    }
}

int64_t block_floats(const Layer& layer, int64_t block) {
    return layer.c + POINTS * (block * (layer.c + PANEL) + 2 * STAGGER);
}

// Tiles [first, first + rows) of a layer in its panels [from, to). image: the number of x's first one, for plus.
void convolve(const Layer& layer, const float* x, float* y, const Shape& s, int64_t first, int64_t rows, int64_t from,
              int64_t to, int64_t image, float* memory) {
    const int64_t v_stride = rows * layer.c + STAGGER, m_stride = rows * PANEL + STAGGER;
    float *outside = memory, *v = outside + layer.c, *m = v + POINTS * v_stride;
    std::fill_n(outside, layer.c, 0.f);
    for (int64_t row = 0; row < rows; ++row) gather(x, s, layer.c, Place(s, first + row), outside, v, row, v_stride);
    for (int64_t panel = from; panel < to; ++panel) {
        for (int point = 0; point < POINTS; ++point) {
            const float* u = layer.u + (panel * POINTS + point) * layer.c * PANEL;
            multiply_rows(v + point * v_stride, u, m + point * m_stride, layer.c, rows);
        }
        for (int64_t row = 0; row < rows; ++row) {
            const Place place(s, first + row);
            scatter(m, row, m_stride, s, place, panel * PANEL, layer, image + place.image, y);
        }
    }
}

// All tiles of one layer, dealt out to threads.
void run_layer(const Layer& layer, const float* x, float* y, const Shape& s, int threads) {
    const int64_t tiles = s.tiles(), panels = layer.k / PANEL;
    const int64_t share = split(tiles, split(tiles, BLOCK * threads) * threads);
    const int64_t block = split(share, ROWS) * ROWS, blocks = split(tiles, block);
    // With fewer blocks than threads each block's output channels are split too, and its points computed by each.
    const int64_t parts = blocks < threads ? std::min(panels, split(threads, blocks)) : 1;
    const Workspaces workspaces(block_floats(layer, block), threads);
#pragma omp parallel num_threads(threads)
    {
        float* memory = workspaces.of(omp_get_thread_num());
#pragma omp for schedule(dynamic, 1)
        for (int64_t work = 0; work < blocks * parts; ++work) {
            const int64_t first = work / parts * block, part = work % parts;
            convolve(layer, x, y, s, first, std::min(block, tiles - first), panels * part / parts,
                     panels * (part + 1) / parts, 0, memory);
        }
    }
}

// All layers, some whole images at a time. between: floats of what is between two layers, per image.
void run_images(const std::vector<Layer>& layers, const float* x, float* y, const Shape& s, int64_t between,
                int threads) {
    const int64_t per_image = s.down() * s.across(), area = s.h * s.w;
    const int64_t count = std::min(std::max<int64_t>(BLOCK / per_image, 1), split(s.n, threads));
    int64_t floats = 0;
    for (const Layer& layer : layers) {
        floats = std::max(floats, block_floats(layer, std::min(count * per_image, BLOCK)));
    }
    const Workspaces workspaces(floats + 2 * count * between, threads);
#pragma omp parallel num_threads(threads)
    {
        float* memory = workspaces.of(omp_get_thread_num());
        float* halves[2] = {memory + floats, memory + floats + count * between};
#pragma omp for schedule(dynamic, 1)
        for (int64_t start = 0; start < s.n; start += count) {
            const Shape part{std::min(count, s.n - start), s.h, s.w};
            const float* from = x + start * area * layers[0].c;
            for (size_t i = 0; i < layers.size(); ++i) {
                const Layer& layer = layers[i];
                float* to = i + 1 < layers.size() ? halves[i % 2] : y + start * area * layer.k;
                for (int64_t first = 0; first < part.tiles(); first += BLOCK) {
                    const int64_t rows = std::min(BLOCK, part.tiles() - first);
                    convolve(layer, from, to, part, first, rows, 0, layer.k / PANEL, start, memory);
                }
                from = to;
            }
        }
    }
}

}  // namespace

// `count` convolutions one after the other, GELU after each if asked: x [n, h, w, widths[0]] -> y [n, h, w,
// widths[count]]. u[i] [widths[i + 1] / 32, 36, widths[i], 32], bias[i] [widths[i + 1]] or null, plus [plus_images, h,
// w, widths[count]] or null, added to y alone. Widths are multiples of 32. scratch: two tensors [n, h, w, the largest
// width] to go layer by layer; null to go image by image. -> 0, or 1 if there was no memory.
extern "C" int winograd(const float* x, const float* const* u, const float* const* bias, const float* plus, float* y,
                        float* scratch, int64_t n, int64_t h, int64_t w, const int64_t* widths, int64_t count,
                        int64_t plus_images, int gelu, int threads) try {
    threads = int(startable(threads));
    const Shape s{n, h, w};
    std::vector<Layer> layers;
    int64_t widest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float* added = i + 1 == count ? plus : nullptr;
        layers.push_back({u[i], bias[i], added, widths[i], widths[i + 1], plus_images, gelu != 0});
        widest = std::max(widest, widths[i + 1]);
    }
    const int64_t between = h * w * widest;
    if (count > 1 && !scratch) {
        run_images(layers, x, y, s, between, threads);
        return 0;
    }
    for (int64_t i = 0; i < count; ++i) {
        float* to = i + 1 < count ? scratch + i % 2 * n * between : y;
        run_layer(layers[i], x, to, s, threads);
        x = to;
    }
    return 0;
} catch (const std::exception&) {  // bad_alloc, or length_error: none may pass into C
    return 1;
}
