// SPDX-License-Identifier: Apache-2.0
//
// Each example's weight gradient of number codes, exactly, on int8 instructions:
//
//     sum[o, i, j, c] = sum over h, w of (g[h, w, o] - 128) * (x[h * stride + i - padding, w * stride + j - padding, c] - 128)
//
// where x is zero outside of the image. dpquant/backends/algebra.py defines the result (`im2col`, `patch_products`). Codes are
// uint8 with zero point 128, channels last. The caller ensures that no sum overflows int32.
//
// Each example is packed once: g as signed rows of outputs, with consecutive positions; x unsigned, as groups of four positions
// of a channel, once per kernel column. A kernel row is then an offset, so a tap is a matrix product without further copies.
// Positions outside of the image are packed as 128, the code of zero. A sum of signed g times unsigned x is too large by 128
// times the sum of g, which is subtracted at the end.
//
// Three kernels give the same integers: AMX tiles, AVX-512 VNNI in code_products_vnni.cpp, and AVX2 in code_products_avx2.cpp.
// Symbols: O outputs, C channels, T positions in fours.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "code_products.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

using Shape = ProductShape;

#ifdef HAS_TILES

constexpr int64_t LANES = Shape::LANES, FOURS = Shape::FOURS;

// A packed example.
struct Packed {
    std::vector<int8_t> g;         // (tall, fours * 4)
    std::vector<uint8_t> x;        // see `pack_x`
    std::vector<int32_t> g_sums;   // (tall)
    std::vector<int32_t> g_fours;  // see `pack_g`
};

__attribute__((target("avx512f,avx512bw"))) void pack(const uint8_t *x, const uint8_t *g, const Shape &s, Packed &p) {
    const int64_t fours = s.fours(), tall = s.tall();
    pack_x(x, s, p.x);
    pack_g(g, s, fours, p.g_fours);
    p.g.resize(static_cast<size_t>(tall * fours * 4));
    p.g_sums.assign(static_cast<size_t>(tall), 0);
    auto *rows = reinterpret_cast<int32_t *>(p.g.data());
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i steps = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int32_t>(tall)));
    for (int64_t o = 0; o < s.outputs; ++o) {
        __m512i sums = _mm512_setzero_si512();
        for (int64_t four = 0; four < fours; four += FOURS) {
            const __m512i row = _mm512_i32gather_epi32(steps, p.g_fours.data() + four * tall + o, 4);
            _mm512_storeu_si512(rows + o * fours + four, row);
            // sums of g: bytes to pairs to fours, by products with one
            sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(ones, row), _mm512_set1_epi16(1)));
        }
        p.g_sums[o] = _mm512_reduce_add_epi32(sums);
    }
    std::memset(rows + s.outputs * fours, 0, static_cast<size_t>((tall - s.outputs) * fours * 4));
}

// Takes the sums of one tap, (outputs, channels): stores or adds them as float32, and accumulates their squares in float64.
struct Sink {
    float *out;  // of the tap; null: squares only
    std::optional<float> weight;  // the sums times this weight are added to `out`; none: they are stored
    int64_t outputs, channels, depth;
    const int32_t *g_sums;
    __m512d squares;

    __attribute__((target("avx512f"))) void take(__m512i sums, int64_t o, int64_t c) {
        const int64_t count = std::min(LANES, channels - c);
        const auto mask = static_cast<__mmask16>((1u << count) - 1);
        const __m512i excess = _mm512_set1_epi32(CODE_OF_ZERO * g_sums[o]);
        const __m512 values = _mm512_maskz_cvtepi32_ps(mask, _mm512_sub_epi32(sums, excess));
        if (out) {
            float *to = out + o * depth + c;
            const __m512 kept = weight ? _mm512_fmadd_ps(values, _mm512_set1_ps(*weight), _mm512_maskz_loadu_ps(mask, to))
                                       : values;
            _mm512_mask_storeu_ps(to, mask, kept);
        }
        if (weight) return;
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(values));
        const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(values), 1)));
        squares = _mm512_fmadd_pd(low, low, _mm512_fmadd_pd(high, high, squares));
    }
};

// Computes the sums of 16 or 32 outputs by 16 or 32 channels of one tap.
template <bool two_outputs, bool two_channels>
AMX inline void amx_block(const int8_t *g, const uint8_t *x, int64_t fours, int64_t wide, int64_t o, int64_t c, Sink &sink) {
    _tile_zero(0);
    if constexpr (two_channels) _tile_zero(1);
    if constexpr (two_outputs) _tile_zero(2);
    if constexpr (two_outputs && two_channels) _tile_zero(3);
    const int64_t g_step = fours * 4, x_step = wide * 4;
    for (int64_t four = 0; four < fours; four += FOURS) {
        _tile_loadd(4, g + o * g_step + four * 4, g_step);
        _tile_loadd(6, x + four * x_step + c * 4, x_step);
        _tile_dpbsud(0, 4, 6);
        if constexpr (two_channels) {
            _tile_loadd(7, x + four * x_step + (c + LANES) * 4, x_step);
            _tile_dpbsud(1, 4, 7);
        }
        if constexpr (two_outputs) {
            _tile_loadd(5, g + (o + LANES) * g_step + four * 4, g_step);
            _tile_dpbsud(2, 5, 6);
            if constexpr (two_channels) _tile_dpbsud(3, 5, 7);
        }
    }
    alignas(64) int32_t sums[4][LANES][LANES];
    _tile_stored(0, sums[0], 64);
    if constexpr (two_channels) _tile_stored(1, sums[1], 64);
    if constexpr (two_outputs) _tile_stored(2, sums[2], 64);
    if constexpr (two_outputs && two_channels) _tile_stored(3, sums[3], 64);
    for (int64_t down = 0; down <= (two_outputs ? 1 : 0); ++down)
        for (int64_t across = 0; across <= (two_channels ? 1 : 0); ++across)
            for (int64_t k = 0; k < std::min(LANES, sink.outputs - o - down * LANES); ++k)
                sink.take(_mm512_load_si512(sums[down * 2 + across][k]), o + down * LANES + k, c + across * LANES);
}

AMX void amx_tap(const Packed &p, const uint8_t *x, const Shape &s, Sink &sink) {
    const int64_t fours = s.fours(), wide = s.wide(), tall = s.tall();
    for (int64_t c = 0; c < wide; c += 2 * LANES)
        for (int64_t o = 0; o < tall; o += 2 * LANES) {
            const bool two_channels = c + LANES < wide, two_outputs = o + LANES < tall;
            if (two_outputs && two_channels)
                amx_block<true, true>(p.g.data(), x, fours, wide, o, c, sink);
            else if (two_outputs)
                amx_block<true, false>(p.g.data(), x, fours, wide, o, c, sink);
            else if (two_channels)
                amx_block<false, true>(p.g.data(), x, fours, wide, o, c, sink);
            else
                amx_block<false, false>(p.g.data(), x, fours, wide, o, c, sink);
        }
}

__attribute__((target("avx512f")))
double example_amx(const uint8_t *x, const uint8_t *g, const Shape &s, float *out, std::optional<float> weight) {
    thread_local Packed packed;
    pack(x, g, s, packed);
    Sink sink{nullptr, weight, s.outputs, s.channels, s.depth(), packed.g_sums.data(), _mm512_setzero_pd()};
    const Tiles tiles;
    for (int64_t i = 0; i < s.rows.kernel; ++i)
        for (int64_t j = 0; j < s.columns.kernel; ++j) {
            sink.out = out ? out + (i * s.columns.kernel + j) * s.channels : nullptr;
            amx_tap(packed, s.tap(packed.x.data(), i, j), s, sink);
        }
    return _mm512_reduce_add_pd(sink.squares);
}

// Computes an example's product, stores it if `out` is given, and returns the sum of its squares.
double store_example(const uint8_t *x, const uint8_t *g, const Shape &s, const std::string &kernel, float *out) {
    if (kernel == "avx2") return store_example_avx2(x, g, s, out);
    if (kernel == "vnni") return store_example_vnni(x, g, s, out);
    return example_amx(x, g, s, out, std::nullopt);
}

// Adds the products of `count` examples, times their weights, to `out`.
void add_examples(const uint8_t *x, const uint8_t *g, const Shape &s, const std::string &kernel, const float *weights, int64_t count, float *out) {
    if (kernel == "avx2") return add_examples_avx2(x, g, s, weights, count, out);
    if (kernel == "vnni") return add_examples_vnni(x, g, s, weights, count, out);
    for (int64_t b = 0; b < count; ++b)
        example_amx(x + b * s.x_size(), g + b * s.g_size(), s, out, weights[b]);
}
#else
double store_example(const uint8_t *, const uint8_t *, const Shape &, const std::string &, float *) { return 0; }
void add_examples(const uint8_t *, const uint8_t *, const Shape &, const std::string &, const float *, int64_t, float *) {}
#endif

}  // namespace

using Codes = nb::ndarray<const uint8_t, nb::device::cpu>;
using Sums = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Squares = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

Shape shape(nb::tuple rows, nb::tuple columns, int64_t channels, int64_t outputs, const std::string &kernel) {
    return {Axis(rows), Axis(columns), channels, outputs, kernel == "amx" ? Shape::FOURS : 0};
}

void check(const Shape &s, const Codes &x, const Codes &g, size_t batch, const std::string &kernel) {
    if (x.size() != batch * static_cast<size_t>(s.x_size()) || g.size() != batch * static_cast<size_t>(s.g_size()))
        throw std::invalid_argument("sizes of x and g do not agree");
    check_kernel(int8_kernels(), kernel);
}

}  // namespace

void bind_codes(nb::module_ &m) {
    m.def("code_kernels", &int8_kernels,
          "The kernels of `code_products` that this processor has, fastest first.");
    m.def(
        "code_products",
        [](Codes x, Codes g, std::optional<Sums> out, Squares squares, nb::tuple rows, nb::tuple columns, int64_t channels,
           int64_t outputs, const std::string &kernel, int threads) {
            const Shape s = shape(rows, columns, channels, outputs, kernel);
            const auto batch = static_cast<int64_t>(squares.size());
            check(s, x, g, squares.size(), kernel);
            if (out && static_cast<int64_t>(out->size()) != batch * outputs * s.depth())
                throw std::invalid_argument("the size of out does not agree");
            float *sums = out ? out->data() : nullptr;
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                squares.data()[b] = store_example(x.data() + b * s.x_size(), g.data() + b * s.g_size(), s, kernel, sums ? sums + b * outputs * s.depth() : nullptr);
            });
        },
        nb::arg("x").noconvert(), nb::arg("g").noconvert(), nb::arg("out").none(), nb::arg("squares").noconvert(),
        nb::kw_only(), nb::arg("rows"), nb::arg("columns"), nb::arg("channels"), nb::arg("outputs"), nb::arg("kernel"),
        nb::arg("threads"),
        "Fill out (batch, outputs, kernel rows, kernel columns, channels), if given, and squares (batch) with the sums of "
        "its squares; an axis is (in, out, kernel, stride, padding, dilation).");
    m.def(
        "add_code_products",
        [](Codes x, Codes g, Weights weights, Sums totals, nb::tuple rows, nb::tuple columns, int64_t channels,
           int64_t outputs, const std::string &kernel, int threads) {
            const Shape s = shape(rows, columns, channels, outputs, kernel);
            check(s, x, g, weights.size(), kernel);
            const int64_t size = outputs * s.depth(), parts = static_cast<int64_t>(totals.size()) / size;
            if (parts < 1 || parts * size != static_cast<int64_t>(totals.size()))
                throw std::invalid_argument("the size of totals does not agree");
            const auto batch = static_cast<int64_t>(weights.size());
            nb::gil_scoped_release unlocked;
            parallel_for(parts, threads, [&](int64_t part) {
                const int64_t first = batch * part / parts, last = batch * (part + 1) / parts;
                add_examples(x.data() + first * s.x_size(), g.data() + first * s.g_size(), s, kernel, weights.data() + first, last - first,
                             totals.data() + part * size);
            });
        },
        nb::arg("x").noconvert(), nb::arg("g").noconvert(), nb::arg("weights").noconvert(), nb::arg("totals").noconvert(),
        nb::kw_only(), nb::arg("rows"), nb::arg("columns"), nb::arg("channels"), nb::arg("outputs"), nb::arg("kernel"),
        nb::arg("threads"),
        "Add weights (batch) times the examples' products to totals (parts, outputs, kernel rows, kernel columns, channels), "
        "to each part those of its share of the examples.");
}

}  // namespace dpquant
