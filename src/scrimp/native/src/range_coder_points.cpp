// Points in Morton order as a tree of halved cells: of the points in a cell, how many lie in its lower half.
//
// That spends nothing on the order of the points. A cell with one point left writes its remaining digits plainly.
#include "range_coder.hpp"

#include <algorithm>

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr std::uint32_t few = 15;  // up to here the count has a model for each size of the cell
constexpr int histories = 27, depths = 96, tree = 16, kinds = 64;
constexpr int few_look = 32;       // members looked through for whether any has digits left

struct Cube {
    std::uint32_t corner[3];
};

template <class Coder>
class Points {
  public:
    Points(const PointShape &shape, Coder &coder, std::int32_t *points)
        : shape_(shape), coder_(coder), points_(points), tables_(mix_tables()),
          a_((few + 1 + kinds) * 3 * tree, fresh), b_((few + 1 + kinds) * histories * tree, fresh),
          c_((few + 1 + kinds) * depths * tree, fresh), mixers_((few + 1 + kinds) * tree) {}

    bool run() { return shape_.rows == 0 || visit(0, shape_.rows, 0, 0, Cube{}); }

  private:
    // Members [first, end) of a cell cut `depth` times; `history` holds how the last three cuts went.
    bool visit(Index first, Index end, int depth, int history, Cube cube) {
        while (depth < 3 * shape_.levels && end - first > 1 && !settled(first, end, depth)) {
            const int axis = depth % 3, digit = shape_.levels - 1 - depth / 3;
            const auto count = static_cast<std::uint32_t>(end - first);
            const std::uint32_t wanted = Coder::writes ? lower(first, end, axis, digit) : 0;
            const std::uint32_t found = count <= few ? few_below(wanted, count, depth, history)
                                                     : many_below(wanted, count, depth, history);
            if constexpr (!Coder::writes)
                if (found > count || coder_.beyond()) return false;
            const Index middle = first + found;
            history = history % 9 * 3 + (found == count ? 0 : found == 0 ? 1 : 2);
            ++depth;
            if (middle > first && middle < end && !visit(first, middle, depth, history, cube)) return false;
            if (middle < end) {
                cube.corner[axis] |= 1u << digit;
                first = middle;
            }
        }
        for (Index row = first; row < end; ++row) finish(row, depth, cube);
        return true;
    }

    // Whether every member's digits are all known
    bool settled(Index first, Index end, int depth) const {
        if (end - first > few_look) return false;
        const int digit = shape_.levels - 1 - depth / 3;
        return std::all_of(shape_.drops + first, shape_.drops + end, [&](int drop) { return drop > digit; });
    }

    std::uint32_t lower(Index first, Index end, int axis, int digit) const {
        Index from = first, to = end;
        while (from < to) {
            const Index middle = from + (to - from) / 2;
            if (points_[3 * middle + axis] >> digit & 1)
                to = middle;
            else
                from = middle + 1;
        }
        return static_cast<std::uint32_t>(from - first);
    }

    void finish(Index row, int depth, const Cube &cube) {
        const int drop = shape_.drops[row];
        for (int axis = 0; axis < 3; ++axis) {
            const int left = shape_.levels - depth / 3 - (depth % 3 > axis ? 1 : 0);
            std::uint32_t made = cube.corner[axis];
            if (left > drop) {
                const std::uint32_t wanted =
                    Coder::writes ? static_cast<std::uint32_t>(points_[3 * row + axis]) >> drop : 0;
                made |= plain_bits(coder_, wanted & ((1u << (left - drop)) - 1u), left - drop) << drop;
            }
            // The middle of a cell that is cut no further
            if (drop > 0 && drop <= left) made |= 1u << (drop - 1);
            points_[3 * row + axis] = static_cast<std::int32_t>(made);
        }
    }

    std::uint32_t few_below(std::uint32_t wanted, std::uint32_t count, int depth, int history) {
        std::uint32_t node = 1;
        aim(static_cast<int>(count), depth, history);
        const int bits = bit_length(count);
        for (int place = bits - 1; place >= 0; --place) node = node << 1 | bit(wanted >> place & 1u, node);
        return node - (1u << bits);
    }

    std::uint32_t many_below(std::uint32_t wanted, std::uint32_t count, int depth, int history) {
        const int bits = bit_length(count - 2);
        aim(static_cast<int>(few) + 1 + bits, depth, history);
        const bool empty = wanted == 0 || wanted == count;
        if (bit(empty, 1)) return bit(wanted == 0, 2) ? 0 : count;
        aim(static_cast<int>(few) + 33 + bits, depth, history);
        const std::uint32_t inner = wanted - 1;
        std::uint32_t node = 1;
        for (int place = bits - 1; place >= bits - 3; --place) node = node << 1 | bit(inner >> place & 1u, node);
        const int left = bits - 3;
        return ((node - 8u) << left | plain_bits(coder_, inner & ((1u << left) - 1u), left)) + 1;
    }

    void aim(int kind, int depth, int history) {
        cells_[0] = &a_[static_cast<std::size_t>((kind * 3 + depth % 3) * tree)];
        cells_[1] = &b_[static_cast<std::size_t>((kind * histories + history) * tree)];
        cells_[2] = &c_[static_cast<std::size_t>((kind * depths + depth) * tree)];
        mixer_ = &mixers_[static_cast<std::size_t>(kind * tree)];
    }

    std::uint32_t bit(std::uint32_t wanted, std::uint32_t node) {
        return static_cast<std::uint32_t>(mixed(coder_, static_cast<int>(wanted), cells_[0][node], cells_[1][node],
                                                cells_[2][node], mixer_[node], tables_));
    }

    const PointShape &shape_;
    Coder &coder_;
    std::int32_t *points_;
    const MixTables &tables_;
    std::vector<Cell> a_, b_, c_;
    std::vector<Mixer> mixers_;
    Cell *cells_[3] = {};
    Mixer *mixer_ = nullptr;
};

}  // namespace

std::vector<std::uint8_t> encode_points(const PointShape &shape, const std::int32_t *points) {
    Encoder coder;
    // Written back unchanged: what is coded is what was read.
    Points<Encoder>(shape, coder, const_cast<std::int32_t *>(points)).run();
    return coder.finish();
}

bool decode_points(const PointShape &shape, const std::uint8_t *data, std::size_t size, std::int32_t *points) {
    Decoder coder(data, size);
    return Points<Decoder>(shape, coder, points).run() && coder.exact();
}

}  // namespace scrimp
