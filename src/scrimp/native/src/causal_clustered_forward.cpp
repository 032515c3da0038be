// An epoch's centroids take in the keys block by block. Before they take in a block's own keys its queries look: each
// at the nearest centroid's statistics and, together with the others there, exactly at its best keys. What a block sees
// depends on earlier blocks only, and a query's numbers never on the other queries of its block.
#include <cmath>
#include <limits>

#include "causal_clustered.hpp"
#include "clustered_statistics.hpp"
#include "tiles.hpp"

namespace scrimp {
namespace causal {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

struct Scratch {
    Buffer keys_across, weights, scores, query, made, mass;
    Best best;
    explicit Scratch(const Plan &plan)
        : keys_across(plan.shape.dim * padded(plan.block)),
          weights(std::max(tile * padded(plan.block), clustered::block * padded(plan.shape.topk))),
          scores(plan.block * plan.shape.columns()),
          query(clustered::block * plan.shape.dim),
          made(clustered::block * plan.shape.value_dim),
          mass(clustered::block),
          best(plan.shape, false) {}
};

// Where the block's output and log-masses go; the own keys' part first, the past's joins it.
struct Target {
    float *out, *lse;
};

Target target(const Plan &plan, const Saved &saved, Index row, Index number) {
    const Index first = row * plan.tokens() + number * plan.block;
    return {saved.out + first * plan.shape.value_dim, saved.lse + first};
}

void attend_near(const Plan &plan, const Head &head, Index row, Index number, Scratch &own, const Target &to) {
    const Index dim = plan.shape.dim, value_dim = plan.shape.value_dim, first = number * plan.block;
    const Index keys = plan.keys(number, row), stride = padded(plan.block);
    const float *query = head.query + first * dim;
    clustered::transpose(head.key + first * dim, keys, dim, own.keys_across.data(), stride);
    for (Index start = 0; start < plan.count(number); start += tile) {
        const Index rows = std::min(tile, plan.count(number) - start), seen = std::min(start + rows, keys);
        const Index columns = padded(seen);
        tiles().gemm(query + start * dim, dim, 1, own.keys_across.data(), stride, own.weights.data(), columns, rows,
                     columns, dim, false);
        tiles().softmax_masked(own.weights.data(), rows, columns, {start + 1, 1, keys}, to.lse + start);
        tiles().gemm(own.weights.data(), columns, 1, head.value + first * value_dim, value_dim,
                     to.out + start * value_dim, value_dim, rows, value_dim, seen, false);
    }
}

// A cluster as the queries of one block see it.
struct Past {
    float lse, mass;
    const float *bottom;
};

// Splits off a cluster's best keys: writes them, lse and what the other keys give.
Past settle(const Plan &plan, const Head &head, clustered::Statistics &found, Index cluster, Index place,
            const Saved &saved, Scratch &own) {
    const Shape &shape = plan.shape;
    found.leaders.cut(cluster);
    std::int32_t *top = saved.top + place * shape.topk;
    const bool any = !(found.sum[cluster] == 0.0f);
    const float inverse = any ? 1.0f / found.sum[cluster] : 0.0f;
    float *bottom = saved.bottom + place * shape.value_dim, *shares = own.weights.data(), mass = 0.0f;
    for (const auto *one = found.leaders.begin(cluster); one != found.leaders.end(cluster); ++one) {
        const float share = std::exp(one->logit() - found.most[cluster]) * inverse;
        mass += share;
        *shares++ = -share;
        *top++ = static_cast<std::int32_t>(one->key());
    }
    own.best.read(shape, head, saved.top + place * shape.topk);
    for (Index m = 0; m < shape.value_dim; ++m) bottom[m] = found.value[cluster * shape.value_dim + m] * inverse;
    tiles().gemm(own.weights.data(), 0, 1, own.best.rows.values.data(), shape.value_dim, bottom, shape.value_dim, 1,
                 shape.value_dim, own.best.rows.count, true);
    saved.past_lse[place] = any ? found.most[cluster] + std::log(found.sum[cluster]) : infinity;
    return {saved.past_lse[place], mass, bottom};
}

// out = both parts by their masses: here the own keys', and bottom + mass * made with the log-mass `lse`
void join(const Shape &shape, const Past &past, const float *made, float lse, float *out, float *own_lse) {
    const float most = std::max(*own_lse, lse);
    const float all = most + std::log(std::exp(*own_lse - most) + std::exp(lse - most));
    const float near = std::exp(*own_lse - all), far = std::exp(lse - all);
    for (Index m = 0; m < shape.value_dim; ++m) out[m] = near * out[m] + far * (past.bottom[m] + past.mass * made[m]);
    *own_lse = all;
}

void attend_members(const Shape &shape, const Past &past, const float *query, const std::int32_t *places, Index count,
                    Scratch &own, const Target &to) {
    const clustered::TopKeys &top = own.best.rows;
    if (top.count) {
        clustered::gather(query, places, count, shape.dim, own.query.data());
        tiles().gemm(own.query.data(), shape.dim, 1, top.keys_across.data(), top.columns, own.weights.data(),
                     top.columns, count, top.columns, shape.dim, false);
        tiles().softmax_masked(own.weights.data(), count, top.columns, {top.count, 0, top.count}, own.mass.data());
        tiles().gemm(own.weights.data(), top.columns, 1, top.values.data(), shape.value_dim, own.made.data(),
                     shape.value_dim, count, shape.value_dim, top.count, false);
    } else {
        std::fill_n(own.made.data(), count * shape.value_dim, 0.0f);
    }
    const float log_mass = std::log(past.mass);
    for (Index i = 0; i < count; ++i)
        join(shape, past, own.made.data() + i * shape.value_dim, top.count ? own.mass.data()[i] - log_mass : past.lse,
             to.out + places[i] * shape.value_dim, to.lse + places[i]);
}

void attend_past(const Plan &plan, const Head &head, const Members &members, clustered::Statistics &found, Index row,
                 Index number, Scratch &own, const Saved &saved) {
    const Shape &shape = plan.shape;
    const float *query = head.query + number * plan.block * shape.dim;
    for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
        const Index many = members.count(cluster);
        if (many == 0) continue;
        const Past past = settle(plan, head, found, cluster, plan.place(row, number, cluster), saved, own);
        if (past.lse == infinity) continue;
        for (Index first = 0; first < many; first += clustered::block)
            attend_members(shape, past, query, members.of(cluster) + first, std::min(clustered::block, many - first),
                           own, target(plan, saved, row, number));
    }
}

// Each query's nearest centroid: |q - c|^2 = |q|^2 + 2 (half - q . c)
void assign(const Plan &plan, const Centroids &centroids, const float *half, const float *query, Index count,
            Scratch &own, std::int64_t *nearest) {
    const Index columns = plan.shape.columns(), last = plan.shape.clusters - 1;
    std::vector<std::int32_t> found(count);
    tiles().gemm(query, plan.shape.dim, 1, centroids.transposed.data(), columns, own.scores.data(), columns, count,
                 columns, plan.shape.dim, false);
    tiles().row_argmax(own.scores.data(), count, columns, half, found.data());
    // A query that is not a number is nearest to nothing, padding columns included.
    for (Index i = 0; i < count; ++i) nearest[i] = std::min<Index>(found[i], last);
}

std::vector<float> half_squares(const Shape &shape, const Centroids &centroids, const Members &members) {
    std::vector<float> half(shape.columns(), infinity);
    for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
        const float *mean = &centroids.rows[cluster * shape.dim];
        if (members.count(cluster)) half[cluster] = tiles().dot(mean, mean, shape.dim) / 2;
    }
    return half;
}

// What no log-sum may be is written where a token sees no key: every later exp(logit - lse) is then 0.
void close(float *lse, Index count) {
    for (Index i = 0; i < count; ++i)
        if (lse[i] == -infinity) lse[i] = infinity;
}

void forward_epoch(const Plan &plan, const Head &head, Index row, Index epoch, const Saved &saved) {
    const Shape &shape = plan.shape;
    const Members groups = clustered::members(head.assignment + plan.offset(epoch), plan.since(epoch), shape.clusters);
    const Centroids centroids = centroids_of(plan, head, groups);
    const std::vector<float> half = half_squares(shape, centroids, groups);
    clustered::Statistics found(shape);
    Scratch own(plan);
    const Index end = plan.last_block(epoch), length = shape.length(row);
    for (Index number = Index{1} << epoch, seen = 0; number < end; ++number) {
        const Index first = number * plan.block, count = plan.count(number);
        clustered::attend_centroids(shape, centroids, head.key, head.value, seen, std::min(first, length), found);
        seen = first;
        std::int64_t *nearest = saved.nearest + row * plan.tokens() + first;
        assign(plan, centroids, half.data(), head.query + first * shape.dim, count, own, nearest);
        const Target to = target(plan, saved, row, number);
        attend_near(plan, head, row, number, own, to);
        attend_past(plan, head, clustered::members(nearest, count, shape.clusters), found, row, number, own, saved);
        close(to.lse, count);
    }
}

void forward_first(const Plan &plan, const Head &head, Index row, const Saved &saved) {
    Scratch own(plan);
    const Target to = target(plan, saved, row, 0);
    attend_near(plan, head, row, 0, own, to);
    close(to.lse, plan.count(0));
}

}  // namespace

void forward(const Plan &plan, const Inputs &in, const Saved &saved) {
    const Index rows = plan.shape.rows(), epochs = plan.epochs();
    // The last epoch is the longest: it comes first.
    for_units(rows * (epochs + 1), [&](Index unit) {
        const Index row = unit % rows, epoch = epochs - 1 - unit / rows;
        if (epoch < 0) return forward_first(plan, in.head(plan, row), row, saved);
        forward_epoch(plan, in.head(plan, row), row, epoch, saved);
    });
}

}  // namespace causal
}  // namespace scrimp
