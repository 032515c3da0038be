// Registers OpenSplat's CPU projection, harmonics and rasteriser as torch operators.
#include "project_gaussians.hpp"
#include "rasterize_gaussians.hpp"
#include "spherical_harmonics.hpp"

namespace {

using torch::Tensor;

std::vector<Tensor> project(Tensor means, Tensor scales, Tensor quaternions, Tensor view, Tensor full,
                            c10::ArrayRef<double> lens, int64_t height, int64_t width) {
    return ProjectGaussiansCPU::apply(means, scales, 1.f, quaternions, view, full, lens[0], lens[1], lens[2], lens[3],
                                      height, width);
}

Tensor harmonics(Tensor directions, Tensor coefficients, int64_t degree) {
    return SphericalHarmonicsCPU::apply(degree, directions, coefficients);
}

Tensor rasterize(Tensor places, Tensor radii, Tensor conics, Tensor colors, Tensor opacities, Tensor covariances,
                 Tensor depths, int64_t height, int64_t width, Tensor background) {
    return RasterizeGaussiansCPU::apply(places, radii, conics, colors, opacities, covariances, depths, height, width,
                                        background);
}

}  // namespace

TORCH_LIBRARY(opensplat, library) {
    library.def("project", &project);
    library.def("harmonics", &harmonics);
    library.def("rasterize", &rasterize);
}
