// Centroids attend to all keys, block by block with running maxima and sums (no clusters x keys matrix), and remember
// their best keys; then every member attends exactly to the best keys of its cluster. Weights lie as [keys, clusters]:
// a register holds one key's weights for sixteen clusters, so nothing is summed across lanes and nothing is packed.
#include <cmath>
#include <limits>

#include "clustered_statistics.hpp"
#include "tiles.hpp"

namespace scrimp {
namespace clustered {
namespace {

// Adds `other`, the statistics over later keys.
void merge(const Shape &shape, Statistics &into, Statistics &other) {
    std::vector<float> highest(shape.columns());
    for (Index c = 0; c < shape.columns(); ++c) highest[c] = std::max(into.most[c], other.most[c]);
    into.raise(shape, highest);
    other.raise(shape, highest);
    for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
        into.sum[cluster] += other.sum[cluster];
        if (shape.topk) into.leaders.take(cluster, other.leaders);
    }
    tiles().add_scaled(into.value.data(), other.value.data(), shape.clusters * shape.value_dim, 1.0f);
}

// Splits off a cluster's top keys: their indices, their mass m, and what the other keys give.
void settle(const Shape &shape, const float *value, Statistics &found, Index cluster, Index row, const Outputs &out) {
    const Index place = row * shape.clusters + cluster;
    float *bottom = &found.value[cluster * shape.value_dim];
    std::int64_t *top = out.top + place * shape.topk;
    found.leaders.cut(cluster);
    Best *one = found.leaders.begin(cluster), *end = found.leaders.end(cluster);
    std::sort(one, end, [](const Best &a, const Best &b) { return a.key() < b.key(); });
    std::fill_n(top, shape.topk, -1);
    const bool any = found.sum[cluster] > 0.0f;
    const float inverse = any ? 1.0f / found.sum[cluster] : 0.0f;
    double mass = 0.0;
    for (; one != end; ++one) {
        const float weight = std::exp(one->logit() - found.most[cluster]);
        mass += static_cast<double>(weight * inverse);
        *top++ = one->key();
        tiles().add_scaled(bottom, value + one->key() * shape.value_dim, shape.value_dim, -weight);
    }
    for (Index m = 0; m < shape.value_dim; ++m) out.bottom[place * shape.value_dim + m] = bottom[m] * inverse;
    out.mass[place] = static_cast<float>(mass);
    // Without keys every later exp(logit - lse) must be 0.
    out.lse[place] = any ? found.most[cluster] + std::log(found.sum[cluster]) : std::numeric_limits<float>::infinity();
}

// out_i = bottom_j + m_j softmax(scale q_i K_T^T) V_T for the members i of cluster j
void attend_members(const Shape &shape, const Inputs &in, const Members &members, Index cluster, Index row,
                    const Outputs &out) {
    const Index place = row * shape.clusters + cluster, key_row = shape.key_row(row);
    const float *bottom = out.bottom + place * shape.value_dim;
    TopKeys top(shape, false);
    if (shape.topk)
        top.read(shape, in.key + key_row * shape.keys * shape.dim, in.value + key_row * shape.keys * shape.value_dim,
                 out.top + place * shape.topk);
    Buffer query(block * shape.dim), weights(block * top.columns), made(block * shape.value_dim);
    if (!top.count) std::fill_n(made.data(), block * shape.value_dim, 0.0f);
    const Index many = members.count(cluster);
    for (Index first = 0; first < many; first += block) {
        const Index count = std::min(block, many - first);
        const std::int32_t *places = members.of(cluster) + first;
        if (top.count) {
            gather(in.query + row * shape.queries * shape.dim, places, count, shape.dim, query.data());
            tiles().gemm(query.data(), shape.dim, 1, top.keys_across.data(), top.columns, weights.data(), top.columns,
                         count, top.columns, shape.dim, false);
            tiles().softmax_rows(weights.data(), count, top.count, top.columns);
            tiles().gemm(weights.data(), top.columns, 1, top.values.data(), shape.value_dim, made.data(),
                         shape.value_dim, count, shape.value_dim, top.count, false);
        }
        for (Index i = 0; i < count; ++i)
            tiles().scaled_sum(out.out + (row * shape.queries + places[i]) * shape.value_dim, bottom,
                               made.data() + i * shape.value_dim, shape.value_dim, out.mass[place]);
    }
}

void forward_rows(const Shape &shape, const Inputs &in, const Outputs &out, Index first, Index count) {
    const Index pieces = shape.pieces();
    std::vector<Members> grouped(count);
    std::vector<Centroids> means(count);
    std::vector<Statistics> parts(count * pieces, Statistics(shape));
    for_units(count, [&](Index own) {
        const Index row = first + own;
        grouped[own] = members(in.assignment + row * shape.queries, shape.queries, shape.clusters);
        means[own] = centroids(in.query + row * shape.queries * shape.dim, grouped[own], shape);
        std::fill_n(out.out + row * shape.queries * shape.value_dim, shape.queries * shape.value_dim, 0.0f);
    });
    for_units(count * pieces, [&](Index unit) {
        const Index row = first + unit / pieces, begin = unit % pieces * shape.piece();
        const Index end = std::min(shape.length(row), begin + shape.piece()), key_row = shape.key_row(row);
        attend_centroids(shape, means[unit / pieces], in.key + key_row * shape.keys * shape.dim,
                         in.value + key_row * shape.keys * shape.value_dim, begin, end, parts[unit]);
    });
    for_units(count, [&](Index own) {
        const Index row = first + own;
        for (Index part = 1; part < pieces; ++part) merge(shape, parts[own * pieces], parts[own * pieces + part]);
        for (Index cluster = 0; cluster < shape.clusters; ++cluster)
            settle(shape, in.value + shape.key_row(row) * shape.keys * shape.value_dim, parts[own * pieces], cluster,
                   row, out);
    });
    for_units(count * shape.clusters, [&](Index unit) {
        const Index own = unit / shape.clusters;
        attend_members(shape, in, grouped[own], unit % shape.clusters, first + own, out);
    });
}

}  // namespace

void forward(const Shape &shape, const Inputs &in, const Outputs &out) {
    for_waves(shape.rows(), [&](Index first, Index count) { forward_rows(shape, in, out, first, count); });
}

}  // namespace clustered
}  // namespace scrimp
