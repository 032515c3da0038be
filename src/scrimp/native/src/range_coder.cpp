// Tables of the mixing range coder, and its bindings.
#include "range_coder.hpp"

#include <nanobind/stl/array.h>

#include <cmath>

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;
namespace nb = nanobind;

template <class Number>
Number *at(std::uintptr_t address) {
    return reinterpret_cast<Number *>(address);
}

nb::bytes as_bytes(const std::vector<std::uint8_t> &found) {
    return nb::bytes(reinterpret_cast<const char *>(found.data()), found.size());
}

FieldShape fields(Index rows, Index columns, Index shift_columns, std::uintptr_t shifts, std::uintptr_t predicted,
                  std::uintptr_t counts) {
    return {rows, columns, shift_columns, at<const std::uint8_t>(shifts), at<const std::uint8_t>(predicted),
            at<const std::uint8_t>(counts)};
}

nb::bytes range_encode_fields(std::uintptr_t values, Index rows, Index columns, Index shift_columns,
                              std::uintptr_t shifts, std::uintptr_t predicted, std::uintptr_t counts) {
    std::vector<std::uint8_t> found;
    {
        nb::gil_scoped_release released;
        found = encode_fields(fields(rows, columns, shift_columns, shifts, predicted, counts), at<const std::int32_t>(values));
    }
    return as_bytes(found);
}

bool range_decode_fields(nb::bytes data, std::uintptr_t values, Index rows, Index columns, Index shift_columns,
                         std::uintptr_t shifts, std::uintptr_t predicted, std::uintptr_t counts) {
    const auto *bytes = reinterpret_cast<const std::uint8_t *>(data.c_str());
    const std::size_t size = data.size();
    nb::gil_scoped_release released;
    return decode_fields(fields(rows, columns, shift_columns, shifts, predicted, counts), bytes, size, at<std::int32_t>(values));
}

bool range_decode_rotated(nb::bytes data, std::uintptr_t out, Index rows, Index columns, Index width,
                          std::uintptr_t shifts, std::uintptr_t counts, std::uintptr_t steps,
                          std::uintptr_t directions) {
    const auto *bytes = reinterpret_cast<const std::uint8_t *>(data.c_str());
    const std::size_t size = data.size();
    nb::gil_scoped_release released;
    const std::vector<std::uint8_t> plain(static_cast<std::size_t>(columns), 0);
    const FieldShape shape{rows, columns, 1, at<const std::uint8_t>(shifts), plain.data(),
                           at<const std::uint8_t>(counts)};
    const RotateShape turn{rows, columns, width, nullptr, at<const float>(steps), at<const float>(directions)};
    return decode_rotated(shape, turn, bytes, size, at<float>(out));
}

nb::bytes range_encode_points(std::uintptr_t points, Index rows, int levels, std::uintptr_t drops) {
    std::vector<std::uint8_t> found;
    {
        nb::gil_scoped_release released;
        found = encode_points({rows, levels, at<const std::uint8_t>(drops)}, at<const std::int32_t>(points));
    }
    return as_bytes(found);
}

bool range_decode_points(nb::bytes data, std::uintptr_t points, Index rows, int levels, std::uintptr_t drops) {
    const auto *bytes = reinterpret_cast<const std::uint8_t *>(data.c_str());
    const std::size_t size = data.size();
    nb::gil_scoped_release released;
    return decode_points({rows, levels, at<const std::uint8_t>(drops)}, bytes, size, at<std::int32_t>(points));
}

void range_rotate_rows(std::uintptr_t numbers, std::uintptr_t out, Index rows, Index axes, Index width,
                       std::uintptr_t counts, std::uintptr_t steps, std::uintptr_t directions) {
    nb::gil_scoped_release released;
    const RotateShape shape{rows, axes, width, at<const std::uint8_t>(counts), at<const float>(steps),
                            at<const float>(directions)};
    rotate_rows(shape, at<const std::int32_t>(numbers), at<float>(out));
}

void range_octaves(std::uintptr_t logs, std::uintptr_t out, Index rows, std::uintptr_t levels,
                   const std::array<int, 4> &steps, std::int64_t limit) {
    nb::gil_scoped_release released;
    const OctaveShape shape{rows, at<const std::uint8_t>(levels), steps[0], steps[1], steps[2], steps[3], limit};
    restore_octaves(shape, at<const std::int32_t>(logs), at<std::int32_t>(out));
}

// One of the functions that turn three whole numbers into three or four
template <void (*restore)(const NumberShape &, float *)>
void range_restore(std::uintptr_t numbers, std::uintptr_t out, Index rows, std::uintptr_t shifts, double step,
                   const std::array<double, 9> &frame) {
    nb::gil_scoped_release released;
    restore({rows, at<const std::int32_t>(numbers), at<const std::uint8_t>(shifts), step, frame.data()}, at<float>(out));
}

}  // namespace

MixTables::MixTables() {
    // No rounding here lies near a tie, so every correct exp and log gives these integers.
    for (int p = 0; p < 4096; ++p)
        stretch[static_cast<std::size_t>(p)] =
            static_cast<std::int32_t>(std::floor(256.0 * std::log((p + 0.5) / (4095.5 - p)) + 0.5));
    for (int logit = -2047; logit <= 2047; ++logit)
        squash[static_cast<std::size_t>(logit + 2047)] =
            static_cast<std::uint32_t>(std::floor(65536.0 / (1.0 + std::exp(-logit / 256.0)) + 0.5));
    for (int seen = 0; seen < 1024; ++seen)
        rate[static_cast<std::size_t>(seen)] = 131072u / static_cast<std::uint32_t>(2 * seen + 3);
}

const MixTables &mix_tables() {
    static const MixTables tables;
    return tables;
}

// Addresses of contiguous arrays the caller has checked: values [rows, columns] and points [rows, 3] int32, steps,
// directions [columns, width] and what is turned [rows, width] float32, all others uint8; counts 0 where there are none. Decoders say whether the bytes were spent exactly.
void bind_range_coder(nb::module_ &module) {
    module.def("range_encode_fields", &range_encode_fields);
    module.def("range_decode_fields", &range_decode_fields);
    module.def("range_decode_rotated", &range_decode_rotated);
    module.def("range_encode_points", &range_encode_points);
    module.def("range_decode_points", &range_decode_points);
    module.def("range_rotate_rows", &range_rotate_rows);
    module.def("range_octaves", &range_octaves);
    module.def("range_quaternions", &range_restore<restore_quaternions>);
    module.def("range_framed", &range_restore<restore_framed>);
    module.def("range_means", &range_restore<restore_means>);
}

}  // namespace scrimp
