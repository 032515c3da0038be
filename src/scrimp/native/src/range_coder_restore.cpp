// What whole numbers stand for: each loop does in one pass what torch takes many for. Twins: scrimp.splats.codec.
#include "range_coder.hpp"

#include <algorithm>
#include <cmath>

#include "simd.hpp"
#include "units.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr Index piece = 8192;

SCRIMP_BODY void octaves_body(const OctaveShape &shape, Index first, Index end, const std::int32_t *logs,
                              std::int32_t *out) {
    for (Index row = first; row < end; ++row) {
        const int level = shape.levels[row];
        const std::int64_t dark = std::int64_t{shape.opacity} << std::min(level, shape.opacity_cap);
        const std::int64_t step = std::int64_t{shape.scale} << std::min(level, shape.scale_cap);
        const std::int32_t *from = logs + 4 * row;
        const std::int64_t longest = from[1], middle = longest - from[2], shortest = middle - from[3];
        const std::int64_t found[4] = {from[0] * dark, longest * step, middle * step, shortest * step};
        for (int field = 0; field < 4; ++field)
            out[4 * row + field] = static_cast<std::int32_t>(std::clamp(found[field], -shape.limit, shape.limit));
    }
}

SCRIMP_BODY void quaternions_body(const NumberShape &shape, Index first, Index end, float *out) {
    for (Index row = first; row < end; ++row) {
        const double step = static_cast<double>(1 << shape.shifts[row]);
        const std::int32_t *from = shape.numbers + 3 * row;
        const double x = from[0] * step * shape.step, y = from[1] * step * shape.step, z = from[2] * step * shape.step;
        const double square = x * x + y * y + z * z, rest = std::max(0.0, 1.0 - square);
        const double shorter = 1.0 / std::sqrt(rest + square);
        const double found[4] = {std::sqrt(rest) * shorter, x * shorter, y * shorter, z * shorter};
        for (int field = 0; field < 4; ++field) out[4 * row + field] = static_cast<float>(found[field]);
    }
}

// `frame` holds 3 x 3 numbers: a row of it times each of the three.
SCRIMP_BODY void framed_body(const NumberShape &shape, Index first, Index end, float *out) {
    for (Index row = first; row < end; ++row) {
        const double step = static_cast<double>(1 << shape.shifts[row]);
        const std::int32_t *from = shape.numbers + 3 * row;
        const double a = from[0] * step * shape.step, b = from[1] * step * shape.step, c = from[2] * step * shape.step;
        for (int field = 0; field < 3; ++field)
            out[3 * row + field] = static_cast<float>(a * shape.frame[field] + b * shape.frame[3 + field] +
                                                      c * shape.frame[6 + field]);
    }
}

// Shifts are digits left out: a point that has all of them lies at the lower corner of its cell, not in its middle.
SCRIMP_BODY void means_body(const NumberShape &shape, Index first, Index end, float *out) {
    for (Index row = first; row < end; ++row) {
        const double middle = shape.shifts[row] ? 0.0 : 0.5;
        for (int axis = 0; axis < 3; ++axis)
            out[3 * row + axis] =
                static_cast<float>(shape.frame[axis] + (shape.numbers[3 * row + axis] + middle) * shape.step);
    }
}

SCRIMP_DISPATCH(void, octaves,
                (const OctaveShape &shape, Index first, Index end, const std::int32_t *logs, std::int32_t *out),
                (shape, first, end, logs, out))
SCRIMP_DISPATCH(void, quaternions, (const NumberShape &shape, Index first, Index end, float *out),
                (shape, first, end, out))
SCRIMP_DISPATCH(void, framed, (const NumberShape &shape, Index first, Index end, float *out), (shape, first, end, out))
SCRIMP_DISPATCH(void, means, (const NumberShape &shape, Index first, Index end, float *out), (shape, first, end, out))

template <class Body>
void by_pieces(Index rows, const Body &body) {
    for_units((rows + piece - 1) / piece,
              [&](Index unit) { body(unit * piece, std::min((unit + 1) * piece, rows)); });
}

}  // namespace

void restore_octaves(const OctaveShape &shape, const std::int32_t *logs, std::int32_t *out) {
    by_pieces(shape.rows, [&](Index first, Index end) { octaves(shape, first, end, logs, out); });
}

void restore_quaternions(const NumberShape &shape, float *out) {
    by_pieces(shape.rows, [&](Index first, Index end) { quaternions(shape, first, end, out); });
}

void restore_framed(const NumberShape &shape, float *out) {
    by_pieces(shape.rows, [&](Index first, Index end) { framed(shape, first, end, out); });
}

void restore_means(const NumberShape &shape, float *out) {
    by_pieces(shape.rows, [&](Index first, Index end) { means(shape, first, end, out); });
}

}  // namespace scrimp
