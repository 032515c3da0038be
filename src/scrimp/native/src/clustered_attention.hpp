// What the forward and the backward of (improved) clustered attention share.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "units.hpp"

namespace scrimp {

void bind_clustered_attention(nanobind::module_ &module);

namespace clustered {

using Index = std::ptrdiff_t;

constexpr Index block = 128;  // keys or members a product: a block of keys and its weights stay in the second cache

// One call's sizes. dim and value_dim are multiples of 16; key heads divide the heads; topk <= keys, 0 for plain.
struct Shape {
    Index batch, heads, key_heads, queries, keys, dim, value_dim, clusters, topk;
    float scale;
    const std::int64_t *key_lengths;  // [batch] or null

    Index rows() const { return batch * heads; }
    Index key_row(Index row) const { return row / heads * key_heads + row % heads / (heads / key_heads); }
    Index length(Index row) const {
        return key_lengths ? std::clamp<Index>(key_lengths[row / heads], 0, keys) : keys;
    }
    Index columns() const { return padded(clusters); }
    // Keys a unit of work: some 16 units in all, none below 2048 keys, for each piece finds its own best keys first.
    // Depends on the sizes alone, so that the number of threads changes no sum.
    Index piece() const {
        const Index wanted = (16 + rows() - 1) / rows();
        return std::max<Index>(2048, ((keys + wanted - 1) / wanted + block - 1) / block * block);
    }
    Index pieces() const { return std::max<Index>(1, (keys + piece() - 1) / piece()); }
};

// The queries of one head in the order of their clusters: members start[c] .. start[c + 1] are cluster c's, in order.
struct Members {
    std::vector<std::int32_t> order;
    std::vector<Index> start;
    Index count(Index cluster) const { return start[cluster + 1] - start[cluster]; }
    const std::int32_t *of(Index cluster) const { return order.data() + start[cluster]; }
};

// Queries assigned to no cluster (-1, or out of range) are no members.
Members members(const std::int64_t *assignment, Index queries, Index clusters);

// Mean queries times the scale: rows [columns, dim] and transposed [dim, columns]; 0 for empty clusters and padding.
struct Centroids {
    std::vector<float> rows, transposed;
};
Centroids centroids(const float *query, const Members &members, const Shape &shape);

// to[j][i] = factor * from[i][j] for `rows` of `columns`; row j of `to` has `stride` numbers, those beyond are set to 0
void transpose(const float *from, Index rows, Index columns, float *to, Index stride, float factor = 1.0f);

// Row i of `to` is row places[i] of `from`.
template <class Place>
void gather(const float *from, const Place *places, Index count, Index columns, float *to) {
    for (Index i = 0; i < count; ++i) std::copy_n(from + places[i] * columns, columns, to + i * columns);
}

// Scratch that is written before it is read: a vector would be cleared for nothing.
class Buffer {
public:
    explicit Buffer(Index size) : data_(new float[static_cast<std::size_t>(size)]) {}
    float *data() { return data_.get(); }
    const float *data() const { return data_.get(); }

private:
    std::unique_ptr<float[]> data_;
};

// How many of a cluster's top keys there are: fewer than topk where the keys end earlier. The others are -1, at the end.
Index kept(const std::int64_t *top, Index topk);

// A cluster's top keys and their values, and across, [dim, padded(topk)], the keys times the scale and, where asked
// for, the values. The padding is 0.
struct TopKeys {
    Index count, columns;
    bool both;
    Buffer keys, values, keys_across, values_across;
    TopKeys(const Shape &shape, bool values_too);
    void read(const Shape &shape, const float *key, const float *value, const std::int64_t *top);
};

struct Inputs {
    const float *query, *key, *value;
    const std::int64_t *assignment;
};

struct Outputs {
    float *out, *lse, *mass, *bottom;  // [.., queries, value_dim], [.., clusters] twice, [.., clusters, value_dim]
    std::int64_t *top;                 // [.., clusters, topk], rising
};

struct Gradients {
    const float *out;
    float *query, *key, *value;  // per query head; zeroed here
};

void forward(const Shape &shape, const Inputs &in, const Outputs &out);
void backward(const Shape &shape, const Inputs &in, const Outputs &saved, const Gradients &grads);

}  // namespace clustered
}  // namespace scrimp
