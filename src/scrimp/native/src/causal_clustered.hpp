// What the forward and the backward of causal (improved) clustered attention share. A token sees its own block exactly
// and all blocks before through clusters of earlier queries, which are found anew at `block << epoch` tokens.
#pragma once

#include "clustered_attention.hpp"

namespace scrimp {

void bind_causal_clustered(nanobind::module_ &module);

namespace causal {

using clustered::Buffer;
using clustered::Centroids;
using clustered::Index;
using clustered::Members;
using clustered::Shape;

constexpr Index tile = 64;  // queries a product with their own block: what lies beyond the last of them is skipped

struct Plan {
    Shape shape;  // as many queries as keys; its scale is 1, for the queries come scaled
    Index block;

    Index tokens() const { return shape.queries; }
    Index blocks() const { return (tokens() + block - 1) / block; }
    Index count(Index number) const { return std::min(block, tokens() - number * block); }
    // Keys that exist among a block's
    Index keys(Index number, Index row) const {
        return std::clamp<Index>(shape.length(row) - number * block, 0, count(number));
    }
    Index epochs() const {
        Index found = 0;
        while (since(found) < tokens()) ++found;
        return found;
    }
    Index since(Index epoch) const { return block << epoch; }
    // An epoch's blocks: from 1 << epoch on, before `last_block`
    Index last_block(Index epoch) const { return std::min(Index{2} << epoch, blocks()); }
    // Where an epoch's assignment begins among the row's, and how long all of them are
    Index offset(Index epoch) const { return since(epoch) - block; }
    // A cluster's place among what is kept a block that has a past
    Index place(Index row, Index number, Index cluster) const {
        return (row * (blocks() - 1) + number - 1) * shape.clusters + cluster;
    }
};

// One head's query, key and value, each [tokens, ..], and its epochs' assignments.
struct Head {
    const float *query, *key, *value;
    const std::int64_t *assignment;
};

struct Inputs {
    const float *query, *key, *value;
    const std::int64_t *assignment;
    Head head(const Plan &plan, Index row) const;
};

// out [.., tokens, value_dim]; lse [.., tokens], the log of all mass a token sees, inf where there is none; nearest
// [.., tokens], the token's cluster; and for each block with a past and each cluster: past_lse, inf where there is no
// key, bottom [.., value_dim]; top [.., topk], -1 at the end where there are fewer keys. Of clusters without a query in
// the block past_lse, bottom and top are left as they are.
struct Saved {
    float *out, *lse;
    std::int64_t *nearest;
    float *past_lse, *bottom;
    std::int32_t *top;
};

struct Gradients {
    const float *out;
    float *query, *key, *value;  // per query head; zeroed here
};

// A cluster's best keys, their values, and both across, for products either way.
struct Best {
    clustered::TopKeys rows;
    std::vector<std::int64_t> places;
    explicit Best(const Shape &shape, bool values_too) : rows(shape, values_too), places(shape.topk) {}
    void read(const Shape &shape, const Head &head, const std::int32_t *top);
};

// Means of the (scaled) queries before an epoch, by cluster.
Centroids centroids_of(const Plan &plan, const Head &head, const Members &members);

void forward(const Plan &plan, const Inputs &in, const Saved &out);
void backward(const Plan &plan, const Inputs &in, const Saved &saved, const Gradients &grads);

}  // namespace causal
}  // namespace scrimp
