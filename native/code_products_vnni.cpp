// SPDX-License-Identifier: Apache-2.0
//
// The AVX-512 VNNI kernel of code_products.cpp: tiles of up to 12 outputs x 32 channels, whose int32 sums stay in registers.

#include "code_products.hpp"
#include "fours.hpp"

#ifdef HAS_TILES

namespace dpquant {
namespace {

constexpr int64_t LANES = ProductShape::LANES;
constexpr int64_t OUTPUTS = 12;                // of a tile: 24 of the 32 registers hold its sums
constexpr int64_t SHARED = 8 * OUTPUTS;        // outputs that share an example's channels, and whose totals stay in the first-level cache
constexpr int64_t CACHED = 1 << 21;            // bytes of examples that are packed at once
constexpr int64_t MOST_EXAMPLES = 64;

// A packed example.
struct Packed {
    std::vector<uint8_t> x;       // see `pack_x`
    std::vector<int32_t> g;       // see `pack_g`
    std::vector<int32_t> excess;  // (tall): 128 times the sums of g, negated
};

VNNI void pack(const uint8_t *x, const uint8_t *g, const ProductShape &s, Packed &p) {
    const int64_t tall = s.tall(), fours = s.used_fours();
    pack_x(x, s, p.x);
    pack_g(g, s, fours, p.g);
    p.excess.resize(static_cast<size_t>(tall));
    for (int64_t o = 0; o < tall; o += LANES) {
        __m512i excess = _mm512_setzero_si512();
        for (int64_t four = 0; four < fours; ++four)
            excess = add_excess(excess, _mm512_loadu_si512(p.g.data() + four * tall + o));
        _mm512_storeu_si512(p.excess.data() + o, _mm512_sub_epi32(_mm512_setzero_si512(), excess));
    }
}

// Sums for `n_out` outputs and `n_vec` vectors of channels.
template <int n_out, int n_vec>
VNNI inline void multiply(const Packed &p, const uint8_t *x, const ProductShape &s, int64_t o, __m512i (&sums)[n_out][n_vec]) {
    UNROLLED for (int k = 0; k < n_out; ++k)
        UNROLLED for (int v = 0; v < n_vec; ++v) sums[k][v] = _mm512_set1_epi32(p.excess[static_cast<size_t>(o + k)]);
    const int32_t *g = p.g.data() + o;
    const int64_t fours = s.used_fours(), g_step = s.tall(), x_step = s.wide() * 4;
    for (int64_t four = 0; four < fours; ++four, g += g_step, x += x_step) {
        __m512i seen[n_vec];
        UNROLLED for (int v = 0; v < n_vec; ++v) seen[v] = _mm512_loadu_si512(x + v * 64);
        UNROLLED for (int k = 0; k < n_out; ++k) {
            const __m512i factor = _mm512_set1_epi32(g[k]);
            UNROLLED for (int v = 0; v < n_vec; ++v) sums[k][v] = add_fours(sums[k][v], seen[v], factor);
        }
    }
}

// Stores the sums, if `out` is given, and adds their squares in float64. Lanes that pad are zero.
struct Store {
    float *out;
    int64_t depth;
    Lanes16 lanes[2];
    __m512d squares[4];  // several, so that additions need not wait for each other

    VNNI void take(__m512i sums, int64_t o, int v) {
        const __m512 values = _mm512_cvtepi32_ps(sums);
        if (out) lanes[v].store(out + o * depth + v * LANES, values);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(values)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(values, 1));
        squares[2 * v] = _mm512_fmadd_pd(low, low, squares[2 * v]);
        squares[2 * v + 1] = _mm512_fmadd_pd(high, high, squares[2 * v + 1]);
    }
};

// Adds the sums times a weight to `out`.
struct Add {
    float *out;
    int64_t depth;
    Lanes16 lanes[2];
    __m512 weight;

    VNNI void take(__m512i sums, int64_t o, int v) {
        float *to = out + o * depth + v * LANES;
        lanes[v].store(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), weight, lanes[v].loaded(to)));
    }
};

template <int n_out, int n_vec, class Sink>
VNNI inline void block(const Packed &p, const uint8_t *x, const ProductShape &s, int64_t o, Sink &sink) {
    __m512i sums[n_out][n_vec];
    multiply(p, x, s, o, sums);
    UNROLLED for (int k = 0; k < n_out; ++k)
        UNROLLED for (int v = 0; v < n_vec; ++v) sink.take(sums[k][v], o + k, v);
}

// Computes the sums of outputs first .. last - 1.
template <int n_vec, class Sink>
VNNI void outputs(const Packed &p, const uint8_t *x, const ProductShape &s, int64_t first, int64_t last, Sink &sink) {
    int64_t o = first;
    for (; o + OUTPUTS <= last; o += OUTPUTS) block<OUTPUTS, n_vec>(p, x, s, o, sink);
    for (; o + 4 <= last; o += 4) block<4, n_vec>(p, x, s, o, sink);
    for (; o < last; ++o) block<1, n_vec>(p, x, s, o, sink);
}

template <class Sink>
VNNI void outputs(const Packed &p, const uint8_t *x, const ProductShape &s, int64_t c, int64_t first, int64_t last, Sink &sink) {
    if (c + LANES < s.channels)
        outputs<2>(p, x + c * 4, s, first, last, sink);
    else
        outputs<1>(p, x + c * 4, s, first, last, sink);
}

// Calls body(taps' place in `out`, the fours that it reads, first channel) for every tap and 32 channels.
template <class Body>
VNNI void for_channels(const ProductShape &s, const Body &body) {
    for (int64_t i = 0; i < s.rows.kernel; ++i)
        for (int64_t j = 0; j < s.columns.kernel; ++j)
            for (int64_t c = 0; c < s.channels; c += 2 * LANES) body(i, j, c, (i * s.columns.kernel + j) * s.channels + c);
}

}  // namespace

VNNI double store_example_vnni(const uint8_t *x, const uint8_t *g, const ProductShape &s, float *out) {
    thread_local Packed packed;
    pack(x, g, s, packed);
    Store sink{nullptr, s.depth(), {Lanes16(0), Lanes16(0)}, {}};
    for_channels(s, [&](int64_t i, int64_t j, int64_t c, int64_t place) VNNI {
        sink.out = out ? out + place : nullptr;
        sink.lanes[0] = Lanes16(s.channels - c), sink.lanes[1] = Lanes16(s.channels - c - LANES);
        outputs(packed, s.tap(packed.x.data(), i, j), s, c, 0, s.outputs, sink);
    });
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sink.squares[0], sink.squares[1]), _mm512_add_pd(sink.squares[2], sink.squares[3])));
}

VNNI void add_examples_vnni(const uint8_t *x, const uint8_t *g, const ProductShape &s, const float *weights, int64_t count, float *out) {
    thread_local std::vector<Packed> packed;
    const int64_t size = s.columns.kernel * s.rows.stride * s.plane_fours() * s.wide() * 4 + s.used_fours() * s.tall() * 4;
    const int64_t at_once = std::clamp<int64_t>(CACHED / size, 1, MOST_EXAMPLES);
    packed.resize(static_cast<size_t>(at_once));
    for (int64_t first = 0; first < count; first += at_once) {
        const int64_t some = std::min(at_once, count - first);
        for (int64_t b = 0; b < some; ++b)
            pack(x + (first + b) * s.x_size(), g + (first + b) * s.g_size(), s, packed[static_cast<size_t>(b)]);
        for_channels(s, [&](int64_t i, int64_t j, int64_t c, int64_t place) VNNI {
            for (int64_t o = 0; o < s.outputs; o += SHARED)
                for (int64_t b = 0; b < some; ++b) {
                    const Packed &p = packed[static_cast<size_t>(b)];
                    Add sink{out + place, s.depth(), {Lanes16(s.channels - c), Lanes16(s.channels - c - LANES)}, _mm512_set1_ps(weights[first + b])};
                    outputs(p, s.tap(p.x.data(), i, j), s, c, o, std::min(o + SHARED, s.outputs), sink);
                }
        });
    }
}

}  // namespace dpquant
#endif
