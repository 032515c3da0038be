// What centroids learn of keys that come in order: running softmax statistics and each centroid's best keys.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "clustered_attention.hpp"

namespace scrimp {
namespace clustered {

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

// Takes in the keys begin .. end, whose exponentials and sums are those of all keys so far afterwards.
void attend_centroids(const Shape &shape, const Centroids &centroids, const float *key, const float *value, Index begin,
                      Index end, Statistics &found);

}  // namespace clustered
}  // namespace scrimp
