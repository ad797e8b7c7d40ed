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
// Two kernels give the same integers: AMX tiles, and AVX-512 VNNI. Symbols: O outputs, C channels, T positions in fours.

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

#include "geometry.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr int64_t ZERO = 128, LANES = 16, FOURS = 16;  // LANES int32 in a vector or tile row; FOURS of positions in a tile

struct Shape {
    Axis rows, columns;
    int64_t channels, outputs;

    int64_t row_fours() const { return (columns.out + 3) / 4; }
    int64_t fours() const { return up_to(rows.out * row_fours(), FOURS); }
    int64_t wide() const { return up_to(channels, LANES); }
    int64_t tall() const { return up_to(outputs, LANES); }
    int64_t depth() const { return rows.kernel * columns.kernel * channels; }
    // The rows of a phase, with one padding row above and one below.
    int64_t first_row() const { return rows.lowest() - 1; }
    int64_t plane_rows() const { return rows.out + rows.shift(rows.kernel - 1) + 2; }
    int64_t plane_fours() const { return plane_rows() * row_fours() + FOURS; }  // tiles may read past the last row
};

// A packed example.
struct Packed {
    std::vector<int8_t> g;         // (tall, fours * 4)
    std::vector<uint8_t> x;        // (kernel columns, row stride, plane_fours, wide, 4)
    std::vector<int32_t> g_sums;   // (tall)
    std::vector<int32_t> g_fours;  // (fours, tall), as dwords of four positions

    const uint8_t *tap(const Shape &s, int64_t i, int64_t j) const {
        const int64_t plane = j * s.rows.stride + s.rows.phase(i), row = s.rows.shift(i) + 1;
        return x.data() + (plane * s.plane_fours() + row * s.row_fours()) * s.wide() * 4;
    }
};

#ifdef HAS_TILES

// Interleaves four positions of `channels` channels: out[c * 4 + k] = from[k][c].
__attribute__((target("sse2"))) void interleave(const uint8_t *const from[4], int64_t channels, uint8_t *out) {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
        __m128i in[4];
        for (int k = 0; k < 4; ++k) in[k] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from[k] + c));
        const __m128i low01 = _mm_unpacklo_epi8(in[0], in[1]), high01 = _mm_unpackhi_epi8(in[0], in[1]);
        const __m128i low23 = _mm_unpacklo_epi8(in[2], in[3]), high23 = _mm_unpackhi_epi8(in[2], in[3]);
        auto *to = reinterpret_cast<__m128i *>(out + c * 4);
        _mm_storeu_si128(to, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
    }
    for (; c < channels; ++c)
        for (int k = 0; k < 4; ++k) out[c * 4 + k] = from[k][c];
}

__attribute__((target("avx512f,avx512bw"))) void pack(const uint8_t *x, const uint8_t *g, const Shape &s, const std::vector<uint8_t> &zeros, Packed &p) {
    const int64_t fours = s.fours(), tall = s.tall(), wide = s.wide();
    p.g_fours.assign(static_cast<size_t>(fours * tall), 0);
    p.g.resize(static_cast<size_t>(tall * fours * 4));
    p.g_sums.assign(static_cast<size_t>(tall), 0);
    for (int64_t h = 0, four = 0; h < s.rows.out; ++h)
        for (int64_t w = 0; w < s.columns.out; w += 4, ++four) {
            const uint8_t *from[4];
            for (int64_t k = 0; k < 4; ++k)
                from[k] = w + k < s.columns.out ? g + (h * s.columns.out + w + k) * s.outputs : zeros.data();
            auto *to = reinterpret_cast<uint8_t *>(p.g_fours.data() + four * tall);
            interleave(from, s.outputs, to);
            for (int64_t b = 0; b < s.outputs * 4; ++b) to[b] ^= 0x80;  // to signed; padding is zero already
        }
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

    const int64_t plane = s.plane_fours() * wide * 4;
    p.x.resize(static_cast<size_t>(s.columns.kernel * s.rows.stride * plane));
    for (int64_t j = 0; j < s.columns.kernel; ++j)
        for (int64_t r = 0; r < s.rows.stride; ++r) {
            uint8_t *out = p.x.data() + (j * s.rows.stride + r) * plane;
            for (int64_t m = 0; m < s.plane_rows(); ++m, out += s.row_fours() * wide * 4) {
                const int64_t row = (m + s.first_row()) * s.rows.stride + r;
                if (row < 0 || row >= s.rows.in) {
                    std::memset(out, ZERO, static_cast<size_t>(s.row_fours() * wide * 4));
                    continue;
                }
                for (int64_t four = 0; four < s.row_fours(); ++four) {
                    const uint8_t *from[4];
                    for (int64_t k = 0; k < 4; ++k) {
                        const int64_t w = (four * 4 + k) * s.columns.stride + j * s.columns.dilation - s.columns.padding;
                        from[k] = w >= 0 && w < s.columns.in ? x + (row * s.columns.in + w) * s.channels : zeros.data();
                    }
                    interleave(from, s.channels, out + four * wide * 4);
                    if (wide > s.channels)
                        std::memset(out + (four * wide + s.channels) * 4, ZERO, static_cast<size_t>((wide - s.channels) * 4));
                }
            }
            std::memset(out, ZERO, static_cast<size_t>(FOURS * wide * 4));
        }
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
        const __m512i excess = _mm512_set1_epi32(static_cast<int32_t>(ZERO) * g_sums[o]);
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

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

template <int n_out, int n_vec>
VNNI inline void vnni_block(const int8_t *g, const uint8_t *x, int64_t fours, int64_t wide, int64_t o, int64_t c, Sink &sink) {
    __m512i sums[n_out][n_vec];
    for (auto &row : sums)
        for (auto &sum : row) sum = _mm512_setzero_si512();
    const auto *factors = reinterpret_cast<const int32_t *>(g) + o * fours;
    x += c * 4;
    for (int64_t four = 0; four < fours; ++four, x += wide * 4) {
        __m512i seen[n_vec];
        for (int v = 0; v < n_vec; ++v) seen[v] = _mm512_loadu_si512(x + v * 64);
        for (int k = 0; k < n_out; ++k) {
            const __m512i factor = _mm512_set1_epi32(factors[k * fours + four]);
            for (int v = 0; v < n_vec; ++v) sums[k][v] = _mm512_dpbusd_epi32(sums[k][v], seen[v], factor);
        }
    }
    for (int k = 0; k < n_out; ++k)
        for (int v = 0; v < n_vec; ++v) sink.take(sums[k][v], o + k, c + v * LANES);
}

template <int n_vec>
VNNI void vnni_outputs(const Packed &p, const uint8_t *x, const Shape &s, int64_t c, Sink &sink) {
    int64_t o = 0;
    for (; o + 6 <= s.outputs; o += 6) vnni_block<6, n_vec>(p.g.data(), x, s.fours(), s.wide(), o, c, sink);
    for (; o < s.outputs; ++o) vnni_block<1, n_vec>(p.g.data(), x, s.fours(), s.wide(), o, c, sink);
}

void vnni_tap(const Packed &p, const uint8_t *x, const Shape &s, Sink &sink) {
    int64_t c = 0;
    for (; c + 4 * LANES <= s.wide(); c += 4 * LANES) vnni_outputs<4>(p, x, s, c, sink);
    for (; c < s.wide(); c += LANES) vnni_outputs<1>(p, x, s, c, sink);
}

__attribute__((target("avx512f")))
double example(const uint8_t *x, const uint8_t *g, const Shape &s, bool amx, float *out, std::optional<float> weight) {
    thread_local Packed packed;
    const std::vector<uint8_t> zeros(static_cast<size_t>(std::max(s.channels, s.outputs)), ZERO);
    pack(x, g, s, zeros, packed);
    Sink sink{nullptr, weight, s.outputs, s.channels, s.depth(), packed.g_sums.data(), _mm512_setzero_pd()};
    std::optional<Tiles> tiles;
    if (amx) tiles.emplace();
    for (int64_t i = 0; i < s.rows.kernel; ++i)
        for (int64_t j = 0; j < s.columns.kernel; ++j) {
            sink.out = out ? out + (i * s.columns.kernel + j) * s.channels : nullptr;
            (amx ? amx_tap : vnni_tap)(packed, packed.tap(s, i, j), s, sink);
        }
    return _mm512_reduce_add_pd(sink.squares);
}
#else
double example(const uint8_t *, const uint8_t *, const Shape &, bool, float *, std::optional<float>) { return 0; }
#endif

}  // namespace

using Codes = nb::ndarray<const uint8_t, nb::device::cpu>;
using Sums = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Weights = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Squares = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

Shape shape(nb::tuple rows, nb::tuple columns, int64_t channels, int64_t outputs) {
    return {Axis(rows), Axis(columns), channels, outputs};
}

int64_t x_size(const Shape &s) { return s.rows.in * s.columns.in * s.channels; }
int64_t g_size(const Shape &s) { return s.rows.out * s.columns.out * s.outputs; }

void check(const Shape &s, const Codes &x, const Codes &g, size_t batch, const std::string &kernel) {
    if (x.size() != batch * static_cast<size_t>(x_size(s)) || g.size() != batch * static_cast<size_t>(g_size(s)))
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
            const Shape s = shape(rows, columns, channels, outputs);
            const auto batch = static_cast<int64_t>(squares.size());
            check(s, x, g, squares.size(), kernel);
            if (out && static_cast<int64_t>(out->size()) != batch * outputs * s.depth())
                throw std::invalid_argument("the size of out does not agree");
            float *sums = out ? out->data() : nullptr;
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                squares.data()[b] = example(x.data() + b * x_size(s), g.data() + b * g_size(s), s, kernel == "amx",
                                            sums ? sums + b * outputs * s.depth() : nullptr, std::nullopt);
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
            const Shape s = shape(rows, columns, channels, outputs);
            check(s, x, g, weights.size(), kernel);
            const int64_t size = outputs * s.depth(), parts = static_cast<int64_t>(totals.size()) / size;
            if (parts < 1 || parts * size != static_cast<int64_t>(totals.size()))
                throw std::invalid_argument("the size of totals does not agree");
            const auto batch = static_cast<int64_t>(weights.size());
            nb::gil_scoped_release unlocked;
            parallel_for(parts, threads, [&](int64_t part) {
                for (int64_t b = batch * part / parts; b < batch * (part + 1) / parts; ++b)
                    example(x.data() + b * x_size(s), g.data() + b * g_size(s), s, kernel == "amx",
                            totals.data() + part * size, weights.data()[b]);
            });
        },
        nb::arg("x").noconvert(), nb::arg("g").noconvert(), nb::arg("weights").noconvert(), nb::arg("totals").noconvert(),
        nb::kw_only(), nb::arg("rows"), nb::arg("columns"), nb::arg("channels"), nb::arg("outputs"), nb::arg("kernel"),
        nb::arg("threads"),
        "Add weights (batch) times the examples' products to totals (parts, outputs, kernel rows, kernel columns, channels), "
        "to each part those of its share of the examples.");
}

}  // namespace dpquant
