// SPDX-License-Identifier: Apache-2.0
//
// Attention in float32, one head of one example at a time, and its gradients:
//
//     p[t, s] = softmax over s of (scale * q[t] k[s] + mask[t, s]),        out[t] = sum over s of p[t, s] v[s]
//
// dpquant/engine/fused_attention.py defines the result. A block of queries and their probabilities stay in the cache; the
// gradients compute the probabilities again, so that nothing is kept but q, k and v. A head's sums are formed by one thread in
// one order, so that no bit of an example follows from another.
//
// Symbols: B examples, N heads, L queries, S keys, E features of a head; W keys, rounded up to whole vectors.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "float_tiles.hpp"
#include "tiles.hpp"

namespace nb = nanobind;

namespace dpquant {
namespace {

constexpr int64_t QUERIES = 48;  // of a block; a multiple of the rows of a tile
constexpr int64_t LANES = 16;    // the number of features is a multiple of it

// One head of one example: rows of contiguous features; no mask is a null pointer.
template <class Float>
struct Rows {
    Float *at;
    int64_t row;

    Float *operator[](int64_t t) const { return at + t * row; }
};

struct Head {
    Rows<const float> q, k, v, mask, grad;
    Rows<float> out, grad_q, grad_k, grad_v;  // those that are filled
};

struct Shape {
    int64_t batch, heads, queries, keys, features;
    float scale;
    bool causal;

    int64_t width() const { return (keys + LANES - 1) / LANES * LANES; }
};

#ifdef HAS_TILES
// Buffers of a thread, reused for all of its heads: the transposes of k and v, probabilities and their gradients.
struct Scratch {
    std::vector<float> keys, values, p, grad_p;

    void resize(const Shape &s) {
        for (auto *one : {&keys, &values}) one->resize(s.features * s.width());
        for (auto *one : {&p, &grad_p}) one->resize(QUERIES * s.width());
    }
};

Scratch &scratch(const Shape &s) {
    thread_local Scratch mine;
    mine.resize(s);
    return mine;
}

// e^x for x <= 0, to 3 in 10^7; zero below e^-87; NaN stays NaN.
template <int bytes>
INLINE typename Vector<bytes>::Type exponential(typename Vector<bytes>::Type x) {
    using V = typename Vector<bytes>::Type;
    typedef int32_t Bits __attribute__((vector_size(bytes), aligned(4), may_alias));
    constexpr float TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: its last bit is worth one
    const V shifted = x * 1.44269504f + TO_INTEGER, whole = shifted - TO_INTEGER;
    const V rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first of few bits
    V sum = rest * (1.0f / 5040.0f) + 1.0f / 720.0f;
    sum = sum * rest + 1.0f / 120.0f;
    sum = sum * rest + 1.0f / 24.0f;
    sum = sum * rest + 1.0f / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    const Bits power = (reinterpret_cast<const Bits &>(shifted) << 23) + 0x3f800000;
    const V value = sum * reinterpret_cast<const V &>(power);
    return x < -87.0f ? V{} : value;
}

template <int bytes>
INLINE float total(typename Vector<bytes>::Type x) {
    float sum = 0;
    for (int l = 0; l < Vector<bytes>::lanes; ++l) sum += x[l];
    return sum;
}

// to (E, W) = the transpose of from (S, E), with zeros in its last columns
template <int bytes>
INLINE void transposed(Rows<const float> from, float *to, const Shape &s) {
    const int64_t width = s.width();
    for (int64_t key = 0; key < width; key += LANES)
        for (int64_t e = 0; e < s.features; e += LANES) {
            alignas(64) float square[LANES][LANES] = {};
            for (int64_t n = 0; n < std::min(LANES, s.keys - key); ++n) std::copy_n(from[key + n] + e, LANES, square[n]);
            if constexpr (bytes == 64)
                transpose(reinterpret_cast<__m512i *>(square));
            else
                for (int64_t n = 0; n < LANES; ++n)
                    for (int64_t m = 0; m < n; ++m) std::swap(square[n][m], square[m][n]);
            for (int64_t n = 0; n < LANES; ++n) std::copy_n(square[n], LANES, to + (e + n) * width + key);
        }
}

// to (count, W) = rows of features times a transpose
template <int bytes>
INLINE void times_transposed(Rows<const float> rows, const float *transposed, float *to, int64_t count, const Shape &s) {
    products<bytes, false>({rows.at, rows.row, 1}, transposed, s.width(), s.features, to, s.width(), count, s.width());
}

// to (count, E) (+)= factors (count, depth) times rows (depth, E)
template <int bytes, bool adds>
INLINE void times_rows(Factors a, Rows<const float> rows, int64_t depth, Rows<float> to, int64_t count, const Shape &s) {
    products<bytes, adds>(a, rows.at, rows.row, depth, to.at, to.row, count, s.features);
}

// Replaces the scores of queries begin .. begin + count - 1 by probabilities.
template <int bytes>
INLINE void softmax(float *scores, int64_t begin, int64_t count, const Head &head, const Shape &s) {
    using V = typename Vector<bytes>::Type;
    constexpr int lanes = Vector<bytes>::lanes;
    constexpr float LEAST = -std::numeric_limits<float>::infinity();
    const int64_t width = s.width();
    for (int64_t t = 0; t < count; ++t, scores += width) {
        const int64_t seen = s.causal ? std::min(begin + t + 1, s.keys) : s.keys;
        const float *mask = head.mask.at ? head.mask[begin + t] : nullptr;
        const int64_t whole = s.keys / lanes * lanes;
        int64_t n = 0;
        for (; n < whole; n += lanes) {
            V &x = *reinterpret_cast<V *>(scores + n);
            x = mask ? x * s.scale + *reinterpret_cast<const V *>(mask + n) : x * s.scale;
        }
        for (; n < s.keys; ++n) scores[n] = scores[n] * s.scale + (mask ? mask[n] : 0.0f);
        std::fill(scores + seen, scores + width, LEAST);
        V largest = V{} + LEAST;
        for (n = 0; n < width; n += lanes) {
            const V &x = *reinterpret_cast<const V *>(scores + n);
            largest = x > largest ? x : largest;
        }
        float most = LEAST;
        for (int l = 0; l < lanes; ++l) most = std::max(most, largest[l]);
        if (most == LEAST) most = 0;  // everything is masked: probabilities of zero, as torch has them
        V sums{};
        for (n = 0; n < width; n += lanes) {
            V &x = *reinterpret_cast<V *>(scores + n);
            x = exponential<bytes>(x - most);
            sums += x;
        }
        const float sum = total<bytes>(sums), inverse = sum == 0 ? 0 : 1 / sum;
        for (n = 0; n < width; n += lanes) *reinterpret_cast<V *>(scores + n) *= inverse;
    }
}

template <int bytes>
INLINE void forward(const Head &head, const Shape &s) {
    Scratch &mine = scratch(s);
    float *const p = mine.p.data();
    transposed<bytes>(head.k, mine.keys.data(), s);
    for (int64_t begin = 0; begin < s.queries; begin += QUERIES) {
        const int64_t count = std::min(QUERIES, s.queries - begin);
        times_transposed<bytes>({head.q[begin], head.q.row}, mine.keys.data(), p, count, s);
        softmax<bytes>(p, begin, count, head, s);
        times_rows<bytes, false>({p, s.width(), 1}, head.v, s.keys, {head.out[begin], head.out.row}, count, s);
    }
}

// Replaces the gradients of probabilities by those of q k^T.
template <int bytes>
INLINE void softmax_backward(const float *p, float *grad, int64_t count, const Shape &s) {
    using V = typename Vector<bytes>::Type;
    constexpr int lanes = Vector<bytes>::lanes;
    const int64_t width = s.width();
    for (int64_t t = 0; t < count; ++t, p += width, grad += width) {
        V sums{};
        for (int64_t n = 0; n < width; n += lanes)
            sums += *reinterpret_cast<const V *>(p + n) * *reinterpret_cast<const V *>(grad + n);
        const float mean = total<bytes>(sums);
        for (int64_t n = 0; n < width; n += lanes) {
            V &g = *reinterpret_cast<V *>(grad + n);
            g = *reinterpret_cast<const V *>(p + n) * (g - mean) * s.scale;
        }
    }
}

template <int bytes>
INLINE void backward(const Head &head, const Shape &s) {
    Scratch &mine = scratch(s);
    float *const p = mine.p.data(), *const g = mine.grad_p.data();
    const int64_t width = s.width();
    transposed<bytes>(head.k, mine.keys.data(), s);
    transposed<bytes>(head.v, mine.values.data(), s);
    for (int64_t key = 0; key < s.keys; ++key) {
        std::fill(head.grad_k[key], head.grad_k[key] + s.features, 0.0f);
        std::fill(head.grad_v[key], head.grad_v[key] + s.features, 0.0f);
    }
    for (int64_t begin = 0; begin < s.queries; begin += QUERIES) {
        const int64_t count = std::min(QUERIES, s.queries - begin);
        const Rows<const float> q{head.q[begin], head.q.row}, grad{head.grad[begin], head.grad.row};
        times_transposed<bytes>(q, mine.keys.data(), p, count, s);
        softmax<bytes>(p, begin, count, head, s);
        times_rows<bytes, true>({p, 1, width}, grad, count, head.grad_v, s.keys, s);
        times_transposed<bytes>(grad, mine.values.data(), g, count, s);
        softmax_backward<bytes>(p, g, count, s);
        times_rows<bytes, true>({g, 1, width}, q, count, head.grad_k, s.keys, s);
        times_rows<bytes, false>({g, width, 1}, head.k, s.keys, {head.grad_q[begin], head.grad_q.row}, count, s);
    }
}

AVX512_FLOATS void forward_avx512(const Head &head, const Shape &s) { forward<64>(head, s); }
AVX512_FLOATS void backward_avx512(const Head &head, const Shape &s) { backward<64>(head, s); }
AVX2_FLOATS void forward_avx2(const Head &head, const Shape &s) { forward<32>(head, s); }
AVX2_FLOATS void backward_avx2(const Head &head, const Shape &s) { backward<32>(head, s); }
#endif

using Floats = nb::ndarray<const float, nb::ndim<4>, nb::device::cpu>;
using Filled = nb::ndarray<float, nb::ndim<4>, nb::device::cpu>;

template <class Array>
bool fits(const Array &array, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
    return static_cast<int64_t>(array.shape(0)) == batch && static_cast<int64_t>(array.shape(1)) == heads &&
           static_cast<int64_t>(array.shape(2)) == rows && static_cast<int64_t>(array.shape(3)) == columns &&
           (columns == 1 || array.stride(3) == 1);
}

Shape shape_of(const Floats &q, const Floats &k, const Floats &v, const std::optional<Floats> &mask, float scale, bool causal) {
    const Shape s{static_cast<int64_t>(q.shape(0)), static_cast<int64_t>(q.shape(1)), static_cast<int64_t>(q.shape(2)),
                  static_cast<int64_t>(k.shape(2)), static_cast<int64_t>(q.shape(3)), scale, causal};
    const auto like = [&](const Floats &array, int64_t rows) { return fits(array, s.batch, s.heads, rows, s.features); };
    if (s.features % LANES != 0 || s.keys == 0 || !like(q, s.queries) || !like(k, s.keys) || !like(v, s.keys) ||
        (mask && !fits(*mask, s.batch, s.heads, s.queries, s.keys)))
        throw std::invalid_argument("sizes or strides of q, k, v and mask do not fit");
    return s;
}

template <class Array>
auto rows_of(const Array &array, int64_t example, int64_t head) {
    return Rows<std::remove_pointer_t<decltype(array.data())>>{
        array.data() + example * array.stride(0) + head * array.stride(1), array.stride(2)};
}

Rows<const float> rows_of(const std::optional<Floats> &array, int64_t example, int64_t head) {
    return array ? rows_of(*array, example, head) : Rows<const float>{};
}

}  // namespace

void bind_attention(nb::module_ &m) {
    m.def(
        "attention",
        [](Floats q, Floats k, Floats v, std::optional<Floats> mask, Filled out, float scale, bool causal,
           const std::string &kernel, [[maybe_unused]] int threads) {
            check_kernel(float_kernels(), kernel);
            const Shape s = shape_of(q, k, v, mask, scale, causal);
            if (!fits(out, s.batch, s.heads, s.queries, s.features)) throw std::invalid_argument("out does not fit q");
            nb::gil_scoped_release unlocked;
#ifdef HAS_TILES
            const auto run = kernel == "avx512" ? forward_avx512 : forward_avx2;
            parallel_for(s.batch * s.heads, threads, [&](int64_t i) {
                const auto of = [&](const auto &array) { return rows_of(array, i / s.heads, i % s.heads); };
                run({.q = of(q), .k = of(k), .v = of(v), .mask = of(mask), .out = of(out)}, s);
            });
#endif
        },
        nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(), nb::arg("mask").noconvert().none(),
        nb::arg("out").noconvert(), nb::kw_only(), nb::arg("scale"), nb::arg("causal"), nb::arg("kernel"), nb::arg("threads"),
        "Fill out (B, N, L, E) from q (B, N, L, E), k and v (B, N, S, E) and a mask (B, N, L, S) that is added to the scores.");
    m.def(
        "attention_backward",
        [](Floats q, Floats k, Floats v, std::optional<Floats> mask, Floats grad, Filled grad_q, Filled grad_k, Filled grad_v,
           float scale, bool causal, const std::string &kernel, [[maybe_unused]] int threads) {
            check_kernel(float_kernels(), kernel);
            const Shape s = shape_of(q, k, v, mask, scale, causal);
            if (!fits(grad, s.batch, s.heads, s.queries, s.features) || !fits(grad_q, s.batch, s.heads, s.queries, s.features) ||
                !fits(grad_k, s.batch, s.heads, s.keys, s.features) || !fits(grad_v, s.batch, s.heads, s.keys, s.features))
                throw std::invalid_argument("gradients do not fit q, k and v");
            nb::gil_scoped_release unlocked;
#ifdef HAS_TILES
            const auto run = kernel == "avx512" ? backward_avx512 : backward_avx2;
            parallel_for(s.batch * s.heads, threads, [&](int64_t i) {
                const auto of = [&](const auto &array) { return rows_of(array, i / s.heads, i % s.heads); };
                run({.q = of(q), .k = of(k), .v = of(v), .mask = of(mask), .grad = of(grad),
                     .grad_q = of(grad_q), .grad_k = of(grad_k), .grad_v = of(grad_v)}, s);
            });
#endif
        },
        nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(), nb::arg("mask").noconvert().none(),
        nb::arg("grad").noconvert(), nb::arg("grad_q").noconvert(), nb::arg("grad_k").noconvert(), nb::arg("grad_v").noconvert(),
        nb::kw_only(), nb::arg("scale"), nb::arg("causal"), nb::arg("kernel"), nb::arg("threads"),
        "Fill the gradients of q, k and v from that of out (B, N, L, E); arguments as for `attention`.");
}

}  // namespace dpquant
