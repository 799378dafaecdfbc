// winograd.py has the equations and this operator's reference. Images are NHWC, float32.
//
// A block is some tiles of 4x4 pixels: its points V and the products M stay in the second cache between the three
// stages, the weights U stream through. Vectors are along channels, so transforms never exchange lanes.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // 16 of 32 registers are sums, enough to hide the latency of two FMA units
#else
constexpr int LANES = 8, ROWS = 3;  // 12 of 16 registers
#endif
constexpr int PANEL = 32;  // output channels that are done at once, as winograd.py packs them
constexpr int TILE = 4, SIDE = 6, POINTS = SIDE * SIDE;
constexpr int64_t BLOCK = 32;   // tiles. 16 to 40 are within 5% at 64 channels; 128 want 24 or more (Xeon 2.5 GHz)
// Channels that are summed in registers: short sums, then their sum, round less (4.6e-7 instead of 7.1e-7, root mean
// square) and cost nothing that could be measured.
constexpr int64_t CHUNK = 16;
constexpr int64_t STAGGER = 16; // floats: points that are a multiple of 4096 bytes apart would share cache sets

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef int32_t Choice __attribute__((vector_size(LANES * sizeof(float))));

inline Vec load(const float* from) { return *reinterpret_cast<const Vec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Vec*>(to) = value; }

struct Shape {
    int64_t n, h, w, c, k;
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

// x Phi(x). Phi(x) = 1/2 + x q(x^2) within +-5.4 and 0 or 1 beyond, where it is to 4e-8; q is the minimax polynomial of
// degree 14 in s = 2 x^2 / 5.4^2 - 1. Phi in float32 has an error of at most 1.2e-7.
inline Vec gelu(Vec x) {
    constexpr float LIMIT = 5.4f;
    constexpr float Q[] = {1.309281126e-01f,  -6.532805488e-02f, 4.849959172e-02f,  -3.920681298e-02f, 3.211659117e-02f,
                           -2.574645809e-02f, 1.964516947e-02f,  -1.396331550e-02f, 9.651121341e-03f,  -6.715348498e-03f,
                           3.659034586e-03f,  -1.186400228e-03f, 8.748502121e-04f,  -1.028372572e-03f, 3.928831231e-04f};
    const Vec s = x * x * (2.f / (LIMIT * LIMIT)) - 1.f;
    Vec q = Vec{} + Q[14];
    for (int i = 13; i >= 0; --i) q = q * s + Q[i];
    const Choice above = x > LIMIT, below = x < -LIMIT;
    Vec phi = x * q + .5f;
    phi = above ? Vec{} + 1.f : phi;
    phi = below ? Vec{} : phi;
    return x * phi;
}

// V: row `row` of every point, from the 6x6 pixels around a tile.
void gather(const float* x, const Shape& s, const Place& place, float* v, int64_t row, int64_t stride) {
    for (int64_t c = 0; c < s.c; c += LANES) {
        Vec lines[SIDE][SIDE];
        for (int i = 0; i < SIDE; ++i) {
            Vec pixels[SIDE];
            const int64_t y = place.top + i - 1;
            for (int j = 0; j < SIDE; ++j) {
                const int64_t z = place.left + j - 1;
                const bool inside = y >= 0 && y < s.h && z >= 0 && z < s.w;
                pixels[j] = inside ? load(x + ((place.image * s.h + y) * s.w + z) * s.c + c) : Vec{};
            }
            to_points(pixels, lines[i]);
        }
        for (int j = 0; j < SIDE; ++j) {
            Vec column[SIDE], points[SIDE];
            for (int i = 0; i < SIDE; ++i) column[i] = lines[i][j];
            to_points(column, points);
            for (int i = 0; i < SIDE; ++i) store(v + (i * SIDE + j) * stride + row * s.c + c, points[i]);
        }
    }
}

// M [R, PANEL] = V [R, c] U [c, PANEL] at one point.
template <int R>
inline void multiply(const float* v, const float* u, float* m, int64_t c) {
    constexpr int N = PANEL / LANES;
    constexpr int WIDE = N > 2 ? 2 : N;  // vectors of a row that are summed at once
    for (int first = 0; first < N; first += WIDE) {
        for (int64_t from = 0; from < c; from += CHUNK) {
            Vec sums[R][WIDE] = {};
            for (int64_t k = from; k < from + CHUNK; ++k) {
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

void multiply_rows(const float* v, const float* u, float* m, int64_t c, int64_t rows) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) multiply<ROWS>(v + r * c, u, m + r * PANEL, c);
    for (; r + 4 <= rows; r += 4) multiply<4>(v + r * c, u, m + r * PANEL, c);
    for (; r < rows; ++r) multiply<1>(v + r * c, u, m + r * PANEL, c);
}

// What follows a product: y = GELU(. + bias) + plus, the latter two and GELU optional; images of plus repeat.
struct Epilogue {
    const float *bias, *plus;
    int64_t plus_images;
    bool gelu;
};

// One tile's pixels in the PANEL channels from `channel`, from row `row` of every point of M.
void scatter(const float* m, int64_t row, int64_t stride, const Shape& s, const Place& place, int64_t channel,
             const Epilogue& then, float* y) {
    const int64_t height = std::min<int64_t>(TILE, s.h - place.top), width = std::min<int64_t>(TILE, s.w - place.left);
    for (int64_t c = 0; c < PANEL; c += LANES) {
        Vec lines[TILE][SIDE];
        for (int j = 0; j < SIDE; ++j) {
            Vec points[SIDE], pixels[TILE];
            for (int i = 0; i < SIDE; ++i) points[i] = load(m + (i * SIDE + j) * stride + row * PANEL + c);
            to_pixels(points, pixels);
            for (int i = 0; i < TILE; ++i) lines[i][j] = pixels[i];
        }
        const Vec bias = then.bias ? load(then.bias + channel + c) : Vec{};
        for (int64_t i = 0; i < height; ++i) {
            Vec pixels[TILE];
            to_pixels(lines[i], pixels);
            for (int64_t j = 0; j < width; ++j) {
                const int64_t pixel = (place.top + i) * s.w + place.left + j, area = s.h * s.w;
                Vec value = pixels[j] + bias;
                if (then.gelu) value = gelu(value);
                if (then.plus) {
                    value += load(then.plus + (place.image % then.plus_images * area + pixel) * s.k + channel + c);
                }
                store(y + (place.image * area + pixel) * s.k + channel + c, value);
            }
        }
    }
}

}  // namespace

// x [n, h, w, c], u [36, k / 32, c, 32], bias [k] or null, plus [plus_images, h, w, k] or null -> y [n, h, w, k];
// c a multiple of 16, k of 32.
extern "C" void winograd(const float* x, const float* u, const float* bias, const float* plus, float* y, int64_t n,
                         int64_t h, int64_t w, int64_t c, int64_t k, int64_t plus_images, int gelu, int threads) {
    const Shape s{n, h, w, c, k};
    const Epilogue then{bias, plus, plus_images, gelu != 0};
    const int64_t tiles = s.tiles(), panels = k / PANEL;
    const int64_t rounds = (tiles + BLOCK * threads - 1) / (BLOCK * threads);
    const int64_t share = (tiles + rounds * threads - 1) / (rounds * threads);
    const int64_t block = (share + ROWS - 1) / ROWS * ROWS, blocks = (tiles + block - 1) / block;
    // With fewer blocks than threads each block's output channels are split too, and its points computed by each.
    const int64_t parts = blocks < threads ? std::min(panels, (threads + blocks - 1) / blocks) : 1;
    const int64_t v_stride = block * c + STAGGER, m_stride = block * PANEL + STAGGER;
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> memory;  // kept: fresh memory would be cleared page by page
        memory.resize(std::max<size_t>(memory.size(), POINTS * (v_stride + m_stride)));
        float *v = memory.data(), *m = v + POINTS * v_stride;
#pragma omp for schedule(dynamic, 1)
        for (int64_t work = 0; work < blocks * parts; ++work) {
            const int64_t first = work / parts * block, rows = std::min(block, tiles - first), part = work % parts;
            for (int64_t row = 0; row < rows; ++row) gather(x, s, Place(s, first + row), v, row, v_stride);
            for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
                for (int point = 0; point < POINTS; ++point) {
                    const float* right = u + (point * panels + panel) * c * PANEL;
                    multiply_rows(v + point * v_stride, right, m + point * m_stride, c, rows);
                }
                for (int64_t row = 0; row < rows; ++row)
                    scatter(m, row, m_stride, s, Place(s, first + row), panel * PANEL, then, y);
            }
        }
    }
}
