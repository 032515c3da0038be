// Rows of whole numbers, each the difference from a running mean of its column, coded as a token and plain digits.
//
// The token's probabilities are the mean of three running distributions, each of its own context. All are cumulative,
// 32 numbers of 16 bits, so that compilers turn every loop over them into a few vector instructions.
#include "range_coder.hpp"

#include <algorithm>

#include "simd.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Members too are compiled for each instruction set, by being inlined into what is dispatched.
#if defined(__GNUC__)
#define SCRIMP_MEMBER inline __attribute__((always_inline))
#else
#define SCRIMP_MEMBER inline
#endif

namespace scrimp {
namespace {

using Index = std::ptrdiff_t;

constexpr int tokens = 32, escape = 31;
constexpr int activities = 16, pairs = 27, habits = 24, most_tables = 20, most_shifts = 16;
constexpr int most_digits = 24;

// Entry i: how likely a token up to i is, in 1 / 32767. One cache line each.
struct alignas(64) Distribution {
    std::int16_t upto[tokens];
};

struct Context {
    std::vector<Distribution> rows;
    std::vector<std::uint8_t> seen;

    void reset(std::size_t count) {
        Distribution flat;
        for (int token = 0; token < tokens; ++token)
            flat.upto[token] = static_cast<std::int16_t>(std::min(32767, (token + 1) * 1024));
        rows.assign(count, flat);
        seen.assign(count, 0);
    }
};

// After so many tokens a distribution moves by 1 / 2^rate of the way.
SCRIMP_BODY int rate_after(int seen) { return seen < 2 ? 2 : seen < 6 ? 3 : seen < 16 ? 4 : seen < 60 ? 5 : 6; }

SCRIMP_BODY void learn(Context &context, std::size_t row, int token) {
    std::int16_t *upto = context.rows[row].upto;
    const int rate = rate_after(context.seen[row]);
    for (int other = 0; other < tokens; ++other) {
        const auto goal = static_cast<std::int16_t>(other >= token ? 32767 : 0);
        upto[other] = static_cast<std::int16_t>(upto[other] + (static_cast<std::int16_t>(goal - upto[other]) >> rate));
    }
    if (context.seen[row] < 255) ++context.seen[row];
}

// How many of ascending numbers are at most `place`
SCRIMP_BODY int count_upto(const std::int16_t *upto, std::int16_t place) {
#if defined(__SSE2__)
    const __m128i limit = _mm_set1_epi16(place);
    const auto *four = reinterpret_cast<const __m128i *>(upto);
    const auto above = [&](int part) { return _mm_cmpgt_epi16(_mm_load_si128(four + part), limit); };
    const int low = _mm_movemask_epi8(_mm_packs_epi16(above(0), above(1)));
    const int high = _mm_movemask_epi8(_mm_packs_epi16(above(2), above(3)));
    const auto mask = static_cast<std::uint32_t>(low) | static_cast<std::uint32_t>(high) << 16;
    return mask ? bit_length(mask & (~mask + 1u)) - 1 : tokens;
#else
    std::int16_t below = 0;
    for (int other = 0; other < tokens; ++other) below = static_cast<std::int16_t>(below + (upto[other] <= place));
    return below;
#endif
}

// What follows each token: its smallest size and how many plain digits, one of them the sign from `wide` on
constexpr int wide = 15;
struct TokenTable {
    std::uint32_t least[tokens] = {};
    std::uint8_t digits[tokens] = {};
    constexpr TokenTable() {
        for (int token = 1; token < escape; ++token) {
            const int kind = token < wide ? (token + 1) / 2 : token - 7, plain = kind < 4 ? 0 : kind / 2 - 1;
            least[token] = kind < 4 ? static_cast<std::uint32_t>(kind) : (2u | (kind & 1u)) << plain;
            digits[token] = static_cast<std::uint8_t>(plain + (token >= wide));
        }
    }
};
constexpr TokenTable token_table;

SCRIMP_BODY int signed_bucket(std::int64_t value, int most) {
    const std::int64_t size = value < 0 ? -value : value;
    const int length = std::min(bit_length(static_cast<std::uint32_t>(std::min<std::int64_t>(size, 0x7FFFFFFF))), most);
    return value < 0 ? -length : length;
}

// What is remembered of a column from row to row
struct Column {
    std::int64_t mean = 0;      // of the numbers in units of 1 / 16 of the finest step
    std::int32_t activity = 0;  // mean length of differences, 1 / 16 bits
    std::int64_t last = 0;
};

// Sizes 0 to 3 each, then each half octave
SCRIMP_BODY int size_class(std::uint32_t size) {
    if (size < 4) return static_cast<int>(size);
    const int top = bit_length(size) - 1;
    return 2 * top + static_cast<int>(size >> (top - 1) & 1u);
}

template <class Coder>
class Fields {
  public:
    Fields(const FieldShape &shape, Coder &coder)
        : shape_(shape), coder_(coder), columns_(static_cast<std::size_t>(shape.columns)) {
        const std::size_t rows = static_cast<std::size_t>(std::min<Index>(shape.columns, most_tables)) * most_shifts;
        contexts_[0].reset(rows * activities);
        contexts_[1].reset(rows * pairs);
        contexts_[2].reset(rows * habits);
    }

    // Values are read where the coder writes, and written where it reads; `done(row, its values, how many)` after each
    // row, the next one's `stride` further on. False where the bytes end too soon.
    template <class Done>
    SCRIMP_MEMBER bool run(std::int32_t *values, Index stride, const Done &done) {
        for (Index row = 0; row < shape_.rows; ++row) {
            const Index count = shape_.counts ? shape_.counts[row] : shape_.columns;
            const std::uint8_t *shifts = shape_.shifts + row * shape_.shift_columns;
            std::int32_t *line = values + row * stride;
            std::int64_t before = 0, earlier = 0;
            for (Index column = 0; column < count; ++column) {
                const int shift = shape_.shift_columns == 1 ? shifts[0] : shifts[column];
                const std::int64_t rest = number(column, shift, line[column], before, earlier);
                earlier = before;
                before = rest;
            }
            if constexpr (!Coder::writes)
                if (coder_.beyond()) return false;
            done(row, line, count);
        }
        return true;
    }

  private:
    SCRIMP_MEMBER std::int64_t number(Index column, int shift, std::int32_t &value, std::int64_t before,
                                      std::int64_t earlier) {
        Column &held = columns_[static_cast<std::size_t>(column)];
        const bool predicted = shape_.predicted[column];
        const std::int64_t half = std::int64_t{1} << (shift + 3);
        const std::int64_t expected = predicted ? (held.mean + half) >> (shift + 4) : 0;
        aim(column, shift, held, predicted ? expected : held.last, before, earlier);
        const std::int64_t rest = difference(Coder::writes ? value - expected : 0);
        value = static_cast<std::int32_t>(std::clamp<std::int64_t>(rest + expected, -(1 << 30), 1 << 30));
        const int length = bit_length(static_cast<std::uint32_t>(rest < 0 ? -rest : rest));
        held.mean += (static_cast<std::int64_t>(value) * 2 * half - held.mean) >> 2;
        held.activity += ((length << 4) - held.activity) >> 2;
        held.last = rest;
        return rest;
    }

    SCRIMP_MEMBER void aim(Index column, int shift, const Column &held, std::int64_t habitual, std::int64_t before,
             std::int64_t earlier) {
        const int table = static_cast<int>(column < 16 ? column : 16 + std::min<Index>((column - 16) / 8, 3));
        const int row = table * most_shifts + shift;
        const int activity = std::min(held.activity >> 3, activities - 1);
        const int pair = (signed_bucket(before, 4) + 4) * 3 + signed_bucket(earlier, 1) + 1;
        const int habit = signed_bucket(habitual, 11) + 12;
        places_[0] = static_cast<std::size_t>(row * activities + activity);
        places_[1] = static_cast<std::size_t>(row * pairs + pair);
        places_[2] = static_cast<std::size_t>(row * habits + habit);
    }

    SCRIMP_MEMBER std::int64_t difference(std::int64_t rest) {
        const bool negative = rest < 0;
        const auto size = static_cast<std::uint32_t>(negative ? -rest : rest);
        const int kind = size_class(size);
        const int wanted = kind == 0 ? 0 : kind < 8 ? 2 * kind - 1 + negative : std::min(kind + 7, escape);
        const int found = token(wanted);
        if (found == escape) return escaped(size, negative);
        const int digits = token_table.digits[found];
        std::uint32_t made = token_table.least[found];
        bool below = (found & 1) == 0;
        if (digits > 0) {
            const bool last = found >= wide;
            const std::uint32_t low = size & ((1u << (digits - last)) - 1u);
            const std::uint32_t rest = coder_.plain(last ? low << 1 | negative : low, digits);
            made |= last ? rest >> 1 : rest;
            below = last ? rest & 1u : below;
        }
        return below ? -static_cast<std::int64_t>(made) : static_cast<std::int64_t>(made);
    }

    SCRIMP_MEMBER std::int64_t escaped(std::uint32_t size, bool negative) {
        const int top = std::min<int>(static_cast<int>(coder_.plain(Coder::writes ? bit_length(size) - 1 : 0, 5)),
                                      most_digits);
        const std::uint32_t sign = coder_.plain(negative, 1);
        const std::uint32_t made = 1u << top | plain_bits(coder_, size & ((1u << top) - 1u), top);
        return sign ? -static_cast<std::int64_t>(made) : static_cast<std::int64_t>(made);
    }

    SCRIMP_MEMBER int token(int wanted) {
        // Before the first of them a 0, where the first token begins
        alignas(64) std::int16_t edges[2 * tokens];
        std::int16_t *upto = edges + tokens;
        upto[-1] = 0;
        const std::int16_t *a = contexts_[0].rows[places_[0]].upto, *b = contexts_[1].rows[places_[1]].upto,
                           *c = contexts_[2].rows[places_[2]].upto;
        for (int other = 0; other < tokens; ++other) {
            const auto mean = static_cast<std::int16_t>((a[other] >> 1) + (b[other] >> 2) + (c[other] >> 2));
            // Every token keeps a part of its own.
            upto[other] = static_cast<std::int16_t>(mean - (mean >> 10) + other + 1);
        }
        if constexpr (!Coder::writes) {
            const auto place = static_cast<std::int16_t>(std::min<std::uint32_t>(coder_.aim(), 32765));
            wanted = std::min(count_upto(upto, place), escape);
        }
        coder_.interval(static_cast<std::uint32_t>(upto[wanted - 1]), static_cast<std::uint32_t>(upto[wanted]));
        for (int context = 0; context < 3; ++context) learn(contexts_[context], places_[context], wanted);
        return wanted;
    }

    const FieldShape &shape_;
    Coder &coder_;
    std::vector<Column> columns_;
    Context contexts_[3];
    std::size_t places_[3] = {};
};

constexpr auto nothing = [](Index, const std::int32_t *, Index) {};

SCRIMP_BODY bool write_body(const FieldShape &shape, Encoder &coder, const std::int32_t *values) {
    // Written back unchanged: what is coded is what was read.
    return Fields<Encoder>(shape, coder).run(const_cast<std::int32_t *>(values), shape.columns, nothing);
}

SCRIMP_BODY bool read_body(const FieldShape &shape, Decoder &coder, std::int32_t *values) {
    return Fields<Decoder>(shape, coder).run(values, shape.columns, nothing);
}

constexpr Index most_width = 128;

SCRIMP_BODY bool read_rotated_body(const FieldShape &shape, Decoder &coder, const RotateShape &turn, float *out) {
    std::vector<std::int32_t> line(static_cast<std::size_t>(shape.columns));
    return Fields<Decoder>(shape, coder).run(line.data(), 0, [&](Index row, const std::int32_t *numbers, Index count) {
        float sums[most_width] = {};
        for (Index axis = 0; axis < count; ++axis) {
            const float factor = static_cast<float>(numbers[axis]) * turn.steps[row];
            const float *direction = turn.directions + axis * turn.width;
            for (Index place = 0; place < turn.width; ++place) sums[place] += factor * direction[place];
        }
        std::copy_n(sums, turn.width, out + row * turn.width);
    });
}

SCRIMP_DISPATCH(bool, write, (const FieldShape &shape, Encoder &coder, const std::int32_t *values),
                (shape, coder, values))
SCRIMP_DISPATCH(bool, read, (const FieldShape &shape, Decoder &coder, std::int32_t *values), (shape, coder, values))
SCRIMP_DISPATCH(bool, read_rotated,
                (const FieldShape &shape, Decoder &coder, const RotateShape &turn, float *out),
                (shape, coder, turn, out))

}  // namespace

std::vector<std::uint8_t> encode_fields(const FieldShape &shape, const std::int32_t *values) {
    Encoder coder;
    write(shape, coder, values);
    return coder.finish();
}

bool decode_fields(const FieldShape &shape, const std::uint8_t *data, std::size_t size, std::int32_t *values) {
    Decoder coder(data, size);
    return read(shape, coder, values) && coder.exact();
}

bool decode_rotated(const FieldShape &shape, const RotateShape &turn, const std::uint8_t *data, std::size_t size,
                    float *out) {
    Decoder coder(data, size);
    return read_rotated(shape, coder, turn, out) && coder.exact();
}

}  // namespace scrimp
