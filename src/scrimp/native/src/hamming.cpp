// Grouping of queries: sign codes, Lloyd's iterations on the codes, Lloyd's iterations on the queries themselves.
// Work is cut into pieces of whole runs of tokens, the same whatever the number of threads, and pieces are summed in
// order: the result does not depend on the threads.
#include "hamming.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "tiles.hpp"
#include "units.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr Index piece = 4096;   // tokens a unit of work
constexpr Index block = 128;    // tokens a product
constexpr Index width = 64;     // bits a code, at most

// Rows of `tokens` queries each; row r has lengths[r] real ones. Cut into pieces.
struct Rows {
    Index rows, tokens, pieces;
    const std::int64_t *lengths;
    Index length(Index row) const { return std::clamp<Index>(lengths[row], 0, tokens); }
    Index begin(Index unit) const { return unit % pieces * piece; }
    Index count(Index unit) const { return std::max<Index>(0, std::min(length(unit / pieces) - begin(unit), piece)); }
    Index first(Index unit) const { return unit / pieces * tokens + begin(unit); }
};

Rows rows_of(Index rows, Index tokens, std::uintptr_t lengths) {
    const Index pieces = std::max<Index>(1, (tokens + piece - 1) / piece);
    return {rows, tokens, pieces, reinterpret_cast<const std::int64_t *>(lengths)};
}

// Bit b of a code: x . plane_b > offset_b. planes is [dim, 64], the unused columns never exceed their offset.
void sign_codes(const float *x, Index count, Index dim, const float *planes, const float *offsets,
                std::uint64_t *codes) {
    float side[block * width];
    for (Index start = 0; start < count; start += block) {
        const Index here = std::min(block, count - start);
        tiles().gemm(x + start * dim, dim, 1, planes, width, side, width, here, width, dim, false);
        tiles().sign_bits(side, here, offsets, codes + start);
    }
}

// planes [dim, 64] are common to all rows, offsets [rows, 64] are not.
void hash_queries(std::uintptr_t query, std::uintptr_t planes, std::uintptr_t offsets, std::uintptr_t lengths,
                  Index row_count, Index tokens, Index dim, std::uintptr_t codes) {
    const Rows rows = rows_of(row_count, tokens, lengths);
    const float *x = reinterpret_cast<const float *>(query);
    std::uint64_t *out = reinterpret_cast<std::uint64_t *>(codes);
    for_units(rows.rows * rows.pieces, [&](Index unit) {
        const Index first = rows.first(unit);
        sign_codes(x + first * dim, rows.count(unit), dim, reinterpret_cast<const float *>(planes),
                   reinterpret_cast<const float *>(offsets) + unit / rows.pieces * width, out + first);
    });
}

// byte -> its eight bits as eight byte counters
struct Spread {
    std::uint64_t of[256];
    Spread() {
        for (int byte = 0; byte < 256; ++byte) {
            of[byte] = 0;
            for (int bit = 0; bit < 8; ++bit) of[byte] |= static_cast<std::uint64_t>(byte >> bit & 1) << (8 * bit);
        }
    }
};

// How often each bit is set among a cluster's codes: byte counters, emptied before the 256th member overflows them.
class BitCounts {
public:
    explicit BitCounts(Index clusters) : bytes_(clusters * 8), pending_(clusters), ones_(clusters * width), members_(clusters) {}
    void add(std::uint64_t code, Index cluster) {
        static const Spread spread;
        std::uint64_t *bytes = &bytes_[cluster * 8];
        for (int part = 0; part < 8; ++part) bytes[part] += spread.of[code >> (8 * part) & 255];
        if (++pending_[cluster] == 255) flush(cluster);
    }
    void flush(Index cluster) {
        for (Index bit = 0; bit < width; ++bit) {
            ones_[cluster * width + bit] += static_cast<std::int32_t>(bytes_[cluster * 8 + bit / 8] >> (8 * (bit % 8)) & 255);
        }
        std::fill_n(&bytes_[cluster * 8], 8, 0);
        members_[cluster] += pending_[cluster];
        pending_[cluster] = 0;
    }
    Index members(Index cluster) const { return members_[cluster]; }
    Index ones(Index cluster, Index bit) const { return ones_[cluster * width + bit]; }

private:
    std::vector<std::uint64_t> bytes_;
    std::vector<std::int32_t> pending_, ones_, members_;
};

// Bits set in more than half of the members; an empty cluster keeps its code.
void majority(const BitCounts &counts, Index clusters, std::uint64_t *centroids) {
    for (Index cluster = 0; cluster < clusters; ++cluster) {
        if (counts.members(cluster) == 0) continue;
        std::uint64_t code = 0;
        for (Index bit = 0; bit < width; ++bit)
            code |= static_cast<std::uint64_t>(2 * counts.ones(cluster, bit) > counts.members(cluster)) << bit;
        centroids[cluster] = code;
    }
}

// Lloyd's iterations in Hamming space. centroids [rows, clusters] are the first ones and are moved; row r uses its
// first used[r]. assignment [rows, tokens] int32, -1 beyond a row's length. A row stops once none of its codes moves.
void cluster_codes(std::uintptr_t codes_at, std::uintptr_t lengths, std::uintptr_t used_at, Index row_count,
                   Index tokens, Index clusters, Index iterations, std::uintptr_t centroids_at,
                   std::uintptr_t assignment_at) {
    const Rows rows = rows_of(row_count, tokens, lengths);
    const auto *codes = reinterpret_cast<const std::uint64_t *>(codes_at);
    const auto *used = reinterpret_cast<const std::int64_t *>(used_at);
    auto *centroids = reinterpret_cast<std::uint64_t *>(centroids_at);
    auto *assignment = reinterpret_cast<std::int32_t *>(assignment_at);
    std::fill_n(assignment, rows.rows * tokens, -1);
    const Index units = rows.rows * rows.pieces;
    std::vector<char> moved(units, 1), moving(rows.rows, 1);
    for (Index round = 0; round <= iterations; ++round) {
        for_units(units, [&](Index unit) {
            const Index row = unit / rows.pieces, first = rows.first(unit);
            if (moving[row])
                moved[unit] = tiles().nearest_codes(codes + first, rows.count(unit), centroids + row * clusters,
                                                    used[row], assignment + first);
        });
        for (Index row = 0; row < rows.rows; ++row)
            moving[row] = std::any_of(&moved[row * rows.pieces], &moved[row * rows.pieces] + rows.pieces,
                                      [](char any) { return any != 0; });
        if (round == iterations) return;
        for_units(rows.rows, [&](Index row) {
            if (!moving[row]) return;
            BitCounts counts(used[row]);
            for (Index i = row * tokens; i < row * tokens + rows.length(row); ++i) counts.add(codes[i], assignment[i]);
            for (Index cluster = 0; cluster < used[row]; ++cluster) counts.flush(cluster);
            majority(counts, used[row], centroids + row * clusters);
        });
    }
}

// Means of the members as the columns of [dim, columns], and half their squared lengths; an empty cluster is infinitely
// far. sums [clusters, dim] and counts are its members'.
void means(const std::vector<float> &sums, const std::vector<Index> &counts, Index clusters, Index dim, Index columns,
           float *transposed, float *half) {
    std::fill_n(transposed, dim * columns, 0.0f);
    std::fill_n(half, columns, std::numeric_limits<float>::infinity());
    for (Index cluster = 0; cluster < clusters; ++cluster) {
        if (counts[cluster] == 0) continue;
        const float inverse = 1.0f / static_cast<float>(counts[cluster]);
        float square = 0.0f;
        for (Index d = 0; d < dim; ++d) {
            const float mean = sums[cluster * dim + d] * inverse;
            transposed[d * columns + cluster] = mean;
            square += mean * mean;
        }
        half[cluster] = square / 2;
    }
}

// Lloyd's iterations on the queries, from an assignment: nearest mean by |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x . c).
void refine_groups(std::uintptr_t query, std::uintptr_t lengths, Index row_count, Index tokens, Index dim,
                   Index clusters, Index rounds, std::uintptr_t assignment_at) {
    const Rows rows = rows_of(row_count, tokens, lengths);
    const float *x = reinterpret_cast<const float *>(query);
    auto *assignment = reinterpret_cast<std::int32_t *>(assignment_at);
    const Index columns = padded(clusters);
    std::vector<float> transposed(rows.rows * dim * columns), half(rows.rows * columns);
    for (Index round = 0; round < rounds; ++round) {
        for_units(rows.rows, [&](Index row) {
            std::vector<float> sums(clusters * dim);
            std::vector<Index> counts(clusters);
            for (Index i = row * tokens; i < row * tokens + rows.length(row); ++i) {
                tiles().add_scaled(&sums[assignment[i] * dim], x + i * dim, dim, 1.0f);
                ++counts[assignment[i]];
            }
            means(sums, counts, clusters, dim, columns, &transposed[row * dim * columns], &half[row * columns]);
        });
        for_units(rows.rows * rows.pieces, [&](Index unit) {
            const Index row = unit / rows.pieces, first = rows.first(unit), count = rows.count(unit);
            std::vector<float> scores(block * columns);
            for (Index start = 0; start < count; start += block) {
                const Index here = std::min(block, count - start);
                tiles().gemm(x + (first + start) * dim, dim, 1, &transposed[row * dim * columns], columns,
                             scores.data(), columns, here, columns, dim, false);
                tiles().row_argmax(scores.data(), here, columns, &half[row * columns], assignment + first + start);
                // A query that is not a number is nearest to nothing, padding columns included.
                for (Index i = first + start; i < first + start + here; ++i)
                    assignment[i] = std::min(assignment[i], static_cast<std::int32_t>(clusters - 1));
            }
        });
    }
}

}  // namespace

void bind_hamming(nanobind::module_ &module) {
    if (!has_tiles()) return;
    using Released = nanobind::call_guard<nanobind::gil_scoped_release>;
    module.def("hash_queries", &hash_queries, Released());
    module.def("cluster_codes", &cluster_codes, Released());
    module.def("refine_groups", &refine_groups, Released());
}

}  // namespace scrimp
