// SPDX-License-Identifier: Apache-2.0
//
// The AVX2 kernel of code_convolutions.cpp. Codes that fit are multiplied in triples (see quads.hpp), others as 16-bit numbers, in
// pairs of channels. Weights are packed in panels of 16 outputs.

#include <cstring>

#include "code_convolutions.hpp"
#include "quads.hpp"

#ifdef HAS_TILES

namespace dpquant {
namespace {

constexpr int64_t PANEL = 16;  // outputs
constexpr int64_t TILE = 6;    // positions

}  // namespace

AVX2 void pack_panel_avx2(const Convolution &s, const Layout &l, const int8_t *weight, int64_t first, int32_t *panel) {
    std::memset(panel, 0, static_cast<size_t>(s.panel()) * 4);
    const int64_t count = std::min(PANEL, s.outputs - first), per_tap = s.pixel() / 4;
    for (size_t t = 0; t < l.places.size(); ++t)
        for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t k = static_cast<int64_t>(t) * per_tap + c / s.per_dword(), slot = c % s.per_dword();
            const int8_t *from = weight + l.places[t] + c * l.channel + first * l.output;
            if (s.form == Form::triples) {
                auto *to = reinterpret_cast<int8_t *>(panel + s.panel_row(k)) + slot;
                for (int64_t o = 0; o < count; ++o) to[o * 4] = from[o * l.output];
            } else {
                auto *to = reinterpret_cast<int16_t *>(panel + s.panel_row(k)) + slot;
                for (int64_t o = 0; o < count; ++o) to[o * 2] = from[o * l.output];
            }
        }
    if (s.form != Form::triples) return;
    for (int64_t k = 0; k < s.dwords(); k += TRIPLE)
        for (int64_t half = 0; half < PANEL; half += 8) {
            int32_t *row = panel + s.panel_row(k) + half;
            const __m256i bytes[TRIPLE] = {load(row), load(row + PANEL), load(row + 2 * PANEL)};
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(row + TRIPLE * PANEL), excess_of(bytes));
        }
}

namespace {

// Copies a pixel's channels. Whole dwords are faster; what follows the last channel is multiplied by weights of zero.
inline void copy_bytes(const Convolution &s, const uint8_t *from, const uint8_t *end, uint8_t *to) {
    if (end - from < s.pixel()) {
        std::memcpy(to, from, static_cast<size_t>(s.channels));
        return;
    }
    for (int64_t k = 0; k < s.pixel(); k += 4) std::memcpy(to + k, from + k, 4);
}

AVX2 inline void copy_words(const Convolution &s, const uint8_t *from, uint8_t *to) {
    auto *words = reinterpret_cast<int16_t *>(to);
    for (int64_t c = 0; c < s.channels; ++c) words[c] = static_cast<int16_t>(from[c] - CODE_OF_ZERO);
}

}  // namespace

AVX2 void fill_plane(const Convolution &s, const uint8_t *x, const uint8_t *x_end, uint8_t *plane) {
    const int64_t pixel = s.pixel(), from_pixel = s.groups * s.channels, width = s.plane_columns();
    std::memset(plane, s.form != Form::words ? CODE_OF_ZERO : 0, static_cast<size_t>(s.plane()));
    const int64_t first = std::max<int64_t>(s.left(), 0), last = std::min(s.columns.in, s.left() + width);
    for (int64_t m = 0; m < s.plane_rows(); ++m) {
        const int64_t row = m + s.top();
        if (row < 0 || row >= s.rows.in || first >= last) continue;
        const uint8_t *from = x + (row * s.columns.in + first) * from_pixel;
        uint8_t *to = plane + (m * width + first - s.left()) * pixel;
        if (s.form != Form::words && pixel == from_pixel) {
            std::memcpy(to, from, static_cast<size_t>((last - first) * pixel));
            continue;
        }
        for (int64_t n = first; n < last; ++n, from += from_pixel, to += pixel)
            s.form != Form::words ? copy_bytes(s, from, x_end, to) : copy_words(s, from, to);
    }
}

namespace {

// Sums for `n` positions and a panel.
template <bool bytes, int n>
AVX2 inline void multiply(const uint8_t *planes, const int64_t *places, const std::vector<int64_t> &offsets, const int32_t *panel, __m256i (&sums)[n][2]) {
    const uint8_t *first[n];
    UNROLLED for (int r = 0; r < n; ++r) first[r] = planes + places[r], sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    const int64_t *offset = offsets.data(), *end = offset + offsets.size();
    if constexpr (bytes)
        for (; offset < end; offset += TRIPLE, panel += (TRIPLE + 1) * PANEL)
            UNROLLED for (int r = 0; r < n; ++r) {
                __m256i seen[TRIPLE];
                UNROLLED for (int i = 0; i < TRIPLE; ++i) seen[i] = broadcast(first[r] + offset[i]);
                const int32_t *from = again(panel);
                UNROLLED for (int v = 0; v < 2; ++v) {
                    const int32_t *at = from + v * 8;
                    const __m256i weights[TRIPLE] = {load(at), load(at + PANEL), load(at + 2 * PANEL)};
                    sums[r][v] = add_triple(sums[r][v], seen, weights, load(at + TRIPLE * PANEL));
                }
            }
    else
        for (; offset < end; ++offset, panel += PANEL) {
            const __m256i weights[2] = {load(panel), load(panel + 8)};
            UNROLLED for (int r = 0; r < n; ++r) {
                const __m256i seen = broadcast(first[r] + *offset);
                UNROLLED for (int v = 0; v < 2; ++v) {
                    sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(seen, weights[v]));
                    asm("" : "+x"(sums[r][v]));  // as in `add_triple`
                }
            }
        }
}

// The work on some examples and a panel.
struct Work {
    const Positions &positions;
    const std::vector<int64_t> &offsets;
    const uint8_t *planes;
    const int32_t *panel;
    const float *scales;  // of the examples
    float *out;           // the panel's outputs of the first example
    Lanes lanes[2];       // outputs of the panel
    alignas(32) float output_scales[PANEL], bias[PANEL];
    bool has_bias;
};

template <bool bytes, int n>
AVX2 inline void tile(const Work &w, int64_t first) {
    __m256i sums[n][2];
    multiply<bytes, n>(w.planes, w.positions.from.data() + first, w.offsets, w.panel, sums);
    UNROLLED for (int r = 0; r < n; ++r)
        UNROLLED for (int v = 0; v < 2; ++v) {
            const float scale_of_example = w.scales[w.positions.example[static_cast<size_t>(first + r)]];
            const __m256 scale = _mm256_mul_ps(_mm256_set1_ps(scale_of_example), _mm256_load_ps(w.output_scales + v * 8));
            __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][v]), scale);
            if (w.has_bias) values = _mm256_add_ps(values, _mm256_load_ps(w.bias + v * 8));
            w.lanes[v].store(w.out + w.positions.to[static_cast<size_t>(first + r)] + v * 8, values);
        }
}

template <bool bytes>
AVX2 void tiles(const Work &w, int64_t count) {
    int64_t k = 0;
    for (; k + TILE <= count; k += TILE) tile<bytes, TILE>(w, k);
    for (; k + 3 <= count; k += 3) tile<bytes, 3>(w, k);
    for (; k < count; ++k) tile<bytes, 1>(w, k);
}

}  // namespace

AVX2 void convolve_avx2(const Prepared &part, const Operands &o, int64_t first, int64_t count) {
    thread_local std::vector<uint8_t> planes;
    const Convolution &s = part.shape;
    const int64_t x_size = s.rows.in * s.columns.in * s.groups * s.channels, out_size = s.rows.size * s.columns.size * s.groups * s.outputs;
    planes.resize(static_cast<size_t>(count * s.plane()));
    for (int64_t g = 0; g < s.groups; ++g) {
        for (int64_t b = 0; b < count; ++b) {
            const uint8_t *x = o.x + (first + b) * x_size;
            fill_plane(s, x + g * s.channels, x + x_size, planes.data() + b * s.plane());
        }
        for (int64_t k = 0; k < s.panels(); ++k) {
            const int64_t output = g * s.outputs + k * PANEL, outputs = std::min(PANEL, s.outputs - k * PANEL);
            Work w{part.positions, part.offsets, planes.data(), part.panels + (g * s.panels() + k) * s.panel(), o.scales + first,
                   o.out + first * out_size + output, {Lanes(outputs), Lanes(outputs - 8)}, {}, {}, o.bias != nullptr};
            for (int64_t i = 0; i < outputs; ++i) {
                w.output_scales[i] = o.output_scales[o.one_scale ? 0 : output + i];
                w.bias[i] = o.bias ? o.bias[output + i] : 0;
            }
            (s.form == Form::triples ? tiles<true> : tiles<false>)(w, count * s.positions());
        }
    }
}

}  // namespace dpquant
#endif
