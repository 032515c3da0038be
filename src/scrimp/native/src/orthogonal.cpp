// Sums over NOLA's orthogonal bases and their transpose: signs drawn where they are used, and a fast Hadamard
// transform of each block in between. Every instruction set and number of threads gives the same bits: a butterfly
// adds the same pairs in the same order whatever the width of a register, and pieces are summed in order.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.hpp"
#include "philox.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr Index drawn_signs = 128 * philox_lanes;  // signs of one draw
constexpr Index widest = 16;                       // lanes of the widest register
constexpr Index most_parts = 64;                   // of a gradient's sum

// bases coefficients, blocks of length (a power of two from 2), count numbers of the sum.
struct Plan {
    PhiloxVector outer, inner;
    Index bases, length, count;
    // A block, or as many as fill a register.
    Index width() const { return std::max(length, widest); }
    Index unit() const { return std::max(length, drawn_signs); }
    Index units() const { return (count + unit() - 1) / unit(); }
};

struct Room {
    std::vector<float> row;
    std::vector<std::uint32_t> outer, inner;
    explicit Room(const Plan &plan)
        : row(static_cast<std::size_t>(plan.width())), outer(static_cast<std::size_t>(plan.unit() / 32)),
          inner(outer.size()) {}
};

void draw(const PhiloxVector &vector, Index unit, Index per_unit, std::uint32_t *bits) {
    for (Index at = 0; at < per_unit; at += drawn_signs)
        philox_words(vector, static_cast<std::uint32_t>((unit * per_unit + at) / 128), bits + at / 32);
}

// Numbers [at, at + Lanes) with the signs of their bits.
template <int Lanes>
SCRIMP_BODY Floats<Lanes> signed_by(const Floats<Lanes> &numbers, const std::uint32_t *bits, Index at) {
    const Ints<Lanes> zero = {};
    const Ints<Lanes> word = zero + static_cast<std::int32_t>(bits[at / 32] >> (at % 32));
    Ints<Lanes> raw;
    std::memcpy(&raw, &numbers, sizeof(raw));
    raw = raw ^ (((word >> lane_numbers<Lanes>()) & 1) << 31);
    Floats<Lanes> changed;
    std::memcpy(&changed, &raw, sizeof(changed));
    return changed;
}

#if defined(__GNUC__)
// Lanes l and l ^ Half become their sum and their difference.
template <int Lanes, int Half, std::size_t... Lane>
SCRIMP_BODY void butterfly(Floats<Lanes> &x, std::index_sequence<Lane...>) {
    const Ints<Lanes> flips = {(Lane & Half ? static_cast<std::int32_t>(0x80000000u) : 0)...};
    const Floats<Lanes> partner = SCRIMP_SHUFFLE(Lanes, x, x, static_cast<int>(Lane ^ Half)...);
    Ints<Lanes> raw;
    std::memcpy(&raw, &x, sizeof(raw));
    raw = raw ^ flips;
    std::memcpy(&x, &raw, sizeof(x));
    x = partner + x;
}
#endif

template <int Lanes>
SCRIMP_BODY void within(Floats<Lanes> &x, Index length) {
#if defined(__GNUC__)
    using All = std::make_index_sequence<Lanes>;
    if constexpr (Lanes >= 2) if (length >= 2) butterfly<Lanes, 1>(x, All{});
    if constexpr (Lanes >= 4) if (length >= 4) butterfly<Lanes, 2>(x, All{});
    if constexpr (Lanes >= 8) if (length >= 8) butterfly<Lanes, 4>(x, All{});
    if constexpr (Lanes >= 16) if (length >= 16) butterfly<Lanes, 8>(x, All{});
#else
    (void)x;
    (void)length;
#endif
}

// The butterflies between registers, of each block of the row.
template <int Lanes>
SCRIMP_BODY void across(float *row, Index width, Index length) {
    for (Index half = Lanes; half < length; half *= 2)
        for (Index top = 0; top < width; top += 2 * half)
            for (Index at = top; at < top + half; at += Lanes) {
                Floats<Lanes> a, b;
                load<Lanes>(a, row + at);
                load<Lanes>(b, row + at + half);
                store<Lanes>(row + at, a + b);
                store<Lanes>(row + at + half, a - b);
            }
}

// tile [width]: the coefficients, zeros up to the length, and again for each further block of the row.
template <int Lanes>
SCRIMP_BODY void sum_unit_body(const Plan &plan, const float *tile, Index unit, Room &room, float *out) {
    const Index first = unit * plan.unit(), end = std::min(plan.unit(), plan.count - first), width = plan.width();
    float *row = room.row.data();
    for (Index start = 0; start < end; start += width) {
        for (Index at = 0; at < width; at += Lanes) {
            Floats<Lanes> x;
            load<Lanes>(x, tile + at);
            x = signed_by<Lanes>(x, room.outer.data(), start + at);
            within<Lanes>(x, plan.length);
            store<Lanes>(row + at, x);
        }
        across<Lanes>(row, width, plan.length);
        for (Index at = 0; at < width; at += Lanes) {
            Floats<Lanes> x;
            load<Lanes>(x, row + at);
            store<Lanes>(row + at, signed_by<Lanes>(x, room.inner.data(), start + at));
        }
        const Index here = std::min(width, end - start);
        std::memcpy(out + first + start, row, static_cast<std::size_t>(here) * sizeof(float));
    }
}

// sums [width] += the unit's share of the transpose's product with grad.
template <int Lanes>
SCRIMP_BODY void dot_unit_body(const Plan &plan, const float *grad, Index unit, Room &room, float *sums) {
    const Index first = unit * plan.unit(), end = std::min(plan.unit(), plan.count - first), width = plan.width();
    float *row = room.row.data();
    for (Index start = 0; start < end; start += width) {
        const Index here = std::min(width, end - start);
        std::memcpy(row, grad + first + start, static_cast<std::size_t>(here) * sizeof(float));
        std::fill(row + here, row + width, 0.0f);
        for (Index at = 0; at < width; at += Lanes) {
            Floats<Lanes> x;
            load<Lanes>(x, row + at);
            x = signed_by<Lanes>(x, room.inner.data(), start + at);
            within<Lanes>(x, plan.length);
            store<Lanes>(row + at, x);
        }
        across<Lanes>(row, width, plan.length);
        for (Index at = 0; at < width; at += Lanes) {
            Floats<Lanes> x, sum;
            load<Lanes>(x, row + at);
            load<Lanes>(sum, sums + at);
            store<Lanes>(sums + at, sum + signed_by<Lanes>(x, room.outer.data(), start + at));
        }
    }
}

SCRIMP_DISPATCH_LANES(void, sum_unit, (const Plan &plan, const float *tile, Index unit, Room &room, float *out),
                      (plan, tile, unit, room, out))
SCRIMP_DISPATCH_LANES(void, dot_unit, (const Plan &plan, const float *grad, Index unit, Room &room, float *sums),
                      (plan, grad, unit, room, sums))

Plan plan_of(std::uint32_t low, std::uint32_t high, std::uint32_t stream, Index bases, Index length, Index count) {
    const PhiloxVector outer = {{low, high}, 0, stream, PhiloxKind::signs};
    const PhiloxVector inner = {{low, high}, 1, stream, PhiloxKind::signs};
    return {outer, inner, bases, length, count};
}

// The unit's signs, and what it does with them.
template <class Work>
void with_signs(const Plan &plan, Index unit, Room &room, Work work) {
    draw(plan.outer, unit, plan.unit(), room.outer.data());
    draw(plan.inner, unit, plan.unit(), room.inner.data());
    work();
}

void orthogonal_sum(std::uint32_t low, std::uint32_t high, std::uint32_t stream, std::uintptr_t coefficients,
                    Index bases, Index length, Index count, std::uintptr_t out) {
    nanobind::gil_scoped_release released;
    const Plan plan = plan_of(low, high, stream, bases, length, count);
    const float *given = reinterpret_cast<const float *>(coefficients);
    std::vector<float> tile(static_cast<std::size_t>(plan.width()));
    for (Index start = 0; start < plan.width(); start += length) std::copy_n(given, bases, tile.begin() + start);
    const Index parts = std::min(plan.units(), most_parts);
    const bool parallel = parts > 8;
    (void)parallel;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (Index part = 0; part < parts; ++part) {
        Room room(plan);
        for (Index unit = part * plan.units() / parts; unit < (part + 1) * plan.units() / parts; ++unit)
            with_signs(plan, unit, room,
                       [&] { sum_unit(plan, tile.data(), unit, room, reinterpret_cast<float *>(out)); });
    }
}

void orthogonal_dot(std::uint32_t low, std::uint32_t high, std::uint32_t stream, std::uintptr_t grad, Index count,
                    Index length, Index bases, std::uintptr_t out) {
    nanobind::gil_scoped_release released;
    const Plan plan = plan_of(low, high, stream, bases, length, count);
    const Index width = plan.width(), parts = std::min(plan.units(), most_parts);
    std::vector<float> sums(static_cast<std::size_t>(parts * width));
    const float *given = reinterpret_cast<const float *>(grad);
    const bool parallel = parts > 8;
    (void)parallel;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (Index part = 0; part < parts; ++part) {
        Room room(plan);
        for (Index unit = part * plan.units() / parts; unit < (part + 1) * plan.units() / parts; ++unit)
            with_signs(plan, unit, room, [&] { dot_unit(plan, given, unit, room, sums.data() + part * width); });
    }
    for (Index base = 0; base < bases; ++base) {
        double total = 0.0;
        for (Index at = base; at < parts * width; at += length)
            total += static_cast<double>(sums[static_cast<std::size_t>(at)]);
        reinterpret_cast<float *>(out)[base] = static_cast<float>(total);
    }
}

}  // namespace

void bind_orthogonal(nanobind::module_ &module) {
    module.def("orthogonal_sum", &orthogonal_sum);
    module.def("orthogonal_dot", &orthogonal_dot);
}

}  // namespace scrimp
