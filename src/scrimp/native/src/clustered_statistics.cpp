#include "clustered_statistics.hpp"

#include "tiles.hpp"

namespace scrimp {
namespace clustered {
namespace {

void offer_all(const Shape &shape, const float *logits, Index rows, Index first, std::vector<float> &highest,
               Leaders &leaders) {
    std::vector<float> most(shape.columns());
    for (Index start = 0; start < rows; start += group) {
        const Index here = std::min(group, rows - start);
        std::fill(most.begin(), most.end(), -std::numeric_limits<float>::infinity());
        tiles().column_max(logits + start * shape.columns(), here, shape.columns(), most.data());
        for (Index c = 0; c < shape.columns(); ++c) highest[c] = std::max(highest[c], most[c]);
        if (shape.topk) leaders.offer(logits + start * shape.columns(), most.data(), here, shape.columns(), first + start);
    }
}

}  // namespace

void attend_centroids(const Shape &shape, const Centroids &centroids, const float *key, const float *value, Index begin,
                      Index end, Statistics &found) {
    const Index columns = shape.columns();
    std::vector<float> weights(block * columns), highest(columns);
    for (Index first = begin; first < end; first += block) {
        const Index rows = std::min(block, end - first);
        tiles().gemm(key + first * shape.dim, shape.dim, 1, centroids.transposed.data(), columns, weights.data(),
                     columns, rows, columns, shape.dim, false);
        highest = found.most;
        offer_all(shape, weights.data(), rows, first, highest, found.leaders);
        found.raise(shape, highest);
        tiles().exp_columns(weights.data(), rows, columns, found.most.data(), found.sum.data());
        tiles().gemm(weights.data(), 1, columns, value + first * shape.value_dim, shape.value_dim, found.value.data(),
                     shape.value_dim, shape.clusters, shape.value_dim, rows, true);
    }
}

}  // namespace clustered
}  // namespace scrimp
