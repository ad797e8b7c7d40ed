// SPDX-License-Identifier: Apache-2.0
//
// How a convolution walks over an image: what the kernels of its weight gradient share.

#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>

namespace dpquant {

inline int64_t up_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Output h and tap i meet at input h * stride + i * dilation - padding.
struct Axis {
    int64_t in, out, kernel, stride, padding, dilation;

    explicit Axis(nanobind::tuple t)
        : in(nanobind::cast<int64_t>(t[0])), out(nanobind::cast<int64_t>(t[1])), kernel(nanobind::cast<int64_t>(t[2])),
          stride(nanobind::cast<int64_t>(t[3])), padding(nanobind::cast<int64_t>(t[4])), dilation(nanobind::cast<int64_t>(t[5])) {}

    // What tap i sees, counted from output 0's place.
    int64_t reach(int64_t i) const { return i * dilation - padding; }
    // The images' rows (or columns) that leave one rest modulo the stride are a phase: tap i sees phase phase(i), there
    // at output + shift(i), counted from what tap 0 of output 0 sees in its phase.
    int64_t phase(int64_t i) const { return ((reach(i) % stride) + stride) % stride; }
    int64_t lowest() const { return (reach(0) - phase(0)) / stride; }
    int64_t shift(int64_t i) const { return (reach(i) - phase(i)) / stride - lowest(); }
    // The first and one past the last output whose tap i lies in the image.
    int64_t first(int64_t i) const { return std::max<int64_t>(0, (-reach(i) + stride - 1) / stride); }
    int64_t last(int64_t i) const {
        const int64_t room = in - 1 - reach(i);
        return room < 0 ? 0 : std::min(out, room / stride + 1);
    }
};

}  // namespace dpquant
