// One decode step of a small batch in one call: embedding, blocks, paged attention, logits.
//
// Between two matrix-vector products of a small model the cost is dispatch, not arithmetic; here there is none.
// Same arithmetic as puyu.model in fp32 (sums in another order); weights and cache are float or bfloat16.
// Plain C interface, no torch headers; built by puyu/engine/native.py.
//
// D hidden, N query heads, K key/value heads, g = N / K, H head_dim, F intermediate, V vocabulary, B sequences.

#include <cmath>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

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

}  // namespace

extern "C" {

struct Shape {
    int64_t hidden, heads, kv_heads, head_dim, intermediate, vocab, layers;
    int64_t block_size, num_slots, threads;
    float eps;
};

struct Layer {
    const void *attention_norm, *qkv, *qkv_bias, *out, *out_bias, *mlp_norm, *gate_up, *down;
};

struct Step {
    int64_t batch, table_width;
    const int64_t *tokens, *positions, *tables;  // [B], [B], [B, table_width]
    const float *cos, *sin;                      // [positions, H]
    const void *embedding, *norm, *head;
    void *cache;     // [layers, 2 * K * slots, H]
    float *scratch;  // see scratch_floats
    float *logits;   // [B, V]
};

int64_t scratch_floats(const Shape *s, int64_t batch, int64_t longest) {
    int64_t shared = batch * (s->hidden + (2 * s->heads + 2 * s->kv_heads) * s->head_dim + s->intermediate);
    int64_t own = batch * s->hidden + longest + s->head_dim;
    return shared + s->threads * own;
}
}

namespace {

// y[b][row] (+)= W[row] . x[b] + bias[row]; rows are divided among the threads, four at a time.
template <typename T, bool add>
void product(const T *weight, const T *bias, const float *x, float *y, int64_t batch, int64_t in, int64_t out) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < out; row += 4) {
        int64_t count = out - row < 4 ? out - row : 4;
        const T *w0 = weight + row * in;
        const T *w1 = count > 1 ? w0 + in : w0, *w2 = count > 2 ? w0 + 2 * in : w0, *w3 = count > 3 ? w0 + 3 * in : w0;
        for (int64_t b = 0; b < batch; b++) {
            const float *v = x + b * in;
            float sums[4] = {0, 0, 0, 0};
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
            for (int64_t i = 0; i < in; i++) {
                s0 += get(w0[i]) * v[i];
                s1 += get(w1[i]) * v[i];
                s2 += get(w2[i]) * v[i];
                s3 += get(w3[i]) * v[i];
            }
            sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
            for (int64_t r = 0; r < count; r++) {
                float value = sums[r] + (bias ? get(bias[row + r]) : 0.0f);
                float &place = y[b * out + row + r];
                place = add ? place + value : value;
            }
        }
    }
}

// y[b][i] = silu(gate[i] . x[b]) * (up[i] . x[b]), with gate and up the halves of one matrix.
template <typename T>
void gated(const T *weight, const float *x, float *y, int64_t batch, int64_t in, int64_t out) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < out; row++) {
        const T *gate = weight + row * in, *up = weight + (row + out) * in;
        for (int64_t b = 0; b < batch; b++) {
            const float *v = x + b * in;
            float g = 0, u = 0;
            for (int64_t i = 0; i < in; i++) {
                g += get(gate[i]) * v[i];
                u += get(up[i]) * v[i];
            }
            y[b * out + row] = g / (1.0f + exponential(-g)) * u;
        }
    }
}

template <typename T>
void normalize(const T *weight, const float *x, float *y, int64_t batch, int64_t size, float eps) {
    for (int64_t b = 0; b < batch; b++, x += size, y += size) {
        float square = 0;
        for (int64_t i = 0; i < size; i++) square += x[i] * x[i];
        float scale = 1.0f / std::sqrt(square / float(size) + eps);
        for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * get(weight[i]);
    }
}

inline void rotate(const float *x, const float *cos, const float *sin, float *y, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i++) {
        y[i] = x[i] * cos[i] - x[i + half] * sin[i];
        y[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
    }
}

// One query over `length` keys and values of one head; `scores` has room for them, `turned` for the query.
template <typename T>
void attend(const float *query, const T *keys, const T *values, const int64_t *table, int64_t length, int64_t block_size,
            int64_t size, float *scores, float *out) {
    float best = -INFINITY, total = 0, scale = 1.0f / std::sqrt(float(size));
    for (int64_t p = 0; p < length; p++) {
        const T *key = keys + (table[p / block_size] * block_size + p % block_size) * size;
        float score = 0;
        for (int64_t i = 0; i < size; i++) score += query[i] * get(key[i]);
        scores[p] = score * scale;
        best = scores[p] > best ? scores[p] : best;
    }
    for (int64_t p = 0; p < length; p++) scores[p] = exponential(scores[p] - best);
    for (int64_t p = 0; p < length; p++) total += scores[p];
    for (int64_t i = 0; i < size; i++) out[i] = 0;
    for (int64_t p = 0; p < length; p++) {
        const T *value = values + (table[p / block_size] * block_size + p % block_size) * size;
        for (int64_t i = 0; i < size; i++) out[i] += scores[p] * get(value[i]);
    }
    for (int64_t i = 0; i < size; i++) out[i] /= total;
}

// Rotate and store the new keys and values, then attend; (sequence, head) pairs are divided among the threads.
template <typename T>
void attention(const Shape *s, const Step *t, const float *qkv, float *out, T *rows, float *scores) {
    int64_t group = s->heads / s->kv_heads, size = s->head_dim, width = (group + 2) * size;
    float *turned = scores;
    scores += size;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < t->batch * s->kv_heads; item++) {
        int64_t b = item / s->kv_heads, k = item % s->kv_heads, position = t->positions[b];
        const int64_t *table = t->tables + b * t->table_width;
        const float *own = qkv + b * s->kv_heads * width + k * width;
        const float *cos = t->cos + position * size, *sin = t->sin + position * size;
        T *keys = rows + k * s->num_slots * size, *values = rows + (s->kv_heads + k) * s->num_slots * size;
        int64_t slot = table[position / s->block_size] * s->block_size + position % s->block_size;
        rotate(own + group * size, cos, sin, turned, size);
        for (int64_t i = 0; i < size; i++) put(keys[slot * size + i], turned[i]);
        for (int64_t i = 0; i < size; i++) put(values[slot * size + i], own[(group + 1) * size + i]);
        for (int64_t g = 0; g < group; g++) {
            rotate(own + g * size, cos, sin, turned, size);
            attend(turned, keys, values, table, position + 1, s->block_size, size, scores,
                   out + (b * s->heads + k * group + g) * size);
        }
    }
}

template <typename T>
void run(const Shape *s, const Layer *layers, const Step *t) {
    int64_t batch = t->batch, D = s->hidden, width = (s->heads + 2 * s->kv_heads) * s->head_dim;
    int64_t longest = 0;
    for (int64_t b = 0; b < batch; b++) longest = t->positions[b] + 1 > longest ? t->positions[b] + 1 : longest;
    float *x = t->scratch, *qkv = x + batch * D, *mixed = qkv + batch * width;
    float *inner = mixed + batch * s->heads * s->head_dim, *free = inner + batch * s->intermediate;
    int64_t own_size = batch * D + longest + s->head_dim, layer_size = 2 * s->kv_heads * s->num_slots * s->head_dim;
    const T *embedding = static_cast<const T *>(t->embedding);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t i = 0; i < D; i++) x[b * D + i] = get(embedding[t->tokens[b] * D + i]);
#pragma omp parallel num_threads(s->threads)
    {
#ifdef _OPENMP
        float *own = free + own_size * omp_get_thread_num();
#else
        float *own = free;
#endif
        float *normed = own, *scores = own + batch * D;
        for (int64_t index = 0; index < s->layers; index++) {
            const Layer &l = layers[index];
            auto at = [](const void *pointer) { return static_cast<const T *>(pointer); };
            normalize(at(l.attention_norm), x, normed, batch, D, s->eps);
            product<T, false>(at(l.qkv), at(l.qkv_bias), normed, qkv, batch, D, width);
            attention(s, t, qkv, mixed, static_cast<T *>(t->cache) + index * layer_size, scores);
            product<T, true>(at(l.out), at(l.out_bias), mixed, x, batch, s->heads * s->head_dim, D);
            normalize(at(l.mlp_norm), x, normed, batch, D, s->eps);
            gated(at(l.gate_up), normed, inner, batch, D, s->intermediate);
            product<T, true>(at(l.down), nullptr, inner, x, batch, s->intermediate, D);
        }
        normalize(static_cast<const T *>(t->norm), x, normed, batch, D, s->eps);
        product<T, false>(static_cast<const T *>(t->head), nullptr, normed, t->logits, batch, D, s->vocab);
    }
}

}  // namespace

extern "C" {

void step_float(const Shape *shape, const Layer *layers, const Step *step) { run<float>(shape, layers, step); }
void step_bfloat16(const Shape *shape, const Layer *layers, const Step *step) { run<bf16>(shape, layers, step); }
}
