// The loss of 3DGS, mean |x - y| and structural similarity (Wang et al. 2004), with its gradient in one pass.
#include "splat_loss.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.hpp"
#include "units.hpp"

#if SCRIMP_X86
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;
using RunBand = void (*)(const Pictures &, Index first, Index end, double *absolute, double *similar, float *to);

}  // namespace

#if defined(__GNUC__)
namespace loss_generic {
namespace {
#define SPLAT_TARGET
#define SPLAT_LANES 4
#include "splat_loss.inc"
#undef SPLAT_TARGET
#undef SPLAT_LANES
}  // namespace
}  // namespace loss_generic

#if SCRIMP_X86
namespace loss_avx2 {
namespace {
#define SPLAT_TARGET __attribute__((target("avx2,fma")))
#define SPLAT_LANES 8
#include "splat_loss.inc"
#undef SPLAT_TARGET
#undef SPLAT_LANES
}  // namespace
}  // namespace loss_avx2

namespace loss_avx512 {
namespace {
#define SPLAT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define SPLAT_LANES 16
#include "splat_loss.inc"
#undef SPLAT_TARGET
#undef SPLAT_LANES
}  // namespace
}  // namespace loss_avx512
#endif

namespace {

RunBand run_band() {
#if SCRIMP_X86
    switch (simd()) {
        case Simd::avx512: return loss_avx512::run;
        case Simd::avx2: return loss_avx2::run;
        default: break;
    }
#endif
    return loss_generic::run;
}

// As many bands as threads: each reads some rows of its neighbours'. Sums are by row, so their order is not the bands'.
nb::tuple image_loss(std::uintptr_t rendered, std::uintptr_t target, std::uintptr_t mask, Index height, Index width,
                     float absolute, float similar, std::uintptr_t to) {
    const Pictures images = {reinterpret_cast<const float *>(rendered),
                             reinterpret_cast<const float *>(target),
                             reinterpret_cast<const float *>(mask),
                             height, width, absolute, similar};
    std::vector<double> differences(static_cast<std::size_t>(height)), losses(differences);
    double difference = 0, loss = 0;
    {
        nb::gil_scoped_release released;
#ifdef _OPENMP
        const Index bands = std::clamp<Index>(height / 32, 1, omp_get_max_threads());
#else
        const Index bands = 1;
#endif
        const RunBand run = run_band();
        for_units(bands, [&](Index band) {
            run(images, height * band / bands, height * (band + 1) / bands, differences.data(), losses.data(),
                reinterpret_cast<float *>(to));
        });
        for (Index y = 0; y < height; ++y) difference += differences[y], loss += losses[y];
    }
    return nb::make_tuple(difference, loss);
}

}  // namespace

void bind_splat_loss(nb::module_ &module) { module.def("splat_image_loss", &image_loss); }
#else
void bind_splat_loss(nb::module_ &) {}
#endif

}  // namespace scrimp
