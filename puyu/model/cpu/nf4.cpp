// Values of NF4 codes, written once in the dtype of the product. Twin: NF4.dequantized in puyu/model/nf4.py, bit for bit:
// the product of table and scale in fp32, rounded to the nearest, ties to even. A block of 64 has but 16 values, so they
// are made once a block and looked up by lane.

#include <cstdint>
#include <cstring>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64, GROUP = 256;

inline uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void values(const float* table, float scale, float* found) {
    for (int i = 0; i < 16; i++) found[i] = table[i] * scale;
}

inline void values(const float* table, float scale, uint16_t* found) {
    for (int i = 0; i < 16; i++) found[i] = narrow(table[i] * scale);
}

template <class T>
inline void plain(const uint8_t* codes, const T* found, T* to) {
    for (int64_t i = 0; i < BLOCK / 2; i++) {
        to[2 * i] = found[codes[i] >> 4];
        to[2 * i + 1] = found[codes[i] & 15];
    }
}

inline void block(const uint8_t* codes, const uint16_t* found, uint16_t* to) {
#ifdef __AVX512BW__
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(found));
    const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    const __m512i low = _mm512_set1_epi32(15);
    for (int i = 0; i < 2; i++) {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
        const __m512i even = _mm512_srli_epi32(bytes, 4);
        const __m512i odd = _mm512_slli_epi32(_mm512_and_si512(bytes, low), 16);
        const __m512i lanes = _mm512_permutexvar_epi16(_mm512_or_si512(even, odd), table);
        _mm512_storeu_si512(to + 32 * i, lanes);
    }
#else
    plain(codes, found, to);
#endif
}

inline void block(const uint8_t* codes, const float* found, float* to) {
#ifdef __AVX512BW__
    const __m512 table = _mm512_loadu_ps(found);
    const __m512i low = _mm512_set1_epi64(15);
    for (int i = 0; i < 4; i++) {
        const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
        const __m512i even = _mm512_srli_epi64(bytes, 4);
        const __m512i odd = _mm512_slli_epi64(_mm512_and_si512(bytes, low), 32);
        _mm512_storeu_ps(to + 16 * i, _mm512_permutexvar_ps(_mm512_or_si512(even, odd), table));
    }
#else
    plain(codes, found, to);
#endif
}

template <class T>
void dequantize(const uint8_t* codes, const uint8_t* scale_codes, const float* scales, float offset, const float* dynamic,
                const float* table, T* to, int64_t blocks, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < blocks; n++) {
        T found[16];
        values(table, dynamic[scale_codes[n]] * scales[n / GROUP] + offset, found);
        block(codes + n * (BLOCK / 2), found, to + n * BLOCK);
    }
}

}  // namespace

extern "C" void puyu_nf4(const uint8_t* codes, const uint8_t* scale_codes, const float* scales, float offset,
                         const float* dynamic, const float* table, void* to, int64_t is_narrow, int64_t blocks,
                         int64_t threads) {
    if (is_narrow)
        dequantize(codes, scale_codes, scales, offset, dynamic, table, static_cast<uint16_t*>(to), blocks, int(threads));
    else
        dequantize(codes, scale_codes, scales, offset, dynamic, table, static_cast<float*>(to), blocks, int(threads));
}
