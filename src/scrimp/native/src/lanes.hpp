// Vectors of a chosen number of float lanes, and kernels compiled for several numbers of them.
//
// A kernel is a SCRIMP_BODY template over the lanes. SCRIMP_DISPATCH_LANES compiles it for each instruction set with
// the lanes that set has. Compilers without vector extensions get one lane: the same source, run as scalars.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.hpp"

#if SCRIMP_X86
#define SCRIMP_DISPATCH_LANES(RESULT, NAME, PARAMETERS, ARGUMENTS)                                                  \
    static RESULT NAME##_generic PARAMETERS { return NAME##_body<4> ARGUMENTS; }                                    \
    __attribute__((target("avx2,fma"))) static RESULT NAME##_avx2 PARAMETERS { return NAME##_body<8> ARGUMENTS; }   \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static RESULT NAME##_avx512 PARAMETERS { \
        return NAME##_body<16> ARGUMENTS;                                                                           \
    }                                                                                                               \
    static RESULT NAME PARAMETERS {                                                                                 \
        switch (scrimp::simd()) {                                                                                   \
            case scrimp::Simd::avx512: return NAME##_avx512 ARGUMENTS;                                              \
            case scrimp::Simd::avx2: return NAME##_avx2 ARGUMENTS;                                                  \
            default: return NAME##_generic ARGUMENTS;                                                               \
        }                                                                                                           \
    }
#elif defined(__GNUC__)
#define SCRIMP_DISPATCH_LANES(RESULT, NAME, PARAMETERS, ARGUMENTS) \
    static RESULT NAME PARAMETERS { return NAME##_body<4> ARGUMENTS; }
#else
#define SCRIMP_DISPATCH_LANES(RESULT, NAME, PARAMETERS, ARGUMENTS) \
    static RESULT NAME PARAMETERS { return NAME##_body<1> ARGUMENTS; }
#endif

#if defined(__GNUC__) && !defined(__clang__)
// Vectors are passed between functions that are always inlined: how a call would pass them matters to nobody.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace scrimp {

template <int Lanes>
struct Vector;

template <>
struct Vector<1> {
    using Float = float;
    using Int = std::int32_t;
};

#if defined(__GNUC__)
#define SCRIMP_VECTOR(LANES)                                                       \
    template <>                                                                    \
    struct Vector<LANES> {                                                         \
        typedef float Float __attribute__((vector_size(4 * LANES)));               \
        typedef std::int32_t Int __attribute__((vector_size(4 * LANES)));          \
    };
SCRIMP_VECTOR(4)
SCRIMP_VECTOR(8)
SCRIMP_VECTOR(16)
#undef SCRIMP_VECTOR
#endif

template <int Lanes>
using Floats = typename Vector<Lanes>::Float;
template <int Lanes>
using Ints = typename Vector<Lanes>::Int;

// memcpy, not a cast: user memory is aligned to single floats only. It compiles to one move.
template <int Lanes>
SCRIMP_BODY void load(Floats<Lanes> &to, const float *from) {
    std::memcpy(&to, from, sizeof(to));
}

template <int Lanes>
SCRIMP_BODY void store(float *to, const Floats<Lanes> &from) {
    std::memcpy(to, &from, sizeof(from));
}

template <int Lanes, std::size_t... Lane>
SCRIMP_BODY Ints<Lanes> numbers(std::index_sequence<Lane...>) {
    return Ints<Lanes>{static_cast<std::int32_t>(Lane)...};
}

// 0, 1, 2, ...
template <int Lanes>
SCRIMP_BODY Ints<Lanes> lane_numbers() {
    return numbers<Lanes>(std::make_index_sequence<Lanes>{});
}

// exp(x) for x <= 0, to 2e-7 of its value; from -87 down it stays at exp(-87), above zero. For x > 0 it means nothing.
// exp(x) = 2^n p(x - n log 2) with n the nearest integer to x / log 2 and p of degree 5, fitted to relative error.
template <int Lanes>
SCRIMP_BODY Floats<Lanes> exp_nonpositive(const Floats<Lanes> &x) {
    constexpr float per_log2 = 1.44269504f, log2_high = 0.693145752f, log2_low = 1.42860677e-6f;
    // 1.5 * 2^23 leaves the nearest integer in the low bits of a sum; the 127 is the bias of a float's exponent.
    constexpr float to_integer = 12582912.0f + 127.0f;
    const Floats<Lanes> zero = {}, low = zero - 87.0f;
    const Floats<Lanes> bounded = x < low ? low : x;
    const Floats<Lanes> shifted = bounded * per_log2 + to_integer;
    const Floats<Lanes> count = shifted - to_integer;
    Floats<Lanes> rest = bounded - count * log2_high;
    rest = rest - count * log2_low;
    Floats<Lanes> sum = rest * 8.31252e-3f + 4.189011e-2f;
    sum = sum * rest + 1.6667114e-1f;
    sum = sum * rest + 4.9999232e-1f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    Ints<Lanes> bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = bits << 23;
    Floats<Lanes> power;
    std::memcpy(&power, &bits, sizeof(power));
    return sum * power;
}

#if defined(__clang__)
#define SCRIMP_SHUFFLE(LANES, A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#elif defined(__GNUC__)
#define SCRIMP_SHUFFLE(LANES, A, B, ...) __builtin_shuffle(A, B, Ints<LANES>{__VA_ARGS__})
#endif

#if defined(__GNUC__)
// Exchange with partners Half rows and lanes away: after Half = 1, 2, 4, ... the block is transposed.
template <int Lanes, int Half, std::size_t... Lane>
SCRIMP_BODY void exchange(Floats<Lanes> (&row)[Lanes], std::index_sequence<Lane...>) {
#pragma GCC unroll 16
    for (int upper = 0; upper < Lanes; ++upper) {
        if (upper & Half) continue;
        const Floats<Lanes> a = row[upper], b = row[upper + Half];
        row[upper] = SCRIMP_SHUFFLE(Lanes, a, b, static_cast<int>(Lane & Half ? Lane - Half + Lanes : Lane)...);
        row[upper + Half] = SCRIMP_SHUFFLE(Lanes, a, b, static_cast<int>(Lane & Half ? Lane + Lanes : Lane + Half)...);
    }
}
#endif

template <int Lanes>
SCRIMP_BODY void transpose_block(Floats<Lanes> (&row)[Lanes]) {
#if defined(__GNUC__)
    using All = std::make_index_sequence<Lanes>;
    if constexpr (Lanes >= 2) exchange<Lanes, 1>(row, All{});
    if constexpr (Lanes >= 4) exchange<Lanes, 2>(row, All{});
    if constexpr (Lanes >= 8) exchange<Lanes, 4>(row, All{});
    if constexpr (Lanes >= 16) exchange<Lanes, 8>(row, All{});
#else
    (void)row;
#endif
}

}  // namespace scrimp
