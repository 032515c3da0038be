// Linear attention, forward and backward, in chunks of tokens.
//
// Source: Katharopoulos, Vyas, Pappas and Fleuret, "Transformers are RNNs", ICML 2020 (arXiv 2006.16236), equations
// 9-15. Within a chunk the causal sums are taken over a triangle of scores, between chunks through the state
// S = sum phi(k) v^T and Z = sum phi(k). A column of ones beside the values makes Z a part of S, and with it the
// denominator z of a row and its gradient ride along:
//     out_i = phi(q_i) S_i / (z_i + eps),   z_i = phi(q_i) Z_i
//     g_i = dout_i / (z_i + eps),           dz_i = -(dout_i . out_i) / (z_i + eps)
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "tile.hpp"

namespace scrimp {

constexpr int chunk = 64;

// Rows of one query head within one chunk.
struct Place {
    int batch, head, from, rows;
};

// [batch, heads, tokens, dim] with any strides (in numbers) but the last, which is 1.
template <class Number>
struct Field {
    Number *data = nullptr;
    Stride batch = 0, head = 0, token = 0;

    Number *at(int b, int h, int n) const { return data + b * batch + h * head + n * token; }
    Number *at(const Place &p) const { return at(p.batch, p.head, p.from); }
};

// S [batch, key heads, dim, value dim] and Z [batch, key heads, dim], packed; or nothing, which stands for zeros.
template <class Number>
struct State {
    Number *kv = nullptr, *normaliser = nullptr;

    State at(int index, int dim, int value_dim) const {
        if (kv == nullptr) return {};
        const Stride place = static_cast<Stride>(index) * dim;
        return {kv + place * value_dim, normaliser + place};
    }
};

struct Attention {
    int batch, heads, key_heads, queries, keys, dim, value_dim;
    Field<const float> query, key, value;
    const std::int64_t *key_lengths;  // [batch] or null: all exist
    Map query_map, key_map;
    float eps;

    int group() const { return heads / key_heads; }
    // How many of these keys exist.
    int live(const Place &keys) const {
        if (key_lengths == nullptr) return keys.rows;
        const std::int64_t left = key_lengths[keys.batch] - keys.from;
        return left <= 0 ? 0 : left < keys.rows ? static_cast<int>(left) : keys.rows;
    }
    // Where the rows' numbers lie in [batch, heads, queries].
    Stride row(const Place &p) const { return (static_cast<Stride>(p.batch) * heads + p.head) * queries + p.from; }
};

// One thread's share: tokens [from, to) of neighbouring key heads and of the query heads that read them. It is walked
// chunk by chunk and within a chunk head by head: where a token's heads lie side by side, so do the reads.
struct Part {
    int batch, key_head, heads, from, to;
    State<const float> before = {};  // what the sums of its heads begin with
    State<float> after = {};         // where they go; may be nothing

    int items() const { return (to - from + chunk - 1) / chunk * heads; }
    Place keys(int item) const {
        const int start = from + item / heads * chunk;
        return {batch, key_head + item % heads, start, to - start < chunk ? to - start : chunk};
    }
};

inline Place queries(const Attention &a, const Place &keys, int member) {
    return {keys.batch, keys.head * a.group() + member, keys.from, keys.rows};
}

struct Results {
    Field<float> out;
    float *denominators;  // [batch, heads, queries]
};

struct Gradients {
    Field<const float> out, grad_out;
    const float *denominators;
    float *grad_denominators;  // [batch, heads, queries]: written by the query pass, read by the key pass
    Field<float> query, key, value;
};

// Scratch memory of the calling thread: at least `count` floats, aligned to 64 bytes, kept for the next call.
float *scratch(std::size_t count);
std::size_t forward_scratch(const Attention &attention, int heads);
std::size_t backward_scratch(const Attention &attention, int heads);

// The passes over one part. S, Z go from left to right:
void add_keys(const Attention &attention, const Part &part);
void causal_forward(const Attention &attention, const Results &results, const Part &part);
void causal_query_backward(const Attention &attention, const Gradients &gradients, const Part &part);
// R = sum phi(q)^T g and RZ = sum phi(q)^T dz from right to left:
void add_queries(const Attention &attention, const Gradients &gradients, const Part &part);
void causal_key_backward(const Attention &attention, const Gradients &gradients, const Part &part);
// Without an order, S, Z (or R, RZ) are of all tokens; the query pass begins with S, Z and ends with its R, RZ.
void full_forward(const Attention &attention, const Results &results, const Part &part);
void full_query_backward(const Attention &attention, const Gradients &gradients, const Part &part);
void full_key_backward(const Attention &attention, const Gradients &gradients, const Part &part);

// All parts, on as many threads as pay.
void linear_forward(const Attention &attention, const Results &results, bool causal, const State<const float> &before,
                    const State<float> &after);
// `state` is what the queries met: for causal attention the state before the first token, else that of all tokens.
void linear_backward(const Attention &attention, const Gradients &gradients, bool causal,
                     const State<const float> &state, const State<const float> &grad_after,
                     const State<float> &grad_before);

// One token: `after` = `before` plus the token, which may be the same memory; then the queries' output from `after`.
void linear_step(const Attention &attention, const State<const float> &before, const State<float> &after,
                 const Field<float> &out);

void bind_linear_attention(nanobind::module_ &module);

}  // namespace scrimp
