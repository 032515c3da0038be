// Rows of few coefficients along principal axes, turned back: most rows use only the first axes.
#include "range_coder.hpp"

#include <algorithm>

#include "simd.hpp"
#include "units.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr Index most_width = 128, piece = 4096;

SCRIMP_BODY void rotate_piece_body(const RotateShape &shape, Index first, Index end, const std::int32_t *numbers,
                                   float *out) {
    for (Index row = first; row < end; ++row) {
        float sums[most_width] = {};
        for (Index axis = 0; axis < shape.counts[row]; ++axis) {
            const float factor = static_cast<float>(numbers[row * shape.axes + axis]) * shape.steps[row];
            const float *direction = shape.directions + axis * shape.width;
            for (Index place = 0; place < shape.width; ++place) sums[place] += factor * direction[place];
        }
        std::copy_n(sums, shape.width, out + row * shape.width);
    }
}

SCRIMP_DISPATCH(void, rotate_piece,
                (const RotateShape &shape, Index first, Index end, const std::int32_t *numbers, float *out),
                (shape, first, end, numbers, out))

}  // namespace

void rotate_rows(const RotateShape &shape, const std::int32_t *numbers, float *out) {
    for_units((shape.rows + piece - 1) / piece, [&](Index unit) {
        rotate_piece(shape, unit * piece, std::min((unit + 1) * piece, shape.rows), numbers, out);
    });
}

}  // namespace scrimp
