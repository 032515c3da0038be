// Centroids attend to all keys, block by block with running maxima and sums (no clusters x keys matrix), and remember
// their best keys; then every member attends exactly to the best keys of its cluster. Weights lie as [keys, clusters]:
// a register holds one key's weights for sixteen clusters, so nothing is summed across lanes and nothing is packed.
#include <cmath>
#include <cstring>
#include <limits>

#include "clustered_attention.hpp"
#include "tiles.hpp"

namespace scrimp {
namespace clustered {
namespace {

constexpr Index group = 16;  // keys whose common maximum decides whether any of them is looked at

// A logit and its key as one number, the better the larger; on a tie the earlier key. Compared in one instruction.
class Best {
public:
    Best() = default;
    Best(float logit, Index key) {
        const float signless = logit + 0.0f;  // -0 is 0
        std::uint32_t bits;
        std::memcpy(&bits, &signless, sizeof bits);
        bits = bits >> 31 ? ~bits : bits | 0x80000000u;
        rank_ = static_cast<std::uint64_t>(bits) << 32 | (0xffffffffu - static_cast<std::uint32_t>(key));
    }
    float logit() const {
        const std::uint32_t ordered = static_cast<std::uint32_t>(rank_ >> 32);
        const std::uint32_t bits = ordered >> 31 ? ordered & 0x7fffffffu : ~ordered;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    Index key() const { return 0xffffffffu - static_cast<std::uint32_t>(rank_ & 0xffffffffu); }
    bool operator<(const Best &other) const { return rank_ > other.rank_; }

private:
    std::uint64_t rank_;
};

// The largest `limit` logits of each cluster, over keys that come in order.
class Leaders {
public:
    Leaders(Index clusters, Index limit)
        : limit_(limit), room_(4 * limit + group), best_(clusters * room_), count_(clusters),
          bar_(clusters, -std::numeric_limits<float>::infinity()) {}

    // logits [rows, columns] of keys from `first` on, rows <= group; most[c] is their maximum
    void offer(const float *logits, const float *most, Index rows, Index columns, Index first) {
        for (Index cluster = 0; cluster < static_cast<Index>(bar_.size()); ++cluster) {
            if (!(most[cluster] > bar_[cluster])) continue;
            for (Index i = 0; i < rows; ++i)
                if (logits[i * columns + cluster] > bar_[cluster])
                    add(cluster, {logits[i * columns + cluster], first + i});
            if (count_[cluster] > 4 * limit_) cut(cluster);
        }
    }
    void add(Index cluster, Best one) { best_[cluster * room_ + count_[cluster]++] = one; }
    // Keeps the `limit` best; a later key must beat the last of them.
    void cut(Index cluster) {
        if (count_[cluster] < limit_ || limit_ == 0) return;
        Best *from = &best_[cluster * room_];
        std::nth_element(from, from + limit_ - 1, from + count_[cluster]);
        count_[cluster] = limit_;
        bar_[cluster] = from[limit_ - 1].logit();
    }
    void take(Index cluster, const Leaders &other) {
        for (const Best *one = other.begin(cluster); one != other.end(cluster); ++one) {
            if (one->logit() > bar_[cluster]) add(cluster, *one);
            if (count_[cluster] > 4 * limit_) cut(cluster);
        }
    }
    const Best *begin(Index cluster) const { return &best_[cluster * room_]; }
    const Best *end(Index cluster) const { return begin(cluster) + count_[cluster]; }
    Best *begin(Index cluster) { return &best_[cluster * room_]; }
    Best *end(Index cluster) { return begin(cluster) + count_[cluster]; }

private:
    Index limit_, room_;
    std::vector<Best> best_;
    std::vector<Index> count_;
    std::vector<float> bar_;
};

// Softmax statistics of a head's clusters over some of the keys; `value` is not yet divided by `sum`.
struct Statistics {
    std::vector<float> most, sum, value;
    Leaders leaders;
    explicit Statistics(const Shape &shape)
        : most(shape.columns(), -std::numeric_limits<float>::infinity()), sum(shape.columns()),
          value(shape.clusters * shape.value_dim), leaders(shape.clusters, shape.topk) {}

    // Makes `higher` the reference of the exponentials.
    void raise(const Shape &shape, const std::vector<float> &higher) {
        for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
            if (!(higher[cluster] > most[cluster])) continue;
            const float factor = std::exp(most[cluster] - higher[cluster]);
            sum[cluster] *= factor;
            float *row = &value[cluster * shape.value_dim];
            for (Index m = 0; m < shape.value_dim; ++m) row[m] *= factor;
        }
        most = higher;
    }
};

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
