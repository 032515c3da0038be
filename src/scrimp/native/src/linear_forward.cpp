#include "linear_tiles.hpp"

namespace scrimp {
namespace {

template <int Lanes>
struct ForwardTiles {
    int dim, value_dim;  // padded
    float *keys, *keys_t, *values, *queries, *scores, *result, *kv, *normaliser, *lines, *factors;

    SCRIMP_BODY ForwardTiles make(const Attention &a, int heads) {
        Arena arena{scratch(forward_scratch(a, heads))};
        ForwardTiles t;
        t.dim = padded<Lanes>(a.dim);
        t.value_dim = padded<Lanes>(a.value_dim);
        t.keys = arena.take(chunk, t.dim);
        t.keys_t = arena.take(t.dim, chunk);
        t.values = arena.take(chunk, t.value_dim);
        t.queries = arena.take(chunk, t.dim);
        t.scores = arena.take(chunk, chunk);
        t.result = arena.take(chunk, t.value_dim);
        t.lines = arena.take(chunk, Lanes);
        t.factors = arena.take(1, chunk);
        t.normaliser = arena.take(heads, t.dim);
        t.kv = arena.take(heads, t.dim * t.value_dim);
        return t;
    }

    // The same tiles with the state of the part's `index`th head.
    SCRIMP_BODY ForwardTiles head(const ForwardTiles &all, int index) {
        ForwardTiles t = all;
        t.kv += index * t.dim * t.value_dim;
        t.normaliser += index * t.dim;
        return t;
    }
};

template <int Lanes>
SCRIMP_BODY void load_keys(const Attention &a, const ForwardTiles<Lanes> &t, const Place &at, int live, int size) {
    gather<Lanes>(t.keys, t.dim, a.key.at(at), a.key.token, live, size, a.dim, a.key_map);
    transpose<Lanes>(t.keys_t, chunk, t.keys, t.dim, size, t.dim);
    gather<Lanes>(t.values, t.value_dim, a.value.at(at), a.value.token, live, size, a.value_dim, Map::identity);
}

// S += phi(k)^T v, Z += sum of phi(k)
template <int Lanes>
SCRIMP_BODY void update_state(const ForwardTiles<Lanes> &t, int live) {
    const Term term[1] = {{t.keys_t, chunk, t.values, t.value_dim, live}};
    product<Lanes>(t.kv, t.value_dim, t.dim, t.value_dim, term, true);
    add_rows<Lanes>(t.normaliser, t.keys, t.dim, live, t.dim, nullptr);
}

// z_i = phi(q_i) Z, and in a chunk of its own keys the sum of row i of the triangle.
template <int Lanes>
SCRIMP_BODY void sum_denominators(const ForwardTiles<Lanes> &t, int size, bool triangle) {
    constexpr int step = Block<Lanes>::rows;
    for (int row = 0; row < size; ++row) {
        Floats<Lanes> sum = {}, a, b;
        for (int column = 0; column < t.dim; column += Lanes) {
            load<Lanes>(a, t.queries + row * t.dim + column);
            load<Lanes>(b, t.normaliser + column);
            sum += a * b;
        }
        for (int column = 0; triangle && column < row / step * step + step; column += Lanes) {
            load<Lanes>(a, t.scores + row * chunk + column);
            sum += a;
        }
        store<Lanes>(t.lines + row * Lanes, sum);
    }
    sum_lanes<Lanes>(t.factors, t.lines, size);
}

// The chunk's denominators, and its numerators divided by them.
template <int Lanes>
SCRIMP_BODY void write_results(const Attention &a, const Results &results, const ForwardTiles<Lanes> &t,
                               const Place &at) {
    std::copy_n(t.factors, at.rows, results.denominators + a.row(at));
    for (int row = 0; row < at.rows; ++row) t.factors[row] = 1.0f / (t.factors[row] + a.eps);
    scatter_scaled<Lanes>(results.out.at(at), results.out.token, t.result, t.value_dim, at.rows, a.value_dim,
                          t.factors);
}

// Numerators phi(q) S, and with keys of its own tril(phi(q) phi(k)^T) v as well.
template <int Lanes>
SCRIMP_BODY void attend(const Attention &a, const Results &results, const ForwardTiles<Lanes> &t, const Place &at,
                        bool own_keys) {
    const int size = padded<Lanes>(at.rows);
    gather<Lanes>(t.queries, t.dim, a.query.at(at), a.query.token, at.rows, size, a.dim, a.query_map);
    const Term past = {t.queries, t.dim, t.kv, t.value_dim, a.dim};
    if (own_keys) {
        triangle<Lanes, true>(t.scores, chunk, size, {t.queries, t.dim, t.keys_t, chunk, a.dim});
        const Term terms[2] = {{t.scores, chunk, t.values, t.value_dim, size, Reach::to_row}, past};
        product<Lanes>(t.result, t.value_dim, size, t.value_dim, terms);
    } else {
        const Term terms[1] = {past};
        product<Lanes>(t.result, t.value_dim, size, t.value_dim, terms);
    }
    sum_denominators<Lanes>(t, size, own_keys);
    write_results<Lanes>(a, results, t, at);
}

template <int Lanes>
SCRIMP_BODY ForwardTiles<Lanes> begin(const Attention &a, const Part &part) {
    const ForwardTiles<Lanes> all = ForwardTiles<Lanes>::make(a, part.heads);
    for (int h = 0; h < part.heads; ++h) {
        const ForwardTiles<Lanes> t = ForwardTiles<Lanes>::head(all, h);
        load_state<Lanes>(t.kv, t.normaliser, part.before.at(h, a.dim, a.value_dim), a.dim, a.value_dim);
    }
    return all;
}

template <int Lanes>
SCRIMP_BODY void end(const Attention &a, const Part &part, const ForwardTiles<Lanes> &all) {
    for (int h = 0; h < part.heads; ++h) {
        const ForwardTiles<Lanes> t = ForwardTiles<Lanes>::head(all, h);
        save_state<Lanes>(part.after.at(h, a.dim, a.value_dim), t.kv, t.normaliser, a.dim, a.value_dim);
    }
}

template <int Lanes>
SCRIMP_BODY void add_keys_pass_body(const Attention &a, const Part &part) {
    const ForwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = 0; item < part.items(); ++item) {
        const Place at = part.keys(item);
        const int live = a.live(at);
        if (live == 0) break;
        const ForwardTiles<Lanes> t = ForwardTiles<Lanes>::head(all, item % part.heads);
        load_keys<Lanes>(a, t, at, live, padded<Lanes>(live));
        if (item + 1 < part.items()) expect_keys(a, part.keys(item + 1));
        update_state<Lanes>(t, live);
    }
    end<Lanes>(a, part, all);
}

template <int Lanes>
SCRIMP_BODY void causal_forward_pass_body(const Attention &a, const Results &results, const Part &part) {
    const ForwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = 0; item < part.items(); ++item) {
        const Place at = part.keys(item);
        const int live = a.live(at);
        const ForwardTiles<Lanes> t = ForwardTiles<Lanes>::head(all, item % part.heads);
        if (live > 0) load_keys<Lanes>(a, t, at, live, padded<Lanes>(at.rows));
        if (item + 1 < part.items()) {
            expect_keys(a, part.keys(item + 1));
            expect_queries(a, a.query, part.keys(item + 1), a.dim);
        }
        for (int member = 0; member < a.group(); ++member)
            attend<Lanes>(a, results, t, queries(a, at, member), live > 0);
        if (live > 0) update_state<Lanes>(t, live);
    }
    end<Lanes>(a, part, all);
}

template <int Lanes>
SCRIMP_BODY void full_forward_pass_body(const Attention &a, const Results &results, const Part &part) {
    const ForwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = 0; item < part.items(); ++item) {
        const ForwardTiles<Lanes> t = ForwardTiles<Lanes>::head(all, item % part.heads);
        if (item + 1 < part.items()) expect_queries(a, a.query, part.keys(item + 1), a.dim);
        for (int member = 0; member < a.group(); ++member)
            attend<Lanes>(a, results, t, queries(a, part.keys(item), member), false);
    }
}

SCRIMP_DISPATCH_LANES(void, add_keys_pass, (const Attention &a, const Part &part), (a, part))
SCRIMP_DISPATCH_LANES(void, causal_forward_pass, (const Attention &a, const Results &r, const Part &part), (a, r, part))
SCRIMP_DISPATCH_LANES(void, full_forward_pass, (const Attention &a, const Results &r, const Part &part), (a, r, part))

}  // namespace

void add_keys(const Attention &a, const Part &part) { add_keys_pass(a, part); }

void causal_forward(const Attention &a, const Results &r, const Part &part) { causal_forward_pass(a, r, part); }

void full_forward(const Attention &a, const Results &r, const Part &part) { full_forward_pass(a, r, part); }

}  // namespace scrimp
