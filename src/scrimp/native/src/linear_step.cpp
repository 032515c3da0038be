#include "linear_tiles.hpp"

namespace scrimp {
namespace {

template <int Lanes>
SCRIMP_BODY float dot_rows(const float *left, const float *right, int dim) {
    float lanes[Lanes];
    Floats<Lanes> sum = {}, x, y;
    for (int column = 0; column < dim; column += Lanes) {
        load<Lanes>(x, left + column);
        load<Lanes>(y, right + column);
        sum += x * y;
    }
    store<Lanes>(lanes, sum);
    float total = 0.0f;
    for (const float lane : lanes) total += lane;
    return total;
}

// A panel of columns: S += phi(k) v^T in passing, and the first query's phi(q) S with it.
template <int Lanes, int Vectors>
SCRIMP_BODY void step_panel(const float *before, float *after, const float *key, const float *query,
                            const float *value, float *sums, int dim, int value_dim, int column) {
    Floats<Lanes> values[Vectors], sum[Vectors] = {};
    const int width = value_dim - column;
    for (int v = 0; v < Vectors; ++v) load_part<Lanes>(values[v], value + column + v * Lanes, width - v * Lanes);
    for (int row = 0; row < dim; ++row) {
        const Stride place = static_cast<Stride>(row) * value_dim + column;
        for (int v = 0; v < Vectors; ++v) {
            Floats<Lanes> line;
            load_part<Lanes>(line, before + place + v * Lanes, width - v * Lanes);
            if (key != nullptr) {
                line += key[row] * values[v];
                store_part<Lanes>(after + place + v * Lanes, line, width - v * Lanes);
            }
            sum[v] += query[row] * line;
        }
    }
    for (int v = 0; v < Vectors; ++v) store<Lanes>(sums + column + v * Lanes, sum[v]);
}

// sums = phi(q) S; with a key, of the S that has it.
template <int Lanes>
SCRIMP_BODY void step_product(const float *before, float *after, const float *key, const float *query,
                              const float *value, float *sums, int dim, int value_dim) {
    int column = 0;
    for (; column + 4 * Lanes <= value_dim; column += 4 * Lanes)
        step_panel<Lanes, 4>(before, after, key, query, value, sums, dim, value_dim, column);
    for (; column < value_dim; column += Lanes)
        step_panel<Lanes, 1>(before, after, key, query, value, sums, dim, value_dim, column);
}

template <int Lanes>
SCRIMP_BODY void step_pass_body(const Attention &a, const Part &part, const Field<float> &out) {
    const int dim = padded<Lanes>(a.dim);
    Arena arena{scratch(forward_scratch(a, 1))};
    float *key = arena.take(1, dim), *normaliser = arena.take(1, dim), *query = arena.take(1, dim);
    float *sums = arena.take(1, padded<Lanes>(a.value_dim));
    const Place at = part.keys(0);
    gather<Lanes>(key, dim, a.key.at(at), 0, 1, 1, a.dim, a.key_map);
    std::fill_n(normaliser, dim, 0.0f);
    for (int row = 0; row < a.dim; ++row) normaliser[row] = part.before.normaliser[row] + key[row];
    std::copy_n(normaliser, a.dim, part.after.normaliser);
    for (int member = 0; member < a.group(); ++member) {
        const Place place = queries(a, at, member);
        gather<Lanes>(query, dim, a.query.at(place), 0, 1, 1, a.dim, a.query_map);
        step_product<Lanes>(member == 0 ? part.before.kv : part.after.kv, part.after.kv, member == 0 ? key : nullptr,
                            query, a.value.at(at), sums, a.dim, a.value_dim);
        const float factor = 1.0f / (dot_rows<Lanes>(query, normaliser, dim) + a.eps);
        scatter_scaled<Lanes>(out.at(place), 0, sums, 0, 1, a.value_dim, &factor);
    }
}

SCRIMP_DISPATCH_LANES(void, step_pass, (const Attention &a, const Part &part, const Field<float> &out), (a, part, out))

}  // namespace

void linear_step(const Attention &a, const State<const float> &before, const State<float> &after,
                 const Field<float> &out) {
    const std::ptrdiff_t heads = static_cast<std::ptrdiff_t>(a.batch) * a.key_heads;
    const bool parallel = heads > 1 && static_cast<double>(heads) * a.dim * a.value_dim * (1 + a.group()) > 1e6;
    (void)parallel;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (parallel)
#endif
    for (std::ptrdiff_t index = 0; index < heads; ++index) {
        const int head = static_cast<int>(index);
        const Part part = {head / a.key_heads, head % a.key_heads, 1, 0, 1, before.at(head, a.dim, a.value_dim),
                           after.at(head, a.dim, a.value_dim)};
        step_pass(a, part, out);
    }
}

}  // namespace scrimp
