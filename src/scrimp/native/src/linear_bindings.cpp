// Linear attention's door to Python: raw addresses in agreed orders, checked by the caller.
#include <nanobind/stl/array.h>

#include <array>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "linear_attention.hpp"

namespace nb = nanobind;

namespace scrimp {
namespace {

template <std::size_t Count>
using Numbers = std::array<std::intptr_t, Count>;

template <class Number>
Number *pointer(std::intptr_t address) {
    return reinterpret_cast<Number *>(address);
}

template <class Number, std::size_t Count>
Field<Number> field(std::intptr_t address, const Numbers<Count> &strides, std::size_t place) {
    return {pointer<Number>(address), strides[3 * place], strides[3 * place + 1], strides[3 * place + 2]};
}

template <class Number>
State<Number> state(std::intptr_t kv, std::intptr_t normaliser) {
    return {pointer<Number>(kv), pointer<Number>(normaliser)};
}

// Ask for large pages under a large tensor that is about to be written for the first time: the system then clears it
// in 2 MiB steps instead of 4 KiB ones, each of which costs as much as a chunk's product. Elsewhere a hint ignored.
void prepare([[maybe_unused]] std::intptr_t address, [[maybe_unused]] std::intptr_t count) {
#ifdef MADV_HUGEPAGE
    constexpr std::intptr_t page = 1 << 21;
    const std::intptr_t begin = (address + page - 1) / page * page;
    const std::intptr_t end = (address + count * static_cast<std::intptr_t>(sizeof(float))) / page * page;
    if (end - begin >= 2 * page) madvise(pointer<void>(begin), static_cast<std::size_t>(end - begin), MADV_HUGEPAGE);
#endif
}

std::intptr_t numbers_of_queries(const Numbers<7> &s, std::size_t dim) { return s[0] * s[1] * s[3] * s[dim]; }
std::intptr_t numbers_of_keys(const Numbers<7> &s, std::size_t dim) { return s[0] * s[2] * s[4] * s[dim]; }

// sizes: batch, heads, key heads, queries, keys, dim, value dim.
// strides: of query, key, value; for each the batch's, the head's and the token's.
template <std::size_t Pointers, std::size_t Strides>
Attention attention(const Numbers<Pointers> &pointers, const Numbers<Strides> &strides, const Numbers<7> &sizes,
                    const Numbers<2> &maps, float eps) {
    const auto size = [&](std::size_t place) { return static_cast<int>(sizes[place]); };
    return {size(0), size(1), size(2), size(3), size(4), size(5), size(6),
            field<const float>(pointers[0], strides, 0),
            field<const float>(pointers[1], strides, 1),
            field<const float>(pointers[2], strides, 2),
            pointer<const std::int64_t>(pointers[3]),
            static_cast<Map>(maps[0]), static_cast<Map>(maps[1]), eps};
}

// pointers: query, key, value, lengths, S and Z before, out, denominators, S and Z after. strides end with out's.
void forward(const Numbers<10> &pointers, const Numbers<12> &strides, const Numbers<7> &sizes, const Numbers<2> &maps,
             float eps, bool causal) {
    nb::gil_scoped_release released;
    prepare(pointers[6], numbers_of_queries(sizes, 6));
    const Results results = {field<float>(pointers[6], strides, 3), pointer<float>(pointers[7])};
    linear_forward(attention(pointers, strides, sizes, maps, eps), results, causal,
                   state<const float>(pointers[4], pointers[5]), state<float>(pointers[8], pointers[9]));
}

// pointers: query, key, value, lengths, S and Z met, out, denominators, the gradients of out, of S and Z after, of
// query, key, value, of S and Z before. strides go on with out, its gradient, and the gradients of query, key, value.
void backward(const Numbers<16> &pointers, const Numbers<24> &strides, const Numbers<7> &sizes,
              const Numbers<2> &maps, float eps, bool causal) {
    nb::gil_scoped_release released;
    prepare(pointers[11], numbers_of_queries(sizes, 5));
    prepare(pointers[12], numbers_of_keys(sizes, 5));
    prepare(pointers[13], numbers_of_keys(sizes, 6));
    const Gradients gradients = {field<const float>(pointers[6], strides, 3),
                                 field<const float>(pointers[8], strides, 4),
                                 pointer<const float>(pointers[7]),
                                 nullptr,
                                 field<float>(pointers[11], strides, 5),
                                 field<float>(pointers[12], strides, 6),
                                 field<float>(pointers[13], strides, 7)};
    linear_backward(attention(pointers, strides, sizes, maps, eps), gradients, causal,
                    state<const float>(pointers[4], pointers[5]), state<const float>(pointers[9], pointers[10]),
                    state<float>(pointers[14], pointers[15]));
}

// pointers: query, key, value, S and Z before, out, S and Z after. strides end with out's.
void step(const Numbers<8> &pointers, const Numbers<12> &strides, const Numbers<7> &sizes, const Numbers<2> &maps,
          float eps) {
    nb::gil_scoped_release released;
    Attention a = attention(pointers, strides, sizes, maps, eps);
    a.key_lengths = nullptr;
    linear_step(a, state<const float>(pointers[3], pointers[4]), state<float>(pointers[6], pointers[7]),
                field<float>(pointers[5], strides, 3));
}

}  // namespace

void bind_linear_attention(nb::module_ &module) {
    module.def("linear_forward", &forward);
    module.def("linear_backward", &backward);
    module.def("linear_step", &step);
}

}  // namespace scrimp
