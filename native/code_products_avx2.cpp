// SPDX-License-Identifier: Apache-2.0
//
// The AVX2 kernel of code_products.cpp: tiles of outputs x channels; quads.hpp multiplies.

#include "code_products.hpp"
#include "quads.hpp"

#ifdef HAS_TILES

namespace dpquant {
namespace {

constexpr int64_t LANES = 8;

constexpr int64_t CACHED = 1 << 18, MOST_EXAMPLES = 16;  // bytes and number of examples that are packed at once
constexpr int64_t OUTPUTS = 12;  // whose totals stay in the first-level cache

// A packed example.
struct Packed {
    std::vector<uint8_t> x;       // see `pack_x`
    std::vector<int32_t> g;       // see `pack_g`
    std::vector<int32_t> excess;  // (fours / 3, tall), see `excess_of`
    Quads quads;                  // of g's rows and no columns yet
};

AVX2 void fill_excess(const ProductShape &s, Packed &p) {
    const int64_t tall = s.tall(), triples = s.used_fours() / TRIPLE;
    p.excess.resize(static_cast<size_t>(triples * tall));
    for (int64_t k = 0; k < triples; ++k)
        for (int64_t o = 0; o < tall; o += LANES) {
            const int32_t *g = p.g.data() + k * TRIPLE * tall + o;
            const __m256i bytes[TRIPLE] = {load(g), load(g + tall), load(g + 2 * tall)};
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(p.excess.data() + k * tall + o), excess_of(bytes));
        }
}

AVX2 void pack(const uint8_t *x, const uint8_t *g, const ProductShape &s, Packed &p) {
    pack_x(x, s, p.x);
    pack_g(g, s, s.used_fours(), p.g);
    const bool in_triples = fit_in_triples(largest(x, s.x_size()), largest(g, s.g_size()));
    if (in_triples) fill_excess(s, p);
    p.quads = {p.g.data(), s.tall(), nullptr, s.wide(), in_triples ? p.excess.data() : nullptr, s.used_fours()};
}

// Stores the sums, if `out` is given, and adds their squares in float64. Lanes that pad are zero.
struct Store {
    float *out;
    int64_t depth;
    Lanes lanes[2];
    __m256d squares;

    AVX2 void take(__m256i sums, int64_t o, int v) {
        const __m256 values = _mm256_cvtepi32_ps(sums);
        if (out) lanes[v].store(out + o * depth + v * LANES, values);
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(values)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
        squares = _mm256_fmadd_pd(low, low, _mm256_fmadd_pd(high, high, squares));
    }
};

// Adds the sums times a weight to `out`.
struct Add {
    float *out;
    int64_t depth;
    Lanes lanes[2];
    float weight;

    AVX2 void take(__m256i sums, int64_t o, int v) {
        float *to = out + o * depth + v * LANES;
        lanes[v].store(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(weight), lanes[v].loaded(to)));
    }
};

template <int n_out, class Sink>
AVX2 inline void block(const Quads &q, int64_t o, Sink &sink) {
    __m256i sums[n_out][2];
    multiply(q.at(o, 0), sums);
    UNROLLED for (int k = 0; k < n_out; ++k)
        UNROLLED for (int v = 0; v < 2; ++v) sink.take(sums[k][v], o + k, v);
}

// Computes the sums of outputs first .. last - 1.
template <class Sink>
AVX2 void outputs(const Quads &q, int64_t first, int64_t last, Sink &sink) {
    int64_t o = first;
    for (; o + 6 <= last; o += 6) block<6>(q, o, sink);
    for (; o + 2 <= last; o += 2) block<2>(q, o, sink);
    for (; o < last; ++o) block<1>(q, o, sink);
}

Quads columns_of(const Packed &p, const ProductShape &s, int64_t i, int64_t j, int64_t c) {
    Quads q = p.quads;
    q.columns = reinterpret_cast<const int32_t *>(s.tap(p.x.data(), i, j)) + c;
    return q;
}

int64_t place(const ProductShape &s, int64_t i, int64_t j, int64_t c) { return (i * s.columns.kernel + j) * s.channels + c; }

}  // namespace

AVX2 double store_example_avx2(const uint8_t *x, const uint8_t *g, const ProductShape &s, float *out) {
    thread_local Packed packed;
    pack(x, g, s, packed);
    __m256d squares = _mm256_setzero_pd();
    for (int64_t i = 0; i < s.rows.kernel; ++i)
        for (int64_t j = 0; j < s.columns.kernel; ++j)
            for (int64_t c = 0; c < s.channels; c += 2 * LANES) {
                Store sink{out ? out + place(s, i, j, c) : nullptr, s.depth(), {Lanes(s.channels - c), Lanes(s.channels - c - LANES)}, squares};
                outputs(columns_of(packed, s, i, j, c), 0, s.outputs, sink);
                squares = sink.squares;
            }
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, squares);
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

AVX2 void add_examples_avx2(const uint8_t *x, const uint8_t *g, const ProductShape &s, const float *weights, int64_t count, float *out) {
    thread_local std::vector<Packed> packed;
    const int64_t size = s.columns.kernel * s.rows.stride * s.plane_fours() * s.wide() * 4 + s.used_fours() * s.tall() * 4;
    const int64_t at_once = std::clamp<int64_t>(CACHED / size, 1, MOST_EXAMPLES);
    packed.resize(static_cast<size_t>(at_once));
    for (int64_t first = 0; first < count; first += at_once) {
        const int64_t some = std::min(at_once, count - first);
        for (int64_t b = 0; b < some; ++b)
            pack(x + (first + b) * s.x_size(), g + (first + b) * s.g_size(), s, packed[static_cast<size_t>(b)]);
        for (int64_t i = 0; i < s.rows.kernel; ++i)
            for (int64_t j = 0; j < s.columns.kernel; ++j)
                for (int64_t c = 0; c < s.channels; c += 2 * LANES)
                    for (int64_t o = 0; o < s.outputs; o += OUTPUTS)
                        for (int64_t b = 0; b < some; ++b) {
                            Add sink{out + place(s, i, j, c), s.depth(), {Lanes(s.channels - c), Lanes(s.channels - c - LANES)}, weights[first + b]};
                            outputs(columns_of(packed[static_cast<size_t>(b)], s, i, j, c), o, std::min(o + OUTPUTS, s.outputs), sink);
                        }
    }
}

}  // namespace dpquant
#endif
