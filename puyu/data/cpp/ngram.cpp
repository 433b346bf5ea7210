// The plain C interface of the n-gram model. Every call takes many texts, and may be made by several threads at once.

#include "discourse.h"
#include "splice.h"

using namespace puyu;

namespace {

// f(number of the text, its code points) of each.
template <typename F>
void each_text(const Unicode &unicode, const Texts &texts, const F &f) {
    Characters text;
    for (int64_t i = 0; i < texts.count; i++) {
        text.read(unicode, texts, i);
        f(i, text);
    }
}

}  // namespace

extern "C" {

// hashes: of all units, text by text, at most one a byte; ends [texts] counts them up to each text.
void puyu_ngram_units(const Unicode *unicode, const Texts *texts, uint64_t *hashes, int64_t *ends) {
    int64_t count = 0;
    each_text(*unicode, *texts, [&](int64_t i, const Characters &text) {
        each_unit(*unicode, text, [&](const Unit &unit) { hashes[count++] = unit.hash; });
        ends[i] = count;
    });
}

// ids likewise; spellings [SYMBOLS, SYMBOLS] counts the bytes of units that are not in the vocabulary.
void puyu_ngram_ids(const Unicode *unicode, const Vocabulary *vocabulary, const Texts *texts, uint32_t *ids,
                    int64_t *ends, int64_t *spellings) {
    int64_t count = 0;
    each_text(*unicode, *texts, [&](int64_t i, const Characters &text) {
        each_unit(*unicode, text, [&](const Unit &unit) {
            uint32_t id = vocabulary->id(unit.hash);
            ids[count++] = id;
            if (id != UNKNOWN) return;
            int before = SYMBOLS - 1;
            for (uint8_t byte : unit.bytes) spellings[before * SYMBOLS + byte]++, before = byte;
            spellings[before * SYMBOLS + SYMBOLS - 1]++;
        });
        ends[i] = count;
    });
}

// scores [texts, 4]: bits, units, unknown units, bits of those.
void puyu_ngram_score(const Unicode *unicode, const Model *model, const Texts *texts, double *scores) {
    each_text(*unicode, *texts, [&](int64_t i, const Characters &text) {
        Walk walk(*model);
        double bits = 0, unknown_bits = 0;
        int64_t units = 0, unknown = 0;
        each_unit(*unicode, text, [&](const Unit &unit) {
            uint32_t id = model->vocabulary.id(unit.hash);
            double found = -walk.step(unit, id);
            bits += found, units++;
            if (id == UNKNOWN) unknown++, unknown_bits += found;
        });
        double *row = scores + 4 * i;
        row[0] = bits, row[1] = double(units), row[2] = double(unknown), row[3] = unknown_bits;
    });
}

// log2 of the probability of each unit of a text; returns how many there are.
int64_t puyu_ngram_walk(const Unicode *unicode, const Model *model, const Texts *texts, double *logs) {
    int64_t count = 0;
    each_text(*unicode, *texts, [&](int64_t, const Characters &text) {
        Walk walk(*model);
        each_unit(*unicode, text,
                  [&](const Unit &unit) { logs[count++] = walk.step(unit, model->vocabulary.id(unit.hash)); });
    });
    return count;
}

// gains and starts as in splice.h, text after text; ends [texts] counts segments up to each.
void puyu_splice(const Unicode *unicode, const Model *model, const SpliceOptions *options, const Texts *texts,
                 double *gains, int64_t *starts, int64_t *ends) {
    Splice splice(*unicode, *model, *options);
    int64_t count = 0;
    for (int64_t i = 0; i < texts->count; i++) {
        count += splice(texts->text(i), texts->length(i), gains + count * (2 * options->reach + 1), starts + count);
        ends[i] = count;
    }
}

// scores [texts, NUM_DISCOURSE]
void puyu_discourse(const Unicode *unicode, const Phrases *phrases, const DiscourseOptions *options, const Texts *texts,
                    double *scores) {
    Discourse discourse(*unicode, *phrases, *options);
    for (int64_t i = 0; i < texts->count; i++)
        discourse(texts->text(i), texts->length(i), scores + i * NUM_DISCOURSE);
}

}  // extern "C"
