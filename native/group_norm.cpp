// SPDX-License-Identifier: Apache-2.0
//
// Group normalization of channels-last maps, one example at a time, with per-example parameter gradients.
// dpquant/engine/group_norm.py defines the result. Sums within a block of positions are float32, sums over blocks float64.
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
#include <type_traits>
#include <vector>

#include "parallel.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr int64_t BLOCK = 32;  // positions summed in float32
constexpr int64_t LANES = 32;  // channels that are summed together, in registers

#if defined(_MSC_VER)
#define RESTRICT __restrict
#else
#define RESTRICT __restrict__
#endif

struct Map {
    int64_t positions, channels, groups;

    int64_t size() const { return positions * channels; }
    int64_t in_group() const { return channels / groups; }
    double count() const { return static_cast<double>(positions * in_group()); }
};

// Buffers of one value per channel, reused for all examples of a thread.
struct Scratch {
    std::vector<double> first, second;
    std::vector<float> a, b, c;

    explicit Scratch(int64_t channels) : first(channels), second(channels), a(channels), b(channels), c(channels) {}
};

Scratch &scratch(int64_t channels) {
    thread_local Scratch mine(0);
    if (static_cast<int64_t>(mine.a.size()) != channels) mine = Scratch(channels);
    return mine;
}

// Calls body(start, positions, channel, width) for blocks of positions, and within a block, which stays in the first-level
// cache, for strips of LANES channels. All strips but the last have a constant width, so their sums can stay in registers.
template <class Body>
INLINE void for_strips(const Map &map, const Body &body) {
    for (int64_t begin = 0; begin < map.positions; begin += BLOCK) {
        const int64_t count = std::min(BLOCK, map.positions - begin);
        int64_t c = 0;
        for (; c + LANES <= map.channels; c += LANES)
            body(begin * map.channels + c, count, c, std::integral_constant<int64_t, LANES>{});
        if (c < map.channels) body(begin * map.channels + c, count, c, map.channels - c);
    }
}

// total[c] = sum of x, or of (x - mean[c])^2
template <bool squared>
INLINE void moments(const float *x, const Map &map, const float *mean, double *total) {
    std::fill(total, total + map.channels, 0.0);
    for_strips(map, [&](int64_t start, int64_t count, int64_t channel, auto width) {
        float sum[LANES] = {}, level[LANES] = {};
        if (squared)
            for (int64_t l = 0; l < width; ++l) level[l] = mean[channel + l];
        const float *row = x + start;
        for (int64_t t = 0; t < count; ++t, row += map.channels)
            for (int64_t l = 0; l < width; ++l) {
                const float deviation = squared ? row[l] - level[l] : row[l];
                sum[l] += squared ? deviation * deviation : deviation;
            }
        for (int64_t l = 0; l < width; ++l) total[channel + l] += static_cast<double>(sum[l]);
    });
}

// sum_g[c] = sum of g; sum_gx[c] = sum of g * (x - mean[c])
INLINE void gradient_sums(const float *g, const float *x, const Map &map, const float *mean, double *sum_g,
                          double *sum_gx) {
    std::fill(sum_g, sum_g + map.channels, 0.0);
    std::fill(sum_gx, sum_gx + map.channels, 0.0);
    for_strips(map, [&](int64_t start, int64_t count, int64_t channel, auto width) {
        float sum[LANES] = {}, product[LANES] = {}, level[LANES] = {};
        for (int64_t l = 0; l < width; ++l) level[l] = mean[channel + l];
        const float *row_g = g + start, *row_x = x + start;
        for (int64_t t = 0; t < count; ++t, row_g += map.channels, row_x += map.channels)
            for (int64_t l = 0; l < width; ++l) {
                sum[l] += row_g[l];
                product[l] += row_g[l] * (row_x[l] - level[l]);
            }
        for (int64_t l = 0; l < width; ++l) {
            sum_g[channel + l] += static_cast<double>(sum[l]);
            sum_gx[channel + l] += static_cast<double>(product[l]);
        }
    });
}

// Sums a group's channels in eight independent parts, to hide the latency of additions.
INLINE double sum_of(const double *values, int64_t count) {
    double parts[8] = {}, rest = 0;
    int64_t c = 0;
    for (; c + 8 <= count; c += 8)
        for (int64_t l = 0; l < 8; ++l) parts[l] += values[c + l];
    for (; c < count; ++c) rest += values[c];
    return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7])) + rest;
}

FOR_EVERY_X86 void forward(const float *x, const float *gamma, const float *beta, Map map, double eps,
                           float *RESTRICT y, float *mean, float *rstd) {
    Scratch &s = scratch(map.channels);
    const int64_t size = map.in_group();
    double *total = s.first.data();
    float *RESTRICT a = s.a.data(), *RESTRICT b = s.b.data();
    moments<false>(x, map, nullptr, total);
    for (int64_t group = 0, begin = 0; group < map.groups; ++group, begin += size) {
        mean[group] = static_cast<float>(sum_of(total + begin, size) / map.count());
        std::fill(a + begin, a + begin + size, mean[group]);
    }
    moments<true>(x, map, a, total);
    for (int64_t group = 0, begin = 0; group < map.groups; ++group, begin += size) {
        const double variance = sum_of(total + begin, size) / map.count();
        const float m = mean[group], r = static_cast<float>(1.0 / std::sqrt(variance + eps));
        rstd[group] = r;
        for (int64_t c = begin; c < begin + size; ++c) {
            a[c] = gamma ? gamma[c] * r : r;
            b[c] = (beta ? beta[c] : 0.0f) - a[c] * m;
        }
    }
    for_strips(map, [&](int64_t start, int64_t count, int64_t channel, auto width) {
        const float *row = x + start;
        float *RESTRICT out = y + start;
        for (int64_t t = 0; t < count; ++t, row += map.channels, out += map.channels)
            for (int64_t l = 0; l < width; ++l) out[l] = a[channel + l] * row[l] + b[channel + l];
    });
}

// With sums over a group, grad_x = rstd (gamma g - sum(gamma g) / N - normalized * sum(gamma g normalized) / N).
FOR_EVERY_X86 void backward(const float *g, const float *x, const float *gamma, const float *mean, const float *rstd,
                            Map map, float *RESTRICT grad_x, float *grad_gamma, float *grad_beta) {
    Scratch &s = scratch(map.channels);
    const int64_t size = map.in_group();
    double *sum_g = s.first.data(), *sum_gx = s.second.data();
    float *RESTRICT a = s.a.data(), *RESTRICT b = s.b.data(), *RESTRICT k = s.c.data();
    for (int64_t group = 0, begin = 0; group < map.groups; ++group, begin += size)
        std::fill(a + begin, a + begin + size, mean[group]);
    gradient_sums(g, x, map, a, sum_g, sum_gx);
    for (int64_t group = 0, begin = 0; group < map.groups; ++group, begin += size) {
        const double r = rstd[group];
        for (int64_t c = begin; c < begin + size; ++c) {
            sum_gx[c] *= r;
            grad_beta[c] = static_cast<float>(sum_g[c]);
            grad_gamma[c] = static_cast<float>(sum_gx[c]);
        }
        if (gamma)
            for (int64_t c = begin; c < begin + size; ++c) {
                sum_g[c] *= gamma[c];
                sum_gx[c] *= gamma[c];
            }
        const double slope = -r * r * sum_of(sum_gx + begin, size) / map.count();
        const double level = -r * sum_of(sum_g + begin, size) / map.count() - slope * mean[group];
        for (int64_t c = begin; c < begin + size; ++c) {
            a[c] = static_cast<float>(r) * (gamma ? gamma[c] : 1.0f);
            b[c] = static_cast<float>(slope);
            k[c] = static_cast<float>(level);
        }
    }
    // Whole rows, not strips: with three maps at once, sequential memory access is faster.
    for (int64_t t = 0; t < map.positions; ++t, g += map.channels, x += map.channels, grad_x += map.channels)
        for (int64_t c = 0; c < map.channels; ++c) grad_x[c] = a[c] * g[c] + (b[c] * x[c] + k[c]);
}

using Floats = nb::ndarray<const float, nb::device::cpu>;
using Out = nb::ndarray<float, nb::device::cpu>;

// Returns the number of maps in x.
int64_t examples(const Floats &x, const Map &map) {
    const auto values = static_cast<int64_t>(x.size());
    const bool positive = map.positions > 0 && map.channels > 0 && map.groups > 0;
    if (!positive || map.channels % map.groups != 0 || values % map.size() != 0)
        throw std::invalid_argument("sizes of x, positions, channels and groups do not agree");
    return values / map.size();
}

}  // namespace

void bind_norms(nb::module_ &m) {
    m.def(
        "group_norm",
        [](Floats x, std::optional<Floats> gamma, std::optional<Floats> beta, Out y, Out mean, Out rstd,
           int64_t positions, int64_t channels, int64_t groups, double eps, int threads) {
            const Map map{positions, channels, groups};
            const int64_t batch = examples(x, map);
            if (y.size() != x.size() || static_cast<int64_t>(mean.size()) != batch * groups ||
                rstd.size() != mean.size() || (gamma && static_cast<int64_t>(gamma->size()) != channels) ||
                (beta && static_cast<int64_t>(beta->size()) != channels))
                throw std::invalid_argument("sizes do not agree");
            const float *weight = gamma ? gamma->data() : nullptr, *bias = beta ? beta->data() : nullptr;
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                forward(x.data() + b * map.size(), weight, bias, map, eps, y.data() + b * map.size(),
                        mean.data() + b * groups, rstd.data() + b * groups);
            });
        },
        nb::arg("x").noconvert(), nb::arg("gamma").noconvert().none(), nb::arg("beta").noconvert().none(),
        nb::arg("y").noconvert(), nb::arg("mean").noconvert(), nb::arg("rstd").noconvert(), nb::kw_only(),
        nb::arg("positions"), nb::arg("channels"), nb::arg("groups"), nb::arg("eps"), nb::arg("threads"),
        "Fill y, and mean and rstd (B, G), from channels-last x (B, T, C).");
    m.def(
        "group_norm_backward",
        [](Floats g, Floats x, std::optional<Floats> gamma, Floats mean, Floats rstd, Out grad_x, Out grad_gamma,
           Out grad_beta, int64_t positions, int64_t channels, int64_t groups, int threads) {
            const Map map{positions, channels, groups};
            const int64_t batch = examples(x, map);
            if (g.size() != x.size() || grad_x.size() != x.size() ||
                static_cast<int64_t>(mean.size()) != batch * groups || rstd.size() != mean.size() ||
                static_cast<int64_t>(grad_gamma.size()) != batch * channels || grad_beta.size() != grad_gamma.size() ||
                (gamma && static_cast<int64_t>(gamma->size()) != channels))
                throw std::invalid_argument("sizes do not agree");
            const float *weight = gamma ? gamma->data() : nullptr;
            nb::gil_scoped_release unlocked;
            parallel_for(batch, threads, [&](int64_t b) {
                backward(g.data() + b * map.size(), x.data() + b * map.size(), weight, mean.data() + b * groups,
                         rstd.data() + b * groups, map, grad_x.data() + b * map.size(),
                         grad_gamma.data() + b * channels, grad_beta.data() + b * channels);
            });
        },
        nb::arg("g").noconvert(), nb::arg("x").noconvert(), nb::arg("gamma").noconvert().none(),
        nb::arg("mean").noconvert(), nb::arg("rstd").noconvert(), nb::arg("grad_x").noconvert(),
        nb::arg("grad_gamma").noconvert(), nb::arg("grad_beta").noconvert(), nb::kw_only(), nb::arg("positions"),
        nb::arg("channels"), nb::arg("groups"), nb::arg("threads"),
        "Fill grad_x, and grad_gamma and grad_beta (B, C), from channels-last g and x (B, T, C).");
}

}  // namespace dpquant
