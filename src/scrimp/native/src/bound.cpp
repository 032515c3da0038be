#include "bound.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace scrimp {
namespace {

// (1 - p_y)^2 + sum of the other p_j^2, with 1 - p_y summed from the others: no cancellation where p_y is near 1.
float row_bound(const float *logits, std::size_t target, std::size_t classes) {
    const float top = *std::max_element(logits, logits + classes);
    float others = 0.0f, squares = 0.0f;
    for (std::size_t j = 0; j < classes; ++j) {
        if (j == target) continue;
        const float e = std::exp(logits[j] - top);
        others += e;
        squares += e * e;
    }
    const float total = others + std::exp(logits[target] - top);
    return std::sqrt(others * others + squares) / total;
}

}  // namespace

void gradient_norm_bound(const float *logits, const std::int64_t *targets, std::size_t rows, std::size_t classes,
                         std::int64_t ignored, float *out) {
    for (std::size_t row = 0; row < rows; ++row) {
        const std::int64_t target = targets[row];
        if (target == ignored) {
            out[row] = 0.0f;
            continue;
        }
        if (target < 0 || target >= static_cast<std::int64_t>(classes))
            throw std::out_of_range("expected targets from 0 to " + std::to_string(classes - 1) + "; got " +
                                    std::to_string(target) + "; check the labels");
        out[row] = row_bound(logits + row * classes, static_cast<std::size_t>(target), classes);
    }
}

}  // namespace scrimp
