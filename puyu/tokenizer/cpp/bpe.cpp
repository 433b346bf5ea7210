// Byte-level BPE behind a plain C interface: cut, encode, count, learn. See puyu/tokenizer/library.py.
#include "train.h"

using namespace puyu;

extern "C" {

void* puyu_splitter(const int64_t* program, const uint8_t* kinds) { return new Splitter(program, kinds); }
void puyu_splitter_free(void* splitter) { delete static_cast<Splitter*>(splitter); }

void* puyu_encoder(const int32_t* byte_ids, const int32_t* merges, int64_t count) {
    return new Encoder(byte_ids, merges, count);
}
void puyu_encoder_words(void* encoder, const uint8_t* bytes, const int64_t* starts, const int32_t* ids, int64_t count) {
    static_cast<Encoder*>(encoder)->set_words(bytes, starts, ids, count);
}
void puyu_encoder_free(void* encoder) { delete static_cast<Encoder*>(encoder); }

// Ids of each text in a row (room for all bytes and 8 more); ends [texts], as ~end where a text is left to `tokenizers`.
// Without a splitter each text is one piece.
void puyu_encode(void* encoder, void* splitter, const uint8_t* bytes, const int64_t* starts, int64_t texts,
                 int32_t* ids, int64_t* ends) {
    const auto& bpe = *static_cast<Encoder*>(encoder);
    const auto* cut = static_cast<Splitter*>(splitter);
    auto cache = bpe.take();
    int32_t* out = ids;
    for (int64_t n = 0; n < texts; ++n) {
        const uint8_t *at = bytes + starts[n], *end = bytes + starts[n + 1];
        int32_t* began = out;
        while (at < end) {
            const uint8_t* next = cut ? cut->next(at, end) : end;
            if (!next) break;
            out = bpe.piece(at, size_t(next - at), out, *cache);
            at = next;
        }
        if (at < end) out = began;
        ends[n] = at < end ? ~int64_t(out - ids) : int64_t(out - ids);
    }
    bpe.give(std::move(cache));
}

void* puyu_pieces() { return new Pieces(); }
void puyu_pieces_free(void* pieces) { delete static_cast<Pieces*>(pieces); }

// Counts the pieces of texts `weight` times each, none longer than `longest` characters, with a splitter that leaves
// nothing to others.
void puyu_pieces_add(void* pieces, void* splitter, const uint8_t* bytes, const int64_t* starts, int64_t texts,
                     int64_t longest, int64_t weight) {
    auto& table = *static_cast<Pieces*>(pieces);
    const auto& cut = *static_cast<Splitter*>(splitter);
    for (int64_t n = 0; n < texts; ++n) {
        const uint8_t *at = bytes + starts[n], *end = bytes + starts[n + 1];
        while (at < end) {
            const uint8_t* next = cut.next(at, end);
            if (!next) return;
            while (at < next) {
                const uint8_t* stop = at;
                for (int64_t k = 0; k < longest && stop < next; ++k) stop += width(*stop);
                table.add(at, size_t(stop - at), weight);
                at = stop;
            }
        }
    }
}

void puyu_pieces_weigh(void* pieces, const uint8_t* bytes, const int64_t* starts, const int64_t* counts, int64_t size) {
    for (int64_t n = 0; n < size; ++n)
        static_cast<Pieces*>(pieces)->add(bytes + starts[n], size_t(starts[n + 1] - starts[n]), counts[n]);
}

void puyu_pieces_size(void* pieces, int64_t k, int64_t* count, int64_t* size) {
    *count = *size = 0;
    static_cast<Pieces*>(pieces)->kept(k, [&](const uint8_t*, uint32_t n, int64_t) { ++*count, *size += n; });
}

void puyu_pieces_kept(void* pieces, int64_t k, uint8_t* bytes, int64_t* starts, int64_t* counts) {
    int64_t at = 0, n = 0;
    starts[0] = 0;
    static_cast<Pieces*>(pieces)->kept(k, [&](const uint8_t* from, uint32_t size, int64_t count) {
        std::memcpy(bytes + at, from, size);
        at += size;
        counts[n++] = count;
        starts[n] = at;
    });
}

void* puyu_trainer(int32_t* ids, const int64_t* starts, const int64_t* counts, int64_t words, int64_t tokens,
                   int64_t wanted, int64_t least) {
    return new Trainer(ids, starts, counts, words, tokens, wanted, least);
}
int64_t puyu_trainer_learn(void* trainer, int64_t limit, int32_t* merges) {
    return static_cast<Trainer*>(trainer)->learn(limit, merges);
}
void puyu_trainer_free(void* trainer) { delete static_cast<Trainer*>(trainer); }
}
