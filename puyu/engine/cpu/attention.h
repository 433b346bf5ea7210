// Attention over the paged cache. Keys and values of a layer stand as rows of H numbers or codes (`Rows`, cache.h),
// ordered [key or value, head, slot]; a token's slot is block * block_size + offset.
//
// Two ways for the same: `attend_one` takes one query after another, and its result never depends on what else is in
// the step; `attend_many` takes tiles of queries and keys with a running softmax (Dao et al. 2022, arXiv 2205.14135)
// and is several times as fast for prompts. They differ in the order of sums alone.

#pragma once

#include <type_traits>

#include "cache.h"

namespace puyu {

constexpr int64_t KEYS = 64;     // keys of one tile
constexpr int64_t QUERIES = 48;  // rows (query, head of the group) of one tile
constexpr int ROWS = 6;          // rows of the innermost product

struct Heads {
    int64_t group, size, block_size;  // queries of a key head, H, tokens of a block
    int64_t window;                   // 0: everything before is seen
};

// The row of the cache in which the key of place `p` stands, relative to its head.
inline int64_t slot_of(const int64_t *blocks, int64_t p, int64_t block_size) {
    return blocks[p / block_size] * block_size + p % block_size;
}

inline int64_t first_seen(int64_t position, int64_t window) {
    return window && position >= window ? position - window + 1 : 0;
}

// One query [H] at `position` -> out [H]; `scores` has room for all places.
template <typename Rows>
APART void attend_one(const Heads &h, const float *query, const Rows &keys, const Rows &values, const int64_t *blocks,
                int64_t position, float *scores, float *out) {
    int64_t size = h.size, start = first_seen(position, h.window), end = position + 1;
    float best = -INFINITY, total = 0, scale = 1.0f / std::sqrt(float(size));
    for (int64_t p = start; p < end; p++) {
        const auto key = keys.at(slot_of(blocks, p, h.block_size));
        float score = 0;
#pragma omp simd reduction(+ : score)
        for (int64_t i = 0; i < size; i++) score += query[i] * key.number(i);
        scores[p] = score * scale;
        best = scores[p] > best ? scores[p] : best;
    }
    for (int64_t p = start; p < end; p++) scores[p] = exponential(scores[p] - best);
#pragma omp simd reduction(+ : total)
    for (int64_t p = start; p < end; p++) total += scores[p];
    for (int64_t i = 0; i < size; i++) out[i] = 0;
    for (int64_t p = start; p < end; p++) {
        const auto value = values.at(slot_of(blocks, p, h.block_size));
        for (int64_t i = 0; i < size; i++) out[i] += scores[p] * value.number(i);
    }
    for (int64_t i = 0; i < size; i++) out[i] /= total;
}

// The same for the G queries of one key head at once, H = 16 * NV: keys and values are read once, sums stay in registers.
// `scores` has room for G times all places.
template <typename Rows, int G, int NV>
APART void attend_group(const Heads &h, const float *const (&queries)[G], const Rows &keys, const Rows &values,
                  const int64_t *blocks, int64_t position, float *scores, float *const (&outs)[G]) {
    constexpr int64_t size = NV * LANES;
    int64_t start = first_seen(position, h.window), count = position + 1 - start, room = rounded(count, 4);
    float scale = 1.0f / std::sqrt(float(size));
    floats q[G][NV];
    _Pragma("GCC unroll 8") for (int g = 0; g < G; g++)
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) q[g][v] = load(queries[g] + v * LANES) * scale;
    for (int64_t p = 0; p < count; p += 4) {
        floats sums[4][G];
        _Pragma("GCC unroll 8") for (int i = 0; i < 4; i++) {
            const auto key = keys.at(slot_of(blocks, start + smaller(p + i, count - 1), h.block_size));
            _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) {
                floats part = key.vector(v * LANES);
                _Pragma("GCC unroll 8") for (int g = 0; g < G; g++)
                    sums[i][g] = v ? sums[i][g] + q[g][v] * part : q[g][v] * part;
            }
        }
        _Pragma("GCC unroll 8") for (int g = 0; g < G; g++) {
            quad four = four_sums(sums[0][g], sums[1][g], sums[2][g], sums[3][g]);
            std::memcpy(scores + g * room + p, &four, 16);
        }
    }
    float inverse[G];
    for (int g = 0; g < G; g++) {
        float *score = scores + g * room, best = -INFINITY, total = 0;
#pragma omp simd reduction(max : best)
        for (int64_t p = 0; p < count; p++) best = score[p] > best ? score[p] : best;
        for (int64_t p = 0; p < count; p++) score[p] = exponential(score[p] - best);
#pragma omp simd reduction(+ : total)
        for (int64_t p = 0; p < count; p++) total += score[p];
        inverse[g] = 1.0f / total;
    }
    floats o[G][NV];
    _Pragma("GCC unroll 8") for (int g = 0; g < G; g++) _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) o[g][v] = floats{};
    for (int64_t p = 0; p < count; p++) {
        const auto value = values.at(slot_of(blocks, start + p, h.block_size));
        floats share[G];
        _Pragma("GCC unroll 8") for (int g = 0; g < G; g++) share[g] = floats{} + scores[g * room + p];
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) {
            floats part = value.vector(v * LANES);
            _Pragma("GCC unroll 8") for (int g = 0; g < G; g++) o[g][v] += share[g] * part;
        }
    }
    _Pragma("GCC unroll 8") for (int g = 0; g < G; g++)
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) store(outs[g] + v * LANES, o[g][v] * inverse[g]);
}

// Queries [from, to) of one position and key head, two at a time where the size has a kernel.
template <typename Rows, typename Query, typename Place>
void attend_position(const Heads &h, const Query &query, const Place &place, const Rows &keys, const Rows &values,
                     const int64_t *blocks, int64_t position, int64_t from, int64_t to, float *scores) {
    auto some = [&]<int NV>(std::integral_constant<int, NV>) {
        int64_t r = from;
        for (; r + 2 <= to; r += 2)
            attend_group<Rows, 2, NV>(h, {query(r), query(r + 1)}, keys, values, blocks, position, scores,
                                   {place(r), place(r + 1)});
        for (; r < to; r++)
            attend_group<Rows, 1, NV>(h, {query(r)}, keys, values, blocks, position, scores, {place(r)});
    };
    switch (h.size) {
        case 32: return some(std::integral_constant<int, 2>{});
        case 64: return some(std::integral_constant<int, 4>{});
        case 96: return some(std::integral_constant<int, 6>{});
        case 128: return some(std::integral_constant<int, 8>{});
    }
    for (int64_t r = from; r < to; r++)
        attend_one(h, query(r), keys, values, blocks, position, scores, place(r));
}

// c[ROWS, 16 * NV] = (add ? c : 0) + a[ROWS, depth] b[depth, 16 * NV]; strides in floats.
template <int NV>
inline __attribute__((always_inline)) void small_product(const float *a, int64_t a_stride, const float *b,
                                                         int64_t b_stride, float *c, int64_t c_stride, int64_t depth,
                                                         bool add) {
    floats sums[ROWS][NV];
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++)
            sums[r][v] = add ? load(c + r * c_stride + v * LANES) : floats{};
    for (int64_t k = 0; k < depth; k++) {
        floats row[NV];
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) row[v] = load(b + k * b_stride + v * LANES);
        _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) {
            floats value = floats{} + a[r * a_stride + k];
            _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) sums[r][v] += value * row[v];
        }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++)
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

// The same for any multiple of 16 columns and of ROWS rows.
inline void product_of(const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c, int64_t c_stride,
                       int64_t rows, int64_t columns, int64_t depth, bool add) {
    for (int64_t r = 0; r < rows; r += ROWS) {
        int64_t v = 0;
        for (; v + 64 <= columns; v += 64)
            small_product<4>(a + r * a_stride, a_stride, b + v, b_stride, c + r * c_stride + v, c_stride, depth, add);
        for (; v < columns; v += 16)
            small_product<1>(a + r * a_stride, a_stride, b + v, b_stride, c + r * c_stride + v, c_stride, depth, add);
    }
}

inline int64_t tile_floats(int64_t size) {
    return 2 * QUERIES * size + QUERIES * KEYS + 2 * KEYS * size + 2 * QUERIES;
}

// Rows [from, to) of one sequence and key head: row r is query r / group, head r % group. `query(r)` and `place(r)`
// give where they stand; `scratch` has tile_floats.
template <typename Rows, typename Query, typename Place>
void attend_many(const Heads &h, const Query &query, const Place &place, const Rows &keys, const Rows &values,
                 const int64_t *blocks, int64_t context, int64_t from, int64_t to, float *scratch) {
    int64_t size = h.size, rows = to - from, padded = rounded(rows, ROWS);
    float *q = scratch, *o = q + QUERIES * size, *s = o + QUERIES * size, *turned = s + QUERIES * KEYS;
    float *v = turned + KEYS * size, *most = v + KEYS * size, *total = most + QUERIES;
    float scale = 1.0f / std::sqrt(float(size));
    for (int64_t r = 0; r < padded; r++) {
        const float *source = query(from + (r < rows ? r : 0));
        for (int64_t i = 0; i < size; i++) q[r * size + i] = source[i] * scale, o[r * size + i] = 0;
        most[r] = -INFINITY, total[r] = 0;
    }
    int64_t last = context + (to - 1) / h.group, start = first_seen(context + from / h.group, h.window);
    for (int64_t at = start / KEYS * KEYS; at <= last; at += KEYS) {
        int64_t count = smaller(KEYS, last + 1 - at);
        for (int64_t p = 0; p < KEYS; p++) {
            int64_t slot = slot_of(blocks, at + (p < count ? p : 0), h.block_size);
            const auto key = keys.at(slot), value = values.at(slot);
            for (int64_t i = 0; i < size; i++) turned[i * KEYS + p] = key.number(i);
            for (int64_t i = 0; i < size; i++) v[p * size + i] = value.number(i);
        }
        product_of(q, size, turned, KEYS, s, KEYS, padded, KEYS, size, false);
        for (int64_t r = 0; r < padded; r++) {
            int64_t position = context + (from + (r < rows ? r : 0)) / h.group;
            int64_t low = first_seen(position, h.window) - at, high = position + 1 - at;
            float *score = s + r * KEYS, best = most[r], sum = 0;
            for (int64_t p = 0; p < KEYS; p++) score[p] = p >= low && p < high ? score[p] : -INFINITY;
#pragma omp simd reduction(max : best)
            for (int64_t p = 0; p < KEYS; p++) best = score[p] > best ? score[p] : best;
            // NaN is no maximum, but it stays in its score and so in the sum
            float shift = best == -INFINITY ? 0.0f : best, shrink = exponential(most[r] - shift);
            for (int64_t p = 0; p < KEYS; p++) {
                float value = exponential(score[p] - shift);
                score[p] = p >= low && p < high ? value : 0.0f;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < KEYS; p++) sum += score[p];
            shrink = most[r] == -INFINITY ? 0.0f : shrink;
            total[r] = total[r] * shrink + sum, most[r] = best;
            for (int64_t i = 0; i < size; i++) o[r * size + i] *= shrink;
        }
        product_of(s, KEYS, v, size, o, size, padded, size, KEYS, true);
    }
    for (int64_t r = 0; r < rows; r++) {
        float *out = place(from + r), inverse = 1.0f / total[r];
        for (int64_t i = 0; i < size; i++) out[i] = o[r * size + i] * inverse;
    }
}

}  // namespace puyu
