// The plain C interface. Every call takes many texts, and may be made by several threads at once.

#include "digest.h"
#include "hashed.h"
#include "language.h"
#include "measure.h"
#include "minhash.h"
#include "near.h"
#include "personal.h"
#include "presets.h"
#include "winnow.h"
#include "words.h"

using namespace puyu;

extern "C" {

int64_t puyu_num_scores() { return NUM_SCORES; }

void *puyu_automaton(const Texts *phrases) { return new Automaton(*phrases); }
void puyu_automaton_free(void *automaton) { delete static_cast<Automaton *>(automaton); }

// scores [texts, NUM_SCORES]; hows: a `Units_of` each.
void puyu_measure(const Unicode *unicode, const void *boilerplate, const Texts *texts, const uint8_t *hows, double *scores) {
    Measure measure(*unicode, *static_cast<const Automaton *>(boilerplate));
    for (int64_t i = 0; i < texts->count; i++, scores += NUM_SCORES)
        measure(texts->text(i), texts->length(i), hows[i], scores);
}

// digests [texts, 16]
void puyu_digests(const Unicode *unicode, const Texts *texts, uint8_t *digests) {
    Characters text;
    for (int64_t i = 0; i < texts->count; i++) {
        text.read(*unicode, *texts, i);
        folded_digest(*unicode, text, 0, text.size, digests + 16 * i);
    }
}

// What signatures are made of.
struct MinHash {
    const uint64_t *factors, *offsets;  // [size]
    int64_t size, ngram;
    int64_t sketch;                     // shingles that a sketch holds, at most
};

// signatures [texts, size]; counts [texts]: shingles of each, 0 where there is no signature; sketches, one behind the
// other (a text has as many bytes as shingles, at least), which end at ends [texts].
void puyu_minhash(const Unicode *unicode, const Texts *texts, const MinHash *how, uint32_t *signatures, int64_t *counts,
                  uint32_t *sketches, int64_t *ends) {
    Characters text;
    Units units;
    Sketcher sketcher;
    std::vector<uint64_t> shingles;
    int64_t end = 0;
    for (int64_t i = 0; i < texts->count; i++) {
        text.read(*unicode, *texts, i);
        shingles_of(*unicode, text, how->ngram, units, shingles);
        counts[i] = int64_t(shingles.size());
        signature_of(shingles, how->factors, how->offsets, how->size, signatures + i * how->size);
        if (how->sketch) end += sketcher(shingles, how->sketch, sketches + end);
        ends[i] = end;
    }
}

// 0 when all were compared, 1 when a signature or a sketch could not be read.
int32_t puyu_near_copies(const NearTask *task, const Values *signatures, const Values *sketches, int64_t *of,
                         double *value) {
    return Near(*task, *signatures, *sketches)(of, value) ? 0 : 1;
}

// found [texts]: bits of `Personal`
void puyu_may_hold(const Unicode *unicode, const Texts *texts, uint8_t *found) {
    Characters text;
    for (int64_t i = 0; i < texts->count; i++) {
        text.read(*unicode, *texts, i);
        found[i] = may_hold(text);
    }
}

// hashes and places of the fingerprints of all texts, as many as fit in `room`; ends [texts] counts them up to each.
void puyu_fingerprints(const Unicode *unicode, const Texts *texts, int64_t gram, int64_t window, uint64_t *hashes,
                       int64_t *places, int64_t room, int64_t *ends) {
    Characters text;
    Units units;
    std::vector<uint64_t> grams;
    int64_t count = 0;
    for (int64_t i = 0; i < texts->count; i++) {
        text.read(*unicode, *texts, i);
        split_folded(*unicode, text, units);
        ngrams(units.hashes, gram, grams);
        winnow(grams, window, [&](uint64_t hash, int64_t place) {
            if (count < room) hashes[count] = hash, places[count] = place;
            count++;
        });
        ends[i] = count;
    }
}

// counts [texts, 2]: different phrases and places; whole [phrases]: whether letters may not touch it
void puyu_count_words(const Unicode *unicode, const void *words, const Texts *texts, const uint8_t *whole,
                      int64_t *counts) {
    std::vector<int64_t> seen;
    for (int64_t i = 0; i < texts->count; i++)
        count_words(*unicode, *static_cast<const Automaton *>(words), whole, texts->text(i), texts->length(i), seen,
                    counts + 2 * i);
}

// counts [texts, 5]: Han, kana, hangul, Latin words, letters.
void puyu_scripts(const Unicode *unicode, const Texts *texts, int64_t *counts) {
    Characters text;
    for (int64_t i = 0; i < texts->count; i++, counts += 5) {
        text.read(*unicode, *texts, i);
        count_scripts(text, counts);
    }
}

// scores [texts, languages]
void puyu_languages(const Bayes *model, const Texts *texts, float *scores) {
    std::vector<int32_t> found[LANES], seen(size_t(model->num_features), 0);
    for (int64_t first = 0; first < texts->count; first += LANES) {
        int count = int(texts->count - first < LANES ? texts->count - first : LANES);
        const uint8_t *bytes[LANES];
        int64_t lengths[LANES], counts[LANES];
        for (int k = 0; k < count; k++) bytes[k] = texts->text(first + k), lengths[k] = texts->length(first + k);
        find_features(*model, bytes, lengths, count, found, counts);
        for (int k = 0; k < count; k++)
            classify(*model, lengths[k], found[k].data(), counts[k], seen, scores + (first + k) * model->num_languages);
    }
}

// buckets: the distinct features of all texts, as many as fit in `room`; ends [texts] counts them up to each text.
void puyu_features(const Unicode *unicode, const Texts *texts, const FeatureShape *shape, uint32_t *buckets, int64_t room,
                   int64_t *ends) {
    struct Slot {
        uint32_t seen = 0;
    };
    Features features(*unicode, *shape);
    std::vector<Slot> slots(size_t(1) << shape->bits);
    int64_t count = 0;
    for (int64_t i = 0; i < texts->count; i++) {
        features.read(texts->text(i), texts->length(i));
        distinct(features.buckets, slots, uint32_t(i + 1));
        for (uint32_t bucket : features.buckets) {
            if (count < room) buckets[count] = bucket;
            count++;
        }
        ends[i] = count;
    }
}

// margins [texts]
void puyu_linear_margins(const Unicode *unicode, const Texts *texts, const FeatureShape *shape, const float *weights,
                         double *margins) {
    Linear model(*unicode, *shape, weights);
    for (int64_t i = 0; i < texts->count; i++)
        margins[i] = model.margin(texts->text(i), texts->length(i));
}

// A step for each of order [steps]: which text; labels [texts]; weights [buckets + 1] are written.
void puyu_linear_train(const Unicode *unicode, const Texts *texts, const FeatureShape *shape, const uint8_t *labels,
                       const int64_t *order, int64_t steps, double rate, double decay, float *weights) {
    Trainer trainer(*unicode, *shape);
    for (const int64_t *at = order; at < order + steps; at++)
        trainer.step(texts->text(*at), texts->length(*at), labels[*at],
                     float(rate), float(decay));
    trainer.save(weights);
}

// Places [text, key, begin, end] of the n-grams that are known, as many as fit in `room`, and how many there are: begin
// and end are bytes of the text.
void puyu_overlaps(const Unicode *unicode, const Texts *texts, int64_t n, const Known *known, int64_t *places, int64_t room,
                   int64_t *found) {
    Characters text;
    Units units;
    std::vector<uint64_t> grams;
    int64_t count = 0;
    for (int64_t i = 0; i < texts->count; i++) {
        text.read(*unicode, *texts, i);
        split_folded(*unicode, text, units, false);
        ngrams(units.hashes, n, grams);
        for (size_t k = 0; k < grams.size(); k++) {
            int64_t key = known->find(grams[k]);
            if (key < 0) continue;
            int64_t *place = places + 4 * count;
            if (count++ >= room) continue;
            place[0] = i, place[1] = key;
            place[2] = text.at[size_t(units.begins[k])], place[3] = text.at[size_t(units.ends[k + size_t(n) - 1])];
        }
    }
    *found = count;
}

// ---- published rule sets ----

int64_t puyu_num_published(int64_t family) { return family < NUM_FAMILIES ? NUM_PUBLISHED[family] : NUM_C4; }

// scores [texts, puyu_num_published(family)]; by_characters [texts]; marks: bits of `Mark` of all code points.
void puyu_published(const Unicode *unicode, const Texts *texts, const uint8_t *by_characters, const uint8_t *marks,
                    int64_t family, int64_t short_line, double *scores) {
    Published published(*unicode, marks, short_line);
    for (int64_t i = 0; i < texts->count; i++, scores += NUM_PUBLISHED[family])
        published(texts->text(i), texts->length(i), by_characters[i],
                  Family(family), scores);
}

// scores [texts, NUM_C4]; kept: what is left of the texts, one after the other, with ends [texts].
void puyu_c4(const Unicode *unicode, const Texts *texts, const LineRules *rules, double *scores, uint8_t *kept,
             int64_t *ends) {
    C4 c4(*unicode, *rules);
    uint8_t *out = kept;
    for (int64_t i = 0; i < texts->count; i++, scores += NUM_C4) {
        out = c4(texts->text(i), texts->length(i), scores, out);
        ends[i] = out - kept;
    }
}

}  // extern "C"
