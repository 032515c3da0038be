#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>

namespace scrimp {

constexpr int loss_reach = 5, loss_taps = 2 * loss_reach + 1, loss_channels = 3;

// Two images [height, width, 3], rows contiguous, and a mask [height, width] that may be absent.
struct Pictures {
    const float *rendered, *target, *mask;
    std::ptrdiff_t height, width;
    float absolute, similar;  // factors of each pixel's |difference| and 1 - SSIM in the loss and its gradient
};

void bind_splat_loss(nanobind::module_ &module);

}  // namespace scrimp
