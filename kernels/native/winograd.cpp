// ../winograd.py has the equations and this operator's reference. Images are NHWC, float32.
//
// Small images go through all layers block by block, so that what is between two layers stays in the second cache as
// the stages of winograd.h do.

#include "winograd.h"

#include <exception>
#include <omp.h>
#include <vector>

namespace {

// One convolution of a chain. u [k / 32, 36, c, 32]; y = GELU(. + bias) + plus, the latter two and GELU optional.
struct Layer {
    const float *u, *bias, *plus;
    int64_t c, k, plus_images;
    bool gelu;

    // image: the number of x's first one, for plus.
    Convolving of(const float* x, float* y, const Shape& s, int64_t image) const {
        const Epilogue after{bias, nullptr, nullptr, plus, y, k, s.h, s.w, 1, 1, plus_images, gelu, KEEP, image};
        return {{x, u, c}, {}, after, s, 1};
    }
};

// All tiles of one layer, dealt out to threads.
void run_layer(const Layer& layer, const float* x, float* y, const Shape& s, int threads) {
    const Convolving of = layer.of(x, y, s, 0);
    const Workspaces workspaces(convolve_floats(of), threads);
#pragma omp parallel num_threads(threads)
    {
        const int own = omp_get_thread_num();
        convolve_share(of, {own, omp_get_num_threads(), workspaces.of(own), workspaces.stride, nullptr, nullptr});
    }
}

// All layers, some whole images at a time. between: floats of what is between two layers, per image.
void run_images(const std::vector<Layer>& layers, const float* x, float* y, const Shape& s, int64_t between,
                int threads) {
    const int64_t per_image = s.down() * s.across(), area = s.h * s.w;
    const int64_t count = std::min(std::max<int64_t>(BLOCK / per_image, 1), split(s.n, threads));
    int64_t floats = 0;
    for (const Layer& layer : layers) {
        floats = std::max(floats, layer.of(x, y, s, 0).floats(std::min(count * per_image, BLOCK)));
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
                const Convolving of = layer.of(from, to, part, start);
                for (int64_t first = 0; first < part.tiles(); first += BLOCK) {
                    convolve(of, first, std::min(BLOCK, part.tiles() - first), 0, of.panels(), memory);
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
