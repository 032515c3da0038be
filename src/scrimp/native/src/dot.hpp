#pragma once

#include <cstddef>

namespace scrimp {

// Sum of a[i] * b[i]. The same bits whatever the instruction set and the number of threads: products are summed in
// a fixed number of lanes within blocks of fixed length, and the blocks in order.
double dot(const float *a, const float *b, std::size_t count);

}  // namespace scrimp
