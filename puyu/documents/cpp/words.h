// Listed words in a text: how many different ones, and how many units of text they take.

#pragma once

#include "automaton.h"

namespace puyu {

// The code point that begins at, or that ends before, a byte of valid UTF-8.
inline uint32_t point_at(const uint8_t *bytes, int64_t i) {
    uint32_t first = bytes[i];
    if (first < 0x80) return first;
    if (first < 0xe0) return (first & 31) << 6 | (bytes[i + 1] & 63);
    if (first < 0xf0) return (first & 15) << 12 | (bytes[i + 1] & 63) << 6 | (bytes[i + 2] & 63);
    return (first & 7) << 18 | (bytes[i + 1] & 63) << 12 | (bytes[i + 2] & 63) << 6 | (bytes[i + 3] & 63);
}

inline uint32_t point_before(const uint8_t *bytes, int64_t i) {
    do i--;
    while ((bytes[i] & 0xc0) == 0x80);
    return point_at(bytes, i);
}

// counts [2]: different phrases, places. Where `whole` is set for a phrase, letters and digits may not touch it, save
// characters of writing without blanks.
inline void count_words(const Unicode &unicode, const Automaton &words, const uint8_t *whole, const uint8_t *bytes,
                        int64_t length, std::vector<int64_t> &seen, int64_t *counts) {
    seen.clear();
    counts[0] = counts[1] = 0;
    auto touches = [&](uint32_t point) {
        uint8_t kind = unicode.kinds[point];
        return (kind & ALNUM) && !(kind & (HAN | KANA));
    };
    words.each(bytes, length, [&](int64_t begin, int64_t end, int64_t phrase) {
        if (whole[phrase] && ((begin > 0 && touches(point_before(bytes, begin))) ||
                              (end < length && touches(point_at(bytes, end)))))
            return;
        counts[1]++;
        if (std::find(seen.begin(), seen.end(), phrase) == seen.end()) seen.push_back(phrase);
    });
    counts[0] = int64_t(seen.size());
}

}  // namespace puyu
