#include "dot.hpp"

#include <algorithm>
#include <vector>

#include "simd.hpp"

namespace scrimp {
namespace {

constexpr std::size_t block = 4096;
constexpr std::size_t lanes = 16;

// Without -ffast-math a single running sum may not be reordered into vector lanes, so the lanes are written out.
SCRIMP_BODY float dot_block_body(const float *a, const float *b, std::size_t count) {
    float sums[lanes] = {};
    const std::size_t whole = count - count % lanes;
    for (std::size_t start = 0; start < whole; start += lanes)
        for (std::size_t lane = 0; lane < lanes; ++lane) sums[lane] += a[start + lane] * b[start + lane];
    for (std::size_t index = whole; index < count; ++index) sums[index - whole] += a[index] * b[index];
    for (std::size_t half = lanes / 2; half > 0; half /= 2)
        for (std::size_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

SCRIMP_DISPATCH(float, dot_block, (const float *a, const float *b, std::size_t count), (a, b, count))

}  // namespace

double dot(const float *a, const float *b, std::size_t count) {
    const std::ptrdiff_t blocks = static_cast<std::ptrdiff_t>((count + block - 1) / block);
    std::vector<float> sums(static_cast<std::size_t>(blocks));
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (blocks > 16)
#endif
    for (std::ptrdiff_t index = 0; index < blocks; ++index) {
        const std::size_t start = static_cast<std::size_t>(index) * block;
        sums[static_cast<std::size_t>(index)] = dot_block(a + start, b + start, std::min(block, count - start));
    }
    double total = 0.0;
    for (const float sum : sums) total += sum;
    return total;
}

}  // namespace scrimp
