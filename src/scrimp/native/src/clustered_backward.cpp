// The gradient of `forward` with the assignment and the top keys held constant. For cluster j with members i, top keys
// T, mass m_j = sum_T P_js and W_i = softmax(scale q_i K_T^T), with G = dOut:
//   through W:  dW_it = m_j G_i.V_t,  dV_t += m_j W_it G_i,  dm_j = sum_i G_i.(W_i V_T)
//   through P:  dP_js = (sum_i G_i).V_s outside T and dm_j inside, then softmax over all keys, recomputed in blocks.
#include <limits>

#include "clustered_attention.hpp"
#include "tiles.hpp"

namespace scrimp {
namespace clustered {
namespace {

// What the members of a head's clusters hand to the centroids and the top keys.
struct Pulls {
    std::vector<float> gathered, gathered_across;  // sum_i G_i: [columns, value_dim] and its transpose
    std::vector<float> mass, delta, lse;           // [columns]: dm_j; sum_s P_js dP_js; the forward's lse
    std::vector<float> key, value;                 // [clusters, topk, dim] (not yet times the scale) and value_dim: through W

    void make(const Shape &shape) {
        gathered.assign(shape.columns() * shape.value_dim, 0.0f);
        gathered_across.assign(shape.columns() * shape.value_dim, 0.0f);
        mass.assign(shape.columns(), 0.0f);
        delta.assign(shape.columns(), 0.0f);
        // exp(logit - inf) = 0: padding columns weigh nothing.
        lse.assign(shape.columns(), std::numeric_limits<float>::infinity());
        key.assign(shape.clusters * shape.topk * shape.dim, 0.0f);
        value.assign(shape.clusters * shape.topk * shape.value_dim, 0.0f);
    }
};

struct Scratch {
    Buffer query, out, weights, pull, made;
    Scratch(const Shape &shape, Index columns)
        : query(block * shape.dim), out(block * shape.value_dim), weights(block * columns), pull(block * columns),
          made(block * shape.dim) {}
};

// One block of a cluster's members through their exact attention on the top keys.
void pull_block(const Shape &shape, const TopKeys &top, Index count, float mass, Index cluster, Scratch &own,
                Pulls &pulls) {
    const Index columns = top.columns;
    tiles().gemm(own.query.data(), shape.dim, 1, top.keys_across.data(), columns, own.weights.data(), columns, count,
                 columns, shape.dim, false);
    tiles().softmax_rows(own.weights.data(), count, top.count, columns);
    tiles().gemm(own.out.data(), shape.value_dim, 1, top.values_across.data(), columns, own.pull.data(), columns, count,
                 columns, shape.value_dim, false);
    pulls.mass[cluster] += tiles().pull_rows(own.pull.data(), own.weights.data(), count, columns, mass);
    tiles().gemm(own.pull.data(), columns, 1, top.keys.data(), shape.dim, own.made.data(), shape.dim, count, shape.dim,
                 top.count, false);
    tiles().gemm(own.pull.data(), 1, columns, own.query.data(), shape.dim, &pulls.key[cluster * shape.topk * shape.dim],
                 shape.dim, top.count, shape.dim, count, true);
    tiles().gemm(own.weights.data(), 1, columns, own.out.data(), shape.value_dim,
                 &pulls.value[cluster * shape.topk * shape.value_dim], shape.value_dim, top.count, shape.value_dim,
                 count, true);
}

void pull_members(const Shape &shape, const Inputs &in, const Outputs &saved, const Gradients &grads,
                  const Members &members, Index cluster, Index row, Pulls &pulls) {
    const Index place = row * shape.clusters + cluster, key_row = shape.key_row(row);
    TopKeys top(shape, true);
    if (shape.topk)
        top.read(shape, in.key + key_row * shape.keys * shape.dim, in.value + key_row * shape.keys * shape.value_dim,
                 saved.top + place * shape.topk);
    Scratch own(shape, top.columns);
    float *gathered = &pulls.gathered[cluster * shape.value_dim];
    const Index many = members.count(cluster);
    for (Index first = 0; first < many; first += block) {
        const Index count = std::min(block, many - first);
        const std::int32_t *places = members.of(cluster) + first;
        gather(grads.out + row * shape.queries * shape.value_dim, places, count, shape.value_dim, own.out.data());
        for (Index i = 0; i < count; ++i)
            tiles().add_scaled(gathered, own.out.data() + i * shape.value_dim, shape.value_dim, 1.0f);
        if (!top.count) continue;
        gather(in.query + row * shape.queries * shape.dim, places, count, shape.dim, own.query.data());
        pull_block(shape, top, count, saved.mass[place], cluster, own, pulls);
        for (Index i = 0; i < count; ++i)
            tiles().add_scaled(grads.query + (row * shape.queries + places[i]) * shape.dim, own.made.data() + i * shape.dim,
                               shape.dim, shape.scale);
    }
    const float *bottom = saved.bottom + place * shape.value_dim;
    float delta = saved.mass[place] * pulls.mass[cluster];
    for (Index m = 0; m < shape.value_dim; ++m) delta += gathered[m] * bottom[m];
    pulls.delta[cluster] = delta;
    pulls.lse[cluster] = saved.lse[place];
}

// Where the key is one of a cluster's best its weight reaches the output through the mass only, and it takes what the
// members' exact attention hands it. `by_key` groups the entries (cluster, place among its best) by key.
struct Corrections {
    const Shape &shape;
    const Members &by_key;
    const Pulls &pulls;

    void weights(Index first, Index rows, float *weights, float *pull) const {
        each(first, rows, [&](Index key, Index entry) {
            const Index cluster = entry / shape.topk, here = (key - first) * shape.columns() + cluster;
            pull[here] = weights[here] * (pulls.mass[cluster] - pulls.delta[cluster]);
            weights[here] = 0.0f;
        });
    }
    void gradients(Index first, Index rows, float *key_grad, float *value_grad) const {
        each(first, rows, [&](Index key, Index entry) {
            tiles().add_scaled(key_grad + key * shape.dim, &pulls.key[entry * shape.dim], shape.dim, shape.scale);
            tiles().add_scaled(value_grad + key * shape.value_dim, &pulls.value[entry * shape.value_dim],
                               shape.value_dim, 1.0f);
        });
    }

private:
    template <class Body>
    void each(Index first, Index rows, const Body &body) const {
        if (shape.topk == 0) return;
        for (Index key = first; key < first + rows; ++key)
            for (Index i = 0; i < by_key.count(key); ++i) body(key, by_key.of(key)[i]);
    }
};

// Softmax of the centroids over the keys begin .. end: writes those rows of the key's and the value's gradients and
// adds to the centroids', [columns, dim].
void pull_keys(const Shape &shape, const Centroids &centroids, const Corrections &fix, const Inputs &in, Index row,
               Index begin, Index end, const Gradients &grads, float *centroid_grad) {
    const Index columns = shape.columns(), dim = shape.dim, value_dim = shape.value_dim;
    const float *key = in.key + shape.key_row(row) * shape.keys * dim;
    const float *value = in.value + shape.key_row(row) * shape.keys * value_dim;
    float *key_grad = grads.key + row * shape.keys * dim, *value_grad = grads.value + row * shape.keys * value_dim;
    std::vector<float> weights(block * columns), pull(block * columns), unused(columns);
    for (Index first = begin; first < end; first += block) {
        const Index rows = std::min(block, end - first);
        tiles().gemm(key + first * dim, dim, 1, centroids.transposed.data(), columns, weights.data(), columns, rows,
                     columns, dim, false);
        tiles().exp_columns(weights.data(), rows, columns, fix.pulls.lse.data(), unused.data());
        tiles().gemm(value + first * value_dim, value_dim, 1, fix.pulls.gathered_across.data(), columns, pull.data(),
                     columns, rows, columns, value_dim, false);
        tiles().pull_columns(pull.data(), weights.data(), rows, columns, fix.pulls.delta.data());
        fix.weights(first, rows, weights.data(), pull.data());
        tiles().gemm(weights.data(), columns, 1, fix.pulls.gathered.data(), value_dim, value_grad + first * value_dim,
                     value_dim, rows, value_dim, shape.clusters, false);
        tiles().gemm(pull.data(), columns, 1, centroids.rows.data(), dim, key_grad + first * dim, dim, rows, dim,
                     shape.clusters, false);
        tiles().gemm(pull.data(), 1, columns, key + first * dim, dim, centroid_grad, dim, shape.clusters, dim, rows, true);
        fix.gradients(first, rows, key_grad, value_grad);
    }
}

// The gradient of a mean query goes to its members in equal parts.
void share(const Shape &shape, const Members &members, const float *centroid_grad, float *query_grad) {
    for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
        const Index count = members.count(cluster);
        for (Index i = 0; i < count; ++i)
            tiles().add_scaled(query_grad + members.of(cluster)[i] * shape.dim, centroid_grad + cluster * shape.dim,
                               shape.dim, shape.scale / static_cast<float>(count));
    }
}

struct Head {
    Members grouped, by_key;
    Centroids means;
    Pulls pulls;
};

void prepare(const Shape &shape, const Inputs &in, const Outputs &saved, const Gradients &grads, Index row, Head &head) {
    head.grouped = members(in.assignment + row * shape.queries, shape.queries, shape.clusters);
    head.means = centroids(in.query + row * shape.queries * shape.dim, head.grouped, shape);
    if (shape.topk)
        head.by_key = members(saved.top + row * shape.clusters * shape.topk, shape.clusters * shape.topk, shape.keys);
    head.pulls.make(shape);
    std::fill_n(grads.query + row * shape.queries * shape.dim, shape.queries * shape.dim, 0.0f);
    const Index length = shape.length(row), beyond = shape.keys - length;
    std::fill_n(grads.key + (row * shape.keys + length) * shape.dim, beyond * shape.dim, 0.0f);
    std::fill_n(grads.value + (row * shape.keys + length) * shape.value_dim, beyond * shape.value_dim, 0.0f);
}

void backward_rows(const Shape &shape, const Inputs &in, const Outputs &saved, const Gradients &grads, Index first,
                   Index count) {
    const Index pieces = shape.pieces(), size = shape.clusters * shape.dim;
    std::vector<Head> heads(count);
    std::vector<float> parts(count * pieces * size);
    for_units(count, [&](Index own) { prepare(shape, in, saved, grads, first + own, heads[own]); });
    for_units(count * shape.clusters, [&](Index unit) {
        Head &head = heads[unit / shape.clusters];
        pull_members(shape, in, saved, grads, head.grouped, unit % shape.clusters, first + unit / shape.clusters,
                     head.pulls);
    });
    for_units(count, [&](Index own) {
        Pulls &pulls = heads[own].pulls;
        transpose(pulls.gathered.data(), shape.columns(), shape.value_dim, pulls.gathered_across.data(), shape.columns());
    });
    for_units(count * pieces, [&](Index unit) {
        const Head &head = heads[unit / pieces];
        const Index row = first + unit / pieces, begin = unit % pieces * shape.piece();
        pull_keys(shape, head.means, {shape, head.by_key, head.pulls}, in, row, begin,
                  std::min(shape.length(row), begin + shape.piece()), grads, &parts[unit * size]);
    });
    for_units(count, [&](Index own) {
        float *sum = &parts[own * pieces * size];
        for (Index part = 1; part < pieces; ++part) tiles().add_scaled(sum, sum + part * size, size, 1.0f);
        share(shape, heads[own].grouped, sum, grads.query + (first + own) * shape.queries * shape.dim);
    });
}

}  // namespace

void backward(const Shape &shape, const Inputs &in, const Outputs &saved, const Gradients &grads) {
    for_waves(shape.rows(), [&](Index first, Index count) { backward_rows(shape, in, saved, grads, first, count); });
}

}  // namespace clustered
}  // namespace scrimp
