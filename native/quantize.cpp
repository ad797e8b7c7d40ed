// SPDX-License-Identifier: Apache-2.0
//
// One fused pass from float32 rows to one-byte codes and a scale per row. It is an optimisation only: dpquant/backends/quantize.py
// defines the codes and dpquant/rounding.py the random bits, and this file must agree with both bit for bit. It has no state, seeds
// nothing and does not use torch. A row is read twice (largest magnitude, then codes), or three times with a root mean square, while
// it is in the cache.
//
// A record's draws must not depend on how far another record's length pads the batch, so each line h of a map (C, H, W) draws under
// its own key. Maps are channels last: a line is contiguous, and an element's index in it, w * C + c, is its position in memory.
// Draws are made line by line, one tile at a time, before the codes of the tile: the loop over codes then does not stop at ends of
// lines, and lines of 16 elements cost little more than long ones. For the same reason a map's root mean square omits all lines and
// columns after the last ones with a nonzero element.
//
// Symbols: top = the value of the largest code; t = |x| * max_code / top, at most max_code; draw = 23 random bits; z = t, or t + 1
// where t < 1.
//
// Both roundings are one addition on z. Since z >= 1, z is a multiple of 2^-23, and for t < 1 forming t + 1 has rounded t to
// such a multiple, as the definition requires (to nearest, ties to even).
//   powers of two: adding the draw to z's mantissa carries into the exponent with probability mantissa / 2^23.
//   uniform:       floor(t + draw / 2^23), in integers of 2^-23; t <= 127 keeps them below 2^31.
//
// Compile without fast-math and without contraction of a * b + c: both would change bits.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>

#include "parallel.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr uint32_t MANTISSA_BITS = 23;
constexpr uint32_t ONE = 1u << MANTISSA_BITS;  // 1.0 in units of 2^-23
constexpr uint32_t HALF = ONE / 2;             // as a draw: round to nearest, ties away from zero
constexpr uint32_t MAGNITUDE = 0x7FFFFFFF;
constexpr uint32_t INFINITY_BITS = 0x7F800000;  // magnitudes from this value on are not finite
constexpr float SMALLEST_ABSMAX = 0x1p-100f;    // below it max_code / top may overflow
constexpr float UNITS = 32768.0f;               // the largest |x| in the integer units of the root mean square
constexpr int64_t TILE = 2048;                  // elements whose draws are made at a time; they stay in the first-level cache
constexpr int32_t LANES = 16;                   // draws or values processed together: 64 bytes
constexpr int64_t LARGE = 1 << 16;              // rows of at least this many elements are split among threads

// The division of a row into lines: a map has lines of `length` elements, `channels` per column, each with its own key. Any other
// row is one line with the row's key.
struct Lines {
    int64_t length, channels;
    bool own_keys;
};

struct Rule {
    float max_code;
    bool uniform, stochastic;
    int32_t zero_point;
};

// dpquant.rounding.element_bits
INLINE uint32_t element_bits(uint32_t index, uint32_t low, uint32_t high) {
    uint32_t h = index ^ low;
    h = (h ^ (h >> 16)) * 0x7FEB352Du;
    h ^= high;
    h = (h ^ (h >> 15)) * 0x846CA68Bu;
    return (h ^ (h >> 16)) >> (32 - MANTISSA_BITS);
}

// dpquant.rounding.line_keys
INLINE uint64_t line_key(uint64_t row_key, int64_t line) {
    uint64_t z = row_key + (static_cast<uint64_t>(line) + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Makes the draws of a row's elements start .. start + count - 1. Up to LANES draws after them are overwritten.
INLINE void fill_draws(uint32_t *draws, int64_t start, int32_t count, uint64_t row_key, Lines lines) {
    int64_t line = start / lines.length, index = start % lines.length;
    for (int32_t done = 0; done < count; ++line, index = 0) {
        const auto run = static_cast<int32_t>(std::min<int64_t>(lines.length - index, count - done));
        const uint64_t key = lines.own_keys ? line_key(row_key, line) : row_key;
        const auto low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        for (int32_t k = 0; k < run; k += LANES) {  // the next run overwrites the surplus draws
            const uint32_t first = static_cast<uint32_t>(index) + static_cast<uint32_t>(k);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 1  // gcc does not vectorise it when it is unrolled
#endif
            for (int32_t j = 0; j < LANES; ++j)
                draws[done + k + j] = element_bits(first + static_cast<uint32_t>(j), low, high);
        }
        done += run;
    }
}

template <bool uniform, bool stochastic>
INLINE void tile_codes(const float *x, const uint32_t *draws, int32_t count, float inverse, Rule rule, uint8_t *codes) {
    for (int32_t k = 0; k < count; ++k) {
        const uint32_t bits = std::bit_cast<uint32_t>(x[k]);
        const float scaled = std::bit_cast<float>(bits & MAGNITUDE) * inverse;
        const float t = scaled < rule.max_code ? scaled : rule.max_code;
        const float shift = t < 1.0f ? 1.0f : 0.0f;
        const float z = t + shift;
        const uint32_t draw = stochastic ? draws[k] : HALF;
        int32_t magnitude;
        if (uniform) {
            const int32_t fixed = static_cast<int32_t>((z - shift) * static_cast<float>(ONE));
            magnitude = (fixed + static_cast<int32_t>(draw)) >> MANTISSA_BITS;
        } else {
            const uint32_t power = (std::bit_cast<uint32_t>(z) + draw) & INFINITY_BITS;
            magnitude = static_cast<int32_t>(std::bit_cast<float>(power) - shift);
        }
        const int32_t sign = static_cast<int32_t>(bits) >> 31;  // 0 or -1
        codes[k] = static_cast<uint8_t>(((magnitude ^ sign) - sign) + rule.zero_point);
    }
}

// Makes the codes of a row's elements start .. start + count - 1, at most TILE; x and codes point to the first of them.
FOR_EVERY_X86 void quantize_tile(const float *x, int64_t start, int32_t count, float inverse, uint64_t row_key, Lines lines,
                                 Rule rule, uint8_t *codes) {
    uint32_t draws[TILE + LANES];
    if (rule.stochastic) fill_draws(draws, start, count, row_key, lines);
    if (rule.uniform && rule.stochastic)
        tile_codes<true, true>(x, draws, count, inverse, rule, codes);
    else if (rule.uniform)
        tile_codes<true, false>(x, draws, count, inverse, rule, codes);
    else if (rule.stochastic)
        tile_codes<false, true>(x, draws, count, inverse, rule, codes);
    else
        tile_codes<false, false>(x, draws, count, inverse, rule, codes);
}

// Returns the largest |x| of a row. As integers, magnitudes order like floats, with infinity and then NaN above all others.
FOR_EVERY_X86 uint32_t largest_magnitude(const float *x, int64_t count) {
    uint32_t largest = 0;
    for (int64_t k = 0; k < count; ++k) largest = std::max(largest, std::bit_cast<uint32_t>(x[k]) & MAGNITUDE);
    return largest;
}

// Returns the sum of squares of |x| in units of 1 / inverse, rounded to integers, so it does not depend on the order. No value
// exceeds UNITS by more than a float's last bit, so the integer may be clamped instead of the float; gcc vectorises only the former
// for AVX2.
FOR_EVERY_X86 int64_t sum_of_squares(const float *x, int64_t count, float inverse) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; ++k) {
        const float scaled = std::bit_cast<float>(std::bit_cast<uint32_t>(x[k]) & MAGNITUDE) * inverse;
        const int32_t units = std::min(static_cast<int32_t>(scaled + 0.5f), static_cast<int32_t>(UNITS));
        total += static_cast<uint32_t>(units * units);
    }
    return total;
}

// Returns the index after the last nonzero element of x[begin .. end - 1]; begin if all are zero.
INLINE int64_t end_of_values(const float *x, int64_t begin, int64_t end) {
    for (; end - begin >= LANES; end -= LANES) {
        uint32_t seen = 0;
        for (int32_t k = 0; k < LANES; ++k) seen |= std::bit_cast<uint32_t>(x[end - LANES + k]) & MAGNITUDE;
        if (seen) break;
    }
    while (end > begin && !(std::bit_cast<uint32_t>(x[end - 1]) & MAGNITUDE)) --end;
    return end;
}

// dpquant.backends.quantize._extents of a row that is not all zeros. The search runs backwards and ends at the first nonzero value
// in the last column; in a row without padding that is usually the first value.
FOR_EVERY_X86 int64_t extent(const float *x, int64_t row_size, Lines lines) {
    if (!lines.own_keys) return row_size;
    const int64_t last = end_of_values(x, 0, row_size) - 1;
    if (last >= row_size - lines.channels) return row_size;
    const int64_t last_line = last / lines.length;
    int64_t width = (last % lines.length / lines.channels + 1) * lines.channels;  // of the lines from `line` on
    for (int64_t line = last_line; line > 0 && width < lines.length;) {
        const int64_t end = end_of_values(x + --line * lines.length, width, lines.length);
        width = (end + lines.channels - 1) / lines.channels * lines.channels;
    }
    return (last_line + 1) * width;
}

// Sets the scale of a row from its top; returns whether the row can have codes other than zero.
bool usable(float top, float max_code, float *scale) {
    const bool finite = std::bit_cast<uint32_t>(top) < INFINITY_BITS, usable = finite && top >= SMALLEST_ABSMAX;
    *scale = usable ? top / max_code : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    return usable;
}

void quantize_rows(const float *x, const uint64_t *keys, int64_t rows, int64_t row_size, Lines lines, Rule rule,
                   uint8_t *codes, float *scale, std::optional<double> clip, int threads) {
    // Threads work on whole rows, so that a row stays in the cache between its reads; on tiles if rows are few and long.
    const int within = rows < threads && row_size >= LARGE ? threads : 1;
    parallel_for(rows, within > 1 ? 1 : threads, [&](int64_t row) {
        const float *values = x + row * row_size;
        uint8_t *out = codes + row * row_size;
        const int64_t parts = within > 1 ? (row_size + LARGE - 1) / LARGE : 1, part = (row_size + parts - 1) / parts;
        const auto over_parts = [&](auto &&visit) {
            parallel_for(parts, within,
                         [&](int64_t i) { visit(values + i * part, std::min(part, row_size - i * part)); });
        };
        std::atomic<uint32_t> largest{0};
        over_parts([&](const float *some, int64_t count) {
            const uint32_t mine = largest_magnitude(some, count);
            uint32_t seen = largest.load();
            while (seen < mine && !largest.compare_exchange_weak(seen, mine)) {}
        });
        float top = std::bit_cast<float>(largest.load());
        if (clip && usable(top, rule.max_code, &scale[row])) {
            std::atomic<int64_t> squares{0};
            over_parts([&](const float *some, int64_t count) { squares += sum_of_squares(some, count, UNITS / top); });
            const double mean = static_cast<double>(squares.load()) / static_cast<double>(extent(values, row_size, lines));
            top = std::min(top, static_cast<float>(*clip * std::sqrt(mean) * (static_cast<double>(top) / UNITS)));
        }
        if (!usable(top, rule.max_code, &scale[row])) {
            std::memset(out, rule.zero_point, static_cast<size_t>(row_size));
            return;
        }
        const float inverse = rule.max_code / top;
        parallel_for((row_size + TILE - 1) / TILE, within, [&](int64_t tile) {
            const int64_t start = tile * TILE, count = std::min(TILE, row_size - start);
            quantize_tile(values + start, start, static_cast<int32_t>(count), inverse, keys[row], lines, rule, out + start);
        });
    });
}

using Floats = nb::ndarray<const float, nb::device::cpu>;
using Keys = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::device::cpu>;
using Scales = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_quantizer(nb::module_ &m) {
    m.def(
        "quantize_rows",
        [](Floats x, Keys row_keys, Bytes codes, Scales scale, std::optional<double> clip, std::optional<int64_t> line,
           int64_t channels, float max_code, bool uniform, bool stochastic, int32_t zero_point, int threads) {
            const auto rows = static_cast<int64_t>(row_keys.size()), size = static_cast<int64_t>(x.size());
            if (rows == 0 || size == 0 || size % rows != 0 || codes.size() != x.size() || scale.size() != row_keys.size())
                throw std::invalid_argument("sizes of x, row_keys, codes and scale do not agree");
            const int64_t row_size = size / rows;
            const int64_t length = line.value_or(row_size);
            if (length < 1 || row_size % length != 0 || length > INT64_C(1) << 32)
                throw std::invalid_argument("line does not divide a row, or is longer than 2^32 elements");
            if (channels < 1 || length % channels != 0) throw std::invalid_argument("channels does not divide a line");
            if (clip && !(*clip > 0)) throw std::invalid_argument("clip is not above zero");
            if (!(max_code >= 1.0f && max_code <= 127.0f))
                throw std::invalid_argument("max_code is not in 1 .. 127");
            nb::gil_scoped_release unlocked;
            quantize_rows(x.data(), reinterpret_cast<const uint64_t *>(row_keys.data()), rows, row_size,
                          {length, channels, line.has_value()}, {max_code, uniform, stochastic, zero_point}, codes.data(),
                          scale.data(), clip, threads);
        },
        nb::arg("x").noconvert(), nb::arg("row_keys").noconvert(), nb::arg("codes").noconvert(),
        nb::arg("scale").noconvert(), nb::arg("clip").none(), nb::kw_only(), nb::arg("line").none(),
        nb::arg("channels"), nb::arg("max_code"), nb::arg("uniform"), nb::arg("stochastic"), nb::arg("zero_point"),
        nb::arg("threads"),
        "Fill codes (one byte each, in x's memory order) and scale (B) from the B rows of the dense x; clip: the root mean "
        "squares that a row's largest code stands for, if that is less than its largest magnitude; line: how many elements "
        "of a row share a key, as dpquant.streams.line_keys makes it; None: all, and it is the row's own; channels: how many "
        "elements of a line make a column: with a line, the mean is over none of the lines and columns of zeros at the end.");
}

}  // namespace dpquant
