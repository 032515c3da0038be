// The generator philox-1 of NOLA's bases, and the sums of its orthogonal ones.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace scrimp {

// Blocks of a unit of work: their 32-bit words fill whole registers on every processor.
constexpr int philox_lanes = 16;

enum class PhiloxKind : std::uint32_t { numbers = 0, signs = 1 };

// Which vector: the key, and the last three words of the counter.
struct PhiloxVector {
    std::uint32_t key[2], index, stream;
    PhiloxKind kind;
};

// Words of `philox_lanes` blocks from block `first` on: out[4 * block + word].
void philox_words(const PhiloxVector &vector, std::uint32_t first, std::uint32_t *out);

void bind_philox(nanobind::module_ &module);
void bind_orthogonal(nanobind::module_ &module);

}  // namespace scrimp
