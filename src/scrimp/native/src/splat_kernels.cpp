// The bodies of the Gaussian rasteriser, compiled once for each instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.hpp"
#include "splat_frame.hpp"

#if SCRIMP_X86
#include <immintrin.h>
#endif

namespace scrimp {

#if defined(__GNUC__)
namespace generic {
namespace {
#define SPLAT_TARGET
#define SPLAT_LANES 4
#if SCRIMP_X86
#define SPLAT_BITS(mask) static_cast<std::uint32_t>(_mm_movemask_ps((__m128)(mask)))
#define SPLAT_SQRT(x) ((Floats)_mm_sqrt_ps((__m128)(x)))
#else
#define SPLAT_BITS(mask) lane_bits(mask)
#define SPLAT_SQRT(x) square_root(x)
#endif
#include "splat_kernels.inc"
#undef SPLAT_TARGET
#undef SPLAT_LANES
#undef SPLAT_BITS
#undef SPLAT_SQRT
}  // namespace
}  // namespace generic

#if SCRIMP_X86
namespace avx2 {
namespace {
#define SPLAT_TARGET __attribute__((target("avx2,fma")))
#define SPLAT_LANES 8
#define SPLAT_BITS(mask) static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)(mask)))
#define SPLAT_SQRT(x) ((Floats)_mm256_sqrt_ps((__m256)(x)))
#include "splat_kernels.inc"
#undef SPLAT_TARGET
}  // namespace
}  // namespace avx2

// Eight lanes here too: most Gaussians reach over few pixels, and sixteen would be half empty.
namespace avx512 {
namespace {
#define SPLAT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include "splat_kernels.inc"
#undef SPLAT_TARGET
#undef SPLAT_LANES
#undef SPLAT_BITS
#undef SPLAT_SQRT
}  // namespace
}  // namespace avx512
#endif

const SplatKernels &splat_kernels() {
#if SCRIMP_X86
    switch (simd()) {
        case Simd::avx512: return avx512::table;
        case Simd::avx2: return avx2::table;
        default: break;
    }
#endif
    return generic::table;
}
#else
const SplatKernels &splat_kernels() {
    static const SplatKernels none = {};
    return none;
}
#endif

}  // namespace scrimp
