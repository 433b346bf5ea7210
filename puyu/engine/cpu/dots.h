// What differs between processors: products of int8 activations with packed codes, a unit of inputs at a time.
//
// Each way gives TILE (rows that its registers hold), `sums` (16 integers), and the same results to the last bit,
// because sums of integers are exact and the few floating-point steps are the same everywhere.

#pragma once

#include "common.h"

#if defined(PUYU_VNNI) || defined(PUYU_AVX2)
#include <immintrin.h>
#endif

// The sums of a tile must stay in registers: every small loop is unrolled, every helper is inlined.
#define UNROLL _Pragma("GCC unroll 8")
#define ALWAYS inline __attribute__((always_inline))

namespace puyu {

constexpr int PANELS = 2;  // of a pair, whose codes lie side by side: one stream of memory

#if defined(PUYU_VNNI) || defined(PUYU_AVX2)
constexpr int64_t AHEAD = 2048;  // bytes

// Where codes are read once, memory is the limit; asking for them early helps.
ALWAYS void ask_for(const uint8_t *codes) { _mm_prefetch(reinterpret_cast<const char *>(codes + AHEAD), _MM_HINT_T0); }
#endif

// add_unit: acc[r][p] += the products of one unit of inputs, as integers.

#if defined(PUYU_VNNI)

constexpr int TILE = 6;

inline floats half_floats(const uint16_t *place) {
    return floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(place))));
}

inline __m512i broadcast(const int8_t *place) {
    int32_t four;
    std::memcpy(&four, place, 4);
    return _mm512_set1_epi32(four);
}

template <int MR, bool four>
ALWAYS void add_unit(const uint8_t *&codes, const int8_t *a, int64_t stride, int64_t unit, __m512i (&acc)[MR][PANELS]) {
    if constexpr (!four) {
        for (int64_t k = 0; k < unit; k += 4, codes += 128) {
            __m512i some[PANELS];
            UNROLL for (int p = 0; p < PANELS; p++) {
                some[p] = _mm512_loadu_si512(codes + p * 64);
                ask_for(codes + p * 64);
            }
            UNROLL for (int r = 0; r < MR; r++) {
                __m512i inputs = broadcast(a + r * stride + k);
                UNROLL for (int p = 0; p < PANELS; p++) acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], some[p], inputs);
            }
        }
        return;
    }
    const __m512i nibble = _mm512_set1_epi8(15);
    constexpr bool split = MR * PANELS <= 4;  // too few sums to hide the latency of one: take two for each
    __m512i other[MR][PANELS];
    UNROLL for (int r = 0; split && r < MR; r++)
        UNROLL for (int p = 0; p < PANELS; p++) other[r][p] = _mm512_setzero_si512();
    for (int64_t k = 0; k < unit; k += 8, codes += 128) {
        __m512i low[PANELS], high[PANELS];
        UNROLL for (int p = 0; p < PANELS; p++) {
            __m512i both = _mm512_loadu_si512(codes + p * 64);
            ask_for(codes + p * 64);
            low[p] = _mm512_and_si512(both, nibble);
            high[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        }
        UNROLL for (int r = 0; r < MR; r++) {
            __m512i first = broadcast(a + r * stride + k), second = broadcast(a + r * stride + k + 4);
            UNROLL for (int p = 0; p < PANELS; p++) {
                acc[r][p] = _mm512_dpbusd_epi32(acc[r][p], low[p], first);
                __m512i &sum = split ? other[r][p] : acc[r][p];
                sum = _mm512_dpbusd_epi32(sum, high[p], second);
            }
        }
    }
    UNROLL for (int r = 0; split && r < MR; r++)
        UNROLL for (int p = 0; p < PANELS; p++) acc[r][p] = _mm512_add_epi32(acc[r][p], other[r][p]);
}

typedef __m512i sums;
inline sums whole(int32_t value) { return _mm512_set1_epi32(value); }
inline floats as_floats(sums value) { return floats(_mm512_cvtepi32_ps(value)); }
inline floats fused(floats a, floats b, floats c) { return floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }

#elif defined(PUYU_AVX2)

// Lanes 0 to 7, and 8 to 15.
struct sums {
    __m256i half[2];
};

inline floats joined(__m256 first, __m256 second) {
    floats both;
    std::memcpy(&both, &first, 32);
    std::memcpy(reinterpret_cast<char *>(&both) + 32, &second, 32);
    return both;
}

inline __m256 half_of(const floats &both, int which) {
    __m256 half;
    std::memcpy(&half, reinterpret_cast<const char *>(&both) + 32 * which, 32);
    return half;
}

inline floats half_floats(const uint16_t *place) {
    const __m128i *halves = reinterpret_cast<const __m128i *>(place);
    return joined(_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
}

inline sums whole(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
inline floats as_floats(sums s) { return joined(_mm256_cvtepi32_ps(s.half[0]), _mm256_cvtepi32_ps(s.half[1])); }
inline floats fused(floats a, floats b, floats c) {
    auto half = [&](int h) { return _mm256_fmadd_ps(half_of(a, h), half_of(b, h), half_of(c, h)); };
    return joined(half(0), half(1));
}

inline __m256i broadcast(const int8_t *place) {
    int32_t four;
    std::memcpy(&four, place, 4);
    return _mm256_set1_epi32(four);
}

constexpr int TILE = 6;

#ifdef __AVXVNNI__
constexpr int64_t STEPS = 1 << 20;  // 32-bit sums never overflow
typedef __m256i partial;
ALWAYS void add(partial &sum, __m256i codes, __m256i inputs) { sum = _mm256_dpbusd_avx_epi32(sum, codes, inputs); }
ALWAYS __m256i total(partial sum) { return sum; }
#else
// Sums of two products in 16 bits: nibbles times int8 are at most 3,810, so eight of them fit.
constexpr int64_t STEPS = 8;
typedef __m256i partial;
ALWAYS void add(partial &sum, __m256i nibbles, __m256i inputs) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(nibbles, inputs));
}
ALWAYS __m256i total(partial sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif

template <int MR, bool four>
ALWAYS void add_unit(const uint8_t *&codes, const int8_t *a, int64_t stride, int64_t unit, sums (&acc)[MR][PANELS]) {
    const __m256i nibble = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
#ifdef __AVXVNNI__
    constexpr bool halved = four;
#else
    constexpr bool halved = true;  // bytes of 8 bits are two nibbles, too: whole ones would overflow 16 bits
#endif
    constexpr int64_t width = four ? 8 : 4, most = STEPS / (four ? 2 : 1) * width;
    // eight outputs after the other, so that the sums of all rows stay in registers; the unit's codes stay in the cache
    UNROLL for (int part = 0; part < 2 * PANELS; part++) {
        const uint8_t *place = codes + part * 32;
        for (int64_t from = 0; from < unit; from += most) {
            partial low[MR], high[MR];
            UNROLL for (int r = 0; r < MR; r++) low[r] = high[r] = zero;
            for (int64_t k = from; k < smaller(from + most, unit); k += width, place += 128) {
                __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(place));
                if (part % 2 == 0) ask_for(place);
                __m256i lows = halved ? _mm256_and_si256(both, nibble) : both;
                __m256i highs = halved ? _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble) : zero;
                UNROLL for (int r = 0; r < MR; r++) {
                    const int8_t *inputs = a + r * stride + k;
                    add(low[r], lows, broadcast(inputs));
                    // int4: the next inputs, the same sum; int8: the same inputs, sixteen times as much
                    if (halved) add(four ? low[r] : high[r], highs, broadcast(four ? inputs + 4 : inputs));
                }
            }
            UNROLL for (int r = 0; r < MR; r++) {
                __m256i &sum = acc[r][part / 2].half[part % 2];
                sum = _mm256_add_epi32(sum, total(low[r]));
                if (halved && !four) sum = _mm256_add_epi32(sum, _mm256_slli_epi32(total(high[r]), 4));
            }
        }
    }
    codes += unit / width * 128;
}

#else  // the same steps for any processor

constexpr int TILE = 6;

inline floats half_floats(const uint16_t *place) {
    floats result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = half_float(place[lane]);
    return result;
}

typedef ints sums;
inline sums whole(int32_t value) { return sums{} + value; }
inline floats as_floats(sums value) { return __builtin_convertvector(value, floats); }
inline floats fused(floats a, floats b, floats c) {
    floats result;
    for (int lane = 0; lane < LANES; lane++) result[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return result;
}

template <int MR, bool four>
ALWAYS void add_unit(const uint8_t *&codes, const int8_t *a, int64_t stride, int64_t unit, sums (&acc)[MR][PANELS]) {
    constexpr int64_t step = four ? 8 : 4;
    for (int64_t k = 0; k < unit; k++) {
        const uint8_t *place = codes + k / step * 128 + k % 4;
        int shift = k % step >= 4 ? 4 : 0;
        for (int p = 0; p < PANELS; p++)
            for (int lane = 0; lane < LANES; lane++) {
                int32_t code = place[p * 64 + lane * 4] >> shift;
                code = four ? code & 15 : code;
                for (int r = 0; r < MR; r++) acc[r][p][lane] += code * a[r * stride + k];
            }
    }
    codes += unit / step * 128;
}

#endif

}  // namespace puyu
