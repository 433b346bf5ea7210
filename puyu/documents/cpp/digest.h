// BLAKE2b (RFC 7693) with 16 bytes of result and no key, fed a byte at a time; and what equal texts are known by.

#pragma once

#include "units.h"

namespace puyu {

class Blake {
  public:
    Blake() {
        for (int i = 0; i < 8; i++) state[i] = START[i];
        state[0] ^= 0x01010000u ^ 16u;
    }

    void add(uint8_t byte) {
        if (filled == 128) block(false);
        buffer[filled++] = byte;
    }

    void add_point(uint32_t p) {
        if (p < 0x80) return add(uint8_t(p));
        if (p < 0x800) add(uint8_t(0xc0 | p >> 6));
        else {
            if (p < 0x10000) add(uint8_t(0xe0 | p >> 12));
            else add(uint8_t(0xf0 | p >> 18)), add(uint8_t(0x80 | ((p >> 12) & 63)));
            add(uint8_t(0x80 | ((p >> 6) & 63)));
        }
        add(uint8_t(0x80 | (p & 63)));
    }

    void finish(uint8_t *out) {
        std::memset(buffer + filled, 0, size_t(128 - filled));
        block(true);
        std::memcpy(out, state, 16);
    }

  private:
    static constexpr uint64_t START[8] = {0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu,
                                          0xa54ff53a5f1d36f1u, 0x510e527fade682d1u, 0x9b05688c2b3e6c1fu,
                                          0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};
    static constexpr uint8_t ORDER[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                              {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                              {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                              {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                              {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                              {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                              {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                              {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                              {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                              {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
    uint64_t state[8];
    uint64_t total = 0;
    uint8_t buffer[128];
    int64_t filled = 0;

    static uint64_t turned(uint64_t v, int by) { return v >> by | v << (64 - by); }

    static void mix(uint64_t *v, int a, int b, int c, int d, uint64_t x, uint64_t y) {
        v[a] += v[b] + x, v[d] = turned(v[d] ^ v[a], 32), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 24);
        v[a] += v[b] + y, v[d] = turned(v[d] ^ v[a], 16), v[c] += v[d], v[b] = turned(v[b] ^ v[c], 63);
    }

    void block(bool last) {
        uint64_t v[16], m[16];
        total += uint64_t(filled);
        for (int i = 0; i < 8; i++) v[i] = state[i], v[i + 8] = START[i];
        v[12] ^= total;
        if (last) v[14] = ~v[14];
        std::memcpy(m, buffer, 128);
        for (int round = 0; round < 12; round++) {
            const uint8_t *s = ORDER[round % 10];
            mix(v, 0, 4, 8, 12, m[s[0]], m[s[1]]), mix(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
            mix(v, 2, 6, 10, 14, m[s[4]], m[s[5]]), mix(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
            mix(v, 0, 5, 10, 15, m[s[8]], m[s[9]]), mix(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
            mix(v, 2, 7, 8, 13, m[s[12]], m[s[13]]), mix(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
        }
        for (int i = 0; i < 8; i++) state[i] ^= v[i] ^ v[i + 8];
        filled = 0;
    }
};

// Of code points begin to end in lower case, each run of blanks as one, none at either side.
inline void folded_digest(const Unicode &unicode, const Characters &text, int64_t begin, int64_t end, uint8_t *out) {
    Blake blake;
    bool started = false, blank = false;
    for (int64_t i = begin; i < end; i++) {
        if (text.is(i, SPACE)) {
            blank = true;
            continue;
        }
        if (blank && started) blake.add(' ');
        started = true, blank = false;
        blake.add_point(lowered(unicode, text.points[i]));
    }
    blake.finish(out);
}

}  // namespace puyu
