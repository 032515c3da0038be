#include "linear_attention.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace scrimp {
namespace {

constexpr int widest = 16;  // lanes; scratch is measured for them

std::size_t tile(int rows, int columns) {
    const auto up = [](int count) { return static_cast<std::size_t>((count + widest - 1) / widest * widest); };
    return up(rows) * up(columns);
}

int threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// Below this many multiply-adds waking the threads costs more than they give.
bool pays(const Attention &a) {
    const double tokens = static_cast<double>(a.queries) + a.keys;
    return tokens * a.batch * a.heads * a.dim * a.value_dim > 2e6;
}

// Tokens of one head cut into whole chunks, where heads alone are too few for the threads. Each cut costs the causal
// passes one more reading of what lies before it.
int segments(const Attention &a, int tokens) {
    const int heads = std::max(1, a.batch * a.key_heads), chunks = (tokens + chunk - 1) / chunk;
    if (heads >= threads() || !pays(a)) return 1;
    return std::clamp((2 * threads() + heads - 1) / heads, 1, std::max(1, chunks / 4));
}

// One head a part in every segment: [batch, key heads, segments].
std::vector<Part> cut(const Attention &a, int tokens, int count) {
    const int chunks = (tokens + chunk - 1) / chunk;
    const auto border = [&](int segment) {
        return std::min(tokens, static_cast<int>(static_cast<std::int64_t>(chunks) * segment / count) * chunk);
    };
    std::vector<Part> parts;
    for (int b = 0; b < a.batch; ++b)
        for (int h = 0; h < a.key_heads; ++h)
            for (int s = 0; s < count; ++s) parts.push_back({b, h, 1, border(s), border(s + 1)});
    return parts;
}

// Neighbouring heads made one part, as many as leave every thread its own: for uncut tokens whose heads lie side by
// side. Their states together should fit in a second-level cache.
std::vector<Part> bundled(const Attention &a, const std::vector<Part> &parts, int count) {
    if (count > 1 || a.key.head >= a.key.token) return parts;
    const int shares = (threads() + a.batch - 1) / std::max(1, a.batch);
    const int room = static_cast<int>((std::size_t{1} << 16) / std::max<std::size_t>(1, tile(a.dim, a.value_dim)));
    const int wide = std::max(1, std::min(room, (a.key_heads + shares - 1) / shares));
    std::vector<Part> found;
    for (const Part &part : parts)
        if (part.key_head % wide == 0) {
            found.push_back(part);
            found.back().heads = std::min(wide, a.key_heads - part.key_head);
        }
    return found;
}

template <class Pass>
void run(const Attention &a, const std::vector<Part> &parts, const Pass &pass) {
    const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(parts.size());
    const bool parallel = count > 1 && pays(a);
    (void)parallel;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) if (parallel)
#endif
    for (std::ptrdiff_t index = 0; index < count; ++index) pass(parts[static_cast<std::size_t>(index)]);
}

// States of every segment of every head, [heads, segments, ...]; none where causal passes have nothing to hand over.
class Sums {
public:
    Sums(const Attention &a, int segments)
        : dim_(a.dim), value_dim_(a.value_dim), kv_(rows(a, segments) * value_dim_), normaliser_(rows(a, segments)) {}

    State<float> at(int index) { return State<float>{kv_.data(), normaliser_.data()}.at(index, dim_, value_dim_); }
    void set(int index, const State<const float> &from) { combine(at(index), from, false); }
    void add(int index, const State<const float> &from) { combine(at(index), from, true); }
    void copy(int index, const State<float> &to) {
        if (to.kv != nullptr) combine(to, read(at(index)), false);
    }
    static State<const float> read(const State<float> &state) { return {state.kv, state.normaliser}; }

private:
    static std::size_t rows(const Attention &a, int segments) {
        return static_cast<std::size_t>(a.batch) * a.key_heads * segments * a.dim;
    }

    void combine(const State<float> &to, const State<const float> &from, bool add) const {
        if (from.kv == nullptr) return;
        const auto merge = [add](float *out, const float *in, std::size_t count) {
            for (std::size_t i = 0; i < count; ++i) out[i] = add ? out[i] + in[i] : in[i];
        };
        merge(to.kv, from.kv, static_cast<std::size_t>(dim_) * value_dim_);
        merge(to.normaliser, from.normaliser, static_cast<std::size_t>(dim_));
    }

    int dim_, value_dim_;
    std::vector<float> kv_, normaliser_;
};

State<const float> read(const State<float> &state) { return Sums::read(state); }

// Causal parts with the state at each one's first token: `before`, and the keys of the segments that precede it.
std::vector<Part> causal_parts(const Attention &a, Sums &sums, int count, const State<const float> &before) {
    std::vector<Part> parts = cut(a, a.keys, count), early;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const int place = static_cast<int>(i), head = place / count;
        parts[i].before = count == 1 ? before.at(head, a.dim, a.value_dim) : read(sums.at(place));
        if (count == 1) continue;
        if (place % count == 0) {
            sums.set(place, before.at(head, a.dim, a.value_dim));
        } else {
            early.push_back(parts[i - 1]);
            early.back().before = {};
            early.back().after = sums.at(place);
        }
    }
    run(a, early, [&](const Part &part) { add_keys(a, part); });
    for (std::size_t i = 1; i < parts.size(); ++i)
        if (static_cast<int>(i) % count) sums.add(static_cast<int>(i), read(sums.at(static_cast<int>(i) - 1)));
    return parts;
}

void causal_forward_all(const Attention &a, const Results &results, const State<const float> &before,
                        const State<float> &after) {
    const int count = segments(a, a.keys);
    Sums sums(a, count > 1 ? count : 0);
    std::vector<Part> parts = causal_parts(a, sums, count, before);
    for (std::size_t i = 0; i < parts.size(); ++i)
        if ((static_cast<int>(i) + 1) % count == 0)
            parts[i].after = after.at(static_cast<int>(i) / count, a.dim, a.value_dim);
    run(a, bundled(a, parts, count), [&](const Part &part) { causal_forward(a, results, part); });
}

// What every part left in `sums`, added up into each head's first place on top of `start`.
void gather_heads(const Attention &a, Sums &sums, int count, const State<const float> &start) {
    for (int head = 0; head < a.batch * a.key_heads; ++head) {
        for (int s = 1; s < count; ++s) sums.add(head * count, read(sums.at(head * count + s)));
        sums.add(head * count, start.at(head, a.dim, a.value_dim));
    }
}

void full_forward_all(const Attention &a, const Results &results, const State<const float> &before,
                      const State<float> &after) {
    const int count = segments(a, a.keys);
    Sums sums(a, count);
    std::vector<Part> parts = cut(a, a.keys, count);
    for (std::size_t i = 0; i < parts.size(); ++i) parts[i].after = sums.at(static_cast<int>(i));
    run(a, bundled(a, parts, count), [&](const Part &part) { add_keys(a, part); });
    gather_heads(a, sums, count, before);
    const int wide = segments(a, a.queries);
    parts = cut(a, a.queries, wide);
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const int head = static_cast<int>(i) / wide;
        parts[i].before = read(sums.at(head * count));
        if (static_cast<int>(i) % wide == 0) sums.copy(head * count, after.at(head, a.dim, a.value_dim));
    }
    run(a, bundled(a, parts, std::max(count, wide)), [&](const Part &part) { full_forward(a, results, part); });
}

void causal_keys_all(const Attention &a, const Gradients &g, int count, const State<const float> &grad_after,
                     const State<float> &grad_before) {
    Sums sums(a, count > 1 ? count : 0);
    std::vector<Part> parts = cut(a, a.keys, count), late;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const int place = static_cast<int>(i), head = place / count;
        parts[i].before = count == 1 ? grad_after.at(head, a.dim, a.value_dim) : read(sums.at(place));
        if (place % count == 0) parts[i].after = grad_before.at(head, a.dim, a.value_dim);
        if (count == 1) continue;
        if (place % count == count - 1) {
            sums.set(place, grad_after.at(head, a.dim, a.value_dim));
        } else {
            late.push_back(parts[i + 1]);
            late.back().before = {};
            late.back().after = sums.at(place);
        }
    }
    run(a, late, [&](const Part &part) { add_queries(a, g, part); });
    for (int place = static_cast<int>(parts.size()) - 2; place >= 0; --place)
        if (place % count != count - 1) sums.add(place, read(sums.at(place + 1)));
    run(a, bundled(a, parts, count), [&](const Part &part) { causal_key_backward(a, g, part); });
}

void causal_backward_all(const Attention &a, const Gradients &g, const State<const float> &before,
                         const State<const float> &grad_after, const State<float> &grad_before) {
    const int count = segments(a, a.keys);
    Sums sums(a, count > 1 ? count : 0);
    const std::vector<Part> parts = causal_parts(a, sums, count, before);
    run(a, bundled(a, parts, count), [&](const Part &part) { causal_query_backward(a, g, part); });
    causal_keys_all(a, g, count, grad_after, grad_before);
}

void full_backward_all(const Attention &a, const Gradients &g, const State<const float> &total,
                       const State<const float> &grad_after, const State<float> &grad_before) {
    const int count = segments(a, a.queries), wide = segments(a, a.keys);
    Sums sums(a, count);
    std::vector<Part> parts = cut(a, a.queries, count);
    for (std::size_t i = 0; i < parts.size(); ++i) {
        parts[i].before = total.at(static_cast<int>(i) / count, a.dim, a.value_dim);
        parts[i].after = sums.at(static_cast<int>(i));
    }
    run(a, bundled(a, parts, count), [&](const Part &part) { full_query_backward(a, g, part); });
    gather_heads(a, sums, count, grad_after);
    parts = cut(a, a.keys, wide);
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const int head = static_cast<int>(i) / wide;
        parts[i].before = read(sums.at(head * count));
        if (static_cast<int>(i) % wide == 0) sums.copy(head * count, grad_before.at(head, a.dim, a.value_dim));
    }
    run(a, bundled(a, parts, std::max(count, wide)), [&](const Part &part) { full_key_backward(a, g, part); });
}

}  // namespace

float *scratch(std::size_t count) {
    thread_local std::unique_ptr<float[]> kept;
    thread_local std::size_t length = 0;
    if (count + widest > length) {
        kept.reset(new float[count + widest]);
        length = count + widest;
    }
    const auto place = reinterpret_cast<std::uintptr_t>(kept.get());
    return reinterpret_cast<float *>((place + 63) / 64 * 64);
}

std::size_t forward_scratch(const Attention &a, int heads) {
    return 3 * tile(chunk, a.dim) + 2 * tile(chunk, a.value_dim) + tile(chunk, chunk) + tile(chunk, widest) +
           tile(1, chunk) + static_cast<std::size_t>(heads) * (tile(a.dim, a.value_dim) + tile(1, a.dim));
}

std::size_t backward_scratch(const Attention &a, int heads) {
    return 4 * tile(chunk, a.dim) + 5 * tile(chunk, a.value_dim + 1) + 2 * tile(chunk, chunk) + tile(chunk, widest) +
           tile(1, chunk) + static_cast<std::size_t>(heads) * (2 * tile(a.dim, a.value_dim + 1) + tile(1, a.dim));
}

void linear_forward(const Attention &a, const Results &results, bool causal, const State<const float> &before,
                    const State<float> &after) {
    (causal ? causal_forward_all : full_forward_all)(a, results, before, after);
}

void linear_backward(const Attention &a, const Gradients &g, bool causal, const State<const float> &state,
                     const State<const float> &grad_after, const State<float> &grad_before) {
    const std::unique_ptr<float[]> kept(new float[static_cast<std::size_t>(a.batch) * a.heads * a.queries + 1]);
    Gradients gradients = g;
    gradients.grad_denominators = kept.get();
    (causal ? causal_backward_all : full_backward_all)(a, gradients, state, grad_after, grad_before);
}

}  // namespace scrimp
