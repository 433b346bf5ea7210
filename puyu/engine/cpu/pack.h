// Codes as checkpoints' readers have them <-> pairs of panels as product.h reads them.

#pragma once

#include "product.h"

#ifdef __GLIBC__  // which only a header of the C library defines
#include <malloc.h>
#endif

namespace puyu {

// Codes [out, in] (int8, or two 4-bit codes a byte, the even input in the low nibble) <-> pairs of panels (common.h).
// `scales` and `zeros` [out, groups] are half floats; zeros may be null. Outputs beyond the last are zero.
struct Pack {
    int64_t four, gated, out, in, groups;
    uint8_t *codes;
    const uint16_t *scales, *zeros;
    uint8_t *packed;
    uint16_t *packed_scales, *packed_zeros;
};

inline int64_t row_of(const Pack &p, int64_t pair, int64_t half, int64_t lane) {
    return p.gated ? half * (p.out / 2) + pair * LANES + lane : (pair * PANELS + half) * LANES + lane;
}

inline int64_t pairs_of(const Pack &p) { return rounded(p.out, LANES * PANELS) / (LANES * PANELS); }

// A word of codes is 8 or 4 inputs of one output. `visit(word in a panel, word in the rows)`; the second is null for
// outputs beyond the last. A cache line of each row after the other.
template <typename Visit>
void each_word(const Pack &p, const Visit &visit) {
    int64_t words = p.in / (p.four ? 8 : 4), pairs = pairs_of(p);
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int64_t from = 0; from < words; from += 16)
            for (int64_t column = 0; column < PANELS * LANES; column++) {
                int64_t row = row_of(p, pair, column / LANES, column % LANES);
                uint8_t *place = p.packed + ((pair * words + from) * PANELS * LANES + column) * 4;
                uint8_t *source = row < p.out ? p.codes + (row * words + from) * 4 : nullptr;
                for (int64_t left = smaller(words - from, 16); left; left--, place += 4 * PANELS * LANES) {
                    visit(place, source);
                    if (source) source += 4;
                }
            }
}

inline uint32_t swapped(uint32_t word, uint32_t mask, int by) {
    uint32_t differ = (word ^ (word >> by)) & mask;
    return word ^ differ ^ (differ << by);
}

// Nibbles 0 1 2 3 4 5 6 7, from the lowest on, -> 0 4 1 5 2 6 3 7, and back.
inline uint32_t shuffled(uint32_t word) { return swapped(swapped(word, 0x0000ff00, 8), 0x00f000f0, 4); }
inline uint32_t ordered(uint32_t word) { return swapped(swapped(word, 0x00f000f0, 4), 0x0000ff00, 8); }

inline void pack(const Pack &p) {
    each_word(p, [four = p.four](uint8_t *place, const uint8_t *source) {
        uint32_t word = four ? 0x88888888 : 0;
        if (source) std::memcpy(&word, source, 4);
        word = four ? shuffled(word) : word ^ 0x80808080;
        std::memcpy(place, &word, 4);
    });
    for (int64_t pair = 0; pair < pairs_of(p); pair++)
        for (int64_t column = 0; column < PANELS * LANES; column++) {
            int64_t row = row_of(p, pair, column / LANES, column % LANES);
            for (int64_t g = 0; g < p.groups; g++) {
                int64_t at = (pair * p.groups + g) * PANELS * LANES + column;
                p.packed_scales[at] = row < p.out ? p.scales[row * p.groups + g] : 0;
                if (p.zeros) p.packed_zeros[at] = row < p.out ? p.zeros[row * p.groups + g] : 0;
            }
        }
}

// The codes as they were; scales and zeros are not touched.
inline void unpack(const Pack &p) {
    each_word(p, [four = p.four](const uint8_t *place, uint8_t *source) {
        if (!source) return;
        uint32_t word;
        std::memcpy(&word, place, 4);
        word = four ? ordered(word) : word ^ 0x80808080;
        std::memcpy(source, &word, 4);
    });
}

// Dense weights [rows, in] -> int8 codes with a scale for each row, to the nearest, ties to even.
template <typename T>
void round_rows(const T *weights, int64_t rows, int64_t in, const float *scales, int8_t *codes) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *from = weights + row * in;
        int8_t *to = codes + row * in;
        float scale = scales[row];
        for (int64_t i = 0; i < in; i++) {
            float step = __builtin_rintf(get(from[i]) / scale);
            step = step > 127.0f ? 127.0f : step;
            to[i] = int8_t(step < -127.0f ? -127.0f : step);
        }
    }
}

// What the codes of a whole model stood in goes back to the system; the allocator would keep it.
inline void give_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

}  // namespace puyu
