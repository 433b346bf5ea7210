// One step of the engine in one call: embedding, blocks, paged attention, logits.
//
// Between two matrix products of a small model the cost is dispatch, not arithmetic; here there is none. The same
// arithmetic as puyu.model in fp32 (sums in another order), except that packed weights meet activations rounded to
// int8 (product.h). Plain C interface, no torch headers; built by puyu/engine/native.py.

#include "attention.h"
#include "pack.h"
#include "product.h"

namespace puyu {

constexpr int64_t FEW = 8;         // rows up to which every thread prepares the activations for itself: no barrier
constexpr int64_t LEAST_UNIT = 16;  // inputs that share a scale, at least

constexpr int64_t PART = 4096;      // logits that one thread searches at a time

// The largest of some logits and its id; not a number where one of them is none.
struct Peak {
    float value;
    int64_t id;
};

struct Buffers {
    int64_t *plan;
    Peak *peaks;
    float *x, *qkv, *mixed, *inner, *normed, *scores, *ordered;
    char *codes, *end;
};

inline int64_t widest(const Shape &s) {
    int64_t mixed = s.heads * s.head_dim, most = s.hidden > mixed ? s.hidden : mixed;
    return s.intermediate > most ? s.intermediate : most;
}

// Where everything stands in `base`: first what the team shares, then one part for each thread.
inline Buffers layout(const Shape &s, int64_t tokens, int64_t longest, char *base, int64_t thread) {
    auto take = [&](int64_t bytes) {
        char *place = base;
        base += rounded(bytes, 64);
        return place;
    };
    auto floats_of = [&](int64_t count) { return reinterpret_cast<float *>(take(count * 4)); };
    int64_t mixed = s.heads * s.head_dim, width = mixed + 2 * s.kv_heads * s.head_dim;
    Buffers b;
    b.plan = reinterpret_cast<int64_t *>(take(tokens * (4 * 8 + sizeof(Sequence))));
    b.peaks = reinterpret_cast<Peak *>(take(tokens * ((s.vocab + PART - 1) / PART) * sizeof(Peak)));
    b.x = floats_of(tokens * s.hidden), b.qkv = floats_of(tokens * (width > s.hidden ? width : s.hidden)), b.mixed = floats_of(tokens * mixed);
    b.inner = floats_of(tokens * s.intermediate);
    bool shared = tokens > FEW;
    if (shared) b.normed = floats_of(tokens * s.hidden), b.codes = take(codes_bytes(tokens, widest(s), LEAST_UNIT));
    for (int64_t index = 0; index <= thread; index++) {
        if (!shared) b.normed = floats_of(tokens * s.hidden), b.codes = take(codes_bytes(tokens, widest(s), LEAST_UNIT));
        int64_t places = 2 * rounded(longest, 4), tile = tile_floats(s.head_dim);
        b.scores = floats_of(places > tile ? places : tile);
        b.ordered = floats_of(widest(s));
    }
    b.end = base;
    return b;
}

APART inline void normalize_row(const Shape &s, const void *weight, const float *x, float *y, int64_t size) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < size; i++) square += x[i] * x[i];
    float scale = 1.0f / std::sqrt(square / float(size) + s.eps);
    auto scaled = [&](auto w) {
        for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * get(w[i]);
    };
    s.kind == FLOAT ? scaled(static_cast<const float *>(weight)) : scaled(static_cast<const bf16 *>(weight));
}

APART inline void rotate(float *x, const float *cos, const float *sin, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

inline bool is_packed(const Matrix &m) { return m.kind == INT8 || m.kind == INT4; }

// Rows as a product wants them: floats, or integers.
struct Input {
    const float *rows;
    Codes codes;
};

// `count` rows of m.in floats, normalized where there is a norm, rounded where the weights are packed.
inline Input prepare(Team &team, const Shape &s, const Matrix &m, const void *norm, const float *rows, int64_t count,
                     const Buffers &b, bool shared) {
    Codes codes{};
    if (is_packed(m)) codes = make_codes(b.codes, count, m.in, m.unit);
    auto one = [&](int64_t row) {
        const float *x = rows + row * m.in;
        if (norm) {
            normalize_row(s, norm, x, b.normed + row * m.in, m.in);
            x = b.normed + row * m.in;
        }
        if (m.order) {
            for (int64_t i = 0; i < m.in; i++) b.ordered[i] = x[m.order[i]];
            x = b.ordered;
        }
        if (is_packed(m)) round_row(x, codes, row, m.unit);
    };
    if (shared) {
        team.each(count, 4, one);
    } else {
        for (int64_t row = 0; row < count; row++) one(row);
    }
    return {norm ? b.normed : rows, codes};
}

template <bool add>
inline void product(Team &team, const Matrix &m, const Input &input, float *y, int64_t rows) {
    if (is_packed(m)) return packed_product<add>(team, m, input.codes, y, rows);
    if (m.kind == FLOAT) return dense_product<float, add>(team, m, input.rows, y, rows);
    dense_product<bf16, add>(team, m, input.rows, y, rows);
}

inline void gated(Team &team, const Matrix &m, const Input &input, float *y, int64_t rows) {
    if (is_packed(m)) return packed_gated(team, m, input.codes, y, rows);
    if (m.kind == FLOAT) return dense_gated<float>(team, m, input.rows, y, rows);
    dense_gated<bf16>(team, m, input.rows, y, rows);
}

// One token and key head: norms of queries and key, rotation, and the new key and value to the cache.
template <typename Rows>
void write_one(const Shape &s, const Layer &l, const Step &t, float *qkv, const Rows &rows, int64_t token, int64_t k) {
    int64_t group = s.heads / s.kv_heads, size = s.head_dim, position = t.positions[token];
    float *own = qkv + (token * s.kv_heads + k) * (group + 2) * size, *key = own + group * size, *value = key + size;
    const float *cos = t.cos + position * size, *sin = t.sin + position * size;
    for (int64_t g = 0; g <= group; g++) {
        const void *norm = g < group ? l.query_norm : l.key_norm;
        if (norm) normalize_row(s, norm, own + g * size, own + g * size, size);
        rotate(own + g * size, cos, sin, size);
    }
    rows.write(k * s.num_slots + t.slots[token], key);
    rows.write((s.kv_heads + k) * s.num_slots + t.slots[token], value);
}

// One tile of queries of one sequence and key head; single tokens one by one.
template <typename Rows>
void attend(const Shape &s, const Layer &l, const Sequence &q, int64_t k, int64_t from, int64_t to, const float *qkv,
            float *out, const Rows &rows, float *scores) {
    int64_t group = s.heads / s.kv_heads, size = s.head_dim, width = (group + 2) * size;
    Heads heads{group, size, s.block_size, l.window};
    const Rows keys = rows.from(k * s.num_slots), values = rows.from((s.kv_heads + k) * s.num_slots);
    auto query = [&](int64_t r) {
        return qkv + ((q.first + r / group) * s.kv_heads + k) * width + r % group * size;
    };
    auto place = [&](int64_t r) { return out + ((q.first + r / group) * s.heads + k * group + r % group) * size; };
    if (q.length > 1 && !s.invariant && size % LANES == 0)
        return attend_many(heads, query, place, keys, values, q.blocks, q.context, from, to, scores);
    for (int64_t r = from; r < to;) {
        int64_t position = r / group, next = smaller((position + 1) * group, to);
        attend_position(heads, query, place, keys, values, q.blocks, q.context + position, r, next, scores);
        r = next;
    }
}

// Keys and values of the step's tokens to the cache, then attention; where every sequence has one token, both at once.
template <typename Rows>
void attention(Team &team, const Shape &s, const Layer &l, const Step &t, float *qkv, float *out, const Rows &rows,
               float *scores) {
    int64_t group = s.heads / s.kv_heads, items = 0;
    bool single = t.num_tokens == t.num_sequences;
    auto tiles_of = [&](int64_t index) { return (t.sequences[index].length * group + QUERIES - 1) / QUERIES; };
    for (int64_t i = 0; i < t.num_sequences; i++) items += tiles_of(i);
    if (!single)
        team.each(t.num_tokens * s.kv_heads, 4,
                  [&](int64_t item) { write_one(s, l, t, qkv, rows, item / s.kv_heads, item % s.kv_heads); });
    team.each((single ? t.num_sequences : items) * s.kv_heads, 1, [&](int64_t item) {
        int64_t tile = item / s.kv_heads, k = item % s.kv_heads, index = 0;
        if (single) {
            write_one(s, l, t, qkv, rows, tile, k);
            return attend(s, l, t.sequences[tile], k, 0, group, qkv, out, rows, scores);
        }
        for (; tile >= tiles_of(index); index++) tile -= tiles_of(index);
        const Sequence &q = t.sequences[index];
        int64_t from = tile * QUERIES, to = smaller(from + QUERIES, q.length * group);
        attend(s, l, q, k, from, to, qkv, out, rows, scores);
    });
}

inline void embed(Team &team, const Shape &s, const Step &t, float *x) {
    auto copied = [&](auto table) {
        team.each(t.num_tokens, 4, [&](int64_t row) {
            for (int64_t i = 0; i < s.hidden; i++) x[row * s.hidden + i] = get(table[t.tokens[row] * s.hidden + i]);
        });
    };
    s.kind == FLOAT ? copied(static_cast<const float *>(t.embedding)) : copied(static_cast<const bf16 *>(t.embedding));
}

inline Step laid_out(const Shape &s, const Call &call, int64_t *place) {
    int64_t T = call.num_tokens, token = 0, row = 0;
    Step t{call, place, place + T, place + 2 * T, place + 3 * T, reinterpret_cast<Sequence *>(place + 4 * T)};
    const int64_t *next = call.plan;
    for (int64_t i = 0; i < call.num_sequences; i++) {
        int64_t length = next[0], context = next[1], rows = next[2];
        const int64_t *ids = next + 4, *blocks = ids + length;
        t.sequences[i] = {token, length, context, blocks};
        next = blocks + next[3];
        for (int64_t left = rows; left; left--) t.rows[row++] = token + length - left;
        for (int64_t position = context; position < context + length; position++, token++) {
            t.tokens[token] = *ids++, t.positions[token] = position;
            t.slots[token] = blocks[position / s.block_size] * s.block_size + position % s.block_size;
        }
    }
    return t;
}

APART inline Peak peak_of(const float *x, int64_t count, int64_t first) {
    float most = -INFINITY;
    int broken = 0;
#pragma omp simd reduction(max : most) reduction(| : broken)
    for (int64_t i = 0; i < count; i++) {
        most = x[i] > most ? x[i] : most;
        broken |= x[i] != x[i];
    }
    if (broken) return {NAN, -1};
    int64_t at = 0;
    while (x[at] != most) at++;
    return {most, first + at};
}

// Of equal logits the first one's id, as everywhere.
inline void choose(Team &team, const Shape &s, const Step &t, Peak *peaks) {
    int64_t parts = (t.num_ids + PART - 1) / PART;
    team.each(t.num_rows * parts, 1, [&](int64_t item) {
        int64_t first = item % parts * PART;
        const float *x = t.logits + item / parts * s.vocab + first;
        peaks[item] = peak_of(x, smaller(t.num_ids - first, PART), first);
    });
    for (int64_t row = team.index; row < t.num_rows; row += team.count) {
        Peak best{-INFINITY, -1};
        for (int64_t part = 0; part < parts && best.value == best.value; part++) {
            const Peak &peak = peaks[row * parts + part];
            if (!(peak.value <= best.value)) best = peak;
        }
        t.best[row] = best.value < INFINITY ? best.id : -1;
    }
}

template <typename Rows>
void run(const Shape &s, const Layer *layers, const Call &call) {
    const Step t = laid_out(s, call, layout(s, call.num_tokens, 0, call.scratch, 0).plan);
    int64_t longest = 0, D = s.hidden, count = t.num_tokens;
    for (int64_t i = 0; i < t.num_sequences; i++) {
        int64_t end = t.sequences[i].context + t.sequences[i].length;
        longest = end > longest ? end : longest;
    }
    bool shared = count > FEW;
    auto work = [&](Team team) {
        Buffers b = layout(s, count, longest, t.scratch, team.index);
        embed(team, s, t, b.x);
        for (int64_t index = 0; index < s.layers; index++) {
            const Layer &l = layers[index];
            const Rows rows = Rows::of(s, t, index);
            auto ready = [&](const Matrix &m, const void *norm, const float *x) {
                return prepare(team, s, m, norm, x, count, b, shared);
            };
            product<false>(team, l.qkv, ready(l.qkv, l.attention_norm, b.x), b.qkv, count);
            attention(team, s, l, t, b.qkv, b.mixed, rows, b.scores);
            product<true>(team, l.attention_out, ready(l.attention_out, nullptr, b.mixed), b.x, count);
            gated(team, l.gate_up, ready(l.gate_up, l.mlp_norm, b.x), b.inner, count);
            product<true>(team, l.down, ready(l.down, nullptr, b.inner), b.x, count);
        }
        team.each(t.num_rows, 1, [&](int64_t row) {
            std::memcpy(b.qkv + row * D, b.x + t.rows[row] * D, size_t(D) * 4);
        });
        if (t.num_rows) {
            Input last = prepare(team, s, t.head, t.norm, b.qkv, t.num_rows, b, shared);
            product<false>(team, t.head, last, t.logits, t.num_rows);
            choose(team, s, t, b.peaks);
        }
    };
    Shared together;
#ifdef _OPENMP
#pragma omp parallel num_threads(s.threads)
    work({&together, omp_get_thread_num(), omp_get_num_threads()});
#else
    work({&together, 0, 1});
#endif
}

}  // namespace puyu

extern "C" {

int64_t puyu_scratch_bytes(const puyu::Shape *shape, int64_t tokens, int64_t longest) {
    return puyu::layout(*shape, tokens, longest, nullptr, shape->threads - 1).end - static_cast<char *>(nullptr);
}

void puyu_step(const puyu::Shape *shape, const puyu::Layer *layers, const puyu::Call *call) {
    using namespace puyu;
    switch (shape->cache_kind) {
        case FLOAT: return run<CachedNumbers<float>>(*shape, layers, *call);
        case BFLOAT: return run<CachedNumbers<bf16>>(*shape, layers, *call);
        case INT8: return run<CachedCodes<false>>(*shape, layers, *call);
        case INT4: return run<CachedCodes<true>>(*shape, layers, *call);
    }
}

void puyu_pack(const puyu::Pack *pack) { puyu::pack(*pack); }

void puyu_round_rows(int64_t kind, const void *weights, int64_t rows, int64_t in, const float *scales, int8_t *codes) {
    using namespace puyu;
    if (kind == BFLOAT) return round_rows(static_cast<const bf16 *>(weights), rows, in, scales, codes);
    round_rows(static_cast<const float *>(weights), rows, in, scales, codes);
}

void puyu_give_back() { puyu::give_back(); }

void puyu_unpack(const puyu::Pack *pack) { puyu::unpack(*pack); }
}
