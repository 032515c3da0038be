#pragma once

#include <cstddef>
#include <cstdint>

namespace scrimp {

// out[i] = ||softmax(logits[i]) - onehot(targets[i])||_2; 0 where targets[i] == ignored. Rows lie one after the other.
// Throws std::out_of_range for a target outside [0, classes).
void gradient_norm_bound(const float *logits, const std::int64_t *targets, std::size_t rows, std::size_t classes,
                         std::int64_t ignored, float *out);

}  // namespace scrimp
