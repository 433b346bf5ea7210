// An n-gram model over units of a text: reading units, the vocabulary, probabilities. The twin is puyu/data/ngram.py.

#pragma once

#include <cmath>

#include "../../documents/cpp/units.h"

namespace puyu {

constexpr int MAX_ORDER = 5;
constexpr uint32_t UNKNOWN = 1;  // 0 is the boundary, which stands in contexts only
constexpr uint64_t EMPTY = ~uint64_t(0);
constexpr int SYMBOLS = 257;  // bytes, and the end of a unit

// A unit, in lower case, numbers as 0: begin and end in code points, its bytes, their hash.
struct Unit {
    int64_t begin, end;
    const std::vector<uint8_t> &bytes;
    uint64_t hash;
};

inline void append_point(std::vector<uint8_t> &bytes, uint32_t p) {
    if (p < 0x80) return bytes.push_back(uint8_t(p));
    if (p < 0x800) bytes.push_back(uint8_t(0xc0 | p >> 6));
    else {
        if (p < 0x10000) bytes.push_back(uint8_t(0xe0 | p >> 12));
        else bytes.push_back(uint8_t(0xf0 | p >> 18)), bytes.push_back(uint8_t(0x80 | ((p >> 12) & 63)));
        bytes.push_back(uint8_t(0x80 | ((p >> 6) & 63)));
    }
    bytes.push_back(uint8_t(0x80 | (p & 63)));
}

// FNV-1a, then the finalizer of splitmix64.
inline uint64_t unit_hash(const std::vector<uint8_t> &bytes) {
    uint64_t hash = 0xCBF29CE484222325u;
    for (uint8_t byte : bytes) hash = (hash ^ byte) * 0x100000001B3u;
    return mixed(hash);
}

// f(Unit) of each: a Han character or kana, a run of other letters and digits, a mark, a line end among blanks.
template <typename F>
void each_unit(const Unicode &unicode, const Characters &text, const F &f) {
    std::vector<uint8_t> bytes;
    for (int64_t i = 0; i < text.size;) {
        int64_t begin = i;
        bytes.clear();
        if (text.is(i, SPACE)) {
            bool line_end = false;
            for (; i < text.size && text.is(i, SPACE); i++) line_end |= text.points[i] == '\n';
            if (!line_end) continue;
            bytes.push_back('\n');
        } else if (!text.is_word(i) || text.is(i, HAN | KANA)) {
            append_point(bytes, lowered(unicode, text.points[i])), i++;
        } else {
            while (i < text.size && text.is_word(i) && !text.is(i, HAN | KANA)) {
                if (text.is(i, DIGIT)) {
                    bytes.push_back('0');
                    while (i < text.size && text.is(i, DIGIT)) i++;
                } else {
                    append_point(bytes, lowered(unicode, text.points[i])), i++;
                }
            }
        }
        f(Unit{begin, i, bytes, unit_hash(bytes)});
    }
}

// Keys -> places, by linear probing without wrapping around; the last slot is empty.
struct Slots {
    const uint64_t *keys;
    int64_t shift;

    int64_t find(uint64_t key) const {
        uint64_t place = (key * PRIME) >> shift;
        for (;; place++) {
            if (keys[place] == key) return int64_t(place);
            if (keys[place] == EMPTY) return -1;
        }
    }
};

struct Vocabulary {
    Slots slots;
    const uint32_t *ids;

    uint32_t id(uint64_t hash) const {
        int64_t place = slots.find(hash);
        return place < 0 ? UNKNOWN : ids[place];
    }
};

// n-grams of one order: key -> discounted probability, and the weight of what is shorter where it is the context.
struct Grams {
    Slots slots;
    const float *probabilities;
    const float *weights;
};

struct Model {
    Vocabulary vocabulary;
    int64_t order;
    int64_t bits;           // of an id in a key
    const float *unigrams;  // interpolated
    const float *weights;   // of contexts of one unit
    const float *spelling;  // log2 [SYMBOLS, SYMBOLS]: of a byte or the end, given the byte before (the end: at first)
    Grams grams[MAX_ORDER - 1];
};

inline double spelled(const float *spelling, const std::vector<uint8_t> &bytes) {
    double total = 0;
    int before = SYMBOLS - 1;
    for (uint8_t byte : bytes) total += spelling[before * SYMBOLS + byte], before = byte;
    return total + spelling[before * SYMBOLS + SYMBOLS - 1];
}

// Walks over a text and gives the probability of each unit after those before it.
class Walk {
  public:
    explicit Walk(const Model &model) : model(model) {
        depth = 1, weights[1] = model.weights[0];
        for (int n = 2; n < model.order; n++) {
            int64_t place = model.grams[n - 2].slots.find(0);
            if (place < 0) break;
            depth = n, weights[n] = model.grams[n - 2].weights[place];
        }
    }

    // log2 of the probability.
    double step(const Unit &unit, uint32_t id) {
        double p = model.unigrams[id];
        uint64_t key = id;
        double next[MAX_ORDER + 1];
        int found = 1;
        next[1] = model.weights[id];
        bool known = true;
        for (int n = 2; n <= model.order && n - 1 <= depth; n++) {
            key |= history[n - 2] << (model.bits * (n - 1));
            const Grams &grams = model.grams[n - 2];
            int64_t place = known ? grams.slots.find(key) : -1;
            known = place >= 0;
            p *= weights[n - 1];
            if (!known) continue;
            p += grams.probabilities[place];
            if (n < model.order) found = n, next[n] = grams.weights[place];
        }
        depth = found;
        for (int n = 1; n <= found; n++) weights[n] = next[n];
        for (int n = MAX_ORDER - 1; n > 0; n--) history[n] = history[n - 1];
        history[0] = id;
        return std::log2(p) + (id == UNKNOWN ? spelled(model.spelling, unit.bytes) : 0.0);
    }

  private:
    const Model &model;
    uint64_t history[MAX_ORDER] = {};  // ids, the nearest first
    double weights[MAX_ORDER + 1];     // of the contexts of 1 .. depth units
    int depth;                         // the longest context that is known
};

}  // namespace puyu
