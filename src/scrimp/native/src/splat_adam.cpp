// Adam for the Gaussians that a view showed: all their fields in one pass, the others left as they are.
#include "splat_adam.hpp"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "simd.hpp"
#include "units.hpp"

namespace nb = nanobind;

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr Index block = 1024;  // Gaussians a unit of work
constexpr Index narrow = 4;    // numbers a row up to which rows are taken together

// One field of the scene, `width` numbers a Gaussian. The corrections of both moments for their start at 0 are in
// `rate` and `least`.
struct AdamField {
    float *values;
    const float *pull;
    float *first, *second;
    Index width;
    float rate, least;
};

struct Decay {
    float first, second, first_rest, second_rest;
};

// The tensors do not overlap: inlined, a function's __restrict is forgotten.
#if defined(__clang__)
#define SCRIMP_APART _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define SCRIMP_APART _Pragma("GCC ivdep")
#else
#define SCRIMP_APART
#endif

// `count` numbers, all of which were seen
SCRIMP_BODY void update(const AdamField &field, const Decay &decay, Index start, Index count) {
    float *__restrict value = field.values + start, *__restrict first = field.first + start;
    float *__restrict second = field.second + start;
    const float *__restrict pull = field.pull + start;
    const float rate = field.rate, least = field.least;
    const Decay by = decay;
    SCRIMP_APART
    for (Index i = 0; i < count; ++i) {
        const float one = by.first * first[i] + by.first_rest * pull[i];
        const float two = by.second * second[i] + by.second_rest * (pull[i] * pull[i]);
        value[i] -= rate * (one / (std::sqrt(two) + least));
        first[i] = one, second[i] = two;
    }
}

// As `update` where `kept`; the others are written as they were. Without a branch, in whole registers.
SCRIMP_BODY void update_kept(const AdamField &field, const Decay &decay, const std::uint32_t *__restrict kept,
                             Index start, Index count) {
    float *__restrict value = field.values + start, *__restrict first = field.first + start;
    float *__restrict second = field.second + start;
    const float *__restrict pull = field.pull + start;
    const float rate = field.rate, least = field.least;
    const Decay by = decay;
    SCRIMP_APART
    for (Index i = 0; i < count; ++i) {
        const float was_one = first[i], was_two = second[i], was = value[i];
        const float one = by.first * was_one + by.first_rest * pull[i];
        const float two = by.second * was_two + by.second_rest * (pull[i] * pull[i]);
        const float now = was - rate * (one / (std::sqrt(two) + least));
        first[i] = kept[i] != 0 ? one : was_one;
        second[i] = kept[i] != 0 ? two : was_two;
        value[i] = kept[i] != 0 ? now : was;
    }
}

// Rows lie far apart: fetch what is wanted soon.
SCRIMP_BODY void fetch(const AdamField &field, Index start) {
#if defined(__GNUC__)
    for (Index i = 0; i < field.width; i += 16) {
        __builtin_prefetch(field.values + start + i, 1);
        __builtin_prefetch(field.pull + start + i);
        __builtin_prefetch(field.first + start + i, 1);
        __builtin_prefetch(field.second + start + i, 1);
    }
#else
    (void)field, (void)start;
#endif
}

SCRIMP_BODY void update_wide(const AdamField &field, const Decay &decay, const std::uint32_t *rows, Index count) {
    for (Index i = 0; i < count; ++i) {
        fetch(field, rows[std::min(i + 4, count - 1)] * field.width);
        update(field, decay, rows[i] * field.width, field.width);
    }
}

SCRIMP_BODY void update_narrow(const AdamField &field, const Decay &decay, const std::uint8_t *seen, Index first,
                               Index rows) {
    std::uint32_t kept[narrow * block];
    for (Index i = 0; i < field.width; ++i)
        for (Index row = 0; row < rows; ++row) kept[row * field.width + i] = seen[first + row];
    update_kept(field, decay, kept, first * field.width, rows * field.width);
}

SCRIMP_BODY void update_block_body(const std::vector<AdamField> &fields, const Decay &decay, const std::uint8_t *seen,
                                   Index first, Index end) {
    std::uint32_t rows[block];
    Index count = 0;
    for (Index row = first; row < end; ++row) {
        rows[count] = static_cast<std::uint32_t>(row);
        count += seen[row] != 0;
    }
    for (const AdamField &field : fields) {
        if (field.width > narrow)
            update_wide(field, decay, rows, count);
        else if (count > 0)
            update_narrow(field, decay, seen, first, end - first);
    }
}

SCRIMP_DISPATCH(void, update_block,
                (const std::vector<AdamField> &fields, const Decay &decay, const std::uint8_t *seen, Index first,
                 Index end),
                (fields, decay, seen, first, end))

// `addresses`: of each field its values, gradient and moments; `numbers`: of each its width, rate and least denominator
void adam(Index count, std::uintptr_t seen, const std::vector<std::uintptr_t> &addresses,
          const std::vector<double> &numbers, double first_decay, double second_decay) {
    const std::size_t fields = numbers.size() / 3;
    if (numbers.size() != 3 * fields || addresses.size() != 4 * fields)
        throw std::invalid_argument("expected four addresses and three numbers a field");
    std::vector<AdamField> all;
    for (std::size_t i = 0; i < fields; ++i) {
        const auto at = [&](std::size_t part) { return reinterpret_cast<float *>(addresses[4 * i + part]); };
        all.push_back({at(0), at(1), at(2), at(3), static_cast<Index>(numbers[3 * i]),
                       static_cast<float>(numbers[3 * i + 1]), static_cast<float>(numbers[3 * i + 2])});
    }
    const Decay decay = {static_cast<float>(first_decay), static_cast<float>(second_decay),
                         static_cast<float>(1 - first_decay), static_cast<float>(1 - second_decay)};
    nb::gil_scoped_release released;
    for_units((count + block - 1) / block, [&](Index unit) {
        update_block(all, decay, reinterpret_cast<const std::uint8_t *>(seen), unit * block,
                     std::min(count, (unit + 1) * block));
    });
}

}  // namespace

void bind_splat_adam(nb::module_ &module) { module.def("splat_adam", &adam); }

}  // namespace scrimp
