#include "clustered_attention.hpp"

#include <nanobind/stl/vector.h>

#include "causal_clustered.hpp"
#include "hamming.hpp"
#include "tiles.hpp"

namespace scrimp {
namespace clustered {

Members members(const std::int64_t *assignment, Index queries, Index clusters) {
    Members found{{}, std::vector<Index>(clusters + 1)};
    const auto real = [&](Index i) { return assignment[i] >= 0 && assignment[i] < clusters; };
    for (Index i = 0; i < queries; ++i)
        if (real(i)) ++found.start[assignment[i] + 1];
    for (Index cluster = 0; cluster < clusters; ++cluster) found.start[cluster + 1] += found.start[cluster];
    found.order.resize(found.start[clusters]);
    std::vector<Index> next(found.start.begin(), found.start.end() - 1);
    for (Index i = 0; i < queries; ++i)
        if (real(i)) found.order[next[assignment[i]]++] = static_cast<std::int32_t>(i);
    return found;
}

void transpose(const float *from, Index rows, Index columns, float *to, Index stride, float factor) {
    for (Index j = 0; j < columns; ++j) {
        for (Index i = 0; i < rows; ++i) to[j * stride + i] = factor * from[i * columns + j];
        std::fill(to + j * stride + rows, to + (j + 1) * stride, 0.0f);
    }
}

Centroids centroids(const float *query, const Members &members, const Shape &shape) {
    Centroids made{std::vector<float>(shape.columns() * shape.dim), std::vector<float>(shape.columns() * shape.dim)};
    for (Index cluster = 0; cluster < shape.clusters; ++cluster) {
        const Index count = members.count(cluster);
        float *mean = &made.rows[cluster * shape.dim];
        for (Index i = 0; i < count; ++i)
            tiles().add_scaled(mean, query + members.of(cluster)[i] * shape.dim, shape.dim, 1.0f);
        for (Index d = 0; d < shape.dim && count; ++d) mean[d] *= shape.scale / static_cast<float>(count);
    }
    transpose(made.rows.data(), shape.columns(), shape.dim, made.transposed.data(), shape.columns());
    return made;
}

Index kept(const std::int64_t *top, Index topk) {
    while (topk > 0 && top[topk - 1] < 0) --topk;
    return topk;
}

TopKeys::TopKeys(const Shape &shape, bool values_too)
    : count(0),
      columns(padded(shape.topk)),
      both(values_too),
      keys(shape.topk * shape.dim),
      values(shape.topk * shape.value_dim),
      keys_across(columns * shape.dim),
      values_across(values_too ? columns * shape.value_dim : 0) {}

void TopKeys::read(const Shape &shape, const float *key, const float *value, const std::int64_t *top) {
    count = kept(top, shape.topk);
    gather(key, top, count, shape.dim, keys.data());
    gather(value, top, count, shape.value_dim, values.data());
    transpose(keys.data(), count, shape.dim, keys_across.data(), columns, shape.scale);
    if (both) transpose(values.data(), count, shape.value_dim, values_across.data(), columns);
}

}  // namespace clustered

namespace {

using Address = std::uintptr_t;
using clustered::Index;

template <class T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

clustered::Shape shape_of(const std::vector<Index> &sizes, double scale, Address key_lengths) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8],
            static_cast<float>(scale), at<const std::int64_t>(key_lengths)};
}

clustered::Inputs inputs(const std::vector<Address> &t) {
    return {at<const float>(t[0]), at<const float>(t[1]), at<const float>(t[2]), at<const std::int64_t>(t[3])};
}

// tensors: query, key, value, assignment; out, lse, mass, bottom, top
void forward(const std::vector<Index> &sizes, double scale, Address key_lengths, const std::vector<Address> &tensors) {
    const auto &t = tensors;
    clustered::forward(shape_of(sizes, scale, key_lengths), inputs(t),
                       {at<float>(t[4]), at<float>(t[5]), at<float>(t[6]), at<float>(t[7]), at<std::int64_t>(t[8])});
}

// tensors: query, key, value, assignment; lse, mass, bottom, top; the output's gradient and those to be written
void backward(const std::vector<Index> &sizes, double scale, Address key_lengths, const std::vector<Address> &tensors) {
    const auto &t = tensors;
    clustered::backward(shape_of(sizes, scale, key_lengths), inputs(t),
                        {nullptr, at<float>(t[4]), at<float>(t[5]), at<float>(t[6]), at<std::int64_t>(t[7])},
                        {at<const float>(t[8]), at<float>(t[9]), at<float>(t[10]), at<float>(t[11])});
}

}  // namespace

// Addresses of packed tensors the caller has checked; sizes in the order of `Shape`.
void bind_clustered_attention(nanobind::module_ &module) {
    if (!has_tiles()) return;
    using Released = nanobind::call_guard<nanobind::gil_scoped_release>;
    module.def("clustered_forward", &forward, Released());
    module.def("clustered_backward", &backward, Released());
    bind_causal_clustered(module);
    bind_hamming(module);
}

}  // namespace scrimp
