// SPDX-License-Identifier: Apache-2.0
//
// Exact sums of products of unsigned and signed bytes on AVX2, which has no instruction that sums them in 32 bits.
//
// vpmaddubsw multiplies bytes and adds pairs in 16 bits. It saturates, and 16 bits hold few sums. Unsigned bytes are codes plus
// 128. So with codes of at most `u` and `s` in magnitude:
//
//     a pair is at most               2 (128 + u) s      which must not saturate
//     three pairs, without the 128s,  6 u s              which must fit in 16 bits
//
// Sums of pairs wrap around. So if 128 times the sum of the six signed codes is subtracted in 16 bits, the sum of six products of
// codes is exact; vpmaddwd then adds two such sums in 32 bits. Both conditions hold for codes of at most 73, so for LUQ-FP4 (64).
// Other codes are widened to 16 bits, which is exact for all bytes and takes nearly twice the time.
//
// A dword holds four bytes, a triple is three dwords: twelve products.

#pragma once

#include <cstdint>
#include <cstdlib>

#include "parallel.hpp"
#include "tiles.hpp"

namespace dpquant {

constexpr int64_t TRIPLE = 3;

// Whether codes of these magnitudes can be multiplied in triples.
inline bool fit_in_triples(int64_t most_unsigned, int64_t most_signed) {
    constexpr int64_t MOST = 32767;
    return 2 * (CODE_OF_ZERO + most_unsigned) * most_signed <= MOST && 2 * TRIPLE * most_unsigned * most_signed <= MOST;
}

}  // namespace dpquant

#ifdef HAS_TILES

#define AVX2 __attribute__((target("avx2,fma")))

namespace dpquant {

AVX2 inline __m256i load(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }

// The first `count` of eight lanes. Masked stores are slow on AMD processors, so whole vectors are moved without a mask.
class Lanes {
  public:
    AVX2 explicit Lanes(int64_t count)
        : whole_(count >= 8), mask_(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
    AVX2 __m256 loaded(const float *from) const { return whole_ ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, mask_); }
    AVX2 void store(float *to, __m256 values) const { whole_ ? _mm256_storeu_ps(to, values) : _mm256_maskstore_ps(to, mask_, values); }

  private:
    bool whole_;
    __m256i mask_;
};

// Broadcasts a dword from memory. As an integer it would pass through a general register, of which there are too few.
AVX2 inline __m256i broadcast(const void *dword) {
    return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float *>(dword)));
}

// Hides from the compiler that addresses are equal. It would keep what it has loaded in registers, and the sums in memory.
INLINE const int32_t *again(const int32_t *address) {
    asm volatile("" : "+r"(address));
    return address;
}

// Adds the twelve products of each lane to `sum`. `excess` is 128 times the sums of signed codes, by pairs, negated.
AVX2 inline __m256i add_triple(__m256i sum, const __m256i (&unsigned_bytes)[TRIPLE], const __m256i (&signed_bytes)[TRIPLE], __m256i excess) {
    __m256i pairs = excess;
    UNROLLED for (int k = 0; k < TRIPLE; ++k)
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(unsigned_bytes[k], signed_bytes[k]));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    asm("" : "+x"(sum));  // in this order: gcc would need more registers than there are
    return sum;
}

// Returns the negated excess of a triple of signed bytes.
AVX2 inline __m256i excess_of(const __m256i (&signed_bytes)[TRIPLE]) {
    __m256i pairs = _mm256_setzero_si256();
    UNROLLED for (int k = 0; k < TRIPLE; ++k)
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(_mm256_set1_epi8(1), signed_bytes[k]));
    return _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_slli_epi16(pairs, 7));
}

// Returns the largest magnitude of codes with zero point 128.
AVX2 inline int64_t largest(const uint8_t *codes, int64_t size) {
    __m256i most = _mm256_setzero_si256();
    int64_t k = 0, rest = 0;
    for (; k + 32 <= size; k += 32)
        most = _mm256_max_epu8(most, _mm256_abs_epi8(_mm256_xor_si256(load(codes + k), _mm256_set1_epi8(-128))));
    for (; k < size; ++k) rest = std::max<int64_t>(rest, std::abs(codes[k] - CODE_OF_ZERO));
    alignas(32) uint8_t lanes[32];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), most);
    return std::max<int64_t>(rest, *std::max_element(lanes, lanes + 32));
}

// The even and the odd bytes of each dword as 16-bit numbers: of signed bytes, and of codes with zero point 128.
struct Words {
    __m256i even, odd;
};
AVX2 inline Words words(__m256i signed_bytes) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(signed_bytes, 8), 8), _mm256_srai_epi16(signed_bytes, 8)};
}
AVX2 inline Words words_of_codes(__m256i codes) { return words(_mm256_xor_si256(codes, _mm256_set1_epi8(-128))); }

// Adds the four products of each lane to `sum`.
AVX2 inline __m256i add_words(__m256i sum, const Words &a, const Words &b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a.even, b.even));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a.odd, b.odd));
    asm("" : "+x"(sum));
    return sum;
}

// The sums over k of rows[row, k] * columns[k, column], for `depth` dwords k of four codes each. Steps are in dwords.
struct Quads {
    const int32_t *rows;     // signed, (depth, rows)
    int64_t rows_step;       // from k to k
    const int32_t *columns;  // with zero point 128, (depth, columns)
    int64_t columns_step;
    const int32_t *excess;  // of the rows' triples, (depth / 3, rows), with the same step; null: codes do not fit in triples
    int64_t depth;

    Quads at(int64_t row, int64_t column) const {
        Quads there = *this;
        there.rows += row, there.columns += column, there.excess += excess ? row : 0;
        return there;
    }
};

// Sums for `n_rows` rows and 16 columns.
template <int n_rows>
AVX2 inline void multiply(const Quads &q, __m256i (&sums)[n_rows][2]) {
    UNROLLED for (int r = 0; r < n_rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    const int32_t *rows = q.rows, *columns = q.columns, *excess = q.excess;
    int64_t k = 0;
    if (excess)
        for (; k + TRIPLE <= q.depth; k += TRIPLE, rows += TRIPLE * q.rows_step, columns += TRIPLE * q.columns_step, excess += q.rows_step)
            UNROLLED for (int r = 0; r < n_rows; ++r) {
                __m256i factors[TRIPLE];
                UNROLLED for (int i = 0; i < TRIPLE; ++i) factors[i] = broadcast(rows + i * q.rows_step + r);
                const int32_t *from = again(columns);
                UNROLLED for (int v = 0; v < 2; ++v) {
                    __m256i seen[TRIPLE];
                    UNROLLED for (int i = 0; i < TRIPLE; ++i) seen[i] = load(from + i * q.columns_step + v * 8);
                    sums[r][v] = add_triple(sums[r][v], seen, factors, broadcast(excess + r));
                }
            }
    for (; k < q.depth; ++k, rows += q.rows_step, columns += q.columns_step) {
        const Words seen[2] = {words_of_codes(load(columns)), words_of_codes(load(columns + 8))};
        UNROLLED for (int r = 0; r < n_rows; ++r) {
            const Words factor = words(broadcast(rows + r));
            UNROLLED for (int v = 0; v < 2; ++v) sums[r][v] = add_words(sums[r][v], seen[v], factor);
        }
    }
}

}  // namespace dpquant
#endif
