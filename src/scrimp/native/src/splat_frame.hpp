// What the passes of the Gaussian rasteriser hand to one another; see splat_render.cpp for their order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace scrimp {

constexpr int tile_side = 16, tile_pixels = tile_side * tile_side;
constexpr int pulled_floats = 12;  // sums of a Gaussian over one tile, see pull() in splat_tiles.inc

// A pinhole camera and how it draws; pixels' centres lie at whole number + 1/2.
struct View {
    int width, height;
    float fx, fy, cx, cy, near;
    float rotation[9], shift[3], position[3];  // world to camera, row-major; the camera in the world
    float background[3];
    bool antialias;
    int columns() const { return (width + tile_side - 1) / tile_side; }
    int rows() const { return (height + tile_side - 1) / tile_side; }
};

// The scene as torch holds it, row-major; `offsets` [n, 2] are added to the projected means and may be absent.
struct Gaussians {
    std::ptrdiff_t count;
    int stored, used;  // coefficients of harmonics above degree 0, in memory and looked at
    const float *means, *quaternions, *scales, *opacities, *colors, *harmonics, *offsets;
};

// Where gradients go; null where none is wanted.
struct GaussianGradients {
    float *means, *quaternions, *scales, *opacities, *colors, *harmonics, *offsets;
};

// One projected Gaussian: at the pixel mean + (dx, dy) its opacity is
//   2 ^ (peak - (steep (dx - lean dy))^2 - fall dy^2),
// a sum of squares, which keeps long thin Gaussians exact. It is drawn within `wide` and `tall` pixels of the mean; its
// rightmost point lies `tilt` below the mean. One cache line: in depth order each is fetched from far away.
struct alignas(64) Drawn {
    float x, y, steep, lean, fall, peak;
    float color[3], depth;
    float wide, tall, tilt;
    std::uint32_t first, entries;  // its places in the gradient sums, one a tile
    std::uint32_t padding;
};

struct Entry {
    std::uint32_t gaussian, place;
};

// A forward pass, kept for the backward one.
struct Frame {
    View view;
    std::unique_ptr<Drawn[]> drawn;        // by Gaussian; set where visible only
    std::vector<std::uint32_t> visible;    // ascending
    std::vector<Entry> entries;            // by tile, front to back
    std::vector<std::size_t> starts;       // of each tile in `entries`, and the end
    std::vector<std::uint32_t> used;       // entries of each tile until its last pixel was opaque
};

// Images, row-major, three interleaved channels; depth may be absent.
struct Picture {
    float *color, *alpha, *depth;
};
struct PicturePull {
    const float *color, *alpha, *depth;                       // as drawn
    const float *grad_color, *grad_alpha, *grad_depth;        // the last two may be absent
    float *sums;                                              // [entries, pulled_floats]
};

// The bodies of splat_*.inc for one instruction set.
struct SplatKernels {
    // Projects Gaussians [first, end); radii[i] becomes how far Gaussian i is seen, pixels, or 0.
    void (*project)(const Gaussians &scene, const View &view, std::ptrdiff_t first, std::ptrdiff_t end, Drawn *drawn,
                    float *radii);
    // Colours of visible[0 .. count)
    void (*shade)(const Gaussians &scene, const View &view, const std::uint32_t *visible, std::ptrdiff_t count,
                  Drawn *drawn);
    void (*draw)(Frame &frame, std::ptrdiff_t tile, const Picture &out);
    void (*pull)(const Frame &frame, std::ptrdiff_t tile, const PicturePull &images);
    // Gradients of visible[first .. end) from the sums; the rows that precede each in memory, of unseen ones, become 0.
    void (*unproject)(const Gaussians &scene, const Frame &frame, std::ptrdiff_t first, std::ptrdiff_t end,
                      const float *sums, const GaussianGradients &out);
};

const SplatKernels &splat_kernels();

// Fills entries, starts and the drawn Gaussians' places, front to back.
void bin_gaussians(Frame &frame);

}  // namespace scrimp
