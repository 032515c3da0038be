// The door to Python: argument checks and bindings, nothing else. Arrays come in through DLPack or the buffer
// protocol, so torch tensors and numpy arrays are read where they lie.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "bound.hpp"
#include "clustered_attention.hpp"
#include "dot.hpp"
#include "kmeans.hpp"
#include "linear_attention.hpp"
#include "philox.hpp"
#include "range_coder.hpp"
#include "simd.hpp"
#include "splat_adam.hpp"
#include "splat_loss.hpp"
#include "splat_render.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

double dot(const Vector &a, const Vector &b) {
    if (a.shape(0) != b.shape(0))
        throw std::invalid_argument("expected vectors of one length; got " + std::to_string(a.shape(0)) + " and " +
                                    std::to_string(b.shape(0)) + "; cut the longer one");
    nb::gil_scoped_release released;
    return scrimp::dot(a.data(), b.data(), a.shape(0));
}

// Raw addresses, not DLPack: at a batch's size the protocol costs more than the kernel. The caller has checked them.
void gradient_norm_bound(std::uintptr_t logits, std::uintptr_t targets, std::size_t rows, std::size_t classes,
                         std::int64_t ignored, std::uintptr_t out) {
    scrimp::gradient_norm_bound(reinterpret_cast<const float *>(logits), reinterpret_cast<const std::int64_t *>(targets),
                                rows, classes, ignored, reinterpret_cast<float *>(out));
}

std::string compiler() {
#if defined(__clang__)
    return "clang " __clang_version__;
#elif defined(__GNUC__)
    return "gcc " __VERSION__;
#elif defined(_MSC_VER)
    return "msvc " + std::to_string(_MSC_VER);
#else
    return "unknown";
#endif
}

nb::dict capabilities() {
    nb::dict found;
    found["simd"] = scrimp::simd_name();
#ifdef _OPENMP
    found["openmp"] = true;
    found["threads"] = omp_get_max_threads();
#else
    found["openmp"] = false;
    found["threads"] = 1;
#endif
    found["compiler"] = compiler();
    return found;
}

}  // namespace

NB_MODULE(_native, module) {
    module.def("capabilities", &capabilities);
    module.def("set_simd", &scrimp::set_simd, "name"_a);
    // No silent conversions: a float64 or strided array would be copied at a cost nobody sees.
    module.def("gradient_norm_bound", &gradient_norm_bound);
    scrimp::bind_linear_attention(module);
    scrimp::bind_clustered_attention(module);
    scrimp::bind_philox(module);
    scrimp::bind_orthogonal(module);
    scrimp::bind_kmeans(module);
    scrimp::bind_range_coder(module);
    scrimp::bind_splat_render(module);
    scrimp::bind_splat_loss(module);
    scrimp::bind_splat_adam(module);
    module.def("dot", &dot, "a"_a.noconvert(), "b"_a.noconvert());
}
