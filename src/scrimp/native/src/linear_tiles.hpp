// The tiles of linear attention's passes: where they lie in scratch memory, how they are filled and emptied.
#pragma once

#include <algorithm>

#include "linear_attention.hpp"

namespace scrimp {

// Hands out scratch memory in steps of whole cache lines.
struct Arena {
    float *next;

    float *take(int rows, int columns) {
        float *found = next;
        next += (static_cast<std::size_t>(rows) * columns + 15) / 16 * 16;
        return found;
    }
};

// S as [dim, value dim], Z as [dim], all padded with zeros.
template <int Lanes>
SCRIMP_BODY void load_state(float *kv, float *normaliser, const State<const float> &from, int dim, int value_dim) {
    const int wide = padded<Lanes>(value_dim);
    std::fill(kv, kv + padded<Lanes>(dim) * wide, 0.0f);
    std::fill(normaliser, normaliser + padded<Lanes>(dim), 0.0f);
    if (from.kv == nullptr) return;
    for (int row = 0; row < dim; ++row) std::copy_n(from.kv + row * value_dim, value_dim, kv + row * wide);
    std::copy_n(from.normaliser, dim, normaliser);
}

template <int Lanes>
SCRIMP_BODY void save_state(const State<float> &to, const float *kv, const float *normaliser, int dim, int value_dim) {
    if (to.kv == nullptr) return;
    const int wide = padded<Lanes>(value_dim);
    for (int row = 0; row < dim; ++row) std::copy_n(kv + row * wide, value_dim, to.kv + row * value_dim);
    std::copy_n(normaliser, dim, to.normaliser);
}

// S^T with Z as the row below it: [value dim + 1, dim].
template <int Lanes>
SCRIMP_BODY void transpose_state(float *out, const float *kv, const float *normaliser, int dim, int value_dim) {
    const int tall = padded<Lanes>(dim), wide = padded<Lanes>(value_dim);
    transpose<Lanes>(out, tall, kv, wide, tall, wide);
    std::copy_n(normaliser, tall, out + value_dim * tall);
}

// Ask for the rows of an item that comes next, of the keys' heads or of the queries'.
SCRIMP_BODY void expect_keys(const Attention &a, const Place &at) {
    expect_rows(a.key.at(at), a.key.token, at.rows, a.dim);
    expect_rows(a.value.at(at), a.value.token, at.rows, a.value_dim);
}

SCRIMP_BODY void expect_queries(const Attention &a, const Field<const float> &field, const Place &at, int dim) {
    for (int member = 0; member < a.group(); ++member)
        expect_rows(field.at(queries(a, at, member)), field.token, at.rows, dim);
}

}  // namespace scrimp
