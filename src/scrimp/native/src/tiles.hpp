#pragma once

#include <cstddef>
#include <cstdint>

namespace scrimp {

// Which columns the rows of a tile see: row i the first min(first + i * step, limit).
struct Kept {
    std::ptrdiff_t first, step, limit;
    std::ptrdiff_t of(std::ptrdiff_t row) const {
        const std::ptrdiff_t wanted = first + row * step;
        return wanted < limit ? wanted : limit;
    }
};

// Dense building blocks of the clustered kernels, for the instruction set in use. Matrices are float32, row-major;
// column counts are multiples of 16 and rows need no alignment. Without GNU vector types there are none (`has_tiles`).
struct Tiles {
    // c[i][j] (+)= sum_p a[i * row + p * step] * b[p * ldb + j]: both `a` and its transpose are read where they lie.
    void (*gemm)(const float *a, std::ptrdiff_t row, std::ptrdiff_t step, const float *b, std::ptrdiff_t ldb, float *c,
                 std::ptrdiff_t ldc, std::ptrdiff_t rows, std::ptrdiff_t columns, std::ptrdiff_t depth, bool add);
    // most[j] = max(most[j], x[i][j])
    void (*column_max)(const float *x, std::ptrdiff_t rows, std::ptrdiff_t columns, float *most);
    // x[i][j] = exp(x[i][j] - shift[j]); sum[j] += x[i][j]
    void (*exp_columns)(float *x, std::ptrdiff_t rows, std::ptrdiff_t columns, const float *shift, float *sum);
    // x[i][j] = softmax of the first `kept` columns of row i; the others become 0
    void (*softmax_rows)(float *x, std::ptrdiff_t rows, std::ptrdiff_t kept, std::ptrdiff_t columns);
    // d[i][j] = p[i][j] * (d[i][j] - delta[j])
    void (*pull_columns)(float *d, const float *p, std::ptrdiff_t rows, std::ptrdiff_t columns, const float *delta);
    // d[i][j] = mass * p[i][j] * (d[i][j] - p[i].d[i]); p *= mass; the sum over i of p[i].d[i] (p as it came) is returned
    float (*pull_rows)(float *d, float *p, std::ptrdiff_t rows, std::ptrdiff_t columns, float mass);
    // Row i keeps its first min(first + i * step, limit) columns, the others become 0: their softmax, and in lse[i] the
    // log of its normaliser, -inf where nothing is kept
    void (*softmax_masked)(float *x, std::ptrdiff_t rows, std::ptrdiff_t columns, const Kept &kept, float *lse);
    // Likewise x[i][j] = exp(x[i][j] - lse[i])
    void (*exp_masked)(float *x, std::ptrdiff_t rows, std::ptrdiff_t columns, const Kept &kept, const float *lse);
    // d[i][j] = p[i][j] * (d[i][j] - delta[i])
    void (*pull_masked)(float *d, const float *p, std::ptrdiff_t rows, std::ptrdiff_t columns, const float *delta);
    // The sum of x[j] * y[j]
    float (*dot)(const float *x, const float *y, std::ptrdiff_t columns);
    // y[j] += factor * x[j]
    void (*add_scaled)(float *y, const float *x, std::ptrdiff_t columns, float factor);
    // to[j] = base[j] + factor * x[j]
    void (*scaled_sum)(float *to, const float *base, const float *x, std::ptrdiff_t columns, float factor);
    // Bit b of codes[i] says whether x[i][b] > limit[b]; 64 columns.
    void (*sign_bits)(const float *x, std::ptrdiff_t rows, const float *limit, std::uint64_t *codes);
    // best[i] = the first j with the largest x[i][j] - half[j]
    void (*row_argmax)(const float *x, std::ptrdiff_t rows, std::ptrdiff_t columns, const float *half,
                       std::int32_t *best);
    // best[i] = the first j with the fewest bits in codes[i] ^ centroids[j]; whether any best[i] changed
    bool (*nearest_codes)(const std::uint64_t *codes, std::ptrdiff_t count, const std::uint64_t *centroids,
                          std::ptrdiff_t clusters, std::int32_t *best);
};

bool has_tiles();
const Tiles &tiles();

}  // namespace scrimp
