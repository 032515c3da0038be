// An adaptive binary range coder whose probabilities are mixed from three contexts. Integers only: the same bytes on
// every machine. Specified in docs/splat-container.md; scrimp.splats.entropy holds a twin in Python.
//
// Models are written once, as templates over `Encoder` or `Decoder`: `code(bit, ...)` writes the bit or finds it.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace scrimp {

constexpr int token_bits = 15;

inline int bit_length(std::uint32_t value) {
#if defined(__GNUC__)
    return value ? 32 - __builtin_clz(value) : 0;
#else
    int length = 0;
    for (; value; value >>= 1) ++length;
    return length;
#endif
}

class Encoder {
  public:
    static constexpr bool writes = true;

    // `one` / 2^16 is the probability of a set bit.
    int code(int bit, std::uint32_t one) {
        const std::uint32_t bound = (range_ >> 16) * one;
        if (bit) {
            range_ = bound;
        } else {
            low_ += bound;
            range_ -= bound;
        }
        while (range_ < (1u << 24)) shift();
        return bit;
    }

    // The part [from, to) of 2^token_bits
    void interval(std::uint32_t from, std::uint32_t to) {
        range_ >>= token_bits;
        low_ += static_cast<std::uint64_t>(from) * range_;
        range_ *= to - from;
        while (range_ < (1u << 24)) shift();
    }

    // The low bits of a value, equally likely, at most 16
    std::uint32_t plain(std::uint32_t value, int bits) {
        range_ >>= bits;
        low_ += static_cast<std::uint64_t>(value) * range_;
        while (range_ < (1u << 24)) shift();
        return value;
    }

    const std::vector<std::uint8_t> &finish() {
        for (int byte = 0; byte < 5; ++byte) shift();
        return out_;
    }

  private:
    // The byte that leaves `low` waits while a carry may still reach it, and with it all 255s after it.
    void shift() {
        if (low_ < 0xFF000000u || low_ >> 32) {
            const auto carry = static_cast<std::uint8_t>(low_ >> 32);
            if (started_) out_.push_back(static_cast<std::uint8_t>(waiting_ + carry));
            for (; behind_; --behind_) out_.push_back(static_cast<std::uint8_t>(0xFF + carry));
            started_ = true;
            waiting_ = static_cast<std::uint8_t>(low_ >> 24);
        } else {
            ++behind_;
        }
        low_ = (low_ & 0x00FFFFFFu) << 8;
        range_ <<= 8;
    }

    std::vector<std::uint8_t> out_;
    std::uint64_t low_ = 0;
    std::uint32_t range_ = 0xFFFFFFFFu;
    std::uint8_t waiting_ = 0;
    std::size_t behind_ = 0;
    bool started_ = false;
};

class Decoder {
  public:
    static constexpr bool writes = false;

    Decoder(const std::uint8_t *data, std::size_t size) : bytes_(size + most_ahead, 0), size_(size) {
        std::copy_n(data, size, bytes_.begin());
        code_ = ahead();
        read_ = 4;
    }

    int code(int, std::uint32_t one) {
        const std::uint32_t bound = (range_ >> 16) * one;
        // The encoder puts a set bit lowest.
        const int bit = code_ < bound;
        if (bit) {
            range_ = bound;
        } else {
            code_ -= bound;
            range_ -= bound;
        }
        settle();
        return bit;
    }

    // Where in the whole the next interval lies, and then that interval
    std::uint32_t aim() {
        range_ >>= token_bits;
        const std::uint32_t place = code_ / range_;
        return place < (1u << token_bits) ? place : (1u << token_bits) - 1u;
    }

    void interval(std::uint32_t from, std::uint32_t to) {
        code_ -= from * range_;
        range_ *= to - from;
        settle();
    }

    std::uint32_t plain(std::uint32_t, int bits) {
        range_ >>= bits;
        std::uint32_t value = code_ / range_;
        if (value >> bits) value = (1u << bits) - 1u;  // only damaged bytes lead here
        code_ -= value * range_;
        settle();
        return value;
    }

    // Whether exactly the bytes there are were read
    bool exact() const { return read_ == size_; }

    // Damaged bytes may ask for more than there is: zeros, and no more work once that is so.
    bool beyond() const { return read_ > size_; }

  private:
    static constexpr std::size_t most_ahead = 4;

    // The next four bytes; damaged streams ask for more than there are, and find zeros.
    std::uint32_t ahead() const {
        const std::uint8_t *next = bytes_.data() + std::min(read_, size_);
        return std::uint32_t{next[0]} << 24 | std::uint32_t{next[1]} << 16 | std::uint32_t{next[2]} << 8 | next[3];
    }

    // All lost bytes at once: a loop over them would be mispredicted every few symbols.
    void settle() {
        const int lost = (32 - bit_length(range_)) & ~7;
        code_ = code_ << lost | static_cast<std::uint32_t>((std::uint64_t{ahead()} << lost) >> 32);
        range_ <<= lost;
        read_ += static_cast<std::size_t>(lost >> 3);
    }

    std::vector<std::uint8_t> bytes_;
    std::size_t size_, read_ = 0;
    std::uint32_t code_ = 0, range_ = 0xFFFFFFFFu;
};

// Logistic mixing (Mattern 2012): probabilities meet as 256 log(p / (1 - p)), weighted by weights learned online.
struct MixTables {
    std::array<std::int32_t, 4096> stretch;   // of p / 4096, at the middle of its interval
    std::array<std::uint32_t, 4095> squash;   // of -2047 to 2047, in 1 / 65536
    std::array<std::uint32_t, 1024> rate;     // of the n-th bit seen, in 1 / 65536
    MixTables();
};

const MixTables &mix_tables();

// A probability of a set bit in 22 bits, and how often it was updated in the 10 below
using Cell = std::uint32_t;
constexpr Cell fresh = (1u << 31) | 0u;
constexpr std::uint32_t most_seen = 255;

struct Mixer {
    std::int32_t weights[3] = {22000, 22000, 22000};
};

inline void learn(Cell &cell, int bit, const MixTables &tables) {
    const std::uint32_t seen = cell & 1023u;
    const auto p = static_cast<std::int64_t>(cell >> 10), goal = static_cast<std::int64_t>(bit ? (1 << 22) - 1 : 0);
    const std::int64_t moved = p + (((goal - p) * tables.rate[seen]) >> 16);
    cell = static_cast<Cell>(moved) << 10 | (seen < most_seen ? seen + 1 : seen);
}

template <class Coder>
inline int mixed(Coder &coder, int bit, Cell &a, Cell &b, Cell &c, Mixer &mixer, const MixTables &tables) {
    Cell *const cells[3] = {&a, &b, &c};
    std::int32_t logits[3];
    std::int64_t sum = 0;
    for (int input = 0; input < 3; ++input) {
        logits[input] = tables.stretch[*cells[input] >> 20];
        sum += static_cast<std::int64_t>(mixer.weights[input]) * logits[input];
    }
    std::int64_t logit = sum >> 16;
    logit = logit < -2047 ? -2047 : logit > 2047 ? 2047 : logit;
    const std::uint32_t one = tables.squash[static_cast<std::size_t>(logit + 2047)];
    bit = coder.code(bit, one);
    const std::int32_t wrong = ((bit << 12) - static_cast<std::int32_t>(one >> 4)) * 6;
    for (int input = 0; input < 3; ++input) {
        const std::int32_t weight = mixer.weights[input] + ((logits[input] * wrong + 0x8000) >> 16);
        mixer.weights[input] = weight < -1048576 ? -1048576 : weight > 1048576 ? 1048576 : weight;
        learn(*cells[input], bit, tables);
    }
    return bit;
}

// Any number of equally likely bits up to 32, the upper ones first
template <class Coder>
inline std::uint32_t plain_bits(Coder &coder, std::uint32_t value, int bits) {
    std::uint32_t made = 0;
    while (bits > 0) {
        const int here = bits > 16 ? 16 : bits;
        bits -= here;
        made = made << here | coder.plain(value >> bits & ((1u << here) - 1u), here);
    }
    return made;
}

// rows of columns of whole numbers; see range_coder_fields.cpp. `shifts` are [rows, shift_columns], one for each column
// or one for all. `counts` may be null: every column of every row.
struct FieldShape {
    std::ptrdiff_t rows, columns, shift_columns;
    const std::uint8_t *shifts, *predicted, *counts;
};

std::vector<std::uint8_t> encode_fields(const FieldShape &shape, const std::int32_t *values);
bool decode_fields(const FieldShape &shape, const std::uint8_t *data, std::size_t size, std::int32_t *values);

// points on a grid of 2^levels cells a side in Morton order; see range_coder_points.cpp
struct PointShape {
    std::ptrdiff_t rows;
    int levels;
    const std::uint8_t *drops;
};

std::vector<std::uint8_t> encode_points(const PointShape &shape, const std::int32_t *points);
bool decode_points(const PointShape &shape, const std::uint8_t *data, std::size_t size, std::int32_t *points);

// rows of `axes` numbers, the first `counts[row]` in use, times steps[row] along directions [axes, width <= 128]
struct RotateShape {
    std::ptrdiff_t rows, axes, width;
    const std::uint8_t *counts;
    const float *steps, *directions;
};

void rotate_rows(const RotateShape &shape, const std::int32_t *numbers, float *out);

// What `decode_fields` and then `rotate_rows` find, without all the numbers in between: out [rows, width].
bool decode_rotated(const FieldShape &shape, const RotateShape &turn, const std::uint8_t *data, std::size_t size,
                    float *out);

// Numbers [rows, 3] in steps of step * 2^shifts[row]; see range_coder_restore.cpp
struct NumberShape {
    std::ptrdiff_t rows;
    const std::int32_t *numbers;
    const std::uint8_t *shifts;
    double step;
    const double *frame;
};

struct OctaveShape {
    std::ptrdiff_t rows;
    const std::uint8_t *levels;
    int opacity, scale, opacity_cap, scale_cap;
    std::int64_t limit;
};

void restore_octaves(const OctaveShape &shape, const std::int32_t *logs, std::int32_t *out);
void restore_quaternions(const NumberShape &shape, float *out);
void restore_framed(const NumberShape &shape, float *out);
void restore_means(const NumberShape &shape, float *out);

void bind_range_coder(nanobind::module_ &module);

}  // namespace scrimp
