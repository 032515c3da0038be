// Which Gaussians each tile shows, front to back.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "simd.hpp"
#include "splat_frame.hpp"
#include "units.hpp"

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

struct Key {
    std::uint32_t depth, gaussian;
};

// Ascending, equal keys in the order they came. Depths are positive, and so order as their bits do.
void sort_keys(std::vector<Key> &keys) {
    constexpr int bits = 11, buckets = 1 << bits;
    std::vector<Key> other(keys.size());
    for (int shift = 0; shift < 32; shift += bits) {
        std::size_t start[buckets + 1] = {};
        for (const Key &key : keys) ++start[(key.depth >> shift & (buckets - 1)) + 1];
        for (int bucket = 0; bucket < buckets; ++bucket) start[bucket + 1] += start[bucket];
        for (const Key &key : keys) other[start[key.depth >> shift & (buckets - 1)]++] = key;
        keys.swap(other);
    }
}

std::vector<Key> front_to_back(const Frame &frame) {
    std::vector<Key> keys(frame.visible.size());
    for (std::size_t i = 0; i < keys.size(); ++i) {
        keys[i].gaussian = frame.visible[i];
        std::memcpy(&keys[i].depth, &frame.drawn[frame.visible[i]].depth, sizeof(float));
    }
    sort_keys(keys);
    return keys;
}

struct Columns {
    int first, end;
};

// The ellipse between two heights is widest to the right at `tilt`, to the left at -tilt, or at the height nearest it.
float edge(const Drawn &g, float at, float low, float high, float side) {
    const float dy = std::min(std::max(at, low), high);
    const float room = std::max(g.peak + 7.99435344f - g.fall * dy * dy, 0.0f);
    return g.lean * dy + side * std::sqrt(room) / g.steep;
}

// Depth order jumps about in memory: fetch what is wanted soon. Inlined by force: a function that only fetches has no
// effect that GCC knows of, and calls of it vanish.
SCRIMP_BODY void fetch_ahead(const Frame &frame, const Key *key, Index at, Index keys) {
#if defined(__GNUC__)
    if (at + 8 < keys) __builtin_prefetch(&frame.drawn[key[at + 8].gaussian], 1);
#else
    (void)frame, (void)key, (void)at, (void)keys;
#endif
}

// Pixels, and so tiles, whose centres may lie within; clamped before they become integers
int clamped(float value, int limit) {
    return static_cast<int>(std::min(std::max(value, 0.0f), static_cast<float>(limit)));
}

Columns columns_of(const View &view, const Drawn &g, int row) {
    const float top = static_cast<float>(row * tile_side) + 0.5f - g.y;
    const float low = std::max(top, -g.tall), high = std::min(top + (tile_side - 1), g.tall);
    if (!(low <= high)) return {0, 0};
    const float left = g.x + edge(g, -g.tilt, low, high, -1.0f), right = g.x + edge(g, g.tilt, low, high, 1.0f);
    const int first = clamped(std::ceil(left - 0.5f), view.width);
    const int end = clamped(std::floor(right + 0.5f), view.width);
    return end <= first ? Columns{0, 0} : Columns{first / tile_side, (end - 1) / tile_side + 1};
}

// One share of the Gaussians: the tile of every place, in order, and how many there are of each tile.
struct Share {
    std::vector<std::uint32_t> tiles;
    std::vector<std::size_t> count;
};

void find_tiles(Frame &frame, const Key *key, Index keys, Share &share) {
    const View &view = frame.view;
    share.count.assign(static_cast<std::size_t>(view.columns()) * view.rows(), 0);
    share.tiles.reserve(static_cast<std::size_t>(keys) * 3);
    for (Index i = 0; i < keys; ++i) {
        fetch_ahead(frame, key, i, keys);
        Drawn &g = frame.drawn[key[i].gaussian];
        const std::size_t before = share.tiles.size();
        const int first = clamped(std::ceil(g.y - g.tall - 0.5f), view.height) / tile_side;
        const int end = (clamped(std::floor(g.y + g.tall + 0.5f), view.height) + tile_side - 1) / tile_side;
        for (int row = first; row < end; ++row) {
            const Columns columns = columns_of(view, g, row);
            for (int column = columns.first; column < columns.end; ++column) {
                const std::uint32_t tile = static_cast<std::uint32_t>(row * view.columns() + column);
                share.tiles.push_back(tile);
                ++share.count[tile];
            }
        }
        g.entries = static_cast<std::uint32_t>(share.tiles.size() - before);
    }
}

// share.count becomes where the share's entries of each tile begin
std::size_t set_starts(Frame &frame, std::vector<Share> &shares) {
    const std::size_t tiles = static_cast<std::size_t>(frame.view.columns()) * frame.view.rows();
    std::size_t total = 0;
    frame.starts.resize(tiles + 1);
    for (std::size_t tile = 0; tile < tiles; ++tile) {
        frame.starts[tile] = total;
        for (Share &share : shares) {
            const std::size_t count = share.count[tile];
            share.count[tile] = total;
            total += count;
        }
    }
    frame.starts[tiles] = total;
    return total;
}

// Places follow the Gaussians in memory: they are then summed as they lie.
void set_places(Frame &frame) {
    std::uint32_t total = 0;
    for (const std::uint32_t gaussian : frame.visible) {
        frame.drawn[gaussian].first = total;
        total += frame.drawn[gaussian].entries;
    }
}

void place(Frame &frame, const Key *key, Index keys, Share &share) {
    const std::uint32_t *tile = share.tiles.data();
    for (Index i = 0; i < keys; ++i) {
        fetch_ahead(frame, key, i, keys);
        const Drawn &g = frame.drawn[key[i].gaussian];
        for (std::uint32_t entry = 0; entry < g.entries; ++entry)
            frame.entries[share.count[*tile++]++] = {key[i].gaussian, g.first + entry};
    }
}

}  // namespace

void bin_gaussians(Frame &frame) {
    const std::vector<Key> keys = front_to_back(frame);
    const Index count = static_cast<Index>(keys.size());
#ifdef _OPENMP
    const Index parts = count < 4096 ? 1 : omp_get_max_threads();
#else
    const Index parts = 1;
#endif
    std::vector<Share> shares(static_cast<std::size_t>(parts));
    const auto border = [&](Index part) { return count * part / parts; };
    for_units(parts, [&](Index part) {
        find_tiles(frame, keys.data() + border(part), border(part + 1) - border(part), shares[part]);
    });
    const std::size_t total = set_starts(frame, shares);
    if (total > 0xffffffffu) throw std::length_error("expected at most 2^32 Gaussians over all tiles; got more");
    frame.entries.resize(total);
    set_places(frame);
    for_units(parts, [&](Index part) {
        place(frame, keys.data() + border(part), border(part + 1) - border(part), shares[part]);
    });
}

}  // namespace scrimp
