// Drawing a scene of Gaussians and pulling gradients back through it. Every sum has one order, whatever the threads:
// a Gaussian's gradient is first summed over each tile, into a place of its own, and these sums in the order of tiles.
#include "splat_render.hpp"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "splat_frame.hpp"
#include "units.hpp"

namespace nb = nanobind;

namespace scrimp {
namespace {

using Address = std::uintptr_t;
using Index = std::ptrdiff_t;

constexpr Index block = 1024;  // Gaussians a unit of work, whole registers of them

const float *in(Address address) { return reinterpret_cast<const float *>(address); }
float *out(Address address) { return reinterpret_cast<float *>(address); }

void take(std::vector<float>::const_iterator &from, float *to, int count) {
    std::copy(from, from + count, to);
    from += count;
}

View view_of(int width, int height, bool antialias, const std::vector<float> &numbers) {
    if (numbers.size() != 23) throw std::invalid_argument("expected 23 numbers of a camera");
    View view = {};
    view.width = width, view.height = height, view.antialias = antialias;
    auto from = numbers.begin();
    for (float *one : {&view.fx, &view.fy, &view.cx, &view.cy, &view.near}) take(from, one, 1);
    take(from, view.rotation, 9);
    take(from, view.shift, 3);
    take(from, view.position, 3);
    take(from, view.background, 3);
    return view;
}

// Addresses of means, quaternions, scales, opacities, colors, harmonics, offsets: 0 for what there is not
using Addresses = std::vector<Address>;

Gaussians scene_of(Index count, int stored, int used, const Addresses &of) {
    return {count, stored, used, in(of.at(0)), in(of.at(1)), in(of.at(2)), in(of.at(3)), in(of.at(4)), in(of.at(5)),
            in(of.at(6))};
}

// body(first, end) for blocks of `count`
template <class Body>
void for_blocks(Index count, const Body &body) {
    for_units((count + block - 1) / block,
              [&](Index unit) { body(unit * block, std::min(count, (unit + 1) * block)); });
}

void project_all(const Gaussians &scene, Frame &frame, float *radii) {
    frame.drawn.reset(new Drawn[static_cast<std::size_t>(scene.count)]);
    for_blocks(scene.count, [&](Index first, Index end) {
        splat_kernels().project(scene, frame.view, first, end, frame.drawn.get(), radii);
    });
    for (Index i = 0; i < scene.count; ++i)
        if (radii[i] > 0.0f) frame.visible.push_back(static_cast<std::uint32_t>(i));
    for_blocks(static_cast<Index>(frame.visible.size()), [&](Index first, Index end) {
        splat_kernels().shade(scene, frame.view, frame.visible.data() + first, end - first, frame.drawn.get());
    });
}

void draw_all(const Gaussians &scene, Frame &frame, const Picture &picture, float *radii) {
    project_all(scene, frame, radii);
    bin_gaussians(frame);
    const Index tiles = static_cast<Index>(frame.starts.size()) - 1;
    frame.used.resize(static_cast<std::size_t>(tiles));
    for_units(tiles, [&](Index tile) { splat_kernels().draw(frame, tile, picture); });
}

// The frame comes as a capsule: of a bound class nanobind complains when a graph outlives the interpreter.
nb::capsule forward(Index count, int stored, int used, const Addresses &of, int width, int height, bool antialias,
                    const std::vector<float> &numbers, const Addresses &to) {
    auto frame = std::make_unique<Frame>();
    frame->view = view_of(width, height, antialias, numbers);
    {
        nb::gil_scoped_release released;
        draw_all(scene_of(count, stored, used, of), *frame, {out(to.at(0)), out(to.at(1)), out(to.at(2))},
                 out(to.at(3)));
    }
    return nb::capsule(frame.release(), [](void *kept) noexcept { delete static_cast<Frame *>(kept); });
}

// `images`: color, alpha and depth as drawn, then their gradients
void backward(const nb::capsule &kept, Index count, int stored, int used, const Addresses &of, const Addresses &images,
              const Addresses &to) {
    const Frame &frame = *static_cast<const Frame *>(kept.data());
    nb::gil_scoped_release released;
    const Gaussians scene = scene_of(count, stored, used, of);
    const std::unique_ptr<float[]> sums(new float[frame.entries.size() * pulled_floats]);
    const PicturePull pull = {in(images.at(0)), in(images.at(1)), in(images.at(2)), in(images.at(3)),
                              in(images.at(4)), in(images.at(5)), sums.get()};
    for_units(static_cast<Index>(frame.used.size()), [&](Index tile) { splat_kernels().pull(frame, tile, pull); });
    const GaussianGradients grads = {out(to.at(0)), out(to.at(1)), out(to.at(2)), out(to.at(3)),
                                     out(to.at(4)), out(to.at(5)), out(to.at(6))};
    const Index seen = static_cast<Index>(frame.visible.size());
    if (seen == 0) splat_kernels().unproject(scene, frame, 0, 0, sums.get(), grads);
    for_blocks(seen, [&](Index first, Index end) {
        splat_kernels().unproject(scene, frame, first, end, sums.get(), grads);
    });
}

}  // namespace

void bind_splat_render(nb::module_ &module) {
    if (splat_kernels().draw == nullptr) return;
    module.def("splat_forward", &forward);
    module.def("splat_backward", &backward);
}

}  // namespace scrimp
