// Nearest centres for k-means: |c|^2 / 2 - <x, c> is least where the distance is.
//
// Each sum runs over the dimensions in their order, a centre a lane, unfused: every instruction set and every number of
// threads finds the same centre, and of equals the one of lowest index.
#include "kmeans.hpp"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.hpp"
#include "units.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr Index panel_width = 32;  // centres side by side
constexpr Index tile_rows = 96;    // points whose best centres stay in the first-level cache while panels pass by

// Centres in panels [panels][dims][panel_width], behind each its halved squared lengths; padded with what never wins.
struct Panels {
    std::vector<float> values, halves;
    std::vector<std::int32_t> names;
    Index dims = 0, count = 0;

    void pack(const float *centres, const std::int32_t *chosen, Index chosen_count, Index dimensions) {
        dims = dimensions;
        count = (chosen_count + panel_width - 1) / panel_width;
        values.assign(static_cast<std::size_t>(count * dims * panel_width), 0.0f);
        halves.assign(static_cast<std::size_t>(count * panel_width), std::numeric_limits<float>::infinity());
        names.assign(static_cast<std::size_t>(count * panel_width), 0);
        for (Index place = 0; place < chosen_count; ++place) {
            const Index name = chosen ? chosen[place] : place;
            const float *centre = centres + name * dims;
            float *panel = values.data() + place / panel_width * dims * panel_width + place % panel_width;
            double square = 0.0;
            for (Index dim = 0; dim < dims; ++dim) {
                panel[dim * panel_width] = centre[dim];
                square += static_cast<double>(centre[dim]) * static_cast<double>(centre[dim]);
            }
            halves[static_cast<std::size_t>(place)] = static_cast<float>(0.5 * square);
            names[static_cast<std::size_t>(place)] = static_cast<std::int32_t>(name);
        }
    }
};

struct Best {
    float score[panel_width];
    std::int32_t panel[panel_width];
};

template <int Lanes>
struct Shape {
    static constexpr int vectors = Lanes == 1 ? 1 : 2;
    static constexpr int rows = Lanes == 16 ? 8 : Lanes == 8 ? 6 : 4;
    static constexpr int width = vectors * Lanes;
};

// Some rows against `width` centres of one panel, from lane `from` on
template <int Lanes, int Rows>
SCRIMP_BODY void meet(const float *const *points, const float *panel, const float *halves, Index dims, Index from,
                      std::int32_t number, Best *best) {
    constexpr int vectors = Shape<Lanes>::vectors;
    Floats<Lanes> sums[Rows][vectors];
#pragma GCC unroll 8
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) load<Lanes>(sums[row][v], halves + from + v * Lanes);
    for (Index dim = 0; dim < dims; ++dim) {
        Floats<Lanes> line[vectors];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) load<Lanes>(line[v], panel + dim * panel_width + from + v * Lanes);
#pragma GCC unroll 8
        for (int row = 0; row < Rows; ++row) {
            const float factor = points[row][dim];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; ++v) sums[row][v] -= factor * line[v];
        }
    }
    for (int row = 0; row < Rows; ++row)
        for (int v = 0; v < vectors; ++v) {
            float *score = best[row].score + from + v * Lanes;
            std::int32_t *place = best[row].panel + from + v * Lanes;
            Floats<Lanes> held;
            Ints<Lanes> where;
            load<Lanes>(held, score);
            std::memcpy(&where, place, sizeof(where));
            const auto better = sums[row][v] < held;
            const Ints<Lanes> here = Ints<Lanes>{} + number;
            held = better ? sums[row][v] : held;
            where = better ? here : where;
            store<Lanes>(score, held);
            std::memcpy(place, &where, sizeof(where));
        }
}

// At most tile_rows points against every panel
template <int Lanes>
SCRIMP_BODY void tile_body(const float *const *points, Index rows, const Panels &panels, Best *best) {
    constexpr int step = Shape<Lanes>::rows;
    for (Index number = 0; number < panels.count; ++number) {
        const float *panel = panels.values.data() + number * panels.dims * panel_width;
        const float *halves = panels.halves.data() + number * panel_width;
        const std::int32_t name = static_cast<std::int32_t>(number);
        for (Index from = 0; from < panel_width; from += Shape<Lanes>::width) {
            Index row = 0;
            for (; row + step <= rows; row += step)
                meet<Lanes, step>(points + row, panel, halves, panels.dims, from, name, best + row);
            for (; row < rows; ++row)
                meet<Lanes, 1>(points + row, panel, halves, panels.dims, from, name, best + row);
        }
    }
}

SCRIMP_DISPATCH_LANES(void, tile, (const float *const *points, Index rows, const Panels &panels, Best *best),
                      (points, rows, panels, best))

std::int32_t winner(const Best &best, const Panels &panels) {
    Index lane = 0;
    for (Index other = 1; other < panel_width; ++other)
        if (best.score[other] < best.score[lane] ||
            (best.score[other] == best.score[lane] && best.panel[other] < best.panel[lane]))
            lane = other;
    return panels.names[static_cast<std::size_t>(best.panel[lane] * panel_width + lane)];
}

struct Job {
    const float *points, *centres;
    Index count, dims, centre_count;
    std::int64_t *labels;
    float *distances;
};

float distance(const float *a, const float *b, Index dims) {
    double sum = 0.0;
    for (Index dim = 0; dim < dims; ++dim) {
        const double apart = static_cast<double>(a[dim]) - static_cast<double>(b[dim]);
        sum += apart * apart;
    }
    return static_cast<float>(sum);
}

// `rows` numbers of points; each is given its nearest of the panels' centres.
void serve(const Job &job, const Index *rows, Index count, const Panels &panels) {
    const float *points[tile_rows];
    Best best[tile_rows];
    for (Index start = 0; start < count; start += tile_rows) {
        const Index here = std::min(tile_rows, count - start);
        for (Index row = 0; row < here; ++row) {
            points[row] = job.points + rows[start + row] * job.dims;
            std::fill_n(best[row].score, panel_width, std::numeric_limits<float>::infinity());
            std::fill_n(best[row].panel, panel_width, 0);
        }
        tile(points, here, panels, best);
        for (Index row = 0; row < here; ++row) {
            const std::int32_t name = winner(best[row], panels);
            job.labels[rows[start + row]] = name;
            job.distances[rows[start + row]] = distance(points[row], job.centres + name * job.dims, job.dims);
        }
    }
}

void nearest(const Job &job) {
    Panels panels;
    panels.pack(job.centres, nullptr, job.centre_count, job.dims);
    constexpr Index unit = 4 * tile_rows;
    for_units((job.count + unit - 1) / unit, [&](Index number) {
        Index rows[unit];
        const Index first = number * unit, here = std::min(unit, job.count - first);
        for (Index row = 0; row < here; ++row) rows[row] = first + row;
        serve(job, rows, here, panels);
    });
}

// Points in the order of their labels, and where each label's begin
void group(const Job &job, std::vector<Index> &starts, std::vector<Index> &rows) {
    starts.assign(static_cast<std::size_t>(job.centre_count) + 1, 0);
    rows.resize(static_cast<std::size_t>(job.count));
    for (Index row = 0; row < job.count; ++row) ++starts[static_cast<std::size_t>(job.labels[row]) + 1];
    for (std::size_t name = 1; name < starts.size(); ++name) starts[name] += starts[name - 1];
    std::vector<Index> next(starts);
    for (Index row = 0; row < job.count; ++row) {
        Index &place = next[static_cast<std::size_t>(job.labels[row])];
        rows[static_cast<std::size_t>(place++)] = row;
    }
}

void refine(const Job &job, const std::int32_t *candidates, Index width) {
    std::vector<Index> starts, rows;
    group(job, starts, rows);
    constexpr Index unit = 16;
    for_units((job.centre_count + unit - 1) / unit, [&](Index number) {
        Panels panels;
        for (Index name = number * unit; name < std::min((number + 1) * unit, job.centre_count); ++name) {
            const Index first = starts[static_cast<std::size_t>(name)];
            const Index here = starts[static_cast<std::size_t>(name) + 1] - first;
            if (here == 0) continue;
            panels.pack(job.centres, candidates + name * width, width, job.dims);
            serve(job, rows.data() + first, here, panels);
        }
    });
}

Job make_job(std::uintptr_t points, std::uintptr_t centres, Index count, Index dims, Index centre_count,
             std::uintptr_t labels, std::uintptr_t distances) {
    return {reinterpret_cast<const float *>(points), reinterpret_cast<const float *>(centres), count, dims,
            centre_count, reinterpret_cast<std::int64_t *>(labels), reinterpret_cast<float *>(distances)};
}

void kmeans_nearest(std::uintptr_t points, std::uintptr_t centres, Index count, Index dims, Index centre_count,
                    std::uintptr_t labels, std::uintptr_t distances) {
    nearest(make_job(points, centres, count, dims, centre_count, labels, distances));
}

void kmeans_refine(std::uintptr_t points, std::uintptr_t centres, Index count, Index dims, Index centre_count,
                   std::uintptr_t labels, std::uintptr_t distances, std::uintptr_t candidates, Index width) {
    refine(make_job(points, centres, count, dims, centre_count, labels, distances),
           reinterpret_cast<const std::int32_t *>(candidates), width);
}

}  // namespace

// Addresses of contiguous arrays the caller has checked: points [count, dims] and centres [centre_count, dims] float,
// labels [count] int64, distances [count] float, candidates [centre_count, width] int32.
void bind_kmeans(nanobind::module_ &module) {
    using Released = nanobind::call_guard<nanobind::gil_scoped_release>;
    module.def("kmeans_nearest", &kmeans_nearest, Released());
    module.def("kmeans_refine", &kmeans_refine, Released());
}

}  // namespace scrimp
