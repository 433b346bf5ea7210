// Texts as the callers have them, and what is known of characters.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace puyu {

// What a code point is, as Python's str methods say (tables are made from them): a bit each.
enum Kind : uint8_t {
    ALPHA = 1, ALNUM = 2, DIGIT = 4, SPACE = 8, PUNCTUATION = 16, ODD = 32, HAN = 64, KANA = 128
};

struct Unicode {
    const uint8_t *kinds;     // of all 0x110000 code points
    const uint32_t *lower;    // of the first `num_lower`: what it is in lower case, as one code point
    int64_t num_lower;
};

// Texts one after the other in UTF-8, which is valid; text i is bytes[starts[i] .. starts[i + 1]).
struct Texts {
    const uint8_t *bytes;
    const int64_t *starts;
    int64_t count;

    const uint8_t *text(int64_t i) const { return bytes + starts[i]; }
    int64_t length(int64_t i) const { return starts[i + 1] - starts[i]; }
};

// One text as code points. `at[i]` is the byte where code point i begins; at[size] is where the text ends.
struct Characters {
    std::vector<uint32_t> points;
    std::vector<uint8_t> kinds;
    std::vector<uint32_t> at;
    const uint8_t *bytes = nullptr;
    int64_t size = 0;

    void read(const Unicode &unicode, const uint8_t *text, int64_t length) {
        bytes = text;
        points.resize(length + 1), kinds.resize(length + 1), at.resize(length + 1);
        int64_t n = 0;
        for (int64_t i = 0; i < length;) {
            uint32_t first = text[i], point;
            int64_t more;
            if (first < 0x80) point = first, more = 1;
            else if (first < 0xe0) point = (first & 31) << 6 | (text[i + 1] & 63), more = 2;
            else if (first < 0xf0) point = (first & 15) << 12 | (text[i + 1] & 63) << 6 | (text[i + 2] & 63), more = 3;
            else
                point = (first & 7) << 18 | (text[i + 1] & 63) << 12 | (text[i + 2] & 63) << 6 | (text[i + 3] & 63),
                more = 4;
            points[n] = point, kinds[n] = unicode.kinds[point], at[n] = uint32_t(i);
            n++, i += more;
        }
        size = n;
        points[n] = 0, kinds[n] = 0, at[n] = uint32_t(length);
    }

    void read(const Unicode &unicode, const Texts &texts, int64_t i) { read(unicode, texts.text(i), texts.length(i)); }

    bool is(int64_t i, uint8_t kind) const { return kinds[i] & kind; }
    bool is_word(int64_t i) const { return is(i, ALNUM) || points[i] == '_'; }
};

inline uint32_t ascii_lower(uint32_t point) { return point - 'A' < 26 ? point + 32 : point; }

inline uint32_t lowered(const Unicode &unicode, uint32_t point) {
    return point < uint64_t(unicode.num_lower) ? unicode.lower[point] : point;
}

// ---- hashes ----

// The finalizer of splitmix64.
inline uint64_t mixed(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

// CRC-32 of zlib, a byte at a time: words are short.
struct Crc {
    uint32_t table[256];
    constexpr Crc() : table() {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int k = 0; k < 8; k++) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
            table[i] = value;
        }
    }
    uint32_t step(uint32_t state, uint8_t byte) const { return table[(state ^ byte) & 255] ^ (state >> 8); }
};
constexpr Crc CRC;

inline uint32_t crc32(const uint8_t *bytes, int64_t length) {
    uint32_t state = ~0u;
    for (int64_t i = 0; i < length; i++) state = CRC.step(state, bytes[i]);
    return ~state;
}

// Any bytes -> 64 bits, within one call of the library only.
inline uint64_t quick_hash(const uint8_t *bytes, int64_t length) {
    uint64_t hash = 0x9E3779B97F4A7C15u ^ uint64_t(length);
    for (; length >= 8; bytes += 8, length -= 8) {
        uint64_t word;
        std::memcpy(&word, bytes, 8);
        hash = (hash ^ word) * 0x9FB21C651E98DF25u;
        hash ^= hash >> 35;
    }
    uint64_t word = 0;
    std::memcpy(&word, bytes, size_t(length));
    return mixed(hash ^ word);
}

// Values by 64-bit keys; emptied by counting up, so that a new text costs nothing.
struct Table {
    struct Slot {
        uint64_t key;
        uint32_t round, first, count;
    };
    std::vector<Slot> slots;
    uint64_t mask = 0;
    uint32_t round = 0;

    // Ready for up to `count` keys.
    void clear(int64_t count) {
        uint64_t need = 64;
        while (need < uint64_t(count) * 2) need *= 2;
        if (slots.size() < need || ++round == 0) {
            slots.assign(need > slots.size() ? need : slots.size(), Slot{});
            round = 1;
        }
        mask = need - 1;
    }

    // The slot of the key; `count` is how often it was asked for before.
    Slot &add(uint64_t key, int64_t place) {
        for (uint64_t i = key & mask;; i = (i + 1) & mask) {
            Slot &slot = slots[i];
            if (slot.round != round) {
                slot = {key, round, uint32_t(place), 0};
                return slot;
            }
            if (slot.key == key) return slot;
        }
    }
};

}  // namespace puyu
