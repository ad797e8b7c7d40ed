// SPDX-License-Identifier: Apache-2.0
//
// The squared norm of each example's weight gradient of number codes, exactly, by Gram matrices:
//
//     || sum over t of g[t] patch[t]^T ||^2 = sum over t, u of (g[t] . g[u]) (patch[t] . patch[u])
//
// for output positions t and u. dpquant/backends/native_products.py (`gram_norms`) defines the result. Codes are uint8 with
// zero point 128, channels last.
//
// The product of two patches is a sum over kernel taps of products of two pixels. So each pair of pixels is multiplied once
// and im2col is not needed. The pixels that one tap reads lie `stride` apart: each phase (row and column modulo the stride)
// is stored on a plane of its own, with a border of zeros for reads outside of the image. All planes and the output have the
// same pitch, so a tap is an offset. Gram matrices are int32; their contraction is float64.
//
// Three kernels give the same integers: AMX tiles, AVX-512 VNNI, and AVX2.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "fours.hpp"
#include "geometry.hpp"
#include "parallel.hpp"
#include "quads.hpp"
#include "tiles.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

struct Walk {
    Axis rows, columns;
    int64_t channels, outputs;

    static int64_t length(const Axis &a) { return a.out + a.shift(a.kernel - 1); }

    int64_t pitch() const { return length(columns); }
    int64_t pixels() const { return length(rows) * pitch(); }
    int64_t positions() const { return (rows.out - 1) * pitch() + columns.out; }
};

#ifdef HAS_TILES

constexpr int64_t DEPTH = 64;  // bytes of a tile row

// Vectors of signed bytes and their Gram matrix.
struct Gram {
    int64_t count = 0, depth = 0;   // number of vectors, a multiple of 16; bytes per vector, a multiple of 64
    std::vector<int8_t> vectors;    // (count, depth)
    std::vector<int32_t> quads;     // (depth / 4, count): the vectors transposed, in groups of four bytes
    std::vector<int32_t> shifted;   // for AVX2: quads with 128 added
    std::vector<int32_t> excess;    // for AVX2, (depth / 12, count): see `excess_of`
    std::vector<int32_t> products;  // (count, count)

    void reset(int64_t new_count, int64_t new_depth) {
        count = up_to(new_count, 16), depth = up_to(new_depth, DEPTH);
        vectors.assign(static_cast<size_t>(count * depth), 0);
        quads.resize(static_cast<size_t>(count * depth / 4));
        products.resize(static_cast<size_t>(count * count));
    }
    const int32_t *row(int64_t k) const { return products.data() + k * count; }
};

FOR_EVERY_X86 void set(Gram &gram, int64_t k, const uint8_t *codes, int64_t size) {
    int8_t *to = gram.vectors.data() + k * gram.depth;
    for (int64_t c = 0; c < size; ++c) to[c] = static_cast<int8_t>(codes[c] ^ 0x80);
}

AVX512 void fill_quads(Gram &gram) {
    const auto *from = reinterpret_cast<const int32_t *>(gram.vectors.data());
    for (int64_t k = 0; k < gram.count; k += 16)
        for (int64_t d = 0; d < gram.depth / 4; d += 16) {
            __m512i rows[16];
            for (int r = 0; r < 16; ++r) rows[r] = _mm512_loadu_si512(from + (k + r) * (gram.depth / 4) + d);
            transpose(rows);
            for (int r = 0; r < 16; ++r) _mm512_storeu_si512(gram.quads.data() + (d + r) * gram.count + k, rows[r]);
        }
}

AMX void multiply_amx(Gram &gram) {
    const Tiles tiles;
    const int64_t step = gram.count * 4;
    for (int64_t i = 0; i < gram.count; i += 32)
        for (int64_t j = 0; j < gram.count; j += 32) {
            const bool down = i + 16 < gram.count, across = j + 16 < gram.count;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < gram.depth; d += DEPTH) {
                const int8_t *left = gram.vectors.data() + i * gram.depth + d;
                const int32_t *right = gram.quads.data() + d / 4 * gram.count + j;
                _tile_loadd(4, left, gram.depth);
                _tile_loadd(6, right, step);
                _tile_dpbssd(0, 4, 6);
                if (across) {
                    _tile_loadd(7, right + 16, step);
                    _tile_dpbssd(1, 4, 7);
                }
                if (down) {
                    _tile_loadd(5, left + 16 * gram.depth, gram.depth);
                    _tile_dpbssd(2, 5, 6);
                    if (across) _tile_dpbssd(3, 5, 7);
                }
            }
            int32_t *out = gram.products.data() + i * gram.count + j;
            _tile_stored(0, out, step);
            if (across) _tile_stored(1, out + 16, step);
            if (down) _tile_stored(2, out + 16 * gram.count, step);
            if (down && across) _tile_stored(3, out + 16 * gram.count + 16, step);
        }
}

// Sums for 8 rows, signed, and `n_vec` vectors of columns, unsigned.
template <int n_vec>
VNNI inline void multiply_vnni(Gram &gram, int64_t i, int64_t j, const int32_t (&excess)[8]) {
    __m512i sums[8][n_vec];
    UNROLLED for (int r = 0; r < 8; ++r)
        UNROLLED for (int v = 0; v < n_vec; ++v) sums[r][v] = _mm512_set1_epi32(-excess[r]);
    const int64_t depth = gram.depth / 4;
    const auto *rows = reinterpret_cast<const int32_t *>(gram.vectors.data()) + i * depth;
    const int32_t *columns = gram.quads.data() + j;
    for (int64_t d = 0; d < depth; ++d, columns += gram.count) {
        __m512i seen[n_vec];
        UNROLLED for (int v = 0; v < n_vec; ++v)
            seen[v] = _mm512_xor_si512(_mm512_loadu_si512(columns + v * 16), _mm512_set1_epi32(static_cast<int32_t>(0x80808080)));
        UNROLLED for (int r = 0; r < 8; ++r) {
            const __m512i row = _mm512_set1_epi32(rows[r * depth + d]);
            UNROLLED for (int v = 0; v < n_vec; ++v) sums[r][v] = add_fours(sums[r][v], seen[v], row);
        }
    }
    UNROLLED for (int r = 0; r < 8; ++r)
        UNROLLED for (int v = 0; v < n_vec; ++v) _mm512_storeu_si512(gram.products.data() + (i + r) * gram.count + j + v * 16, sums[r][v]);
}

VNNI void multiply_vnni(Gram &gram) {
    for (int64_t i = 0; i < gram.count; i += 8) {
        int32_t excess[8];
        for (int r = 0; r < 8; ++r) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t d = 0; d < gram.depth; d += DEPTH) sum = add_excess(sum, _mm512_loadu_si512(gram.vectors.data() + (i + r) * gram.depth + d));
            excess[r] = _mm512_reduce_add_epi32(sum);
        }
        int64_t j = 0;
        for (; j + 32 <= gram.count; j += 32) multiply_vnni<2>(gram, i, j, excess);
        if (j < gram.count) multiply_vnni<1>(gram, i, j, excess);
    }
}

// Fills quads, shifted, and excess.
AVX2 void fill_for_avx2(Gram &gram, bool in_triples) {
    const int64_t depth = gram.depth / 4;
    gram.shifted.resize(gram.quads.size());
    const auto *from = reinterpret_cast<const float *>(gram.vectors.data());
    auto *to = reinterpret_cast<float *>(gram.quads.data()), *shifted = reinterpret_cast<float *>(gram.shifted.data());
    const __m128 flip = _mm_castsi128_ps(_mm_set1_epi8(-128));
    for (int64_t k = 0; k < gram.count; k += 4)
        for (int64_t d = 0; d < depth; d += 4) {
            __m128 rows[4];
            for (int r = 0; r < 4; ++r) rows[r] = _mm_loadu_ps(from + (k + r) * depth + d);
            _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
            for (int r = 0; r < 4; ++r) {
                _mm_storeu_ps(to + (d + r) * gram.count + k, rows[r]);
                _mm_storeu_ps(shifted + (d + r) * gram.count + k, _mm_xor_ps(rows[r], flip));
            }
        }
    if (!in_triples) return;
    gram.excess.resize(static_cast<size_t>(depth / TRIPLE * gram.count));
    for (int64_t triple = 0; triple < depth / TRIPLE; ++triple)
        for (int64_t k = 0; k < gram.count; k += 8) {
            const int32_t *at = gram.quads.data() + triple * TRIPLE * gram.count + k;
            const __m256i bytes[TRIPLE] = {load(at), load(at + gram.count), load(at + 2 * gram.count)};
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(gram.excess.data() + triple * gram.count + k), excess_of(bytes));
        }
}

AVX2 void multiply_avx2(Gram &gram, bool in_triples) {
    fill_for_avx2(gram, in_triples);
    const Quads quads{gram.quads.data(), gram.count, gram.shifted.data(), gram.count, in_triples ? gram.excess.data() : nullptr, gram.depth / 4};
    constexpr int ROWS = 4;  // divides count
    for (int64_t j = 0; j < gram.count; j += 16)
        for (int64_t i = 0; i < gram.count; i += ROWS) {
            __m256i sums[ROWS][2];
            multiply(quads.at(i, j), sums);
            for (int k = 0; k < 2 * ROWS; ++k)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(gram.products.data() + (i + k / 2) * gram.count + j + k % 2 * 8), sums[k / 2][k % 2]);
        }
}

// Multiplies the vectors; `most` is the largest magnitude of their codes.
void multiply(Gram &gram, const std::string &kernel, int64_t most) {
    if (kernel == "avx2") return multiply_avx2(gram, fit_in_triples(most, most));
    fill_quads(gram);
    kernel == "amx" ? multiply_amx(gram) : multiply_vnni(gram);
}

FOR_EVERY_X86 void add_shifted(const Gram &pixels, int64_t offset, const Walk &walk, std::vector<int32_t> &patches) {
    const int64_t pitch = walk.pitch(), length = walk.positions();
    for (int64_t h = 0; h < walk.rows.out; ++h)
        for (int64_t w = 0; w < walk.columns.out; ++w) {
            const int64_t t = h * pitch + w;
            const int32_t *from = pixels.row(t + offset) + offset;
            int32_t *to = patches.data() + t * length;
            for (int64_t u = 0; u < length; ++u) to[u] += from[u];
        }
}

AVX2 double inner(const int32_t *a, const int32_t *b, int64_t count) {
    __m256d sums[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    const auto four = [](const int32_t *from) AVX2 { return _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))); };
    int64_t u = 0;
    for (; u + 8 <= count; u += 8)
        for (int k = 0; k < 2; ++k) sums[k] = _mm256_fmadd_pd(four(a + u + 4 * k), four(b + u + 4 * k), sums[k]);
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, _mm256_add_pd(sums[0], sums[1]));
    double sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (; u < count; ++u) sum += static_cast<double>(a[u]) * b[u];
    return sum;
}

double squared_norm(const uint8_t *x, const uint8_t *g, const Walk &walk, const std::string &kernel) {
    thread_local Gram gram;
    thread_local std::vector<int32_t> patches;
    const Axis &rows = walk.rows, &columns = walk.columns;
    const int64_t pitch = walk.pitch(), length = walk.positions();
    const int64_t most_x = largest(x, rows.in * columns.in * walk.channels), most_g = largest(g, rows.out * columns.out * walk.outputs);
    patches.assign(static_cast<size_t>(length * length), 0);
    for (int64_t down = 0; down < rows.stride; ++down)
        for (int64_t across = 0; across < columns.stride; ++across) {
            std::vector<int64_t> offsets;
            for (int64_t i = 0; i < rows.kernel; ++i)
                for (int64_t j = 0; j < columns.kernel; ++j)
                    if (rows.phase(i) == down && columns.phase(j) == across)
                        offsets.push_back(rows.shift(i) * pitch + columns.shift(j));
            if (offsets.empty()) continue;
            gram.reset(walk.pixels(), walk.channels);
            for (int64_t m = 0; m < Walk::length(rows); ++m)
                for (int64_t n = 0; n < pitch; ++n) {
                    const int64_t row = (m + rows.lowest()) * rows.stride + down;
                    const int64_t column = (n + columns.lowest()) * columns.stride + across;
                    if (row >= 0 && row < rows.in && column >= 0 && column < columns.in)
                        set(gram, m * pitch + n, x + (row * columns.in + column) * walk.channels, walk.channels);
                }
            multiply(gram, kernel, most_x);
            for (const int64_t offset : offsets) add_shifted(gram, offset, walk, patches);
        }
    gram.reset(length, walk.outputs);
    for (int64_t h = 0; h < rows.out; ++h)
        for (int64_t w = 0; w < columns.out; ++w)
            set(gram, h * pitch + w, g + (h * columns.out + w) * walk.outputs, walk.outputs);
    multiply(gram, kernel, most_g);
    double sum = 0;
    for (int64_t t = 0; t < length; ++t) sum += inner(patches.data() + t * length, gram.row(t), length);
    return sum;
}

#else
double squared_norm(const uint8_t *, const uint8_t *, const Walk &, const std::string &) { return 0; }
#endif

using Codes = nb::ndarray<const uint8_t, nb::device::cpu>;
using Squares = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_grams(nb::module_ &m) {
    m.def(
        "code_gram_norms",
        [](Codes x, Codes g, Squares squares, nb::tuple rows, nb::tuple columns, int64_t channels, int64_t outputs,
           const std::string &kernel, int threads) {
            const Walk walk{Axis(rows), Axis(columns), channels, outputs};
            const auto batch = static_cast<int64_t>(squares.size());
            const int64_t x_size = walk.rows.in * walk.columns.in * channels, g_size = walk.rows.out * walk.columns.out * outputs;
            if (static_cast<int64_t>(x.size()) != batch * x_size || static_cast<int64_t>(g.size()) != batch * g_size)
                throw std::invalid_argument("sizes of x and g do not agree");
            check_kernel(int8_kernels(), kernel);
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                squares.data()[b] = squared_norm(x.data() + b * x_size, g.data() + b * g_size, walk, kernel);
            });
        },
        nb::arg("x").noconvert(), nb::arg("g").noconvert(), nb::arg("squares").noconvert(), nb::kw_only(), nb::arg("rows"),
        nb::arg("columns"), nb::arg("channels"), nb::arg("outputs"), nb::arg("kernel"), nb::arg("threads"),
        "Fill squares (batch) with the squared norms of the examples' products; an axis is (in, out, kernel, stride, "
        "padding, dilation).");
}

}  // namespace dpquant
