#include "tiles.hpp"

#include "simd.hpp"

#if SCRIMP_X86
#include <immintrin.h>
#endif

namespace scrimp {

#if defined(__GNUC__)
namespace generic {
namespace {
#define TILE_TARGET
#define TILE_LANES 4
#define TILE_EXCEEDS(x, y) (((x)[0] > (y)[0]) | ((x)[1] > (y)[1]) << 1 | ((x)[2] > (y)[2]) << 2 | ((x)[3] > (y)[3]) << 3)
#define TILE_WIDE 2
#define TILE_TALL 6
#include "tiles.inc"
#undef TILE_TARGET
#undef TILE_LANES
#undef TILE_EXCEEDS
}  // namespace
}  // namespace generic

#if SCRIMP_X86
namespace avx2 {
namespace {
#define TILE_TARGET __attribute__((target("avx2,fma,popcnt")))
#define TILE_LANES 8
#define TILE_EXCEEDS(x, y) _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(y), _CMP_GT_OQ))
#include "tiles.inc"
#undef TILE_TARGET
#undef TILE_LANES
#undef TILE_EXCEEDS
#undef TILE_WIDE
#undef TILE_TALL
}  // namespace
}  // namespace avx2

namespace avx512 {
namespace {
#define TILE_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")))
#define TILE_LANES 16
#define TILE_EXCEEDS(x, y) _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_loadu_ps(y), _CMP_GT_OQ)
#define TILE_WIDE 4
#define TILE_TALL 6
#include "tiles.inc"

// Eight codes a register; a register of (bits << 32 | centroid) keeps the nearest, the first one on a tie.
__attribute__((target("avx512f,avx512vpopcntdq"))) bool nearest_counted(const std::uint64_t *codes,
                                                                        std::ptrdiff_t count,
                                                                        const std::uint64_t *centroids,
                                                                        std::ptrdiff_t clusters, std::int32_t *best) {
    typedef std::uint64_t Codes __attribute__((vector_size(64)));
    typedef std::int32_t Places __attribute__((vector_size(32)));
    constexpr int across = 4;
    bool moved = false;
    std::ptrdiff_t i = 0;
    for (; i + 8 * across <= count; i += 8 * across) {
        Codes own[across], least[across];
        __builtin_memcpy(own, codes + i, sizeof own);
        for (int u = 0; u < across; ++u) least[u] = ~Codes{};
        for (std::ptrdiff_t j = 0; j < clusters; ++j) {
            const Codes other = Codes{} + centroids[j], tag = Codes{} + static_cast<std::uint64_t>(j);
            for (int u = 0; u < across; ++u) {
                const Codes rank = ((Codes)_mm512_popcnt_epi64((__m512i)(own[u] ^ other)) << 32) | tag;
                least[u] = rank < least[u] ? rank : least[u];
            }
        }
        for (int u = 0; u < across; ++u) {
            const Places found = __builtin_convertvector(least[u], Places);
            moved |= __builtin_memcmp(best + i + 8 * u, &found, sizeof found) != 0;
            __builtin_memcpy(best + i + 8 * u, &found, sizeof found);
        }
    }
    return nearest_codes(codes + i, count - i, centroids, clusters, best + i) || moved;
}

constexpr Tiles counted = {gemm,       column_max, exp_columns, softmax_rows, pull_columns,
                           pull_rows,  softmax_masked, exp_masked,  pull_masked,  dot,
                           add_scaled, scaled_sum, sign_bits,   row_argmax,   nearest_counted};
}  // namespace
}  // namespace avx512
#endif

bool has_tiles() { return true; }

const Tiles &tiles() {
#if SCRIMP_X86
    static const bool counts = __builtin_cpu_supports("avx512vpopcntdq");
    switch (simd()) {
        case Simd::avx512: return counts ? avx512::counted : avx512::table;
        case Simd::avx2: return avx2::table;
        default: break;
    }
#endif
    return generic::table;
}
#else
bool has_tiles() { return false; }
const Tiles &tiles() {
    static const Tiles none = {};
    return none;
}
#endif

}  // namespace scrimp
