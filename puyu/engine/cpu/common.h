// Shared words of the native step: numbers, shapes, and what a call hands over.
//
// D hidden, N query heads, K key/value heads, g = N / K, H head_dim, F intermediate, V vocabulary, T tokens of the
// step, S sequences, R rows of logits. Vectors are GCC's: the compiler maps them to what the processor has.

#pragma once

#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

// Without PUYU_PLAIN, what this processor and this compiler have: GCC shuffles since version 12.
#if !defined(PUYU_PLAIN) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PUYU_VNNI 1
#elif !defined(PUYU_PLAIN) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PUYU_AVX2 1
#endif
#if !defined(PUYU_PLAIN) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PUYU_SHUFFLES 1
#endif
#endif

// One piece of code for every row: inlined into a loop over rows, a compiler may take two rows at a time and sum them
// in another order than a row that is left over.
#define APART __attribute__((noinline))

namespace puyu {

constexpr int64_t LANES = 16;  // floats of one vector, and outputs of one panel of packed weights

typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64), aligned(4)));

struct bf16 {
    uint16_t bits;
};

inline float get(float value) { return value; }
inline float get(bf16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }
inline void put(float &place, float value) { place = value; }
inline void put(bf16 &place, float value) {  // round to nearest even; NaN stays NaN
    uint32_t bits = __builtin_bit_cast(uint32_t, value);
    place.bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half_float(uint16_t bits) {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return __builtin_bit_cast(float, sign | 0x7f800000 | ((rest & 0x3ff) << 13));
    float size = __builtin_bit_cast(float, rest << 13) * 0x1p112f;  // right for subnormal numbers, too
    return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, size));
}

// To the nearest, ties to even.
inline uint16_t half_bits(float value) {
    uint32_t bits = __builtin_bit_cast(uint32_t, value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // beyond the largest: infinite
    if (rest < 0x38800000) {  // subnormal: the sum with 0.5 rounds at the right bit
        float small = __builtin_bit_cast(float, rest) + 0.5f;
        return uint16_t(sign | (__builtin_bit_cast(uint32_t, small) - 0x3f000000));
    }
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

typedef float eight __attribute__((vector_size(32)));
typedef float quad __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(32), aligned(2)));
typedef uint32_t words __attribute__((vector_size(64)));

inline floats load(const float *place) { return *reinterpret_cast<const floats *>(place); }
inline floats load(const bf16 *place) {
    return floats(__builtin_convertvector(*reinterpret_cast<const shorts *>(place), words) << 16);
}
inline void store(float *place, floats value) { *reinterpret_cast<floats *>(place) = value; }

// The sums of four vectors' lanes: halves are added until four are left, then neighbors.
#if PUYU_SHUFFLES
inline quad folded(floats v) {
    eight half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
}
inline quad neighbors(quad a, quad b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
inline quad four_sums(floats a, floats b, floats c, floats d) {
    return neighbors(neighbors(folded(a), folded(b)), neighbors(folded(c), folded(d)));
}
#else
inline float lane_sum(floats v) {
    float four[4];
    for (int i = 0; i < 4; i++) four[i] = (v[i] + v[i + 8]) + (v[i + 4] + v[i + 12]);
    return (four[0] + four[1]) + (four[2] + four[3]);
}
inline quad four_sums(floats a, floats b, floats c, floats d) {
    return quad{lane_sum(a), lane_sum(b), lane_sum(c), lane_sum(d)};
}
#endif

// exp to about 2 ulp, as a loop that vectorizes; NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 5.0e-1f;
    p = p * r * r + r + 1.0f;
    return p * __builtin_bit_cast(float, (int32_t(n) + 127) << 23);
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t rounded(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The threads of one step. Work is handed out in small pieces to whoever is free, so that a core that is busy with
// something else holds nobody up; who computes a piece changes nothing. Threads wait for each other by looking, not by
// sleeping: a step of a small model has a hundred such moments, each shorter than a sleep.
struct Shared {
    std::atomic<int64_t> next{0}, arrived{0}, phase{0};
};

struct Team {
    Shared *shared;
    int64_t index, count;

    // f(i) for all i below n, in pieces of `piece`; ends with a barrier.
    template <typename F>
    void each(int64_t n, int64_t piece, const F &f) {
        for (;;) {
            int64_t from = shared->next.fetch_add(piece, std::memory_order_relaxed);
            for (int64_t i = from; i < from + piece && i < n; i++) f(i);
            if (from + piece >= n) break;
        }
        barrier();
    }

    void barrier() {
        int64_t phase = shared->phase.load(std::memory_order_relaxed);
        if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            shared->next.store(0, std::memory_order_relaxed);
            shared->arrived.store(0, std::memory_order_relaxed);
            shared->phase.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int64_t looks = 0; shared->phase.load(std::memory_order_acquire) == phase; looks++)
            if (looks > 20000) sched_yield();
    }
};

enum Kind : int64_t { FLOAT = 0, BFLOAT = 1, INT8 = 2, INT4 = 3 };

// One linear layer. Dense weights are [out, in] as torch has them. Packed ones stand in pairs of panels of 16 outputs:
// int8 [pair, in / 4, 2, 16, 4], code + 128; int4 [pair, in / 8, 2, 16, 4], the first four inputs in the low nibbles.
// The panels of a pair follow each other, or are one of each half (gate and up projection of a gated layer).
// scales and zeros (half floats, zeros may be null) [pair, in / group, 2, 16]: w = (code - 8) * scale + zero for int4,
// code * scale for int8. `unit` inputs of a row share the scale of the activations; it divides group.
struct Matrix {
    int64_t kind, in, out, group, unit;
    const void *data;
    const uint16_t *scales, *zeros;
    const void *bias;      // in the kind of dense weights; floats beside packed ones
    const int64_t *order;  // packed ones: column c of the codes belongs to input order[c]; null: to input c
};

struct Layer {
    const void *attention_norm, *mlp_norm, *query_norm, *key_norm;  // of Shape.kind; the last two may be null
    Matrix qkv, attention_out, gate_up, down;
    int64_t window;  // a query sees this many keys at most; 0: all
};

struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab, layers;
    int64_t block_size, num_slots, threads, invariant;
    int64_t kind, cache_kind;  // of embedding and norms; of the cache
    float eps;
};

// One sequence of the step: `length` tokens from row `first` on, after `context` cached ones.
struct Sequence {
    int64_t first, length, context;
    const int64_t *blocks;
};

// What a call hands over. `plan` has for each sequence: length, context, rows of logits, blocks; its tokens; its blocks.
struct Call {
    int64_t num_tokens, num_sequences, num_rows;
    int64_t num_ids;  // only the first so many ids are chosen from
    const int64_t *plan;
    const float *cos, *sin;  // [positions, H]
    const void *embedding, *norm;
    Matrix head;
    void *cache;  // [layers, 2 * K * slots, H]
    void *sides;  // of codes: scale and offset, half floats [layers, 2 * K * slots, 2]
    char *scratch;  // see scratch_bytes
    float *logits;  // [R, V]
    int64_t *best;  // [R], the id of the largest logit; -1 where a row is not finite
};

// The same with the plan laid out, [T] each; rows [R]: tokens whose logits are wanted.
struct Step : Call {
    int64_t *tokens, *positions, *slots, *rows;
    Sequence *sequences;
};

}  // namespace puyu
