// SPDX-License-Identifier: Apache-2.0
//
// Random words to float32 noise in one pass. It is an optimisation only: dpquant/privacy/noise.py defines the result, and this
// file must agree with it bit for bit. It draws nothing, has no state and no key, and handles each pair of words independently.
//
// All arithmetic is float64, in the order of the definition, with operations that IEEE 754 rounds correctly, so all machines
// give the same bits. Integers are converted to floats by bit operations (SSE2 and AVX2 cannot convert 64-bit integers), and
// there are no branches, so that the compiler can vectorise whole iterations.
//
// Compile without fast-math and without contraction of a * b + c: both would change bits.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>

#include "parallel.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr uint64_t EXPONENT_OF_ONE = 0x3FF0000000000000;
constexpr uint64_t SQRT_HALF = 0x3FE6A09E667F3BCD;
constexpr uint64_t TWO_POW_52 = 0x4330000000000000;  // or-ed with an integer below 2^52: the float 2^52 + integer
constexpr uint64_t SIGN = uint64_t{1} << 63;
constexpr int MANTISSA_BITS = 52, DROPPED_BITS = 12;
constexpr double LN2 = 0x1.62E42FEFA39EFp-1, HALF_PI = 0x1.921FB54442D18p+0;
constexpr int64_t TILE = 4096;  // pairs per unit of work of a thread

// 1, 1/3, 1/5, ...: atanh(s) / s in powers of s^2.
constexpr double ATANH[] = {1.0,        1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0,
                            1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0, 1.0 / 19.0};
// 1, -1/3!, 1/5!, ... and 1, -1/2!, 1/4!, ...: sin(x) / x and cos(x) in powers of x^2. All factorials are exact.
constexpr double SIN[] = {1.0,           -1.0 / 6.0,         1.0 / 120.0,         -1.0 / 5040.0,
                          1.0 / 362880.0, -1.0 / 39916800.0, 1.0 / 6227020800.0, -1.0 / 1307674368000.0};
constexpr double COS[] = {1.0,           -1.0 / 2.0,       1.0 / 24.0,         -1.0 / 720.0,           1.0 / 40320.0,
                          -1.0 / 3628800.0, 1.0 / 479001600.0, -1.0 / 87178291200.0, 1.0 / 20922789888000.0};

template <int count>
INLINE double polynomial(const double (&coefficients)[count], double x) {
    double sum = coefficients[count - 1];
    for (int k = count - 2; k >= 0; --k) sum = sum * x + coefficients[k];
    return sum;
}

// dpquant.privacy.noise.cell_midpoints
INLINE double cell_midpoint(uint64_t word) {
    return (std::bit_cast<double>((word >> DROPPED_BITS) | EXPONENT_OF_ONE) - 1.0) + 0x1p-53;
}

// dpquant.privacy.noise.log_of
INLINE double log_of(double u) {
    const uint64_t bits = std::bit_cast<uint64_t>(u);
    const uint64_t biased = (bits - SQRT_HALF + EXPONENT_OF_ONE) >> MANTISSA_BITS;
    const double exponent = std::bit_cast<double>(biased | TWO_POW_52) - (0x1p52 + 1023.0);
    const double m = std::bit_cast<double>(bits - (biased << MANTISSA_BITS) + EXPONENT_OF_ONE);
    const double s = (m - 1.0) / (m + 1.0);
    return exponent * LN2 + (s + s) * polynomial(ATANH, s * s);
}

// dpquant.privacy.noise.normals, for one pair.
INLINE void pair_of_normals(uint64_t a, uint64_t b, double *first, double *second) {
    const double length = std::sqrt(-2.0 * log_of(cell_midpoint(a)));
    const double radius = std::bit_cast<double>(std::bit_cast<uint64_t>(length) ^ ((b << 62) & SIGN));
    const double x = (cell_midpoint(b) - 0.5) * HALF_PI, square = x * x;
    const uint64_t sine = std::bit_cast<uint64_t>(x * polynomial(SIN, square));
    const uint64_t cosine = std::bit_cast<uint64_t>(polynomial(COS, square));
    const uint64_t swapped = (sine ^ cosine) & (uint64_t{0} - (b & 1));
    *first = radius * std::bit_cast<double>(cosine ^ swapped);
    *second = radius * std::bit_cast<double>(sine ^ swapped);
}

FOR_EVERY_X86 void fill_pairs(const uint64_t *words, int64_t pairs, double std, float *noise) {
    for (int64_t i = 0; i < pairs; ++i) {
        double first, second;
        pair_of_normals(words[2 * i], words[2 * i + 1], &first, &second);
        noise[2 * i] = static_cast<float>(std * first);
        noise[2 * i + 1] = static_cast<float>(std * second);
    }
}

void fill_noise(const uint64_t *words, int64_t count, double std, float *noise, int threads) {
    const int64_t pairs = count / 2;
    parallel_for((pairs + TILE - 1) / TILE, threads, [&](int64_t tile) {
        const int64_t start = tile * TILE;
        fill_pairs(words + 2 * start, std::min(TILE, pairs - start), std, noise + 2 * start);
    });
    if (count % 2 != 0) {  // the second value of the last pair is not used
        float last[2];
        fill_pairs(words + 2 * pairs, 1, std, last);
        noise[count - 1] = last[0];
    }
}

using Words = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Noise = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_noise(nb::module_ &m) {
    m.def(
        "fill_noise",
        [](Words words, Noise noise, double std, int threads) {
            const auto count = static_cast<int64_t>(noise.size());
            if (static_cast<int64_t>(words.size()) != count + count % 2)
                throw std::invalid_argument("sizes of words and noise do not agree");
            nb::gil_scoped_release unlocked;
            fill_noise(words.data(), count, std, noise.data(), threads);
        },
        nb::arg("words").noconvert(), nb::arg("noise").noconvert(), nb::kw_only(), nb::arg("std"), nb::arg("threads"),
        "Fill noise (n) with N(0, std^2) from n random words, or from n + 1 if n is odd.");
}

}  // namespace dpquant
