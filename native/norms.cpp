// SPDX-License-Identifier: Apache-2.0
//
// Group normalization of channels-last maps, one example after the other, with every example's own parameter gradients.
// dpquant/norms.py states the meaning. Sums run over blocks of positions in float32 and over blocks in float64.
//
// Symbols: B examples, T positions, C channels, G groups; N = T * C / G elements of a group.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "parallel.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr int64_t BLOCK = 32;  // positions summed in float32

struct Map {
    int64_t positions, channels, groups;

    int64_t size() const { return positions * channels; }
    int64_t in_group() const { return channels / groups; }
    double count() const { return static_cast<double>(positions * in_group()); }
};

// One double and one float for each channel, reused by every example that a thread takes.
struct Scratch {
    std::vector<double> first, second;
    std::vector<float> a, b, c, part, part_too;

    explicit Scratch(int64_t channels)
        : first(channels), second(channels), a(channels), b(channels), c(channels), part(channels), part_too(channels) {}
};

// total[c] = sum over positions of (x - shift[c])^power, power 1 or 2
FOR_EVERY_X86 void moments(const float *x, Map map, const float *shift, bool squared, float *part, double *total) {
    std::fill(total, total + map.channels, 0.0);
    for (int64_t begin = 0; begin < map.positions; begin += BLOCK) {
        std::fill(part, part + map.channels, 0.0f);
        const int64_t end = std::min(begin + BLOCK, map.positions);
        for (int64_t t = begin; t < end; ++t) {
            const float *row = x + t * map.channels;
            if (squared)
                for (int64_t c = 0; c < map.channels; ++c) part[c] += (row[c] - shift[c]) * (row[c] - shift[c]);
            else
                for (int64_t c = 0; c < map.channels; ++c) part[c] += row[c] - shift[c];
        }
        for (int64_t c = 0; c < map.channels; ++c) total[c] += part[c];
    }
}

// y = a[c] * x + b[c]
FOR_EVERY_X86 void affine(const float *x, Map map, const float *a, const float *b, float *y) {
    for (int64_t t = 0; t < map.positions; ++t, x += map.channels, y += map.channels)
        for (int64_t c = 0; c < map.channels; ++c) y[c] = a[c] * x[c] + b[c];
}

// sum_g[c] = sum of g; sum_gx[c] = sum of g * (x - mean[c])
FOR_EVERY_X86 void gradient_sums(const float *g, const float *x, Map map, const float *mean, Scratch &s) {
    float *part = s.part.data(), *part_too = s.part_too.data();
    double *sum_g = s.first.data(), *sum_gx = s.second.data();
    std::fill(sum_g, sum_g + map.channels, 0.0);
    std::fill(sum_gx, sum_gx + map.channels, 0.0);
    for (int64_t begin = 0; begin < map.positions; begin += BLOCK) {
        std::fill(part, part + map.channels, 0.0f);
        std::fill(part_too, part_too + map.channels, 0.0f);
        const int64_t end = std::min(begin + BLOCK, map.positions);
        for (int64_t t = begin; t < end; ++t) {
            const float *rx = x + t * map.channels, *rg = g + t * map.channels;
            for (int64_t c = 0; c < map.channels; ++c) {
                part[c] += rg[c];
                part_too[c] += rg[c] * (rx[c] - mean[c]);
            }
        }
        for (int64_t c = 0; c < map.channels; ++c) {
            sum_g[c] += part[c];
            sum_gx[c] += part_too[c];
        }
    }
}

// out = a[c] * g + b[c] * x + k[c]
FOR_EVERY_X86 void combine(const float *g, const float *x, Map map, const float *a, const float *b, const float *k, float *out) {
    for (int64_t t = 0; t < map.positions; ++t, x += map.channels, g += map.channels, out += map.channels)
        for (int64_t c = 0; c < map.channels; ++c) out[c] = a[c] * g[c] + (b[c] * x[c] + k[c]);
}

void forward(const float *x, const float *gamma, const float *beta, Map map, double eps, float *y, float *mean, float *rstd,
             Scratch &s) {
    const int64_t size = map.in_group();
    std::fill(s.a.begin(), s.a.end(), 0.0f);
    moments(x, map, s.a.data(), false, s.part.data(), s.first.data());
    for (int64_t group = 0; group < map.groups; ++group) {
        double sum = 0;
        for (int64_t c = group * size; c < (group + 1) * size; ++c) sum += s.first[c];
        mean[group] = static_cast<float>(sum / map.count());
        std::fill(s.a.begin() + group * size, s.a.begin() + (group + 1) * size, mean[group]);
    }
    moments(x, map, s.a.data(), true, s.part.data(), s.second.data());
    for (int64_t group = 0; group < map.groups; ++group) {
        double sum = 0;
        for (int64_t c = group * size; c < (group + 1) * size; ++c) sum += s.second[c];
        rstd[group] = static_cast<float>(1.0 / std::sqrt(sum / map.count() + eps));
        for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            s.a[c] = gamma ? gamma[c] * rstd[group] : rstd[group];
            s.b[c] = (beta ? beta[c] : 0.0f) - s.a[c] * mean[group];
        }
    }
    affine(x, map, s.a.data(), s.b.data(), y);
}

void backward(const float *g, const float *x, const float *gamma, const float *mean, const float *rstd, Map map,
              float *grad_x, float *grad_gamma, float *grad_beta, Scratch &s) {
    const int64_t size = map.in_group();
    for (int64_t group = 0; group < map.groups; ++group)
        std::fill(s.a.begin() + group * size, s.a.begin() + (group + 1) * size, mean[group]);
    gradient_sums(g, x, map, s.a.data(), s);
    for (int64_t group = 0; group < map.groups; ++group) {
        const double r = rstd[group], m = mean[group];
        double sum = 0, sum_x = 0;
        for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            const double weight = gamma ? gamma[c] : 1.0;
            grad_beta[c] = static_cast<float>(s.first[c]);
            grad_gamma[c] = static_cast<float>(s.second[c] * r);
            sum += weight * s.first[c];
            sum_x += weight * s.second[c] * r;
        }
        const double slope = -r * r * sum_x / map.count(), level = -r * sum / map.count() - slope * m;
        for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            s.a[c] = static_cast<float>(r * (gamma ? gamma[c] : 1.0));
            s.b[c] = static_cast<float>(slope);
            s.c[c] = static_cast<float>(level);
        }
    }
    combine(g, x, map, s.a.data(), s.b.data(), s.c.data(), grad_x);
}

Scratch &scratch(int64_t channels) {
    thread_local Scratch mine(0);
    if (static_cast<int64_t>(mine.a.size()) != channels) mine = Scratch(channels);
    return mine;
}

}  // namespace

using Floats = nb::ndarray<const float, nb::device::cpu>;
using Out = nb::ndarray<float, nb::device::cpu>;

void bind_norms(nb::module_ &m) {
    m.def(
        "group_norm",
        [](Floats x, std::optional<Floats> gamma, std::optional<Floats> beta, Out y, Out mean, Out rstd, int64_t positions,
           int64_t channels, int64_t groups, double eps, int threads) {
            const Map map{positions, channels, groups};
            const auto batch = static_cast<int64_t>(x.size()) / map.size();
            if (batch * map.size() != static_cast<int64_t>(x.size()) || y.size() != x.size() ||
                static_cast<int64_t>(mean.size()) != batch * groups || rstd.size() != mean.size() ||
                channels % groups != 0 || (gamma && static_cast<int64_t>(gamma->size()) != channels) ||
                (beta && static_cast<int64_t>(beta->size()) != channels))
                throw std::invalid_argument("sizes do not agree");
            const float *weight = gamma ? gamma->data() : nullptr, *bias = beta ? beta->data() : nullptr;
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                forward(x.data() + b * map.size(), weight, bias, map, eps, y.data() + b * map.size(),
                        mean.data() + b * groups, rstd.data() + b * groups, scratch(channels));
            });
        },
        nb::arg("x").noconvert(), nb::arg("gamma").none(), nb::arg("beta").none(), nb::arg("y").noconvert(),
        nb::arg("mean").noconvert(), nb::arg("rstd").noconvert(), nb::kw_only(), nb::arg("positions"), nb::arg("channels"),
        nb::arg("groups"), nb::arg("eps"), nb::arg("threads"),
        "Fill y, and mean and rstd (B, G), from channels-last x (B, T, C).");
    m.def(
        "group_norm_backward",
        [](Floats g, Floats x, std::optional<Floats> gamma, Floats mean, Floats rstd, Out grad_x, Out grad_gamma,
           Out grad_beta, int64_t positions, int64_t channels, int64_t groups, int threads) {
            const Map map{positions, channels, groups};
            const auto batch = static_cast<int64_t>(x.size()) / map.size();
            if (batch * map.size() != static_cast<int64_t>(x.size()) || g.size() != x.size() || grad_x.size() != x.size() ||
                static_cast<int64_t>(mean.size()) != batch * groups || rstd.size() != mean.size() ||
                static_cast<int64_t>(grad_gamma.size()) != batch * channels || grad_beta.size() != grad_gamma.size() ||
                (gamma && static_cast<int64_t>(gamma->size()) != channels))
                throw std::invalid_argument("sizes do not agree");
            const float *weight = gamma ? gamma->data() : nullptr;
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                backward(g.data() + b * map.size(), x.data() + b * map.size(), weight, mean.data() + b * groups,
                         rstd.data() + b * groups, map, grad_x.data() + b * map.size(), grad_gamma.data() + b * channels,
                         grad_beta.data() + b * channels, scratch(channels));
            });
        },
        nb::arg("g").noconvert(), nb::arg("x").noconvert(), nb::arg("gamma").none(), nb::arg("mean").noconvert(),
        nb::arg("rstd").noconvert(), nb::arg("grad_x").noconvert(), nb::arg("grad_gamma").noconvert(),
        nb::arg("grad_beta").noconvert(), nb::kw_only(), nb::arg("positions"), nb::arg("channels"), nb::arg("groups"),
        nb::arg("threads"), "Fill grad_x, and grad_gamma and grad_beta (B, C), from channels-last g and x (B, T, C).");
}

}  // namespace dpquant
