// MinHash signatures (Broder, 1997): hash i of a shingle is the high half of factor[i] * shingle + offset[i] mod 2^64.

#pragma once

#include "units.h"

namespace puyu {

constexpr int64_t BLOCK = 32;  // hash functions whose smallest values stay in registers

// The smallest value of each hash function over the shingles -> signature [size]; size is a multiple of BLOCK.
inline void signature_of(const std::vector<uint64_t> &shingles, const uint64_t *factors, const uint64_t *offsets,
                         int64_t size, uint32_t *signature) {
    for (int64_t from = 0; from < size; from += BLOCK) {
        uint64_t smallest[BLOCK], a[BLOCK], b[BLOCK];
        for (int64_t i = 0; i < BLOCK; i++) smallest[i] = ~uint64_t(0), a[i] = factors[from + i], b[i] = offsets[from + i];
        for (uint64_t shingle : shingles)
            for (int64_t i = 0; i < BLOCK; i++) {
                uint64_t value = a[i] * shingle + b[i];
                smallest[i] = value < smallest[i] ? value : smallest[i];
            }
        for (int64_t i = 0; i < BLOCK; i++) signature[from + i] = uint32_t(smallest[i] >> 32);
    }
}

// Hashes of n-grams of folded units; of all units where there are fewer.
inline void shingles_of(const Unicode &unicode, const Characters &text, int64_t n, Units &units,
                        std::vector<uint64_t> &shingles) {
    split_folded(unicode, text, units);
    ngrams(units.hashes, units.size < n ? units.size : n, shingles);
    if (!units.size) shingles.clear();
}

}  // namespace puyu
