// SPDX-License-Identifier: Apache-2.0
//
// Exact sums of products of unsigned and signed bytes on AVX-512 VNNI, whose instruction sums four products in 32 bits. Codes plus 128
// are the unsigned bytes; every sum is then too large by 128 times the sum of the signed ones. Sums wrap around, so this excess can
// be subtracted first: only the exact sum has to fit in 32 bits.

#pragma once

#include "parallel.hpp"
#include "tiles.hpp"

#ifdef HAS_TILES

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace dpquant {

// Adds the four products of each lane to `sum`.
VNNI inline __m512i add_fours(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    sum = _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
    asm("" : "+v"(sum));  // in this order: gcc would keep the sums in memory
    return sum;
}

// Adds 128 times the sum of the four signed bytes of each lane to `excess`.
VNNI inline __m512i add_excess(__m512i excess, __m512i signed_bytes) {
    return _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(static_cast<char>(CODE_OF_ZERO)), signed_bytes);
}

// The first `count` lanes of a vector of float32. Whole vectors take less time without a mask.
class Lanes16 {
  public:
    explicit Lanes16(int64_t count) : whole_(count >= 16), mask_(static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1)) {}
    VNNI __m512 loaded(const float *from) const { return whole_ ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(mask_, from); }
    VNNI void store(float *to, __m512 values) const { whole_ ? _mm512_storeu_ps(to, values) : _mm512_mask_storeu_ps(to, mask_, values); }

  private:
    bool whole_;
    __mmask16 mask_;
};

}  // namespace dpquant
#endif
