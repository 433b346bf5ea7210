// MinHash signatures (Broder, 1997): hash i of a shingle is the high half of factor[i] * shingle + offset[i] mod 2^64.

#pragma once

#include <algorithm>

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

// Sorts numbers that are spread evenly over 32 bits: dealt by their high bits, they are nearly in order.
inline void sort_even(std::vector<uint32_t> &values, std::vector<uint32_t> &room, std::vector<uint32_t> &ends) {
    int bits = 4;
    while ((size_t(1) << bits) < values.size() && bits < 20) bits++;
    ends.assign((size_t(1) << bits) + 1, 0), room.resize(values.size());
    for (uint32_t value : values) ends[(value >> (32 - bits)) + 1]++;
    for (size_t i = 1; i < ends.size(); i++) ends[i] += ends[i - 1];
    for (uint32_t value : values) room[ends[value >> (32 - bits)]++] = value;
    for (size_t i = 1; i < room.size(); i++) {
        uint32_t value = room[i];
        size_t k = i;
        for (; k > 0 && room[k - 1] > value; k--) room[k] = room[k - 1];
        room[k] = value;
    }
    values.swap(room);
}

// The `most` smallest of the shingles' high halves, each once, in order -> sketch; returns how many.
class Sketcher {
  public:
    int64_t operator()(const std::vector<uint64_t> &shingles, int64_t most, uint32_t *sketch) {
        values.resize(shingles.size());
        for (size_t i = 0; i < shingles.size(); i++) values[i] = uint32_t(shingles[i] >> 32);
        if (int64_t(values.size()) > most) {
            std::nth_element(values.begin(), values.begin() + most, values.end());
            values.resize(size_t(most));
            std::sort(values.begin(), values.end());  // the smallest are not spread evenly
        } else {
            sort_even(values, room, ends);
        }
        return std::unique_copy(values.begin(), values.end(), sketch) - sketch;
    }

  private:
    std::vector<uint32_t> values, room, ends;
};

}  // namespace puyu
