// SPDX-License-Identifier: Apache-2.0
//
// Convolutions of number codes, exactly:
//
//     out[y, o] = scale * scale[o] * (sum over taps t and channels c of (x[pixel(y, t), c] - 128) * weight[t, c, o]) + bias[o]
//
// dpquant/backends/cpu_int8.py defines the result; forward products and input gradients are both of this form. x is uint8 with
// zero point 128, channels last, and zero outside of the image; the sum is int32 and is converted to float32 once.
//
// An example's image is copied to a plane with a border of zeros. Then each tap and four channels of a pixel are a dword at a fixed
// offset from an output position's first. Positions of a tile may lie anywhere, in several examples too. Weights are packed in
// panels of some outputs.
//
// Two kernels give the same bits: AVX-512 VNNI in code_convolutions_vnni.cpp, and AVX2, which has no instruction that sums products
// of bytes in 32 bits, in code_convolutions_avx2.cpp.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "code_convolutions.hpp"
#include "parallel.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr int64_t AT_ONCE = 192;  // positions, of several examples if one has few, that a panel is used for while it is cached

#ifdef HAS_TILES

void pack(const Convolution &s, const Layout &l, const int8_t *weight, int32_t *panels) {
    for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t k = 0; k < s.panels(); ++k)
            (s.form == Form::fours ? pack_panel_vnni : pack_panel_avx2)(s, l, weight + g * l.group, k * s.width(), panels + (g * s.panels() + k) * s.panel());
}

// Computes all parts of an example while its outputs are cached.
void run(const std::vector<Part> &parts, const Operands &o, int64_t batch, int threads) {
    int64_t most = 1;
    for (const Part &part : parts) most = std::max(most, part.shape.positions());
    const int64_t share = (batch + threads - 1) / threads, count = std::clamp<int64_t>((AT_ONCE + most - 1) / most, 1, std::max<int64_t>(share, 1));
    std::vector<Prepared> prepared;
    for (const Part &part : parts) prepared.push_back({part.shape, part.panels, part.shape.offsets(), Positions(part.shape, count)});
    parallel_for((batch + count - 1) / count, threads, [&](int64_t k) {
        for (const Prepared &part : prepared) (part.shape.form == Form::fours ? convolve_vnni : convolve_avx2)(part, o, k * count, std::min(count, batch - k * count));
    });
}
#else
void pack(const Convolution &, const Layout &, const int8_t *, int32_t *) {}
void run(const std::vector<Part> &, const Operands &, int64_t, int) {}
#endif

// Returns the kernels of `TapWeights` that this processor has, fastest first.
Kernels tap_kernels() {
    Kernels names = int8_kernels();
    std::erase(names, "amx");
    return names;
}

using Weight = nb::ndarray<const int8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const uint8_t, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::device::cpu>;

// Packed weights of a set of taps.
class TapWeights {
  public:
    // weight: (outputs, channels of a group, taps of the kernel), or for a transposed product (channels, outputs of a group, ..).
    TapWeights(Weight weight, const Taps &taps, const std::vector<int64_t> &places, int64_t groups, bool transposed, int64_t most,
               const std::string &kernel) {
        const auto all = static_cast<int64_t>(weight.shape(0)), own = static_cast<int64_t>(weight.shape(1)), size = static_cast<int64_t>(weight.shape(2));
        const bool known = std::all_of(places.begin(), places.end(), [&](int64_t place) { return place >= 0 && place < size; });
        check_kernel(tap_kernels(), kernel);
        if (taps.empty() || taps.size() != places.size() || !known || groups < 1 || all % groups != 0)
            throw std::invalid_argument("weights, taps and groups do not agree");
        shape_.taps = taps, shape_.groups = groups;
        shape_.form = kernel == "vnni" ? Form::fours : fit_in_triples(most, most) ? Form::triples : Form::words;
        shape_.channels = transposed ? all / groups : own, shape_.outputs = transposed ? own : all / groups;
        const int64_t across = own * size;
        const Layout layout{places, transposed ? across : size, transposed ? size : across, all / groups * across};
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
    m.def("tap_kernels", &tap_kernels, "The kernels of `TapWeights` that this processor has, fastest first.");
    nb::class_<TapWeights>(m, "TapWeights", "Weights of kernel taps, packed for convolutions of codes.")
        .def(nb::init<Weight, const Taps &, const std::vector<int64_t> &, int64_t, bool, int64_t, const std::string &>(), nb::arg("weight").noconvert(),
             nb::kw_only(), nb::arg("taps"), nb::arg("places"), nb::arg("groups"), nb::arg("transposed"), nb::arg("most"), nb::arg("kernel"),
             "Pack weight (O, C / groups, kernel size): tap k is at (row, column) taps[k] and place places[k] of the kernel; most: the "
             "largest magnitude of any code.");
    m.def("convolve_codes", &convolve_all, nb::arg("x").noconvert(), nb::arg("scales").noconvert(), nb::arg("output_scales").noconvert(),
          nb::arg("bias").none(), nb::arg("out").noconvert(), nb::kw_only(), nb::arg("parts"), nb::arg("threads"),
          "Fill out, channels last, by parts (TapWeights, rows, columns). An axis is (in, count, stride, first, step, size): position "
          "p < count reads x at p * stride + tap and lies at first + p * step of size.");
}

}  // namespace dpquant
