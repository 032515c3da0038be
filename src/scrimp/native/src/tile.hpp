// Products and copies of small row-major float matrices that lie in scratch memory.
//
// A tile's columns are padded to whole vectors and its rows to whole vectors as well, with zeros where they meet a
// sum. One product form serves every equation: the left factor is read one number at a time and spread over the lanes,
// the right factor and the result are read and written by rows. What is needed crosswise is transposed once.
#pragma once

#include "lanes.hpp"

namespace scrimp {

using Stride = std::ptrdiff_t;

// Numbers the caller may have to map while they are copied: what the feature map of linear attention is.
enum class Map : int { identity = 0, elu_plus_one = 1, relu = 2 };

// Which depths meet a result row: in causal attention a triangle's other half is skipped, not multiplied by zeros.
enum class Reach { whole, to_row, from_row };

// left[row, p] right[p, column], summed over p.
struct Term {
    const float *left;
    Stride left_stride;
    const float *right;
    Stride right_stride;
    int depth;
    Reach reach = Reach::whole;
};

// Rows and vectors of one register block: as many sums as the registers hold beside the factors.
template <int Lanes>
struct Block {
    static constexpr int rows = Lanes == 16 ? 8 : 4, vectors = 2;
};

// A count of rows or columns, rounded up to whole vectors and whole register blocks.
template <int Lanes>
constexpr int padded(int count) {
    constexpr int unit = Lanes > Block<Lanes>::rows ? Lanes : Block<Lanes>::rows;
    return (count + unit - 1) / unit * unit;
}

template <int Lanes, int Rows, int Vectors>
SCRIMP_BODY void add_term(Floats<Lanes> (&sums)[Rows][Vectors], const Term &term, int row, int column) {
    const int from = term.reach == Reach::from_row ? row : 0;
    const int to = term.reach == Reach::to_row && row + Rows < term.depth ? row + Rows : term.depth;
    const float *left = term.left + row * term.left_stride;
    const float *right = term.right + column + from * term.right_stride;
    for (int p = from; p < to; ++p, right += term.right_stride) {
        Floats<Lanes> line[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) load<Lanes>(line[v], right + v * Lanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const float factor = left[r * term.left_stride + p];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sums[r][v] += factor * line[v];
        }
    }
}

template <int Lanes, int Vectors, int Terms>
SCRIMP_BODY void product_block(float *out, Stride stride, const Term (&terms)[Terms], int row, int column, bool add) {
    constexpr int rows = Block<Lanes>::rows;
    Floats<Lanes> sums[rows][Vectors] = {};
    float *corner = out + row * stride + column;
    if (add)
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) load<Lanes>(sums[r][v], corner + r * stride + v * Lanes);
#pragma GCC unroll 2
    for (int term = 0; term < Terms; ++term) add_term<Lanes>(sums, terms[term], row, column);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store<Lanes>(corner + r * stride + v * Lanes, sums[r][v]);
}

// out[rows, columns] = sum of the terms, or += with `add`. Rows and columns are padded counts. A panel of columns is
// finished before the next: the right factor's part of it stays in the first-level cache while the rows pass by.
template <int Lanes, int Terms>
SCRIMP_BODY void product(float *out, Stride stride, int rows, int columns, const Term (&terms)[Terms],
                         bool add = false) {
    constexpr int step = Block<Lanes>::rows, wide = Block<Lanes>::vectors * Lanes;
    int column = 0;
    for (; column + wide <= columns; column += wide)
        for (int row = 0; row < rows; row += step)
            product_block<Lanes, Block<Lanes>::vectors>(out, stride, terms, row, column, add);
    for (; column < columns; column += Lanes)
        for (int row = 0; row < rows; row += step) product_block<Lanes, 1>(out, stride, terms, row, column, add);
}

// Zeros right of the diagonal (lower) or left of it, in the vectors that the diagonal's register blocks cross.
template <int Lanes, bool Lower>
SCRIMP_BODY void cut_triangle(float *out, Stride stride, int size) {
    constexpr int step = Block<Lanes>::rows;
    for (int row = 0; row < size; ++row) {
        const int block = row / step * step;
        for (int column = block / Lanes * Lanes; column < block + step; column += Lanes) {
            float *place = out + row * stride + column;
            Floats<Lanes> line;
            load<Lanes>(line, place);
            const auto kept = Lower ? lane_numbers<Lanes>() <= row - column : lane_numbers<Lanes>() >= row - column;
            store<Lanes>(place, kept ? line : Floats<Lanes>{});
        }
    }
}

// out = the term's lower or upper triangle, diagonal included, [size, size]. Beyond the blocks that the diagonal
// crosses the other half is left unwritten: products reach it with Reach::to_row or Reach::from_row and never read it.
template <int Lanes, bool Lower>
SCRIMP_BODY void triangle(float *out, Stride stride, int size, const Term &term) {
    constexpr int step = Block<Lanes>::rows, wide = Block<Lanes>::vectors * Lanes;
    const Term terms[1] = {term};
    for (int row = 0; row < size; row += step) {
        int column = Lower ? 0 : row / Lanes * Lanes;
        const int end = Lower ? (row + step + Lanes - 1) / Lanes * Lanes : size;
        for (; column + wide <= end; column += wide)
            product_block<Lanes, Block<Lanes>::vectors>(out, stride, terms, row, column, false);
        for (; column < end; column += Lanes) product_block<Lanes, 1>(out, stride, terms, row, column, false);
    }
    cut_triangle<Lanes, Lower>(out, stride, size);
}

// out[columns, rows] = in[rows, columns] transposed; both counts padded.
template <int Lanes>
SCRIMP_BODY void transpose(float *out, Stride out_stride, const float *in, Stride in_stride, int rows, int columns) {
    for (int row = 0; row < rows; row += Lanes)
        for (int column = 0; column < columns; column += Lanes) {
            Floats<Lanes> block[Lanes];
#pragma GCC unroll 16
            for (int r = 0; r < Lanes; ++r) load<Lanes>(block[r], in + (row + r) * in_stride + column);
            transpose_block<Lanes>(block);
#pragma GCC unroll 16
            for (int r = 0; r < Lanes; ++r) store<Lanes>(out + (column + r) * out_stride + row, block[r]);
        }
}

// out[row] = sum of the lanes of lines[row, Lanes]; rows padded.
template <int Lanes>
SCRIMP_BODY void sum_lanes(float *out, const float *lines, int rows) {
    for (int row = 0; row < rows; row += Lanes) {
        Floats<Lanes> block[Lanes];
#pragma GCC unroll 16
        for (int r = 0; r < Lanes; ++r) load<Lanes>(block[r], lines + (row + r) * Lanes);
        transpose_block<Lanes>(block);
        Floats<Lanes> sum = block[0];
#pragma GCC unroll 16
        for (int r = 1; r < Lanes; ++r) sum += block[r];
        store<Lanes>(out + row, sum);
    }
}

// out[column] += sum over rows of weight[row] in[row, column]; without weights every row counts once.
template <int Lanes>
SCRIMP_BODY void add_rows(float *out, const float *in, Stride stride, int rows, int columns, const float *weights) {
    for (int column = 0; column < columns; column += Lanes) {
        Floats<Lanes> sum, line;
        load<Lanes>(sum, out + column);
        for (int row = 0; row < rows; ++row) {
            load<Lanes>(line, in + row * stride + column);
            sum += weights ? weights[row] * line : line;
        }
        store<Lanes>(out + column, sum);
    }
}

template <int Lanes, Map map>
SCRIMP_BODY Floats<Lanes> mapped(const Floats<Lanes> &x) {
    const Floats<Lanes> zero = {};
    if constexpr (map == Map::relu) return x < zero ? zero : x;
    if constexpr (map == Map::elu_plus_one) {
        const Floats<Lanes> positive = x + 1.0f, negative = exp_nonpositive<Lanes>(x);
        return x > 0.0f ? positive : negative;
    }
    return x;
}

// d map(x) / dx, told from map(x).
template <int Lanes, Map map>
SCRIMP_BODY Floats<Lanes> slope(const Floats<Lanes> &y) {
    const Floats<Lanes> zero = {}, one = zero + 1.0f;
    if constexpr (map == Map::relu) return y > 0.0f ? one : zero;
    if constexpr (map == Map::elu_plus_one) return y > 1.0f ? one : y;
    return one;
}

// The first `count` lanes only, or all where there are more.
template <int Lanes>
SCRIMP_BODY void load_part(Floats<Lanes> &to, const float *from, int count) {
    if (count >= Lanes) return load<Lanes>(to, from);
    to = Floats<Lanes>{};
    std::memcpy(&to, from, static_cast<std::size_t>(count) * sizeof(float));
}

template <int Lanes>
SCRIMP_BODY void store_part(float *to, const Floats<Lanes> &from, int count) {
    if (count >= Lanes) return store<Lanes>(to, from);
    std::memcpy(to, &from, static_cast<std::size_t>(count) * sizeof(float));
}

template <int Lanes>
SCRIMP_BODY void pad_row(float *out, int dim) {
    for (int column = dim; column < padded<Lanes>(dim); ++column) out[column] = 0.0f;
}

template <int Lanes, Map map>
SCRIMP_BODY void gather_mapped(float *out, Stride out_stride, const float *in, Stride in_stride, int rows, int dim) {
    for (int row = 0; row < rows; ++row, out += out_stride, in += in_stride) {
        pad_row<Lanes>(out, dim);
        for (int column = 0; column < dim; column += Lanes) {
            Floats<Lanes> line;
            load_part<Lanes>(line, in + column, dim - column);
            store_part<Lanes>(out + column, mapped<Lanes, map>(line), dim - column);
        }
    }
}

// Bring rows towards the second-level cache before they are needed.
SCRIMP_BODY void expect_rows(const float *in, Stride stride, int rows, int dim) {
#if defined(__GNUC__)
    for (int row = 0; row < rows; ++row, in += stride)
        for (int column = 0; column < dim; column += 16) __builtin_prefetch(in + column, 0, 2);
#endif
}

template <int Lanes>
SCRIMP_BODY void clear_rows(float *out, Stride stride, int from, int to, int columns) {
    for (int row = from; row < to; ++row)
        std::memset(out + row * stride, 0, static_cast<std::size_t>(columns) * sizeof(float));
}

// Copy user rows [rows, dim] through the map into a tile of `size` rows; the rest of the tile becomes zero.
template <int Lanes>
SCRIMP_BODY void gather(float *out, Stride out_stride, const float *in, Stride in_stride, int rows, int size, int dim,
                        Map map) {
    switch (map) {
        case Map::identity:
            gather_mapped<Lanes, Map::identity>(out, out_stride, in, in_stride, rows, dim);
            break;
        case Map::elu_plus_one:
            gather_mapped<Lanes, Map::elu_plus_one>(out, out_stride, in, in_stride, rows, dim);
            break;
        case Map::relu:
            gather_mapped<Lanes, Map::relu>(out, out_stride, in, in_stride, rows, dim);
            break;
    }
    clear_rows<Lanes>(out, out_stride, rows, size, padded<Lanes>(dim));
}

// The same without a map, each row times its factor.
template <int Lanes>
SCRIMP_BODY void gather_scaled(float *out, Stride out_stride, const float *in, Stride in_stride, int rows, int dim,
                               const float *factors) {
    for (int row = 0; row < rows; ++row, out += out_stride, in += in_stride) {
        pad_row<Lanes>(out, dim);
        for (int column = 0; column < dim; column += Lanes) {
            Floats<Lanes> line;
            load_part<Lanes>(line, in + column, dim - column);
            store_part<Lanes>(out + column, line * factors[row], dim - column);
        }
    }
}

// User rows = tile rows, each times its factor if there are factors.
template <int Lanes>
SCRIMP_BODY void scatter_scaled(float *out, Stride out_stride, const float *in, Stride in_stride, int rows, int dim,
                                const float *factors) {
    for (int row = 0; row < rows; ++row, out += out_stride, in += in_stride)
        for (int column = 0; column < dim; column += Lanes) {
            Floats<Lanes> line;
            load<Lanes>(line, in + column);
            store_part<Lanes>(out + column, factors ? line * factors[row] : line, dim - column);
        }
}

template <int Lanes, Map map>
SCRIMP_BODY void scatter_sloped(float *out, Stride out_stride, const float *in, const float *values, Stride in_stride,
                                int rows, int dim) {
    for (int row = 0; row < rows; ++row, out += out_stride, in += in_stride, values += in_stride)
        for (int column = 0; column < dim; column += Lanes) {
            Floats<Lanes> line, value;
            load<Lanes>(line, in + column);
            load<Lanes>(value, values + column);
            store_part<Lanes>(out + column, line * slope<Lanes, map>(value), dim - column);
        }
}

// User rows = gradient tile times the map's slope at the tile of mapped values; both tiles have one stride.
template <int Lanes>
SCRIMP_BODY void scatter_gradient(float *out, Stride out_stride, const float *in, const float *values,
                                  Stride in_stride, int rows, int dim, Map map) {
    switch (map) {
        case Map::identity:
            return scatter_scaled<Lanes>(out, out_stride, in, in_stride, rows, dim, nullptr);
        case Map::elu_plus_one:
            return scatter_sloped<Lanes, Map::elu_plus_one>(out, out_stride, in, values, in_stride, rows, dim);
        case Map::relu:
            return scatter_sloped<Lanes, Map::relu>(out, out_stride, in, values, in_stride, rows, dim);
    }
}

}  // namespace scrimp
