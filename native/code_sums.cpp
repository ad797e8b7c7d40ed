// SPDX-License-Identifier: Apache-2.0
//
// The weighted sum, over a batch, of weight gradients of number codes, on bfloat16 instructions:
//
//     total[o, i, j, c] += sum over b, h, w of weight[b] * (g[b, h, w, o] - 128) * (x[b, h', w', c] - 128)
//
// with h' = h * stride + i * dilation - padding and the corresponding w'; x is zero outside of the image.
// dpquant/backends/native_products.py (`add_code_sums`) defines the result. Codes are uint8 with zero point 128, channels last.
// A weight is a bfloat16 number. A weight times a code of g is a sum of at most two bfloat16 numbers, and a code of x is one,
// so products are exact. Sums are float32.
//
// The matrix products sum over examples, not over positions: at each position, tiles of 16 outputs by 32 examples are
// multiplied by tiles of 32 examples by 16 channels. A tap only selects other positions, so im2col is not needed and taps that
// read padding only are skipped. The batch is processed in pieces that fit in a core's second-level cache.
//
// Two kernels: AMX tiles, and AVX-512 with bfloat16.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.hpp"
#include "parallel.hpp"
#include "tiles.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

struct Sum {
    Axis rows, columns;
    int64_t batch, channels, outputs, pieces;
    const uint8_t *x, *g;
    const float *weights;
    float *total;

    int64_t depth() const { return rows.kernel * columns.kernel * channels; }
    int64_t output_tiles() const { return up_to(outputs, 16) / 16; }
    int64_t channel_tiles() const { return up_to(channels, 16) / 16; }
};

#ifdef HAS_TILES

constexpr int64_t TILE = 512, EXAMPLES = 32;     // bfloat16 numbers in a tile; examples in one
constexpr int64_t CACHED = int64_t{3} << 19;  // bytes of tiles at once: most of a core's second-level cache

// A piece of the batch: some rows of some examples' maps, packed as tiles.
struct Piece {
    int64_t first_example, blocks;   // blocks of 32 examples
    int64_t first_row, end_row;      // of the output
    int64_t first_in, end_in;        // of the input
    uint16_t *g;                     // (output row, column, piece, output tile, block) of (16 outputs, 32 examples)
    uint16_t *x;                     // (input row, column, block, channel tile) of (16 pairs of examples, 16 channels, 2)
};

// Loads 16 codes as float32; lanes outside of the mask are zero.
AVX512 inline __m512 values(const uint8_t *codes, __mmask16 mask) {
    const __m128i bytes = _mm_mask_loadu_epi8(_mm_set1_epi8(static_cast<char>(0x80)), mask, codes);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(128)));
}

AVX512 inline __m512i truncated(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)); }

// Interleaves two rows of bfloat16 numbers, which are given as the upper halves of float32.
AVX512 inline __m512i paired(__m512i even, __m512i odd) { return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd); }

inline __mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }

AVX512 void pack_x(const Sum &s, const Piece &p, int64_t row) {
    const int64_t image = s.rows.in * s.columns.in * s.channels, tiles = s.channel_tiles();
    for (int64_t w = 0; w < s.columns.in; ++w) {
        const uint8_t *from = s.x + (row * s.columns.in + w) * s.channels;
        uint16_t *out = p.x + ((row - p.first_in) * s.columns.in + w) * p.blocks * tiles * TILE;
        for (int64_t block = 0; block < p.blocks; ++block)
            for (int64_t tile = 0; tile < tiles; ++tile)
                for (int64_t pair = 0; pair < 16; ++pair, out += 32) {
                    const int64_t b = p.first_example + block * EXAMPLES + 2 * pair;
                    const __mmask16 mask = lanes(s.channels - tile * 16);
                    __m512i both[2];
                    for (int k = 0; k < 2; ++k)
                        both[k] = b + k < s.batch
                                      ? _mm512_castps_si512(values(from + (b + k) * image + tile * 16, mask))
                                      : _mm512_setzero_si512();
                    _mm512_storeu_si512(out, paired(both[0], both[1]));
                }
    }
}

AVX512 void pack_g(const Sum &s, const Piece &p, int64_t row) {
    const int64_t image = s.rows.out * s.columns.out * s.outputs, tiles = s.output_tiles();
    for (int64_t w = 0; w < s.columns.out; ++w) {
        const uint8_t *from = s.g + (row * s.columns.out + w) * s.outputs;
        uint16_t *out = p.g + ((row - p.first_row) * s.columns.out + w) * s.pieces * tiles * p.blocks * TILE;
        for (int64_t tile = 0; tile < tiles; ++tile)
            for (int64_t block = 0; block < p.blocks; ++block) {
                const __mmask16 mask = lanes(s.outputs - tile * 16);
                __m512i high[16], low[16];
                for (int64_t pair = 0; pair < 16; ++pair) {
                    const int64_t b = p.first_example + block * EXAMPLES + 2 * pair;
                    __m512i first[2], rest[2];
                    for (int k = 0; k < 2; ++k) {
                        const __m512 value = b + k < s.batch
                                                 ? _mm512_mul_ps(values(from + (b + k) * image + tile * 16, mask),
                                                                 _mm512_set1_ps(s.weights[b + k]))
                                                 : _mm512_setzero_ps();
                        first[k] = truncated(value);
                        rest[k] = truncated(_mm512_sub_ps(value, _mm512_castsi512_ps(first[k])));
                    }
                    high[pair] = paired(first[0], first[1]);
                    low[pair] = paired(rest[0], rest[1]);
                }
                for (int64_t piece = 0; piece < s.pieces; ++piece) {
                    __m512i *pairs = piece ? low : high;
                    transpose(pairs);
                    uint16_t *to = out + ((piece * tiles + tile) * p.blocks + block) * TILE;
                    for (int k = 0; k < 16; ++k) _mm512_storeu_si512(to + k * 32, pairs[k]);
                }
            }
    }
}

// Adds 16 by 16 sums to the total, without those beyond the last output or channel.
AVX512 void add(const Sum &s, const float *sums, int64_t o, int64_t c, int64_t tap) {
    const __mmask16 mask = lanes(s.channels - c);
    for (int64_t k = 0; k < std::min<int64_t>(16, s.outputs - o); ++k) {
        float *to = s.total + (o + k) * s.depth() + tap * s.channels + c;
        _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_loadu_ps(sums + k * 16)));
    }
}

// Computes up to two by two tiles of the total, from output o and channel c.
template <bool two_outputs, bool two_channels>
AMX void amx_block(const Sum &s, const Piece &p, int64_t i, int64_t j, int64_t o, int64_t c) {
    _tile_zero(0);
    if constexpr (two_channels) _tile_zero(1);
    if constexpr (two_outputs) _tile_zero(2);
    if constexpr (two_outputs && two_channels) _tile_zero(3);
    const int64_t outputs = s.output_tiles(), channels = s.channel_tiles();
    const int64_t g_step = s.pieces * outputs * p.blocks * TILE, x_step = p.blocks * channels * TILE;
    const int64_t top = std::max(p.first_row, s.rows.first(i)), bottom = std::min(p.end_row, s.rows.last(i));
    const int64_t left = s.columns.first(j), right = s.columns.last(j);
    for (int64_t h = top; h < bottom; ++h) {
        const int64_t row = h * s.rows.stride + s.rows.reach(i) - p.first_in;
        for (int64_t w = left; w < right; ++w) {
            const int64_t column = w * s.columns.stride + s.columns.reach(j);
            const uint16_t *g = p.g + ((h - p.first_row) * s.columns.out + w) * g_step + o * p.blocks * TILE;
            for (int64_t piece = 0; piece < s.pieces; ++piece, g += outputs * p.blocks * TILE) {
                const uint16_t *x = p.x + (row * s.columns.in + column) * x_step + c * TILE;
                for (int64_t block = 0; block < p.blocks; ++block, x += channels * TILE) {
                    _tile_loadd(4, g + block * TILE, 64);
                    _tile_loadd(6, x, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    if constexpr (two_channels) {
                        _tile_loadd(7, x + TILE, 64);
                        _tile_dpbf16ps(1, 4, 7);
                    }
                    if constexpr (two_outputs) {
                        _tile_loadd(5, g + (p.blocks + block) * TILE, 64);
                        _tile_dpbf16ps(2, 5, 6);
                        if constexpr (two_channels) _tile_dpbf16ps(3, 5, 7);
                    }
                }
            }
        }
    }
    alignas(64) float sums[4][256];
    _tile_stored(0, sums[0], 64);
    if constexpr (two_channels) _tile_stored(1, sums[1], 64);
    if constexpr (two_outputs) _tile_stored(2, sums[2], 64);
    if constexpr (two_outputs && two_channels) _tile_stored(3, sums[3], 64);
    for (int down = 0; down <= (two_outputs ? 1 : 0); ++down)
        for (int across = 0; across <= (two_channels ? 1 : 0); ++across)
            add(s, sums[down * 2 + across], (o + down) * 16, (c + across) * 16, i * s.columns.kernel + j);
}

AMX void amx_task(const Sum &s, const Piece &p, int64_t i, int64_t j, int64_t o) {
    const Tiles tiles;
    for (int64_t c = 0; c < s.channel_tiles(); c += 2) {
        const bool two_outputs = o + 1 < s.output_tiles(), two_channels = c + 1 < s.channel_tiles();
        if (two_outputs && two_channels)
            amx_block<true, true>(s, p, i, j, o, c);
        else if (two_outputs)
            amx_block<true, false>(s, p, i, j, o, c);
        else if (two_channels)
            amx_block<false, true>(s, p, i, j, o, c);
        else
            amx_block<false, false>(s, p, i, j, o, c);
    }
}

// Computes one tile of the total.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
void bf16_block(const Sum &s, const Piece &p, int64_t i, int64_t j, int64_t o, int64_t c, float *sums) {
    const int64_t outputs = s.output_tiles(), channels = s.channel_tiles();
    const int64_t g_step = s.pieces * outputs * p.blocks * TILE, x_step = p.blocks * channels * TILE;
    const int64_t top = std::max(p.first_row, s.rows.first(i)), bottom = std::min(p.end_row, s.rows.last(i));
    __m512 kept[16];
    for (auto &sum : kept) sum = _mm512_setzero_ps();
    for (int64_t h = top; h < bottom; ++h) {
        const int64_t row = h * s.rows.stride + s.rows.reach(i) - p.first_in;
        for (int64_t w = s.columns.first(j); w < s.columns.last(j); ++w) {
            const int64_t column = w * s.columns.stride + s.columns.reach(j);
            const uint16_t *g = p.g + ((h - p.first_row) * s.columns.out + w) * g_step + o * p.blocks * TILE;
            for (int64_t piece = 0; piece < s.pieces; ++piece, g += outputs * p.blocks * TILE) {
                const uint16_t *x = p.x + (row * s.columns.in + column) * x_step + c * TILE;
                for (int64_t block = 0; block < p.blocks; ++block, x += channels * TILE) {
                    const auto *factors = reinterpret_cast<const int32_t *>(g + block * TILE);
                    for (int pair = 0; pair < 16; ++pair) {
                        const auto seen = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + pair * 32));
                        for (int k = 0; k < 16; ++k)
                            kept[k] = _mm512_dpbf16_ps(kept[k], seen, reinterpret_cast<__m512bh>(_mm512_set1_epi32(factors[k * 16 + pair])));
                    }
                }
            }
        }
    }
    for (int k = 0; k < 16; ++k) _mm512_storeu_ps(sums + k * 16, kept[k]);
}

void bf16_task(const Sum &s, const Piece &p, int64_t i, int64_t j, int64_t first) {
    float sums[256];
    for (int64_t o = first; o < std::min(first + 2, s.output_tiles()); ++o)
        for (int64_t c = 0; c < s.channel_tiles(); ++c) {
            bf16_block(s, p, i, j, o, c, sums);
            add(s, sums, o * 16, c * 16, i * s.columns.kernel + j);
        }
}

struct Free {
    void operator()(uint16_t *tiles) const { ::operator delete[](tiles, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<uint16_t[], Free>;
Buffer buffer(int64_t size) { return Buffer(new (std::align_val_t(64)) uint16_t[static_cast<size_t>(size)]); }

void add_sums(const Sum &s, bool amx, int threads) {
    if (s.batch == 0) return;
    const int64_t g_row = s.columns.out * s.pieces * s.output_tiles() * TILE, x_row = s.columns.in * s.channel_tiles() * TILE;
    const int64_t all_blocks = up_to(s.batch, EXAMPLES) / EXAMPLES;
    const int64_t whole = (s.rows.out * g_row + s.rows.in * x_row) * 2;
    const int64_t blocks = std::clamp<int64_t>(CACHED / whole, 1, all_blocks);
    const int64_t most_rows = std::clamp<int64_t>(CACHED / ((g_row + s.rows.stride * x_row) * 2), 1, s.rows.out);
    const int64_t rows = whole <= CACHED ? s.rows.out : most_rows;
    const int64_t most_in = std::min(s.rows.in, (rows - 1) * s.rows.stride + (s.rows.kernel - 1) * s.rows.dilation + 1);
    const Buffer g = buffer(blocks * rows * g_row), x = buffer(blocks * most_in * x_row);
    for (int64_t block = 0; block < all_blocks; block += blocks)
        for (int64_t row = 0; row < s.rows.out; row += rows) {
            Piece p{block * EXAMPLES, std::min(blocks, all_blocks - block), row, std::min(row + rows, s.rows.out), 0, 0, g.get(), x.get()};
            p.first_in = std::clamp<int64_t>(row * s.rows.stride + s.rows.reach(0), 0, s.rows.in);
            p.end_in = std::clamp<int64_t>((p.end_row - 1) * s.rows.stride + s.rows.reach(s.rows.kernel - 1) + 1, p.first_in, s.rows.in);
            const int64_t g_rows = p.end_row - p.first_row, x_rows = p.end_in - p.first_in;
            parallel_for(g_rows + x_rows, threads, [&](int64_t k) {
                if (k < g_rows)
                    pack_g(s, p, p.first_row + k);
                else
                    pack_x(s, p, p.first_in + k - g_rows);
            });
            const int64_t taps = s.rows.kernel * s.columns.kernel, pairs = (s.output_tiles() + 1) / 2;
            parallel_for(taps * pairs, threads, [&](int64_t k) {
                const int64_t tap = k % taps;
                (amx ? amx_task : bf16_task)(s, p, tap / s.columns.kernel, tap % s.columns.kernel, k / taps * 2);
            });
        }
}
#else
void add_sums(const Sum &, bool, int) {}
#endif

using Codes = nb::ndarray<const uint8_t, nb::device::cpu>;
using Weights = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Total = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

}  // namespace

void bind_sums(nb::module_ &m) {
    m.def("code_sum_kernels", &bfloat16_kernels,
          "The kernels of `add_code_sums` that this processor has, fastest first.");
    m.def(
        "add_code_sums",
        [](Codes x, Codes g, Weights weights, Total total, nb::tuple rows, nb::tuple columns, int64_t channels,
           int64_t outputs, int64_t pieces, const std::string &kernel, int threads) {
            const Sum s{Axis(rows), Axis(columns), static_cast<int64_t>(weights.size()), channels, outputs, pieces,
                        x.data(), g.data(), weights.data(), total.data()};
            if (static_cast<int64_t>(x.size()) != s.batch * s.rows.in * s.columns.in * channels ||
                static_cast<int64_t>(g.size()) != s.batch * s.rows.out * s.columns.out * outputs ||
                static_cast<int64_t>(total.size()) != outputs * s.depth() || pieces < 1 || pieces > 2)
                throw std::invalid_argument("sizes of x, g, weights and total do not agree");
            check_kernel(bfloat16_kernels(), kernel);
            nb::gil_scoped_release unlocked;
            add_sums(s, kernel == "amx", threads);
        },
        nb::arg("x").noconvert(), nb::arg("g").noconvert(), nb::arg("weights").noconvert(), nb::arg("total").noconvert(),
        nb::kw_only(), nb::arg("rows"), nb::arg("columns"), nb::arg("channels"), nb::arg("outputs"), nb::arg("pieces"),
        nb::arg("kernel"), nb::arg("threads"),
        "Add weights (batch) times the examples' products to total (outputs, kernel rows, kernel columns, channels); "
        "pieces: how many bfloat16 numbers a weight times a code of g may need.");
}

}  // namespace dpquant
