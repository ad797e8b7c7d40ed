// SPDX-License-Identifier: Apache-2.0
//
// The AMX tile registers, and the instruction sets that this processor and its operating system support.

#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define HAS_TILES 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#define UNROLLED _Pragma("GCC unroll 16")
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AMX __attribute__((target("amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl")))

namespace dpquant {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// gcc's intrinsics declare access to only eight bytes of a configuration; the memory barriers cover all 64.
AMX inline void save_tiles(TileConfig &config) {
    _tile_storeconfig(&config);
    asm volatile("" : : "r"(&config) : "memory");
}
AMX inline void load_tiles(const TileConfig &config) {
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// Configures the tile registers as 16 rows of 64 bytes for the lifetime of the object, then restores the thread's own setting.
class Tiles {
  public:
    Tiles() {
        save_tiles(before_);
        TileConfig mine;
        for (int tile = 0; tile < 8; ++tile) mine.bytes[tile] = 64, mine.rows[tile] = 16;
        load_tiles(mine);
    }
    ~Tiles() { load_tiles(before_); }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;

  private:
    TileConfig before_;
};

// Returns whether AMX tiles of bytes and bfloat16 exist and the operating system grants their use.
inline bool amx_permitted() {
    static const bool permitted = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
        constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        return known && __builtin_cpu_supports("avx512bw") && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    }();
    return permitted;
}

// Transposes 16 rows of 16 double words.
AVX512 inline void transpose(__m512i rows[16]) {
    __m512i a[16], b[16];
    for (int k = 0; k < 16; k += 2) {
        a[k] = _mm512_unpacklo_epi32(rows[k], rows[k + 1]);
        a[k + 1] = _mm512_unpackhi_epi32(rows[k], rows[k + 1]);
    }
    for (int k = 0; k < 16; k += 4)
        for (int half = 0; half < 2; ++half) {
            b[k + 2 * half] = _mm512_unpacklo_epi64(a[k + half], a[k + 2 + half]);
            b[k + 2 * half + 1] = _mm512_unpackhi_epi64(a[k + half], a[k + 2 + half]);
        }
    // b[4 * m + c]: in each quarter q of the register, column 4 * q + c of rows 4 * m .. 4 * m + 3
    for (int c = 0; c < 4; ++c) {
        const __m512i low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd), high_odd = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        rows[c] = _mm512_shuffle_i32x4(low, high, 0x88);
        rows[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
        rows[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        rows[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

}  // namespace dpquant
#endif

namespace dpquant {

constexpr int CODE_OF_ZERO = 128;  // the zero point of codes stored as unsigned bytes

using Kernels = std::vector<std::string>;  // names, fastest first

// Returns the kernels for exact products of codes.
inline Kernels int8_kernels() {
    Kernels names;
#ifdef HAS_TILES
    if (amx_permitted()) names.push_back("amx");
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) names.push_back("vnni");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
    return names;
}

// Returns the kernels for products of bfloat16 numbers.
inline Kernels bfloat16_kernels() {
    Kernels names;
#ifdef HAS_TILES
    if (amx_permitted()) names.push_back("amx");
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) names.push_back("avx512");
#endif
    return names;
}

// Returns the kernels for float32.
inline Kernels float_kernels() {
    Kernels names;
#ifdef HAS_TILES
    if (__builtin_cpu_supports("x86-64-v4")) names.push_back("avx512");
    if (__builtin_cpu_supports("x86-64-v3")) names.push_back("avx2");
#endif
    return names;
}

inline void check_kernel(const Kernels &known, const std::string &kernel) {
    if (std::find(known.begin(), known.end(), kernel) == known.end())
        throw std::invalid_argument("this processor has no such kernel");
}

}  // namespace dpquant
