// SPDX-License-Identifier: Apache-2.0
//
// Convolutions of number codes on AVX2, exactly, for processors without instructions that sum products of bytes in 32 bits:
//
//     out[y, o] = scale * scale[o] * (sum over taps t and channels c of (x[pixel(y, t), c] - 128) * weight[t, c, o]) + bias[o]
//
// dpquant/backends/cpu_int8.py defines the result; forward products and input gradients are both of this form. x is uint8 with
// zero point 128, channels last, and zero outside of the image; the sum is int32 and is converted to float32 once.
//
// An example's image is copied to a plane with a border of zeros. Then each tap and four channels of a pixel are a dword at a fixed
// offset from an output position's first. Positions of a tile may lie anywhere, in several examples too. Weights are packed in
// panels of 16 outputs. Codes that fit are multiplied in triples (see quads.hpp), others as 16-bit numbers, in pairs of channels.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "geometry.hpp"
#include "parallel.hpp"
#include "quads.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr int64_t PANEL = 16;          // outputs
constexpr int64_t TILE = 6;            // positions
constexpr int64_t AT_ONCE = 32 * TILE;  // positions, of several examples if one has few, that a panel is used for while it is cached

// An axis of the output: position p reads input pixels p * stride + tap and is written to first + p * step.
struct Walk {
    int64_t in = 0, count = 0, stride = 1, first = 0, step = 1, size = 0;

    Walk() = default;
    explicit Walk(nb::tuple t)
        : in(nb::cast<int64_t>(t[0])), count(nb::cast<int64_t>(t[1])), stride(nb::cast<int64_t>(t[2])),
          first(nb::cast<int64_t>(t[3])), step(nb::cast<int64_t>(t[4])), size(nb::cast<int64_t>(t[5])) {}
};

using Taps = std::vector<std::pair<int64_t, int64_t>>;  // (row, column) relative to the pixel position * stride

struct Convolution {
    Walk rows, columns;
    Taps taps;
    int64_t groups = 1, channels = 0, outputs = 0;  // the latter of a group
    bool bytes = false;                             // codes fit in triples

    int64_t per_dword() const { return bytes ? 4 : 2; }  // channels
    int64_t pixel() const { return up_to(channels, per_dword()) / per_dword() * 4; }  // bytes
    int64_t top() const { return least(&Taps::value_type::first); }
    int64_t left() const { return least(&Taps::value_type::second); }
    int64_t plane_rows() const { return (rows.count - 1) * rows.stride + most(&Taps::value_type::first) - top() + 1; }
    int64_t plane_columns() const { return (columns.count - 1) * columns.stride + most(&Taps::value_type::second) - left() + 1; }
    int64_t plane() const { return plane_rows() * plane_columns() * pixel(); }  // bytes
    int64_t positions() const { return rows.count * columns.count; }
    int64_t used_dwords() const { return static_cast<int64_t>(taps.size()) * pixel() / 4; }
    int64_t dwords() const { return bytes ? up_to(used_dwords(), TRIPLE) : used_dwords(); }  // of a sum
    int64_t panels() const { return up_to(outputs, PANEL) / PANEL; }
    // Dwords of a panel: those of weights, and after three of them the excess of the triple.
    int64_t panel() const { return (bytes ? dwords() / TRIPLE * (TRIPLE + 1) : dwords()) * PANEL; }
    int64_t panel_row(int64_t k) const { return (bytes ? k / TRIPLE * (TRIPLE + 1) + k % TRIPLE : k) * PANEL; }

    // Returns, for each dword of a sum, its offset in bytes from the position's first. What pads the last triple reads any pixel.
    std::vector<int64_t> offsets() const {
        std::vector<int64_t> all;
        for (const auto &[row, column] : taps)
            for (int64_t k = 0; k < pixel(); k += 4)
                all.push_back(((row - top()) * plane_columns() + column - left()) * pixel() + k);
        all.resize(static_cast<size_t>(dwords()), 0);
        return all;
    }

  private:
    int64_t least(int64_t Taps::value_type::*axis) const {
        int64_t found = taps[0].*axis;
        for (const auto &tap : taps) found = std::min(found, tap.*axis);
        return found;
    }
    int64_t most(int64_t Taps::value_type::*axis) const {
        int64_t found = taps[0].*axis;
        for (const auto &tap : taps) found = std::max(found, tap.*axis);
        return found;
    }
};

// Where weight (tap, c, o) of a group lies, in bytes from the group's first; `places` are those of the taps.
struct Layout {
    std::vector<int64_t> places;
    int64_t channel, output, group;
};

// A convolution and its packed weights.
struct Part {
    Convolution shape;
    const int32_t *panels;
};

// The operands of all examples. The scales of outputs are one, or one each.
struct Operands {
    const uint8_t *x;
    const float *scales, *output_scales, *bias;
    bool one_scale;
    float *out;
};

#ifdef HAS_TILES

AVX2 void pack_panel(const Convolution &s, const Layout &l, const int8_t *weight, int64_t first, int32_t *panel) {
    std::memset(panel, 0, static_cast<size_t>(s.panel()) * 4);
    const int64_t count = std::min(PANEL, s.outputs - first), per_tap = s.pixel() / 4;
    for (size_t t = 0; t < l.places.size(); ++t)
        for (int64_t c = 0; c < s.channels; ++c) {
            const int64_t k = static_cast<int64_t>(t) * per_tap + c / s.per_dword(), slot = c % s.per_dword();
            const int8_t *from = weight + l.places[t] + c * l.channel + first * l.output;
            if (s.bytes) {
                auto *to = reinterpret_cast<int8_t *>(panel + s.panel_row(k)) + slot;
                for (int64_t o = 0; o < count; ++o) to[o * 4] = from[o * l.output];
            } else {
                auto *to = reinterpret_cast<int16_t *>(panel + s.panel_row(k)) + slot;
                for (int64_t o = 0; o < count; ++o) to[o * 2] = from[o * l.output];
            }
        }
    if (!s.bytes) return;
    for (int64_t k = 0; k < s.dwords(); k += TRIPLE)
        for (int64_t half = 0; half < PANEL; half += 8) {
            int32_t *row = panel + s.panel_row(k) + half;
            const __m256i bytes[TRIPLE] = {load(row), load(row + PANEL), load(row + 2 * PANEL)};
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(row + TRIPLE * PANEL), excess_of(bytes));
        }
}

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

// Copies one group's channels of an example into its plane: bytes as they are, or 16-bit numbers without the zero point.
AVX2 void fill_plane(const Convolution &s, const uint8_t *x, const uint8_t *x_end, uint8_t *plane) {
    const int64_t pixel = s.pixel(), from_pixel = s.groups * s.channels, width = s.plane_columns();
    std::memset(plane, s.bytes ? CODE_OF_ZERO : 0, static_cast<size_t>(s.plane()));
    const int64_t first = std::max<int64_t>(s.left(), 0), last = std::min(s.columns.in, s.left() + width);
    for (int64_t m = 0; m < s.plane_rows(); ++m) {
        const int64_t row = m + s.top();
        if (row < 0 || row >= s.rows.in || first >= last) continue;
        const uint8_t *from = x + (row * s.columns.in + first) * from_pixel;
        uint8_t *to = plane + (m * width + first - s.left()) * pixel;
        if (s.bytes && pixel == from_pixel) {
            std::memcpy(to, from, static_cast<size_t>((last - first) * pixel));
            continue;
        }
        for (int64_t n = first; n < last; ++n, from += from_pixel, to += pixel)
            s.bytes ? copy_bytes(s, from, x_end, to) : copy_words(s, from, to);
    }
}

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

// The positions of some examples, relative to their planes and outputs.
struct Positions {
    std::vector<int64_t> from, to;  // a position's first dword, in bytes; its outputs, in floats
    std::vector<int64_t> example;

    Positions(const Convolution &s, int64_t examples) {
        for (int64_t b = 0; b < examples; ++b)
            for (int64_t m = 0; m < s.rows.count; ++m)
                for (int64_t n = 0; n < s.columns.count; ++n) {
                    const int64_t row = s.rows.first + m * s.rows.step, column = s.columns.first + n * s.columns.step;
                    from.push_back(b * s.plane() + (m * s.rows.stride * s.plane_columns() + n * s.columns.stride) * s.pixel());
                    to.push_back(((b * s.rows.size + row) * s.columns.size + column) * s.groups * s.outputs);
                    example.push_back(b);
                }
    }
};

// One of the convolutions that together fill the outputs.
struct Prepared {
    const Convolution &shape;
    const int32_t *panels;
    std::vector<int64_t> offsets;
    Positions positions;
};

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

// Convolves `count` examples from `first` on.
AVX2 void convolve(const Prepared &part, const Operands &o, int64_t first, int64_t count) {
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
            (s.bytes ? tiles<true> : tiles<false>)(w, count * s.positions());
        }
    }
}

void pack(const Convolution &s, const Layout &l, const int8_t *weight, int32_t *panels) {
    for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t k = 0; k < s.panels(); ++k)
            pack_panel(s, l, weight + g * l.group, k * PANEL, panels + (g * s.panels() + k) * s.panel());
}

// Computes all parts of an example while its outputs are cached.
void run(const std::vector<Part> &parts, const Operands &o, int64_t batch, int threads) {
    int64_t most = 1;
    for (const Part &part : parts) most = std::max(most, part.shape.positions());
    const int64_t share = (batch + threads - 1) / threads, count = std::clamp<int64_t>((AT_ONCE + most - 1) / most, 1, std::max<int64_t>(share, 1));
    std::vector<Prepared> prepared;
    for (const Part &part : parts) prepared.push_back({part.shape, part.panels, part.shape.offsets(), Positions(part.shape, count)});
    parallel_for((batch + count - 1) / count, threads, [&](int64_t k) {
        for (const Prepared &part : prepared) convolve(part, o, k * count, std::min(count, batch - k * count));
    });
}

bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
void pack(const Convolution &, const Layout &, const int8_t *, int32_t *) {}
void run(const std::vector<Part> &, const Operands &, int64_t, int) {}
bool available() { return false; }
#endif

using Weight = nb::ndarray<const int8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::device::cpu>;

// Packed weights of a set of taps.
class TapWeights {
  public:
    // weight: (outputs, channels of a group, taps of the kernel), or for a transposed product (channels, outputs of a group, ..).
    TapWeights(Weight weight, const Taps &taps, const std::vector<int64_t> &places, int64_t groups, bool transposed, int64_t most) {
        const auto all = static_cast<int64_t>(weight.shape(0)), own = static_cast<int64_t>(weight.shape(1)), kernel = static_cast<int64_t>(weight.shape(2));
        const bool known = std::all_of(places.begin(), places.end(), [&](int64_t place) { return place >= 0 && place < kernel; });
        if (!available() || taps.empty() || taps.size() != places.size() || !known || groups < 1 || all % groups != 0)
            throw std::invalid_argument("no kernel for these weights");
        shape_.taps = taps, shape_.groups = groups, shape_.bytes = fit_in_triples(most, most);
        shape_.channels = transposed ? all / groups : own, shape_.outputs = transposed ? own : all / groups;
        const int64_t across = own * kernel;
        const Layout layout{places, transposed ? across : kernel, transposed ? kernel : across, all / groups * across};
        panels_.resize(static_cast<size_t>(groups * shape_.panels() * shape_.panel()));
        pack(shape_, layout, weight.data(), panels_.data());
    }

    Part part(nb::tuple rows, nb::tuple columns) const {
        Part part{shape_, panels_.data()};
        part.shape.rows = Walk(rows), part.shape.columns = Walk(columns);
        return part;
    }

  private:
    Convolution shape_;
    std::vector<int32_t> panels_;
};

void check(const Convolution &s, int64_t batch, int64_t x_size, int64_t out_size, int64_t scales, std::optional<int64_t> bias) {
    const int64_t outputs = s.groups * s.outputs;
    const auto inside = [](const Walk &w) { return w.count >= 1 && w.first >= 0 && w.first + (w.count - 1) * w.step < w.size; };
    if (x_size != batch * s.rows.in * s.columns.in * s.groups * s.channels || !inside(s.rows) || !inside(s.columns) ||
        out_size != batch * s.rows.size * s.columns.size * outputs || (scales != 1 && scales != outputs) || (bias && *bias != outputs))
        throw std::invalid_argument("sizes of x, scales, bias and out do not agree");
}

using Parts = std::vector<std::tuple<const TapWeights *, nb::tuple, nb::tuple>>;  // weights, rows, columns

void convolve_all(Codes x, Scales scales, Scales output_scales, std::optional<Scales> bias, Floats out, const Parts &given, int threads) {
    std::vector<Part> parts;
    for (const auto &[weights, rows, columns] : given) parts.push_back(weights->part(rows, columns));
    const auto batch = static_cast<int64_t>(scales.size()), number = static_cast<int64_t>(output_scales.size());
    for (const Part &part : parts)
        check(part.shape, batch, static_cast<int64_t>(x.size()), static_cast<int64_t>(out.size()), number,
              bias ? std::optional<int64_t>(bias->size()) : std::nullopt);
    const Operands operands{x.data(), scales.data(), output_scales.data(), bias ? bias->data() : nullptr, number == 1, out.data()};
    nb::gil_scoped_release unlocked;
    run(parts, operands, batch, threads);
}

}  // namespace

void bind_convolutions(nb::module_ &m) {
    m.def("tap_weights_available", &available, "Whether this processor has a kernel for `TapWeights`.");
    nb::class_<TapWeights>(m, "TapWeights", "Weights of kernel taps, packed for convolutions of codes.")
        .def(nb::init<Weight, const Taps &, const std::vector<int64_t> &, int64_t, bool, int64_t>(), nb::arg("weight").noconvert(),
             nb::kw_only(), nb::arg("taps"), nb::arg("places"), nb::arg("groups"), nb::arg("transposed"), nb::arg("most"),
             "Pack weight (O, C / groups, kernel size): tap k is at (row, column) taps[k] and place places[k] of the kernel; most: the "
             "largest magnitude of any code.");
    m.def("convolve_codes", &convolve_all, nb::arg("x").noconvert(), nb::arg("scales").noconvert(), nb::arg("output_scales").noconvert(),
          nb::arg("bias").none(), nb::arg("out").noconvert(), nb::kw_only(), nb::arg("parts"), nb::arg("threads"),
          "Fill out, channels last, by parts (TapWeights, rows, columns). An axis is (in, count, stride, first, step, size): position "
          "p < count reads x at p * stride + tap and lies at first + p * step of size.");
}

}  // namespace dpquant
