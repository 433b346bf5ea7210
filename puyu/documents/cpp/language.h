// A naive Bayes classifier over n-grams of bytes (Lui and Baldwin, 2012), with the tables that py3langid has.

#pragma once

#include <cmath>

#include "common.h"

namespace puyu {

struct Bayes {
    const uint64_t *moves;   // [rows * 256]: the row of the next state; 32 bits higher its feature + 1, or 0
    const float *weights;    // [features, languages]
    const float *priors;     // [languages]
    int64_t num_features, num_languages;
};

// log(1 + count), of small counts from a table.
struct Logarithms {
    float of[256];
    Logarithms() {
        for (int i = 0; i < 256; i++) of[i] = std::log1p(float(i));
    }
    float operator()(int32_t count) const { return count < 256 ? of[count] : std::log1p(float(count)); }
};
const Logarithms LOGARITHMS;

constexpr int LANES = 16;  // texts that are walked side by side, so that one waits for memory while others go on

// The features of up to LANES texts, walked side by side: found[k] [lengths[k]], as many as counts[k] says.
inline void find_features(const Bayes &model, const uint8_t *const *texts, const int64_t *lengths, int count,
                          std::vector<int32_t> *found, int64_t *counts) {
    uint64_t rows[LANES] = {};
    int32_t *next[LANES];
    int64_t longest = 0;
    for (int k = 0; k < count; k++) {
        found[k].resize(size_t(lengths[k]) + 1), next[k] = found[k].data();
        longest = lengths[k] > longest ? lengths[k] : longest;
    }
    for (int64_t i = 0; i < longest; i++)
        for (int k = 0; k < count; k++) {
            if (i >= lengths[k]) continue;
            uint64_t move = model.moves[rows[k] * 256 + texts[k][i]];
            rows[k] = uint32_t(move);
            *next[k] = int32_t(move >> 32) - 1;
            next[k] += *next[k] >= 0;
        }
    for (int k = 0; k < count; k++) counts[k] = next[k] - found[k].data();
}

// Log-probabilities of each language, up to a constant, over the root of the length. `seen` [features] is all zero
// before and after; `features` becomes the distinct ones, in the order of their first places.
inline void classify(const Bayes &model, int64_t length, int32_t *features, int64_t count, std::vector<int32_t> &seen,
                     float *scores) {
    int64_t n = model.num_languages, distinct = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t feature = features[i];
        features[distinct] = feature;
        distinct += !seen[size_t(feature)]++;
    }
    auto row_of = [&](int64_t i) { return model.weights + int64_t(features[i]) * n; };
    for (int64_t l = 0; l < n; l++) scores[l] = distinct ? model.priors[l] : 0.0f;
    for (int64_t i = 0; i < distinct; i++) {
        if (i + 8 < distinct)
            for (int64_t l = 0; l < n; l += 16) __builtin_prefetch(row_of(i + 8) + l);
        float weight = LOGARITHMS(seen[size_t(features[i])]);
        const float *row = row_of(i);
        for (int64_t l = 0; l < n; l++) scores[l] += weight * row[l];
        seen[size_t(features[i])] = 0;
    }
    float scale = 1.0f / std::sqrt(float(length > 0 ? length : 1));
    for (int64_t l = 0; l < n; l++) scores[l] *= scale;
}

// How many: Han characters, kana, hangul, words of Latin letters (two or more), and whether there is any letter.
inline void count_scripts(const Characters &text, int64_t *counts) {
    int64_t han = 0, kana = 0, hangul = 0, words = 0, letters = 0, run = 0;
    for (int64_t i = 0; i <= text.size; i++) {
        uint32_t p = text.points[i];
        han += text.is(i, HAN), kana += text.is(i, KANA), letters += text.is(i, ALPHA);
        hangul += p >= 0xac00 && p <= 0xd7af;
        bool latin = ascii_lower(p) - 'a' < 26 || (p >= 0xc0 && p <= 0xff);
        words += !latin && run >= 2;
        run = latin ? run + 1 : 0;
    }
    counts[0] = han, counts[1] = kana, counts[2] = hangul, counts[3] = words, counts[4] = letters;
}

}  // namespace puyu
