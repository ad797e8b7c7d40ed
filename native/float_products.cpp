// SPDX-License-Identifier: Apache-2.0
//
// Each example's weight gradient in float32, from the two maps without im2col:
//
//     out[b, o, i, j, c] = sum over h, w of g[b, h, w, o] * x[b, h * stride + i - padding, w * stride + j - padding, c]
//
// dpquant/backends/algebra.py defines the result (`im2col`, `patch_products`); this file chooses the order of the sum. Maps are
// channels last. A few rows of g are multiplied by the rows of x that they read while both are in the first-level cache; a tile
// of outputs x input channels is accumulated in registers over these rows. In a depthwise convolution, whose groups are single
// channels, the vectors run along the channels, and the sums of a few taps are in registers over one row.
//
// Symbols: O output channels, C input channels, D = kernel rows * kernel columns * C.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "float_tiles.hpp"
#include "geometry.hpp"
#include "tiles.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

struct Shape {
    Axis rows, columns;
    int64_t channels, outputs;  // of one group
    int64_t groups;

    int64_t taps() const { return rows.kernel * columns.kernel; }
    int64_t depth() const { return taps() * channels; }
    bool depthwise() const { return channels == 1 && outputs == 1; }
};

constexpr int64_t CACHED = 1 << 15;  // bytes of x that a block of rows may read

#ifdef HAS_TILES
// Adds the products of one row of g and the row of x that kernel row i reads, for all kernel columns.
template <int bytes, int most_vec, int most_out>
INLINE void row(const float *x, const float *g, float *out, const Shape &s) {
    constexpr int lanes = Vector<bytes>::lanes;
    const int64_t pixel = s.groups * s.channels, x_step = s.columns.stride * pixel;
    for (int64_t j = 0; j < s.columns.kernel; ++j, out += s.channels) {
        const int64_t first = s.columns.first(j), last = s.columns.last(j);
        if (first >= last) continue;
        const float *seen = x + (first * s.columns.stride + s.columns.reach(j)) * pixel;
        const Factors grad{g + first * s.groups * s.outputs, 1, s.groups * s.outputs};  // an output, a position
        int64_t c = 0;
        for (; c + most_vec * lanes <= s.channels; c += most_vec * lanes)
            tiles_of_rows<bytes, most_vec, most_out, true>(grad, seen + c, x_step, last - first, out + c, s.depth(), s.outputs);
        for (; c + lanes <= s.channels; c += lanes)
            tiles_of_rows<bytes, 1, most_out, true>(grad, seen + c, x_step, last - first, out + c, s.depth(), s.outputs);
        for (; c < s.channels; ++c)
            tiles_of_rows<4, 1, most_out, true>(grad, seen + c, x_step, last - first, out + c, s.depth(), s.outputs);
    }
}

template <int bytes, int most_vec, int most_out>
INLINE void example(const float *x, const float *g, float *out, const Shape &s) {
    std::memset(out, 0, static_cast<size_t>(s.groups * s.outputs * s.depth()) * sizeof(float));
    const int64_t x_row = s.columns.in * s.groups * s.channels, g_row = s.columns.out * s.groups * s.outputs;
    const int64_t block = std::max<int64_t>(CACHED / (x_row * 4 * s.rows.stride) - s.rows.kernel + 1, 1);
    for (int64_t group = 0; group < s.groups; ++group, x += s.channels, g += s.outputs, out += s.outputs * s.depth())
        for (int64_t begin = 0; begin < s.rows.out; begin += block)
            for (int64_t i = 0; i < s.rows.kernel; ++i) {
                const int64_t end = std::min(begin + block, s.rows.last(i));
                for (int64_t h = std::max(begin, s.rows.first(i)); h < end; ++h)
                    row<bytes, most_vec, most_out>(x + (h * s.rows.stride + s.rows.reach(i)) * x_row, g + h * g_row, out + i * s.columns.kernel * s.channels, s);
            }
}

// Adds the products of one row of g and the row of x that kernel row i reads, for a few kernel columns from j on and n_vec
// vectors of channels, of the outputs begin <= w < end, all of which read the image by each of these columns.
template <int bytes, int n_vec, int n_tap>
INLINE void depthwise_outputs(const float *x, const float *g, float *sums, const Shape &s, int64_t j, int64_t begin, int64_t end) {
    using V = typename Vector<bytes>::Type;
    constexpr int lanes = Vector<bytes>::lanes;
    if (begin >= end) return;
    V products[n_tap][n_vec] = {};
    for (int64_t w = begin; w < end; ++w)
        for (int v = 0; v < n_vec; ++v) {
            const V grad = *reinterpret_cast<const V *>(g + w * s.groups + v * lanes);
            for (int t = 0; t < n_tap; ++t)
                products[t][v] += grad * *reinterpret_cast<const V *>(x + (w * s.columns.stride + s.columns.reach(j + t)) * s.groups + v * lanes);
        }
    for (int t = 0; t < n_tap; ++t)
        for (int v = 0; v < n_vec; ++v) *reinterpret_cast<V *>(sums + (j + t) * s.groups + v * lanes) += products[t][v];
}

// The same for all outputs of the row: those that do not read the image by all of these columns take one at a time.
template <int bytes, int n_vec, int n_tap>
INLINE void depthwise_taps(const float *x, const float *g, float *sums, const Shape &s, int64_t j) {
    int64_t begin = 0, end = s.columns.out;
    for (int t = 0; t < n_tap; ++t) {
        begin = std::max(begin, s.columns.first(j + t));
        end = std::min(end, s.columns.last(j + t));
    }
    begin = std::min(begin, s.columns.out);
    end = std::max(begin, end);
    depthwise_outputs<bytes, n_vec, n_tap>(x, g, sums, s, j, begin, end);
    for (int t = 0; t < n_tap; ++t) {
        const int64_t first = s.columns.first(j + t), last = s.columns.last(j + t);
        depthwise_outputs<bytes, n_vec, 1>(x, g, sums, s, j + t, first, std::min(begin, last));
        depthwise_outputs<bytes, n_vec, 1>(x, g, sums, s, j + t, std::max(end, first), last);
    }
}

template <int bytes, int n_vec>
INLINE void depthwise_row(const float *x, const float *g, float *sums, const Shape &s) {
    int64_t j = 0;
    for (; j + 5 <= s.columns.kernel; j += 5) depthwise_taps<bytes, n_vec, 5>(x, g, sums, s, j);
    for (; j + 3 <= s.columns.kernel; j += 3) depthwise_taps<bytes, n_vec, 3>(x, g, sums, s, j);
    for (; j < s.columns.kernel; ++j) depthwise_taps<bytes, n_vec, 1>(x, g, sums, s, j);
}

template <int bytes>
INLINE void depthwise(const float *x, const float *g, float *out, const Shape &s) {
    constexpr int lanes = Vector<bytes>::lanes;
    const int64_t x_row = s.columns.in * s.groups, g_row = s.columns.out * s.groups, taps = s.taps();
    std::vector<float> sums(static_cast<size_t>(taps * s.groups));  // a tap, a channel
    for (int64_t h = 0; h < s.rows.out; ++h)
        for (int64_t i = 0; i < s.rows.kernel; ++i) {
            if (h < s.rows.first(i) || h >= s.rows.last(i)) continue;
            const float *seen = x + (h * s.rows.stride + s.rows.reach(i)) * x_row, *grad = g + h * g_row;
            float *line = sums.data() + i * s.columns.kernel * s.groups;
            int64_t c = 0;
            for (; c + 2 * lanes <= s.groups; c += 2 * lanes) depthwise_row<bytes, 2>(seen + c, grad + c, line + c, s);
            for (; c + lanes <= s.groups; c += lanes) depthwise_row<bytes, 1>(seen + c, grad + c, line + c, s);
            for (; c < s.groups; ++c) depthwise_row<4, 1>(seen + c, grad + c, line + c, s);
        }
    for (int64_t c = 0; c < s.groups; ++c)
        for (int64_t t = 0; t < taps; ++t) *out++ = sums[static_cast<size_t>(t * s.groups + c)];
}

AVX512_FLOATS void example_avx512(const float *x, const float *g, float *out, const Shape &s) {
    if (s.depthwise())
        depthwise<64>(x, g, out, s);
    else
        example<64, 4, 6>(x, g, out, s);  // 24 sums, 4 vectors and a factor in 32 registers
}

AVX2_FLOATS void example_avx2(const float *x, const float *g, float *out, const Shape &s) {
    if (s.depthwise())
        depthwise<32>(x, g, out, s);
    else
        example<32, 2, 6>(x, g, out, s);  // 12 sums, 2 vectors and a factor in 16 registers
}
#endif

}  // namespace

using Floats = nb::ndarray<const float, nb::device::cpu>;
using Sums = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

void bind_direct(nb::module_ &m) {
    m.def("float_kernels", &float_kernels, "The kernels for float32 that this processor has, fastest first.");
    m.def(
        "direct_products",
        [](Floats x, Floats g, Sums out, int64_t batch, nb::tuple rows, nb::tuple columns, int64_t channels, int64_t outputs,
           int64_t groups, const std::string &kernel, [[maybe_unused]] int threads) {
            check_kernel(float_kernels(), kernel);
            const Shape s{Axis(rows), Axis(columns), channels, outputs, groups};
            const int64_t x_size = s.rows.in * s.columns.in * groups * channels;
            const int64_t g_size = s.rows.out * s.columns.out * groups * outputs, out_size = groups * outputs * s.depth();
            if (static_cast<int64_t>(x.size()) != batch * x_size || static_cast<int64_t>(g.size()) != batch * g_size ||
                static_cast<int64_t>(out.size()) != batch * out_size)
                throw std::invalid_argument("sizes of x, g and out do not agree");
            nb::gil_scoped_release unlocked;
#ifdef HAS_TILES
            const auto run = kernel == "avx512" ? example_avx512 : example_avx2;
            parallel_for(batch, threads, [&](int64_t b) {
                run(x.data() + b * x_size, g.data() + b * g_size, out.data() + b * out_size, s);
            });
#endif
        },
        nb::arg("x").noconvert(), nb::arg("g").noconvert(), nb::arg("out").noconvert(), nb::kw_only(), nb::arg("batch"),
        nb::arg("rows"), nb::arg("columns"), nb::arg("channels"), nb::arg("outputs"), nb::arg("groups"), nb::arg("kernel"),
        nb::arg("threads"),
        "Fill out (batch, groups * outputs, kernel rows, kernel columns, channels) from channels-last maps; an axis is "
        "(in, out, kernel, stride, padding, dilation).");
}

}  // namespace dpquant
