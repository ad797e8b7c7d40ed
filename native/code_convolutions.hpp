// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of code_convolutions_avx2.cpp and code_convolutions_vnni.cpp share: the shape of a convolution of codes, and the
// layout of its packed weights.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "geometry.hpp"
#include "quads.hpp"

namespace dpquant {

// An axis of the output: position p reads input pixels p * stride + tap and is written to first + p * step.
struct Walk {
    int64_t in = 0, count = 0, stride = 1, first = 0, step = 1, size = 0;

    Walk() = default;
    explicit Walk(nanobind::tuple t)
        : in(nanobind::cast<int64_t>(t[0])), count(nanobind::cast<int64_t>(t[1])), stride(nanobind::cast<int64_t>(t[2])),
          first(nanobind::cast<int64_t>(t[3])), step(nanobind::cast<int64_t>(t[4])), size(nanobind::cast<int64_t>(t[5])) {}
};

using Taps = std::vector<std::pair<int64_t, int64_t>>;  // (row, column) relative to the pixel position * stride

// How a dword of codes is multiplied: as two 16-bit numbers or as four bytes on AVX2, which sums bytes in triples of dwords, or as
// four bytes on VNNI.
enum class Form { words, triples, fours };

struct Convolution {
    Walk rows, columns;
    Taps taps;
    int64_t groups = 1, channels = 0, outputs = 0;  // the latter of a group
    Form form = Form::words;

    int64_t per_dword() const { return form == Form::words ? 2 : 4; }  // channels
    int64_t pixel() const { return up_to(channels, per_dword()) / per_dword() * 4; }  // bytes
    int64_t top() const { return least(&Taps::value_type::first); }
    int64_t left() const { return least(&Taps::value_type::second); }
    int64_t plane_rows() const { return (rows.count - 1) * rows.stride + most(&Taps::value_type::first) - top() + 1; }
    int64_t plane_columns() const { return (columns.count - 1) * columns.stride + most(&Taps::value_type::second) - left() + 1; }
    int64_t plane() const { return plane_rows() * plane_columns() * pixel(); }  // bytes
    int64_t positions() const { return rows.count * columns.count; }
    int64_t used_dwords() const { return static_cast<int64_t>(taps.size()) * pixel() / 4; }
    int64_t dwords() const { return form == Form::triples ? up_to(used_dwords(), TRIPLE) : used_dwords(); }  // of a sum
    int64_t width() const { return form == Form::fours ? 64 : 16; }  // outputs of a panel
    int64_t panels() const { return up_to(outputs, width()) / width(); }
    // Rows of a panel: those of weights, and those of their excess: after every triple, or before all.
    int64_t panel() const { return panel_row(dwords()); }
    int64_t panel_row(int64_t k) const {
        return (form == Form::triples ? k / TRIPLE * (TRIPLE + 1) + k % TRIPLE : form == Form::fours ? k + 1 : k) * width();
    }

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

// Whether an example's plane, of one group, would be a copy of its image.
inline bool plane_is_image(const Convolution &s) {
    return s.groups == 1 && s.form == Form::fours && s.pixel() == s.channels && s.top() == 0 && s.left() == 0 &&
           s.plane_columns() == s.columns.in && s.plane_rows() == s.rows.in;
}

// Packs the weights of a panel, from output `first` on.
void pack_panel_avx2(const Convolution &s, const Layout &l, const int8_t *weight, int64_t first, int32_t *panel);
void pack_panel_vnni(const Convolution &s, const Layout &l, const int8_t *weight, int64_t first, int32_t *panel);
// Copies one group's channels of an example into its plane: bytes as they are, or 16-bit numbers without the zero point.
void fill_plane(const Convolution &s, const uint8_t *x, const uint8_t *x_end, uint8_t *plane);
// Convolves `count` examples from `first` on.
void convolve_avx2(const Prepared &part, const Operands &o, int64_t first, int64_t count);
void convolve_vnni(const Prepared &part, const Operands &o, int64_t first, int64_t count);

#endif

}  // namespace dpquant
