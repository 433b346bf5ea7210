// Hashed features of a text (Weinberger et al. 2009), a linear classifier over them (in the spirit of Joulin et al.
// 2016, trained by Adagrad: Duchi et al. 2011), and places of known n-grams. The twin is puyu/data/hashed.py.

#pragma once

#include <algorithm>
#include <cmath>

#include "units.h"

namespace puyu {

// 2^bits buckets; n-grams of 1 .. words folded units, and of shortest .. longest characters (none where longest is 0).
struct FeatureShape {
    int64_t bits, words, shortest, longest;
};

// The buckets of one text, each as often as it stands, in order.
class Features {
  public:
    std::vector<uint32_t> buckets;

    Features(const Unicode &unicode, const FeatureShape &shape) : unicode(unicode), shape(shape) {}

    void read(const uint8_t *bytes, int64_t length) {
        text.read(unicode, bytes, length);
        buckets.clear();
        if (shape.words) {
            split_folded(unicode, text, units);
            grams(units.hashes, 1, shape.words);
        }
        if (shape.longest) {
            fold();
            grams(points, shape.shortest, shape.longest);
        }
    }

  private:
    const Unicode &unicode;
    const FeatureShape shape;
    Characters text;
    Units units;
    std::vector<uint64_t> points;  // hashes of the characters

    // Lower case, digits as 0, runs of blanks as one, one blank at either side.
    void fold() {
        const uint64_t blank = mixed(' ');
        points.clear();
        points.push_back(blank);
        for (int64_t i = 0; i < text.size; i++) {
            if (!text.is(i, SPACE)) points.push_back(mixed(text.is(i, DIGIT) ? '0' : lowered(unicode, text.points[i])));
            else if (points.back() != blank) points.push_back(blank);
        }
        if (points.back() != blank) points.push_back(blank);
    }

    void grams(const std::vector<uint64_t> &hashes, int64_t shortest, int64_t longest) {
        const int64_t size = int64_t(hashes.size()), shift = 64 - shape.bits;
        for (int64_t i = 0; i < size; i++) {
            uint64_t total = 0;
            for (int64_t n = 1; n <= longest && i + n <= size; n++) {
                total = total * PRIME + hashes[size_t(i + n - 1)];
                if (n >= shortest) buckets.push_back(uint32_t(mixed(total) >> shift));
            }
        }
    }
};

// Keeps of the buckets the first place of each; `round` is one in which no slot was seen. What is known of a bucket
// stands beside its mark, so that both are fetched at once.
template <typename Slot>
inline void distinct(std::vector<uint32_t> &buckets, std::vector<Slot> &slots, uint32_t round) {
    size_t left = 0, size = buckets.size();
    for (size_t i = 0; i < size; i++) {
        if (i + 16 < size) __builtin_prefetch(&slots[buckets[i + 16]], 1);
        Slot &slot = slots[buckets[i]];
        if (slot.seen == round) continue;
        slot.seen = round;
        buckets[left++] = buckets[i];
    }
    buckets.resize(left);
}

inline double length_of(const std::vector<uint32_t> &buckets) {
    return std::sqrt(double(buckets.empty() ? 1 : buckets.size()));
}

// Margins of texts, each a vector of length 1 whose features are there or not; weights [buckets + 1], the bias last.
class Linear {
  public:
    Linear(const Unicode &unicode, const FeatureShape &shape, const float *weights)
        : features(unicode, shape), slots(size_t(1) << shape.bits), bias(weights[slots.size()]) {
        for (size_t i = 0; i < slots.size(); i++) slots[i].weight = weights[i];
    }

    double margin(const uint8_t *bytes, int64_t length) {
        features.read(bytes, length);
        distinct(features.buckets, slots, ++round);
        double total = 0;
        for (uint32_t bucket : features.buckets) total += slots[bucket].weight;
        return total / length_of(features.buckets) + bias;
    }

  private:
    struct Slot {
        float weight = 0;
        uint32_t seen = 0;
    };
    Features features;
    std::vector<Slot> slots;
    double bias;
    uint32_t round = 0;
};

// The same classifier while it is trained.
class Trainer {
  public:
    Trainer(const Unicode &unicode, const FeatureShape &shape)
        : features(unicode, shape), slots(size_t(1) << shape.bits) {}

    // One step of Adagrad on the logistic loss of the text; decay pulls the weights that it has toward 0.
    void step(const uint8_t *bytes, int64_t length, bool label, float rate, float decay) {
        features.read(bytes, length);
        distinct(features.buckets, slots, ++round);
        double total = 0, scale = 1.0 / length_of(features.buckets);
        for (uint32_t bucket : features.buckets) total += slots[bucket].weight;
        double error = 1.0 / (1.0 + std::exp(-(total * scale + bias))) - label;
        float slope = float(error * scale);
        for (uint32_t bucket : features.buckets) {
            Slot &slot = slots[bucket];
            float gradient = slope + decay * slot.weight;
            slot.squares += gradient * gradient;
            slot.weight -= rate * gradient / std::sqrt(slot.squares + START);
        }
        squares += error * error;
        bias -= rate * error / std::sqrt(squares + START);
    }

    void save(float *weights) const {
        for (size_t i = 0; i < slots.size(); i++) weights[i] = slots[i].weight;
        weights[slots.size()] = float(bias);
    }

  private:
    static constexpr float START = 1e-3f;  // of the sums of squares: the first steps stay small
    struct Slot {
        float weight = 0, squares = 0;
        uint32_t seen = 0;
    };
    Features features;
    std::vector<Slot> slots;
    double bias = 0, squares = 0;
    uint32_t round = 0;
};

// Sorted hashes with a filter before them: a byte for each beginning of `filter_bits`, 0 where no hash begins so.
struct Known {
    const uint64_t *keys;
    const uint8_t *filter;
    int64_t count, filter_bits;

    // Its place among the keys, or -1.
    int64_t find(uint64_t key) const {
        if (!filter[key >> (64 - filter_bits)]) return -1;
        const uint64_t *place = std::lower_bound(keys, keys + count, key);
        return place != keys + count && *place == key ? place - keys : -1;
    }
};

}  // namespace puyu
