// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of code_products.cpp, code_products_vnni.cpp and code_products_avx2.cpp share: the shape of a product, and the
// packing of an example's codes in groups of four positions.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "geometry.hpp"
#include "tiles.hpp"

namespace dpquant {

struct ProductShape {
    static constexpr int64_t LANES = 16, FOURS = 16;  // int32 in a vector or tile row; fours of positions in a tile

    Axis rows, columns;
    int64_t channels, outputs;
    int64_t past;  // fours that a kernel may read past the last row of a plane

    int64_t row_fours() const { return (columns.out + 3) / 4; }
    int64_t used_fours() const { return rows.out * row_fours(); }
    int64_t fours() const { return up_to(used_fours(), FOURS); }
    int64_t x_size() const { return rows.in * columns.in * channels; }
    int64_t g_size() const { return rows.out * columns.out * outputs; }
    int64_t wide() const { return up_to(channels, LANES); }
    int64_t tall() const { return up_to(outputs, LANES); }
    int64_t depth() const { return rows.kernel * columns.kernel * channels; }
    // The rows of a phase, with one padding row above and one below.
    int64_t first_row() const { return rows.lowest() - 1; }
    int64_t plane_rows() const { return rows.out + rows.shift(rows.kernel - 1) + 2; }
    int64_t plane_fours() const { return plane_rows() * row_fours() + past; }

    // The fours that tap (i, j) reads, in planes packed by `pack_x`.
    const uint8_t *tap(const uint8_t *x, int64_t i, int64_t j) const {
        const int64_t plane = j * rows.stride + rows.phase(i), row = rows.shift(i) + 1;
        return x + (plane * plane_fours() + row * row_fours()) * wide() * 4;
    }
};

#ifdef HAS_TILES

// The VNNI and the AVX2 kernel. Computes an example's product, stores it if `out` is given, and returns the sum of its squares.
double store_example_vnni(const uint8_t *x, const uint8_t *g, const ProductShape &s, float *out);
double store_example_avx2(const uint8_t *x, const uint8_t *g, const ProductShape &s, float *out);
// Adds the products of `count` examples, times their weights, to `out`.
void add_examples_vnni(const uint8_t *x, const uint8_t *g, const ProductShape &s, const float *weights, int64_t count, float *out);
void add_examples_avx2(const uint8_t *x, const uint8_t *g, const ProductShape &s, const float *weights, int64_t count, float *out);

// Interleaves four positions of `channels` channels: out[c * 4 + k] = from[k][c].
__attribute__((target("sse2"))) inline void interleave(const uint8_t *const from[4], int64_t channels, uint8_t *out) {
    const uint8_t *const rows[4] = {from[0], from[1], from[2], from[3]};  // bytes that are written cannot change these
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
        __m128i in[4];
        for (int k = 0; k < 4; ++k) in[k] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[k] + c));
        const __m128i low01 = _mm_unpacklo_epi8(in[0], in[1]), high01 = _mm_unpackhi_epi8(in[0], in[1]);
        const __m128i low23 = _mm_unpacklo_epi8(in[2], in[3]), high23 = _mm_unpackhi_epi8(in[2], in[3]);
        auto *to = reinterpret_cast<__m128i *>(out + c * 4);
        _mm_storeu_si128(to, _mm_unpacklo_epi16(low01, low23));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low01, low23));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high01, high23));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high01, high23));
    }
    for (; c < channels; ++c)
        for (int k = 0; k < 4; ++k) out[c * 4 + k] = rows[k][c];
}

// Packs g as signed bytes, (fours, tall) dwords of four positions each. What pads is zero.
inline void pack_g(const uint8_t *g, const ProductShape &s, int64_t fours, std::vector<int32_t> &out) {
    const std::vector<uint8_t> zeros(static_cast<size_t>(s.outputs), CODE_OF_ZERO);
    const int64_t tall = s.tall(), outputs = s.outputs;
    out.assign(static_cast<size_t>(fours * tall), 0);
    for (int64_t h = 0, four = 0; h < s.rows.out; ++h)
        for (int64_t w = 0; w < s.columns.out; w += 4, ++four) {
            const uint8_t *from[4];
            for (int64_t k = 0; k < 4; ++k)
                from[k] = w + k < s.columns.out ? g + (h * s.columns.out + w + k) * s.outputs : zeros.data();
            int32_t *to = out.data() + four * tall;
            interleave(from, outputs, reinterpret_cast<uint8_t *>(to));
            for (int64_t o = 0; o < outputs; ++o) to[o] ^= static_cast<int32_t>(0x80808080);
        }
}

// Packs x as it is, unsigned: (kernel columns, row stride, plane_fours, wide) dwords of four positions each.
inline void pack_x(const uint8_t *x, const ProductShape &s, std::vector<uint8_t> &packed) {
    const std::vector<uint8_t> zeros(static_cast<size_t>(s.channels), CODE_OF_ZERO);
    const int64_t wide = s.wide(), plane = s.plane_fours() * wide * 4;
    packed.resize(static_cast<size_t>(s.columns.kernel * s.rows.stride * plane));
    for (int64_t j = 0; j < s.columns.kernel; ++j)
        for (int64_t r = 0; r < s.rows.stride; ++r) {
            uint8_t *out = packed.data() + (j * s.rows.stride + r) * plane;
            for (int64_t m = 0; m < s.plane_rows(); ++m, out += s.row_fours() * wide * 4) {
                const int64_t row = (m + s.first_row()) * s.rows.stride + r;
                if (row < 0 || row >= s.rows.in) {
                    std::memset(out, CODE_OF_ZERO, static_cast<size_t>(s.row_fours() * wide * 4));
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
                        std::memset(out + (four * wide + s.channels) * 4, CODE_OF_ZERO, static_cast<size_t>((wide - s.channels) * 4));
                }
            }
            std::memset(out, CODE_OF_ZERO, static_cast<size_t>(s.past * wide * 4));
        }
}

#endif

}  // namespace dpquant
