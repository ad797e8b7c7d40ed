// SPDX-License-Identifier: Apache-2.0
//
// Products of float32 matrices whose operands lie in the first caches, a tile of sums in registers at a time.
// Contraction to fused multiply-add is wanted here; the files that include this are compiled with it.

#pragma once

#include <cstdint>

#include "parallel.hpp"
#include "tiles.hpp"

#ifdef HAS_TILES
#define AVX512_FLOATS __attribute__((target("arch=x86-64-v4")))
#define AVX2_FLOATS __attribute__((target("arch=x86-64-v3")))

namespace dpquant {

template <int bytes>
struct Vector {
    typedef float Type __attribute__((vector_size(bytes), aligned(4), may_alias));
    static constexpr int lanes = bytes / 4;
};

// A matrix of factors, of which one at a time is multiplied by a vector: element (m, t) is at[m * row + t * step].
struct Factors {
    const float *at;
    int64_t row, step;

    INLINE Factors from(int64_t m) const { return {at + m * row, row, step}; }
};

// out[m, n] (+)= sum over t < count of a(m, t) * b[t * b_step + n], for n_row rows and n_vec vectors of columns.
template <int bytes, int n_row, int n_vec, bool adds>
INLINE void tile(Factors a, const float *b, int64_t b_step, int64_t count, float *out, int64_t out_row) {
    using V = typename Vector<bytes>::Type;
    constexpr int lanes = Vector<bytes>::lanes;
    V sums[n_row][n_vec];
    for (int m = 0; m < n_row; ++m)
        for (int v = 0; v < n_vec; ++v)
            sums[m][v] = adds ? *reinterpret_cast<const V *>(out + m * out_row + v * lanes) : V{};
    for (int64_t t = 0; t < count; ++t, a.at += a.step, b += b_step) {
        V seen[n_vec];
        for (int v = 0; v < n_vec; ++v) seen[v] = *reinterpret_cast<const V *>(b + v * lanes);
        for (int m = 0; m < n_row; ++m)
            for (int v = 0; v < n_vec; ++v) sums[m][v] += a.at[m * a.row] * seen[v];
    }
    for (int m = 0; m < n_row; ++m)
        for (int v = 0; v < n_vec; ++v) *reinterpret_cast<V *>(out + m * out_row + v * lanes) = sums[m][v];
}

// The same for any number of rows, most_rows at a time.
template <int bytes, int n_vec, int most_rows, bool adds>
INLINE void tiles_of_rows(Factors a, const float *b, int64_t b_step, int64_t count, float *out, int64_t out_row, int64_t rows) {
    int64_t m = 0;
    for (; m + most_rows <= rows; m += most_rows)
        tile<bytes, most_rows, n_vec, adds>(a.from(m), b, b_step, count, out + m * out_row, out_row);
    for (; m + 2 <= rows; m += 2) tile<bytes, 2, n_vec, adds>(a.from(m), b, b_step, count, out + m * out_row, out_row);
    for (; m < rows; ++m) tile<bytes, 1, n_vec, adds>(a.from(m), b, b_step, count, out + m * out_row, out_row);
}

// out (rows, columns) (+)= a (rows, count) times b (count, columns); columns are whole vectors.
template <int bytes, bool adds>
INLINE void products(Factors a, const float *b, int64_t b_step, int64_t count, float *out, int64_t out_row, int64_t rows, int64_t columns) {
    constexpr int lanes = Vector<bytes>::lanes, most_rows = bytes == 64 ? 8 : 6;  // of 32 and of 16 registers
    int64_t n = 0;
    for (; n + 2 * lanes <= columns; n += 2 * lanes)
        tiles_of_rows<bytes, 2, most_rows, adds>(a, b + n, b_step, count, out + n, out_row, rows);
    for (; n < columns; n += lanes) tiles_of_rows<bytes, 1, most_rows, adds>(a, b + n, b_step, count, out + n, out_row, rows);
}

}  // namespace dpquant
#endif
