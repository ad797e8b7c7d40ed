// SPDX-License-Identifier: Apache-2.0
//
// The geometry of a convolution along one axis, shared by the kernels of weight gradients.

#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>

namespace dpquant {

inline int64_t up_to(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Output h reads input h * stride + i * dilation - padding by tap i.
struct Axis {
    int64_t in, out, kernel, stride, padding, dilation;

    explicit Axis(nanobind::tuple t)
        : in(nanobind::cast<int64_t>(t[0])), out(nanobind::cast<int64_t>(t[1])), kernel(nanobind::cast<int64_t>(t[2])),
          stride(nanobind::cast<int64_t>(t[3])), padding(nanobind::cast<int64_t>(t[4])), dilation(nanobind::cast<int64_t>(t[5])) {}

    // The input that output 0 reads by tap i.
    int64_t reach(int64_t i) const { return i * dilation - padding; }
    // Rows (or columns) of the image that are equal modulo the stride are a phase. Tap i reads phase phase(i), at index
    // output + shift(i); indices count from the row that tap 0 of output 0 reads in its phase.
    int64_t phase(int64_t i) const { return ((reach(i) % stride) + stride) % stride; }
    int64_t lowest() const { return (reach(0) - phase(0)) / stride; }
    int64_t shift(int64_t i) const { return (reach(i) - phase(i)) / stride - lowest(); }
    // The first output, and one past the last output, that reads the image by tap i.
    int64_t first(int64_t i) const { return std::max<int64_t>(0, (-reach(i) + stride - 1) / stride); }
    int64_t last(int64_t i) const {
        const int64_t room = in - 1 - reach(i);
        return room < 0 ? 0 : std::min(out, room / stride + 1);
    }
};

}  // namespace dpquant
