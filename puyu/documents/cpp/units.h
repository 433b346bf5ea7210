// Units of a text (words; single characters where there are no blanks), their hashes, and n-grams of them.

#pragma once

#include "common.h"

namespace puyu {

constexpr uint64_t PRIME = 0x9E3779B97F4A7C15u;

struct Units {
    std::vector<uint64_t> hashes;
    std::vector<int64_t> begins, ends;  // code points
    int64_t size = 0;

    void clear() { hashes.clear(), begins.clear(), ends.clear(), size = 0; }
    void add(int64_t begin, int64_t end, uint32_t crc) {
        hashes.push_back(mixed(crc)), begins.push_back(begin), ends.push_back(end), size++;
    }
};

// Runs of what is not blank, as str.split() gives them.
inline void split_words(const Characters &text, Units &units) {
    units.clear();
    for (int64_t i = 0; i < text.size;) {
        while (i < text.size && text.is(i, SPACE)) i++;
        int64_t begin = i;
        while (i < text.size && !text.is(i, SPACE)) i++;
        if (i > begin) units.add(begin, i, crc32(text.bytes + text.at[begin], text.at[i] - text.at[begin]));
    }
}

// Each Han character or kana by itself; other letters and digits in runs.
inline void split_units(const Characters &text, Units &units) {
    units.clear();
    for (int64_t i = 0; i < text.size;) {
        int64_t begin = i;
        if (text.is(i, HAN | KANA)) i++;
        else
            while (i < text.size && text.is_word(i) && !text.is(i, HAN | KANA)) i++;
        if (i > begin) units.add(begin, i, crc32(text.bytes + text.at[begin], text.at[i] - text.at[begin]));
        else i++;
    }
}

inline uint32_t crc_of(uint32_t state, uint32_t point) {
    if (point < 0x80) return CRC.step(state, uint8_t(point));
    if (point < 0x800) return CRC.step(CRC.step(state, uint8_t(0xc0 | point >> 6)), uint8_t(0x80 | (point & 63)));
    uint8_t last[2] = {uint8_t(0x80 | ((point >> 6) & 63)), uint8_t(0x80 | (point & 63))};
    if (point < 0x10000) state = CRC.step(state, uint8_t(0xe0 | point >> 12));
    else
        state = CRC.step(CRC.step(state, uint8_t(0xf0 | point >> 18)), uint8_t(0x80 | ((point >> 12) & 63)));
    return CRC.step(CRC.step(state, last[0]), last[1]);
}

// The same units in lower case and, unless `numbers` is false, each number as one 0: what near copies are compared by.
inline void split_folded(const Unicode &unicode, const Characters &text, Units &units, bool numbers = true) {
    units.clear();
    for (int64_t i = 0; i < text.size;) {
        int64_t begin = i;
        uint32_t state = ~0u;
        if (text.is(i, HAN | KANA)) state = crc_of(state, lowered(unicode, text.points[i])), i++;
        else
            while (i < text.size && text.is_word(i) && !text.is(i, HAN | KANA)) {
                if (numbers && text.is(i, DIGIT)) {
                    state = CRC.step(state, '0');
                    while (i < text.size && text.is(i, DIGIT)) i++;
                } else {
                    state = crc_of(state, lowered(unicode, text.points[i])), i++;
                }
            }
        if (i > begin) units.add(begin, i, ~state);
        else i++;
    }
}

// Hashes of all n-grams -> grams; none when there are fewer than n units.
inline void ngrams(const std::vector<uint64_t> &hashes, int64_t n, std::vector<uint64_t> &grams) {
    int64_t count = int64_t(hashes.size()) - n + 1;
    grams.resize(count > 0 ? count : 0);
    for (int64_t i = 0; i < count; i++) {
        uint64_t total = 0;
        for (int64_t k = 0; k < n; k++) total = total * PRIME + hashes[i + k];
        grams[i] = mixed(total);
    }
}

}  // namespace puyu
