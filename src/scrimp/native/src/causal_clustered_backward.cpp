// The gradient of `forward` with assignments and best keys held constant. With G = dOut and lse_i the log of all the
// mass token i sees, d_i = G_i.out_i, and for a block and a cluster c: best keys T of mass m, bottom b, members i:
//   own keys s:    p_is = exp(q_i.k_s - lse_i), dlogit = p_is (G_i.v_s - d_i), dv_s += p_is G_i
//   best keys t:   the same with x_i / m for d_i, where x_i = d_i - G_i.b; w_i = sum_t p_it / m is the past's share
//   centroid c:    P_cs = exp(c.k_s - lse_c) over all earlier keys, dP = g.v_s outside T and dm inside, with
//                  g = sum_i w_i G_i and m dm = sum_i w_i x_i; then sum_s P dP = sum_i w_i d_i.
// P of later blocks differs by a factor only, exp(lse_c - lse_c'). So blocks are gone through backwards, g and the sums
// of an epoch are added up under that factor, and every key meets the centroids once an epoch. What is added too much
// inside T is taken off where T is at hand: the centroid joins its members as one more query of negative weights.
#include <cmath>
#include <limits>

#include "causal_clustered.hpp"
#include "tiles.hpp"

namespace scrimp {
namespace causal {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr Index most_rows = clustered::block + 1;  // members of a product, and the centroid

// One head's tensors, [tokens, ..].
struct Row {
    Head head;
    Index number;
    const float *out_grad, *lse;
    float *query_grad, *key_grad, *value_grad;
    std::vector<float> delta;
};

struct Scratch {
    Buffer keys_across, values_across;  // a block's
    Buffer weights, pull;
    Buffer query, out, made, key_sum, value_sum;
    std::vector<float> lse, shift, share;
    Best best;
    explicit Scratch(const Plan &plan)
        : keys_across(plan.shape.dim * padded(plan.block)),
          values_across(plan.shape.value_dim * padded(plan.block)),
          weights(size(plan)),
          pull(size(plan)),
          query(most_rows * plan.shape.dim),
          out(most_rows * plan.shape.value_dim),
          made(most_rows * plan.shape.dim),
          key_sum(plan.shape.topk * plan.shape.dim),
          value_sum(plan.shape.topk * plan.shape.value_dim),
          lse(most_rows),
          shift(most_rows),
          share(padded(plan.shape.topk)),
          best(plan.shape, true) {}
    static Index size(const Plan &plan) {
        return std::max({tile * padded(plan.block), most_rows * padded(plan.shape.topk),
                         clustered::block * plan.shape.columns()});
    }
};

// An epoch's centroids and what the blocks gone through so far hand them, relative to exp(-lse).
struct Pulls {
    Members groups;
    Centroids centroids;
    std::vector<float> gathered, gathered_across, delta, lse, grad;
    Pulls(const Plan &plan, const Head &head, Index epoch)
        : groups(clustered::members(head.assignment + plan.offset(epoch), plan.since(epoch), plan.shape.clusters)),
          centroids(centroids_of(plan, head, groups)),
          gathered(plan.shape.columns() * plan.shape.value_dim),
          gathered_across(plan.shape.columns() * plan.shape.value_dim),
          delta(plan.shape.columns()),
          lse(plan.shape.columns(), infinity),
          grad(plan.shape.clusters * plan.shape.dim) {}
};

void pull_near(const Plan &plan, const Row &row, Index number, Scratch &own) {
    const Index dim = plan.shape.dim, value_dim = plan.shape.value_dim, first = number * plan.block;
    const Index keys = plan.keys(number, row.number), stride = padded(plan.block);
    const float *key = row.head.key + first * dim, *query = row.head.query + first * dim;
    const float *out = row.out_grad + first * value_dim;
    float *key_grad = row.key_grad + first * dim, *value_grad = row.value_grad + first * value_dim;
    clustered::transpose(key, keys, dim, own.keys_across.data(), stride);
    clustered::transpose(row.head.value + first * value_dim, keys, value_dim, own.values_across.data(), stride);
    for (Index start = 0; start < plan.count(number); start += tile) {
        const Index rows = std::min(tile, plan.count(number) - start), seen = std::min(start + rows, keys);
        const Index columns = padded(seen);
        float *weights = own.weights.data(), *pull = own.pull.data();
        tiles().gemm(query + start * dim, dim, 1, own.keys_across.data(), stride, weights, columns, rows, columns, dim,
                     false);
        tiles().exp_masked(weights, rows, columns, {start + 1, 1, keys}, row.lse + first + start);
        tiles().gemm(out + start * value_dim, value_dim, 1, own.values_across.data(), stride, pull, columns, rows,
                     columns, value_dim, false);
        tiles().pull_masked(pull, weights, rows, columns, row.delta.data() + first + start);
        tiles().gemm(pull, columns, 1, key, dim, row.query_grad + (first + start) * dim, dim, rows, dim, seen, true);
        tiles().gemm(pull, 1, columns, query + start * dim, dim, key_grad, dim, seen, dim, rows, true);
        tiles().gemm(weights, 1, columns, out + start * value_dim, value_dim, value_grad, value_dim, seen, value_dim,
                     rows, true);
    }
}

// A cluster as one block sees it, and what its members hand it.
struct Cluster {
    Index number;
    float lse, mass;
    const float *bottom;
    float *gathered;  // g
    float delta, pulled;  // sum_i w_i d_i and sum_i w_i x_i
};

// The centroid's weights on its best keys, negative, for they are taken off; their mass.
float read_shares(const Shape &shape, const Pulls &pulls, const Cluster &cluster, Scratch &own) {
    const clustered::TopKeys &top = own.best.rows;
    if (!top.count) return 0.0f;
    tiles().gemm(&pulls.centroids.rows[cluster.number * shape.dim], shape.dim, 1, top.keys_across.data(), top.columns,
                 own.share.data(), top.columns, 1, top.columns, shape.dim, false);
    tiles().exp_masked(own.share.data(), 1, top.columns, {top.count, 0, top.count}, &cluster.lse);
    float mass = 0.0f;
    for (float &share : own.share) mass += share, share = -share;
    return mass;
}

// w_i and x_i of one member, added up; `weights` are its p_it, and x_i / m is returned
float add_member(const Plan &plan, const Row &row, Index token, const float *weights, Index columns, Cluster &cluster) {
    const Index value_dim = plan.shape.value_dim;
    const float *out = row.out_grad + token * value_dim;
    float share = 0.0f;
    if (columns)
        for (Index t = 0; t < columns; ++t) share += weights[t];
    else
        share = std::exp(cluster.lse - row.lse[token]);
    if (columns) share /= cluster.mass;
    const float pulled = row.delta[token] - tiles().dot(out, cluster.bottom, value_dim);
    tiles().add_scaled(cluster.gathered, out, value_dim, share);
    cluster.delta += share * row.delta[token];
    cluster.pulled += share * pulled;
    return columns ? pulled / cluster.mass : 0.0f;
}

// Row `count` of the scratch becomes the centroid.
void add_centroid(const Shape &shape, const Pulls &pulls, const Cluster &cluster, Index count, Scratch &own) {
    const Index columns = own.best.rows.columns;
    std::copy_n(&pulls.centroids.rows[cluster.number * shape.dim], shape.dim, own.query.data() + count * shape.dim);
    std::copy_n(cluster.gathered, shape.value_dim, own.out.data() + count * shape.value_dim);
    std::copy_n(own.share.data(), columns, own.weights.data() + count * columns);
    own.shift[count] = cluster.pulled / cluster.mass;
}

// Through the weights on the best keys: gradients of the queries in `made`, of keys and values in the sums.
void pull_best(const Shape &shape, Index rows, bool add, Scratch &own) {
    const clustered::TopKeys &top = own.best.rows;
    float *weights = own.weights.data(), *pull = own.pull.data();
    tiles().gemm(own.out.data(), shape.value_dim, 1, top.values_across.data(), top.columns, pull, top.columns, rows,
                 top.columns, shape.value_dim, false);
    tiles().pull_masked(pull, weights, rows, top.columns, own.shift.data());
    tiles().gemm(pull, top.columns, 1, top.keys.data(), shape.dim, own.made.data(), shape.dim, rows, shape.dim,
                 top.count, false);
    tiles().gemm(pull, 1, top.columns, own.query.data(), shape.dim, own.key_sum.data(), shape.dim, top.count, shape.dim,
                 rows, add);
    tiles().gemm(weights, 1, top.columns, own.out.data(), shape.value_dim, own.value_sum.data(), shape.value_dim,
                 top.count, shape.value_dim, rows, add);
}

// `count` members of a cluster from `places` on, tokens counted from `base`; the last of them bring the centroid.
void pull_members(const Plan &plan, const Row &row, Index base, const std::int32_t *places, Index count, bool first,
                  bool last, Cluster &cluster, Pulls &pulls, Scratch &own) {
    const Shape &shape = plan.shape;
    const clustered::TopKeys &top = own.best.rows;
    const Index columns = top.count ? top.columns : 0;
    if (top.count) {
        clustered::gather(row.head.query + base * shape.dim, places, count, shape.dim, own.query.data());
        clustered::gather(row.out_grad + base * shape.value_dim, places, count, shape.value_dim, own.out.data());
        clustered::gather(row.lse + base, places, count, 1, own.lse.data());
        tiles().gemm(own.query.data(), shape.dim, 1, top.keys_across.data(), columns, own.weights.data(), columns,
                     count, columns, shape.dim, false);
        tiles().exp_masked(own.weights.data(), count, columns, {top.count, 0, top.count}, own.lse.data());
    }
    for (Index i = 0; i < count; ++i)
        own.shift[i] = add_member(plan, row, base + places[i], own.weights.data() + i * columns, columns, cluster);
    if (!top.count) return;
    if (last) add_centroid(shape, pulls, cluster, count, own);
    pull_best(shape, count + last, !first, own);
    for (Index i = 0; i < count; ++i)
        tiles().add_scaled(row.query_grad + (base + places[i]) * shape.dim, own.made.data() + i * shape.dim, shape.dim,
                           1.0f);
    if (last)
        tiles().add_scaled(&pulls.grad[cluster.number * shape.dim], own.made.data() + count * shape.dim, shape.dim,
                           1.0f);
}

void pull_cluster(const Plan &plan, const Row &row, const Members &members, Index base, Cluster &cluster, Pulls &pulls,
                  Scratch &own) {
    const Shape &shape = plan.shape;
    const Index many = members.count(cluster.number);
    cluster.mass = read_shares(shape, pulls, cluster, own);
    for (Index first = 0; first < many; first += clustered::block) {
        const Index count = std::min(clustered::block, many - first);
        pull_members(plan, row, base, members.of(cluster.number) + first, count, first == 0, first + count == many,
                     cluster, pulls, own);
    }
    for (Index t = 0; t < own.best.rows.count; ++t) {
        const Index key = own.best.places[t];
        tiles().add_scaled(row.key_grad + key * shape.dim, own.key_sum.data() + t * shape.dim, shape.dim, 1.0f);
        tiles().add_scaled(row.value_grad + key * shape.value_dim, own.value_sum.data() + t * shape.value_dim,
                           shape.value_dim, 1.0f);
    }
}

void pull_past(const Plan &plan, const Row &row, Index number, const Saved &saved, Pulls &pulls, Scratch &own) {
    const Shape &shape = plan.shape;
    const Index base = number * plan.block;
    const Members members = clustered::members(saved.nearest + row.number * plan.tokens() + base, plan.count(number),
                                               shape.clusters);
    std::vector<float> gathered(shape.value_dim);
    for (Index c = 0; c < shape.clusters; ++c) {
        const Index place = plan.place(row.number, number, c);
        if (members.count(c) == 0 || saved.past_lse[place] == infinity) continue;
        own.best.read(shape, row.head, saved.top + place * shape.topk);
        std::fill(gathered.begin(), gathered.end(), 0.0f);
        const float *bottom = saved.bottom + place * shape.value_dim;
        Cluster cluster{c, saved.past_lse[place], 0.0f, bottom, gathered.data(), 0.0f, 0.0f};
        pull_cluster(plan, row, members, base, cluster, pulls, own);
        const float factor = std::exp(cluster.lse - pulls.lse[c]);
        float *sum = &pulls.gathered[c * shape.value_dim];
        tiles().scaled_sum(sum, gathered.data(), sum, shape.value_dim, factor);
        pulls.delta[c] = cluster.delta + factor * pulls.delta[c];
        pulls.lse[c] = cluster.lse;
    }
    clustered::transpose(pulls.gathered.data(), shape.columns(), shape.value_dim, pulls.gathered_across.data(),
                         shape.columns());
}

// Through the centroids' softmax over the keys begin .. end.
void pull_keys(const Plan &plan, const Row &row, Index begin, Index end, Pulls &pulls, Scratch &own) {
    const Shape &shape = plan.shape;
    const Index columns = shape.columns(), dim = shape.dim, value_dim = shape.value_dim;
    std::vector<float> unused(columns);
    float *weights = own.weights.data(), *pull = own.pull.data();
    for (Index first = begin; first < end; first += clustered::block) {
        const Index rows = std::min(clustered::block, end - first);
        const float *key = row.head.key + first * dim;
        tiles().gemm(key, dim, 1, pulls.centroids.transposed.data(), columns, weights, columns, rows, columns, dim,
                     false);
        tiles().exp_columns(weights, rows, columns, pulls.lse.data(), unused.data());
        tiles().gemm(row.head.value + first * value_dim, value_dim, 1, pulls.gathered_across.data(), columns, pull,
                     columns, rows, columns, value_dim, false);
        tiles().pull_columns(pull, weights, rows, columns, pulls.delta.data());
        tiles().gemm(weights, columns, 1, pulls.gathered.data(), value_dim, row.value_grad + first * value_dim,
                     value_dim, rows, value_dim, shape.clusters, true);
        tiles().gemm(pull, columns, 1, pulls.centroids.rows.data(), dim, row.key_grad + first * dim, dim, rows, dim,
                     shape.clusters, true);
        tiles().gemm(pull, 1, columns, key, dim, pulls.grad.data(), dim, shape.clusters, dim, rows, true);
    }
}

// The gradient of a mean query goes to its members in equal parts.
void share(const Shape &shape, const Pulls &pulls, float *query_grad) {
    for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
        const Index count = pulls.groups.count(cluster);
        for (Index i = 0; i < count; ++i)
            tiles().add_scaled(query_grad + pulls.groups.of(cluster)[i] * shape.dim, &pulls.grad[cluster * shape.dim],
                               shape.dim, 1.0f / static_cast<float>(count));
    }
}

void backward_epoch(const Plan &plan, const Row &row, Index epoch, const Saved &saved, Scratch &own) {
    Pulls pulls(plan, row.head, epoch);
    const Index length = plan.shape.length(row.number), first = Index{1} << epoch;
    for (Index number = plan.last_block(epoch) - 1; number >= first; --number) {
        pull_near(plan, row, number, own);
        pull_past(plan, row, number, saved, pulls, own);
        const Index begin = number == first ? 0 : (number - 1) * plan.block;
        pull_keys(plan, row, begin, std::min(length, number * plan.block), pulls, own);
    }
    share(plan.shape, pulls, row.query_grad);
}

Row row_of(const Plan &plan, const Inputs &in, const Saved &saved, const Gradients &grads, Index number) {
    const Index tokens = plan.tokens(), dim = plan.shape.dim, value_dim = plan.shape.value_dim, first = number * tokens;
    Row row{in.head(plan, number),
            number,
            grads.out + first * value_dim,
            saved.lse + first,
            grads.query + first * dim,
            grads.key + first * dim,
            grads.value + first * value_dim,
            std::vector<float>(tokens)};
    std::fill_n(row.query_grad, tokens * dim, 0.0f);
    std::fill_n(row.key_grad, tokens * dim, 0.0f);
    std::fill_n(row.value_grad, tokens * value_dim, 0.0f);
    for (Index i = 0; i < tokens; ++i)
        row.delta[i] = tiles().dot(row.out_grad + i * value_dim, saved.out + (first + i) * value_dim, value_dim);
    return row;
}

}  // namespace

void backward(const Plan &plan, const Inputs &in, const Saved &saved, const Gradients &grads) {
    for_units(plan.shape.rows(), [&](Index number) {
        const Row row = row_of(plan, in, saved, grads, number);
        Scratch own(plan);
        for (Index epoch = plan.epochs() - 1; epoch >= 0; --epoch) backward_epoch(plan, row, epoch, saved, own);
        pull_near(plan, row, 0, own);
    });
}

}  // namespace causal
}  // namespace scrimp
