// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), sixteen blocks at a time. Integers only: every instruction set and
// every number of threads gives the same bits, those of the specification in docs/nola-generator.md.
#include "philox.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "simd.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr int lanes = philox_lanes;
constexpr int words = 4 * lanes;
constexpr Index piece = 64;  // units a thread takes at once

// All rounds of a lane at once: unrolled, they leave the compiler one loop over lanes, with no state in memory.
SCRIMP_BODY void words_here_body(const PhiloxVector &vector, std::uint32_t first, std::uint32_t *out) {
    std::uint32_t made[4][lanes];
    for (int lane = 0; lane < lanes; ++lane) {
        std::uint32_t c0 = first + static_cast<std::uint32_t>(lane), c1 = vector.index, c2 = vector.stream;
        std::uint32_t c3 = static_cast<std::uint32_t>(vector.kind), key0 = vector.key[0], key1 = vector.key[1];
#if defined(__GNUC__)
#pragma GCC unroll 10
#endif
        for (int round = 0; round < 10; ++round) {
            const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c0, product1 = std::uint64_t{0xCD9E8D57u} * c2;
            c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ key0;
            c1 = static_cast<std::uint32_t>(product1);
            c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ key1;
            c3 = static_cast<std::uint32_t>(product0);
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        made[0][lane] = c0;
        made[1][lane] = c1;
        made[2][lane] = c2;
        made[3][lane] = c3;
    }
    for (int lane = 0; lane < lanes; ++lane)
        for (int word = 0; word < 4; ++word) out[4 * lane + word] = made[word][lane];
}

// Units [begin, end) of `words` numbers each: the top 24 bits of a word as a signed multiple of 2^-23.
SCRIMP_BODY void uniform_units_body(const PhiloxVector &vector, Index begin, Index end, Index count, float *out) {
    for (Index unit = begin; unit < end; ++unit) {
        std::uint32_t drawn[words];
        float made[words];
        words_here_body(vector, static_cast<std::uint32_t>(unit * lanes), drawn);
        for (int word = 0; word < words; ++word)
            made[word] = static_cast<float>(static_cast<std::int32_t>(drawn[word]) >> 8) * 0x1p-23f;
        const Index here = std::min<Index>(words, count - unit * words);
        std::memcpy(out + unit * words, made, static_cast<std::size_t>(here) * sizeof(float));
    }
}

// Units of 32 * `words` signs each: bit b of a word, lowest first; a set bit is -1.
SCRIMP_BODY void sign_units_body(const PhiloxVector &vector, Index begin, Index end, Index count, std::int8_t *out) {
    for (Index unit = begin; unit < end; ++unit) {
        std::uint32_t drawn[words];
        std::int8_t made[32 * words];
        words_here_body(vector, static_cast<std::uint32_t>(unit * lanes), drawn);
        for (int word = 0; word < words; ++word)
            for (int bit = 0; bit < 32; ++bit)
                made[32 * word + bit] = static_cast<std::int8_t>(1 - 2 * static_cast<int>(drawn[word] >> bit & 1u));
        const Index here = std::min<Index>(32 * words, count - unit * 32 * words);
        std::memcpy(out + unit * 32 * words, made, static_cast<std::size_t>(here));
    }
}

SCRIMP_DISPATCH(void, words_here, (const PhiloxVector &vector, std::uint32_t first, std::uint32_t *out),
                (vector, first, out))
SCRIMP_DISPATCH(void, uniform_units, (const PhiloxVector &vector, Index begin, Index end, Index count, float *out),
                (vector, begin, end, count, out))
SCRIMP_DISPATCH(void, sign_units, (const PhiloxVector &vector, Index begin, Index end, Index count, std::int8_t *out),
                (vector, begin, end, count, out))

// Rows of `count` numbers, `unit` of them a unit of work.
template <class Number, class Fill>
void fill(PhiloxVector vector, Index rows, Index count, Index unit, Number *out, Fill fill_units) {
    const Index units = (count + unit - 1) / unit, pieces = (units + piece - 1) / piece;
    const bool parallel = rows * units > 4 * piece;
    (void)parallel;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (Index task = 0; task < rows * pieces; ++task) {
        const Index row = task / pieces, begin = task % pieces * piece;
        PhiloxVector here = vector;
        here.index += static_cast<std::uint32_t>(row);
        fill_units(here, begin, std::min(begin + piece, units), count, out + row * count);
    }
}

// out: rows * count numbers at this address; the caller has checked the ranges.
void philox_uniform(std::uint32_t low, std::uint32_t high, std::uint32_t index, std::uint32_t stream, Index rows,
                    Index count, std::uintptr_t out) {
    nanobind::gil_scoped_release released;
    fill({{low, high}, index, stream, PhiloxKind::numbers}, rows, count, words, reinterpret_cast<float *>(out),
         uniform_units);
}

void philox_signs(std::uint32_t low, std::uint32_t high, std::uint32_t index, std::uint32_t stream, Index rows,
                  Index count, std::uintptr_t out) {
    nanobind::gil_scoped_release released;
    fill({{low, high}, index, stream, PhiloxKind::signs}, rows, count, 32 * words,
         reinterpret_cast<std::int8_t *>(out), sign_units);
}

}  // namespace

void philox_words(const PhiloxVector &vector, std::uint32_t first, std::uint32_t *out) {
    words_here(vector, first, out);
}

void bind_philox(nanobind::module_ &module) {
    module.def("philox_uniform", &philox_uniform);
    module.def("philox_signs", &philox_signs);
}

}  // namespace scrimp
