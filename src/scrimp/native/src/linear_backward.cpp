#include "linear_tiles.hpp"

namespace scrimp {
namespace {

// Rows of values and of gradients are one longer than the value dim: the values' end in 1, the gradients' in dz.
template <int Lanes>
struct BackwardTiles {
    int dim, value_dim, tail;  // padded; tail: the value dim and one more
    float *keys, *values, *values_t, *queries, *queries_t, *grads, *grads_t, *scores, *weights, *left, *right;
    float *kv, *kv_t, *normaliser, *lines, *sums;

    SCRIMP_BODY BackwardTiles make(const Attention &a, int heads) {
        Arena arena{scratch(backward_scratch(a, heads))};
        BackwardTiles t;
        t.dim = padded<Lanes>(a.dim);
        t.value_dim = padded<Lanes>(a.value_dim);
        t.tail = padded<Lanes>(a.value_dim + 1);
        t.keys = arena.take(chunk, t.dim);
        t.values = arena.take(chunk, t.tail);
        t.values_t = arena.take(t.tail, chunk);
        t.queries = arena.take(chunk, t.dim);
        t.queries_t = arena.take(t.dim, chunk);
        t.grads = arena.take(chunk, t.tail);
        t.grads_t = arena.take(t.tail, chunk);
        t.scores = arena.take(chunk, chunk);
        t.weights = arena.take(chunk, chunk);
        t.left = arena.take(chunk, t.dim);
        t.right = arena.take(chunk, t.value_dim);
        t.lines = arena.take(chunk, Lanes);
        t.sums = arena.take(1, chunk);
        t.normaliser = arena.take(heads, t.dim);
        t.kv = arena.take(heads, t.dim * t.value_dim);
        t.kv_t = arena.take(heads, t.tail * t.dim);
        return t;
    }

    // The same tiles with the state of the part's `index`th head.
    SCRIMP_BODY BackwardTiles head(const BackwardTiles &all, int index) {
        BackwardTiles t = all;
        t.kv += index * t.dim * t.value_dim;
        t.kv_t += index * t.tail * t.dim;
        t.normaliser += index * t.dim;
        return t;
    }
};

// Every head's state as `before` has it, both ways round.
template <int Lanes>
SCRIMP_BODY BackwardTiles<Lanes> begin(const Attention &a, const Part &part) {
    const BackwardTiles<Lanes> all = BackwardTiles<Lanes>::make(a, part.heads);
    std::fill_n(all.values_t, all.tail * chunk, 0.0f);
    std::fill_n(all.kv_t, part.heads * all.tail * all.dim, 0.0f);
    for (int h = 0; h < part.heads; ++h) {
        const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, h);
        load_state<Lanes>(t.kv, t.normaliser, part.before.at(h, a.dim, a.value_dim), a.dim, a.value_dim);
        transpose_state<Lanes>(t.kv_t, t.kv, t.normaliser, a.dim, a.value_dim);
    }
    return all;
}

template <int Lanes>
SCRIMP_BODY void end(const Attention &a, const Part &part, const BackwardTiles<Lanes> &all) {
    for (int h = 0; h < part.heads; ++h) {
        const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, h);
        save_state<Lanes>(part.after.at(h, a.dim, a.value_dim), t.kv, t.normaliser, a.dim, a.value_dim);
    }
}

template <int Lanes>
SCRIMP_BODY void load_keys(const Attention &a, const BackwardTiles<Lanes> &t, const Place &at, int live, int size) {
    gather<Lanes>(t.keys, t.dim, a.key.at(at), a.key.token, live, size, a.dim, a.key_map);
    gather<Lanes>(t.values, t.tail, a.value.at(at), a.value.token, live, size, a.value_dim, Map::identity);
    for (int row = 0; row < size; ++row) t.values[row * t.tail + a.value_dim] = 1.0f;
}

template <int Lanes>
SCRIMP_BODY void transpose_values(const Attention &a, const BackwardTiles<Lanes> &t, int size) {
    transpose<Lanes>(t.values_t, chunk, t.values, t.tail, size, t.value_dim);
    std::fill_n(t.values_t + a.value_dim * chunk, size, 1.0f);
}

template <int Lanes>
SCRIMP_BODY void load_queries(const Attention &a, const BackwardTiles<Lanes> &t, const Place &at) {
    gather<Lanes>(t.queries, t.dim, a.query.at(at), a.query.token, at.rows, padded<Lanes>(at.rows), a.dim,
                  a.query_map);
}

// sums = -(dout_i . out_i)
template <int Lanes>
SCRIMP_BODY void dot_outputs(const Attention &a, const Gradients &g, const BackwardTiles<Lanes> &t, const Place &at) {
    const float *out = g.out.at(at), *grad = g.grad_out.at(at);
    for (int row = 0; row < at.rows; ++row, out += g.out.token, grad += g.grad_out.token) {
        Floats<Lanes> sum = {}, x, y;
        for (int column = 0; column < a.value_dim; column += Lanes) {
            load_part<Lanes>(x, out + column, a.value_dim - column);
            load_part<Lanes>(y, grad + column, a.value_dim - column);
            sum -= x * y;
        }
        store<Lanes>(t.lines + row * Lanes, sum);
    }
    sum_lanes<Lanes>(t.sums, t.lines, padded<Lanes>(at.rows));
}

// grads = g and, in the column after it, dz. The query pass works dz out and leaves it for the key pass.
template <int Lanes, bool First>
SCRIMP_BODY void load_gradients(const Attention &a, const Gradients &g, const BackwardTiles<Lanes> &t,
                                const Place &at) {
    const float *denominators = g.denominators + a.row(at);
    float *kept = g.grad_denominators + a.row(at);
    float factors[chunk];
    for (int row = 0; row < at.rows; ++row) factors[row] = 1.0f / (denominators[row] + a.eps);
    if constexpr (First) {
        dot_outputs<Lanes>(a, g, t, at);
        for (int row = 0; row < at.rows; ++row) kept[row] = t.sums[row] * factors[row];
    }
    gather_scaled<Lanes>(t.grads, t.tail, g.grad_out.at(at), g.grad_out.token, at.rows, a.value_dim, factors);
    for (int row = 0; row < at.rows; ++row) t.grads[row * t.tail + a.value_dim] = kept[row];
    clear_rows<Lanes>(t.grads, t.tail, at.rows, padded<Lanes>(at.rows), t.tail);
}

// dphi(q) = g_aug S_aug^T, and with keys of its own tril(g_aug v_aug^T) phi(k) as well
template <int Lanes>
SCRIMP_BODY void differentiate_queries(const Attention &a, const Gradients &g, const BackwardTiles<Lanes> &t,
                                       const Place &at, bool own_keys) {
    const int size = padded<Lanes>(at.rows);
    const Term past = {t.grads, t.tail, t.kv_t, t.dim, a.value_dim + 1};
    if (own_keys) {
        triangle<Lanes, true>(t.scores, chunk, size, {t.grads, t.tail, t.values_t, chunk, a.value_dim + 1});
        const Term terms[2] = {{t.scores, chunk, t.keys, t.dim, size, Reach::to_row}, past};
        product<Lanes>(t.left, t.dim, size, t.dim, terms);
    } else {
        const Term terms[1] = {past};
        product<Lanes>(t.left, t.dim, size, t.dim, terms);
    }
    scatter_gradient<Lanes>(g.query.at(at), g.query.token, t.left, t.queries, t.dim, at.rows, a.dim, a.query_map);
}

// S^T += v^T phi(k); the row of ones below the values adds Z, in the product where it has room for one more row.
template <int Lanes>
SCRIMP_BODY void update_transposed(const Attention &a, const BackwardTiles<Lanes> &t, int live) {
    constexpr int step = Block<Lanes>::rows;
    const int rows = (a.value_dim + step - 1) / step * step;
    const Term term[1] = {{t.values_t, chunk, t.keys, t.dim, live}};
    product<Lanes>(t.kv_t, t.dim, rows, t.dim, term, true);
    if (rows == a.value_dim) add_rows<Lanes>(t.kv_t + rows * t.dim, t.keys, t.dim, live, t.dim, nullptr);
}

// R += phi(q)^T g, RZ += phi(q)^T dz
template <int Lanes>
SCRIMP_BODY void update_reverse(const Attention &a, const BackwardTiles<Lanes> &t, int rows) {
    const Term term[1] = {{t.queries_t, chunk, t.grads, t.tail, rows}};
    product<Lanes>(t.kv, t.value_dim, t.dim, t.value_dim, term, true);
    for (int row = 0; row < rows; ++row) t.sums[row] = t.grads[row * t.tail + a.value_dim];
    add_rows<Lanes>(t.normaliser, t.queries, t.dim, rows, t.dim, t.sums);
}

template <int Lanes>
SCRIMP_BODY void transpose_queries(const BackwardTiles<Lanes> &t, int rows) {
    transpose<Lanes>(t.queries_t, chunk, t.queries, t.dim, padded<Lanes>(rows), t.dim);
}

template <int Lanes>
SCRIMP_BODY void transpose_gradients(const Attention &a, const BackwardTiles<Lanes> &t, int rows) {
    const int size = padded<Lanes>(rows);
    transpose<Lanes>(t.grads_t, chunk, t.grads, t.tail, size, t.value_dim);
    for (int row = 0; row < size; ++row) t.grads_t[a.value_dim * chunk + row] = t.grads[row * t.tail + a.value_dim];
}

// dphi(k) = v_aug R_aug^T and dv = phi(k) R over the later chunks, and over this one, head by head,
// triu(v_aug g_aug^T) phi(q) and triu(phi(k) phi(q)^T) g.
template <int Lanes>
SCRIMP_BODY void differentiate_keys(const Attention &a, const BackwardTiles<Lanes> &t, int size, bool first) {
    triangle<Lanes, false>(t.scores, chunk, size, {t.keys, t.dim, t.queries_t, chunk, a.dim});
    triangle<Lanes, false>(t.weights, chunk, size, {t.values, t.tail, t.grads_t, chunk, a.value_dim + 1});
    const Term keys = {t.weights, chunk, t.queries, t.dim, size, Reach::from_row};
    const Term values = {t.scores, chunk, t.grads, t.tail, size, Reach::from_row};
    if (first) {
        const Term keys_first[2] = {keys, {t.values, t.tail, t.kv_t, t.dim, a.value_dim + 1}};
        const Term values_first[2] = {values, {t.keys, t.dim, t.kv, t.value_dim, a.dim}};
        product<Lanes>(t.left, t.dim, size, t.dim, keys_first);
        product<Lanes>(t.right, t.value_dim, size, t.value_dim, values_first);
    } else {
        const Term keys_more[1] = {keys}, values_more[1] = {values};
        product<Lanes>(t.left, t.dim, size, t.dim, keys_more, true);
        product<Lanes>(t.right, t.value_dim, size, t.value_dim, values_more, true);
    }
}

template <int Lanes>
SCRIMP_BODY void write_key_gradients(const Attention &a, const Gradients &g, const BackwardTiles<Lanes> &t,
                                     const Place &at, int live) {
    float *key = g.key.at(at), *value = g.value.at(at);
    scatter_gradient<Lanes>(key, g.key.token, t.left, t.keys, t.dim, live, a.dim, a.key_map);
    scatter_scaled<Lanes>(value, g.value.token, t.right, t.value_dim, live, a.value_dim, nullptr);
    clear_rows<Lanes>(key, g.key.token, live, at.rows, a.dim);
    clear_rows<Lanes>(value, g.value.token, live, at.rows, a.value_dim);
}

SCRIMP_BODY void expect_gradients(const Attention &a, const Gradients &g, const Place &at, bool outputs_too) {
    expect_queries(a, a.query, at, a.dim);
    expect_queries(a, g.grad_out, at, a.value_dim);
    if (outputs_too) expect_queries(a, g.out, at, a.value_dim);
}

template <int Lanes>
SCRIMP_BODY void causal_query_backward_pass_body(const Attention &a, const Gradients &g, const Part &part) {
    const BackwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = 0; item < part.items(); ++item) {
        const Place keys = part.keys(item);
        const int live = a.live(keys), size = padded<Lanes>(keys.rows);
        const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, item % part.heads);
        if (live > 0) {
            load_keys<Lanes>(a, t, keys, live, size);
            transpose_values<Lanes>(a, t, size);
        }
        if (item + 1 < part.items()) {
            expect_keys(a, part.keys(item + 1));
            expect_gradients(a, g, part.keys(item + 1), true);
        }
        for (int member = 0; member < a.group(); ++member) {
            const Place at = queries(a, keys, member);
            load_queries<Lanes>(a, t, at);
            load_gradients<Lanes, true>(a, g, t, at);
            differentiate_queries<Lanes>(a, g, t, at, live > 0);
        }
        if (live > 0) update_transposed<Lanes>(a, t, live);
    }
}

template <int Lanes>
SCRIMP_BODY void causal_key_backward_pass_body(const Attention &a, const Gradients &g, const Part &part) {
    const BackwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = part.items() - 1; item >= 0; --item) {
        const Place keys = part.keys(item);
        const int live = a.live(keys), size = padded<Lanes>(keys.rows);
        const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, item % part.heads);
        if (live > 0) {
            load_keys<Lanes>(a, t, keys, live, size);
            transpose_state<Lanes>(t.kv_t, t.kv, t.normaliser, a.dim, a.value_dim);
        }
        if (item > 0) {
            expect_keys(a, part.keys(item - 1));
            expect_gradients(a, g, part.keys(item - 1), false);
        }
        for (int member = 0; member < a.group(); ++member) {
            const Place at = queries(a, keys, member);
            load_queries<Lanes>(a, t, at);
            load_gradients<Lanes, false>(a, g, t, at);
            transpose_queries<Lanes>(t, at.rows);
            transpose_gradients<Lanes>(a, t, at.rows);
            if (live > 0) differentiate_keys<Lanes>(a, t, size, member == 0);
            update_reverse<Lanes>(a, t, at.rows);
        }
        write_key_gradients<Lanes>(a, g, t, keys, live);
    }
    end<Lanes>(a, part, all);
}

template <int Lanes>
SCRIMP_BODY void add_queries_pass_body(const Attention &a, const Gradients &g, const Part &part) {
    const BackwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = 0; item < part.items(); ++item)
        for (int member = 0; member < a.group(); ++member) {
            const Place at = queries(a, part.keys(item), member);
            const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, item % part.heads);
            load_queries<Lanes>(a, t, at);
            load_gradients<Lanes, false>(a, g, t, at);
            transpose_queries<Lanes>(t, at.rows);
            update_reverse<Lanes>(a, t, at.rows);
        }
    end<Lanes>(a, part, all);
}

template <int Lanes>
SCRIMP_BODY void full_query_backward_pass_body(const Attention &a, const Gradients &g, const Part &part) {
    const BackwardTiles<Lanes> all = begin<Lanes>(a, part);
    std::fill_n(all.kv, part.heads * all.dim * all.value_dim, 0.0f);
    std::fill_n(all.normaliser, part.heads * all.dim, 0.0f);
    for (int item = 0; item < part.items(); ++item) {
        const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, item % part.heads);
        if (item + 1 < part.items()) expect_gradients(a, g, part.keys(item + 1), true);
        for (int member = 0; member < a.group(); ++member) {
            const Place at = queries(a, part.keys(item), member);
            load_queries<Lanes>(a, t, at);
            load_gradients<Lanes, true>(a, g, t, at);
            differentiate_queries<Lanes>(a, g, t, at, false);
            transpose_queries<Lanes>(t, at.rows);
            update_reverse<Lanes>(a, t, at.rows);
        }
    }
    end<Lanes>(a, part, all);
}

template <int Lanes>
SCRIMP_BODY void full_key_backward_pass_body(const Attention &a, const Gradients &g, const Part &part) {
    const BackwardTiles<Lanes> all = begin<Lanes>(a, part);
    for (int item = 0; item < part.items(); ++item) {
        const Place at = part.keys(item);
        const int live = a.live(at), size = padded<Lanes>(live);
        const BackwardTiles<Lanes> t = BackwardTiles<Lanes>::head(all, item % part.heads);
        load_keys<Lanes>(a, t, at, live, size);
        if (item + 1 < part.items()) expect_keys(a, part.keys(item + 1));
        const Term keys[1] = {{t.values, t.tail, t.kv_t, t.dim, a.value_dim + 1}};
        const Term values[1] = {{t.keys, t.dim, t.kv, t.value_dim, a.dim}};
        product<Lanes>(t.left, t.dim, size, t.dim, keys);
        product<Lanes>(t.right, t.value_dim, size, t.value_dim, values);
        write_key_gradients<Lanes>(a, g, t, at, live);
    }
}

#define SCRIMP_GRADIENT_PASS(NAME) \
    SCRIMP_DISPATCH_LANES(void, NAME, (const Attention &a, const Gradients &g, const Part &part), (a, g, part))

SCRIMP_GRADIENT_PASS(causal_query_backward_pass)
SCRIMP_GRADIENT_PASS(causal_key_backward_pass)
SCRIMP_GRADIENT_PASS(add_queries_pass)
SCRIMP_GRADIENT_PASS(full_query_backward_pass)
SCRIMP_GRADIENT_PASS(full_key_backward_pass)

}  // namespace

void causal_query_backward(const Attention &a, const Gradients &g, const Part &part) {
    causal_query_backward_pass(a, g, part);
}

void causal_key_backward(const Attention &a, const Gradients &g, const Part &part) {
    causal_key_backward_pass(a, g, part);
}

void add_queries(const Attention &a, const Gradients &g, const Part &part) {
    add_queries_pass(a, g, part);
}

void full_query_backward(const Attention &a, const Gradients &g, const Part &part) {
    full_query_backward_pass(a, g, part);
}

void full_key_backward(const Attention &a, const Gradients &g, const Part &part) {
    full_key_backward_pass(a, g, part);
}

}  // namespace scrimp
