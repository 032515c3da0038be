#include "causal_clustered.hpp"

#include <nanobind/stl/vector.h>

#include "tiles.hpp"

namespace scrimp {
namespace causal {

Head Inputs::head(const Plan &plan, Index row) const {
    const Shape &shape = plan.shape;
    const Index key_row = shape.key_row(row), tokens = plan.tokens();
    return {query + row * tokens * shape.dim, key + key_row * tokens * shape.dim,
            value + key_row * tokens * shape.value_dim, assignment + row * plan.offset(plan.epochs())};
}

void Best::read(const Shape &shape, const Head &head, const std::int32_t *top) {
    std::copy_n(top, shape.topk, places.begin());
    rows.read(shape, head.key, head.value, places.data());
}

Centroids centroids_of(const Plan &plan, const Head &head, const Members &members) {
    return clustered::centroids(head.query, members, plan.shape);
}

}  // namespace causal

namespace {

using Address = std::uintptr_t;
using causal::Index;

template <class T>
T *at(Address address) {
    return reinterpret_cast<T *>(address);
}

// sizes: batch, heads, key heads, tokens, dim, value dim, clusters, topk, block
causal::Plan plan_of(const std::vector<Index> &s, Address key_lengths) {
    return {{s[0], s[1], s[2], s[3], s[3], s[4], s[5], s[6], s[7], 1.0f, at<const std::int64_t>(key_lengths)}, s[8]};
}

causal::Inputs inputs(const std::vector<Address> &t) {
    return {at<const float>(t[0]), at<const float>(t[1]), at<const float>(t[2]), at<const std::int64_t>(t[3])};
}

causal::Saved kept(const std::vector<Address> &t) {
    return {at<float>(t[4]), at<float>(t[5]), at<std::int64_t>(t[6]),
            at<float>(t[7]), at<float>(t[8]), at<std::int32_t>(t[9])};
}

// tensors: query, key, value, assignment; out, lse, nearest, past_lse, bottom, top
void forward(const std::vector<Index> &sizes, Address key_lengths, const std::vector<Address> &tensors) {
    causal::forward(plan_of(sizes, key_lengths), inputs(tensors), kept(tensors));
}

// tensors: those of `forward`; the output's gradient and those to be written
void backward(const std::vector<Index> &sizes, Address key_lengths, const std::vector<Address> &t) {
    causal::backward(plan_of(sizes, key_lengths), inputs(t), kept(t),
                     {at<const float>(t[10]), at<float>(t[11]), at<float>(t[12]), at<float>(t[13])});
}

}  // namespace

// Addresses of packed tensors the caller has checked.
void bind_causal_clustered(nanobind::module_ &module) {
    if (!has_tiles()) return;
    using Released = nanobind::call_guard<nanobind::gil_scoped_release>;
    module.def("causal_clustered_forward", &forward, Released());
    module.def("causal_clustered_backward", &backward, Released());
}

}  // namespace scrimp
