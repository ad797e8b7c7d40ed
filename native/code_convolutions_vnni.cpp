// SPDX-License-Identifier: Apache-2.0
//
// The AVX-512 VNNI kernel of code_convolutions.cpp: tiles of 6 positions x 64 outputs, whose int32 sums stay in registers.

#include <cstring>

#include "code_convolutions.hpp"
#include "fours.hpp"

#ifdef HAS_TILES

namespace dpquant {
namespace {

constexpr int64_t LANES = 16, VECTORS = 4, PANEL = LANES * VECTORS;  // outputs of a vector, vectors of a panel
constexpr int64_t TILE = 6;                                          // positions

// The work on some examples and a panel.
struct Work {
    const Positions &positions;
    const std::vector<int64_t> &offsets;
    const uint8_t *planes;
    const int32_t *panel;
    const float *scales;  // of the examples
    float *out;           // the panel's outputs of the first example
    Lanes16 lanes[VECTORS];
    alignas(64) float output_scales[PANEL], bias[PANEL];
    bool has_bias;
};

template <int n, int n_vec>
VNNI inline void tile(const Work &w, int64_t first) {
    const uint8_t *from[n];
    __m512i sums[n][n_vec];
    const int32_t *panel = w.panel;
    UNROLLED for (int r = 0; r < n; ++r) {
        from[r] = w.planes + w.positions.from[static_cast<size_t>(first + r)];
        UNROLLED for (int v = 0; v < n_vec; ++v) sums[r][v] = _mm512_loadu_si512(panel + v * LANES);
    }
    for (const int64_t offset : w.offsets) {
        panel += PANEL;
        __m512i weights[n_vec];
        UNROLLED for (int v = 0; v < n_vec; ++v) weights[v] = _mm512_loadu_si512(panel + v * LANES);
        UNROLLED for (int r = 0; r < n; ++r) {
            int32_t dword;
            std::memcpy(&dword, from[r] + offset, 4);
            const __m512i seen = _mm512_set1_epi32(dword);
            UNROLLED for (int v = 0; v < n_vec; ++v) sums[r][v] = add_fours(sums[r][v], seen, weights[v]);
        }
    }
    UNROLLED for (int r = 0; r < n; ++r) {
        const __m512 scale_of_example = _mm512_set1_ps(w.scales[w.positions.example[static_cast<size_t>(first + r)]]);
        float *to = w.out + w.positions.to[static_cast<size_t>(first + r)];
        UNROLLED for (int v = 0; v < n_vec; ++v) {
            const __m512 scale = _mm512_mul_ps(scale_of_example, _mm512_load_ps(w.output_scales + v * LANES));
            __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), scale);
            if (w.has_bias) values = _mm512_add_ps(values, _mm512_load_ps(w.bias + v * LANES));
            w.lanes[v].store(to + v * LANES, values);
        }
    }
}

template <int n_vec>
VNNI void tiles(const Work &w, int64_t count) {
    int64_t k = 0;
    for (; k + TILE <= count; k += TILE) tile<TILE, n_vec>(w, k);
    for (; k + 3 <= count; k += 3) tile<3, n_vec>(w, k);
    for (; k < count; ++k) tile<1, n_vec>(w, k);
}

}  // namespace

VNNI void pack_panel_vnni(const Convolution &s, const Layout &l, const int8_t *weight, int64_t first, int32_t *panel) {
    std::memset(panel, 0, static_cast<size_t>(s.panel()) * 4);
    const int64_t count = std::min(PANEL, s.outputs - first), per_tap = s.pixel() / 4;
    for (size_t t = 0; t < l.places.size(); ++t)
        for (int64_t c = 0; c < s.channels; ++c) {
            auto *to = reinterpret_cast<int8_t *>(panel + s.panel_row(static_cast<int64_t>(t) * per_tap + c / 4)) + c % 4;
            const int8_t *from = weight + l.places[t] + c * l.channel + first * l.output;
            for (int64_t o = 0; o < count; ++o) to[o * 4] = from[o * l.output];
        }
    for (int64_t v = 0; v < PANEL; v += LANES) {
        __m512i excess = _mm512_setzero_si512();
        for (int64_t k = 0; k < s.dwords(); ++k) excess = add_excess(excess, _mm512_loadu_si512(panel + s.panel_row(k) + v));
        _mm512_storeu_si512(panel + v, _mm512_sub_epi32(_mm512_setzero_si512(), excess));
    }
}

VNNI void convolve_vnni(const Prepared &part, const Operands &o, int64_t first, int64_t count) {
    thread_local std::vector<uint8_t> own;
    const Convolution &s = part.shape;
    const int64_t x_size = s.rows.in * s.columns.in * s.groups * s.channels, out_size = s.rows.size * s.columns.size * s.groups * s.outputs;
    const bool copied = !plane_is_image(s);
    if (copied) own.resize(static_cast<size_t>(count * s.plane()));
    const uint8_t *planes = copied ? own.data() : o.x + first * x_size;
    for (int64_t g = 0; g < s.groups; ++g) {
        for (int64_t b = 0; copied && b < count; ++b) {
            const uint8_t *x = o.x + (first + b) * x_size;
            fill_plane(s, x + g * s.channels, x + x_size, own.data() + b * s.plane());
        }
        for (int64_t k = 0; k < s.panels(); ++k) {
            const int64_t output = g * s.outputs + k * PANEL, outputs = std::min(PANEL, s.outputs - k * PANEL);
            Work w{part.positions, part.offsets, planes, part.panels + (g * s.panels() + k) * s.panel(), o.scales + first,
                   o.out + first * out_size + output, {Lanes16(outputs), Lanes16(outputs - LANES), Lanes16(outputs - 2 * LANES), Lanes16(outputs - 3 * LANES)}, {}, {}, o.bias != nullptr};
            for (int64_t i = 0; i < outputs; ++i) {
                w.output_scales[i] = o.output_scales[o.one_scale ? 0 : output + i];
                w.bias[i] = o.bias ? o.bias[output + i] : 0;
            }
            const auto run = outputs > 3 * LANES ? tiles<4> : outputs > 2 * LANES ? tiles<3> : outputs > LANES ? tiles<2> : tiles<1>;
            run(w, count * s.positions());
        }
    }
}

}  // namespace dpquant
#endif
