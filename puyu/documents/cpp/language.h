// A naive Bayes classifier over n-grams of bytes (Lui and Baldwin, 2012), with the tables that py3langid has.

#pragma once

#include <cmath>

#include "common.h"

namespace puyu {

struct Bayes {
    const int32_t *moves;    // [rows * 256]: the next state
    const int32_t *rows;     // of a state
    const int32_t *outputs;  // the feature of a state, or negative
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

// Log-probabilities of each language, up to a constant, over the root of the length; `seen` is all zero before and after.
inline void classify(const Bayes &model, const uint8_t *bytes, int64_t length, std::vector<int32_t> &seen, float *scores) {
    std::vector<int32_t> features;
    int32_t state = 0;
    for (int64_t i = 0; i < length; i++) {
        state = model.moves[int64_t(model.rows[state]) * 256 + bytes[i]];
        int32_t feature = model.outputs[state];
        if (feature >= 0 && !seen[size_t(feature)]++) features.push_back(feature);
    }
    for (int64_t l = 0; l < model.num_languages; l++) scores[l] = features.empty() ? 0.0f : model.priors[l];
    for (int32_t feature : features) {
        float count = LOGARITHMS(seen[size_t(feature)]);
        const float *row = model.weights + int64_t(feature) * model.num_languages;
        for (int64_t l = 0; l < model.num_languages; l++) scores[l] += count * row[l];
        seen[size_t(feature)] = 0;
    }
    float scale = 1.0f / std::sqrt(float(length > 0 ? length : 1));
    for (int64_t l = 0; l < model.num_languages; l++) scores[l] *= scale;
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
