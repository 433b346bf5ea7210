// Softmax cross-entropy of rows of logits, with the gradient written over them: three reads of a row that stays in the
// cache, where torch makes a dozen passes. Twin: `_softmax_rows` in puyu/train/objectives.py.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct Bf16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }

inline float wide(Bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline void store(float* to, float x) { *to = x; }

inline void store(Bf16* to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp for x <= 0, relative error below 2e-7: 2^n e^r with |r| <= ln 2 / 2, Taylor's polynomial. NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = std::nearbyint(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

template <class T>
double row_step(T* row, int64_t size, int64_t target, float weight, bool learns) {
    float most = wide(row[0]);
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < size; i++) most = wide(row[i]) > most ? wide(row[i]) : most;
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += 1024) {
        const int64_t end = begin + 1024 < size ? begin + 1024 : size;
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t i = begin; i < end; i++) part += exponential(wide(row[i]) - most);
        total += part;
    }
    const double loss = (std::log(total) + most - wide(row[target])) * weight;
    if (!learns) return loss;
    const float share = float(weight / total), right = exponential(wide(row[target]) - most) * share - weight;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) store(row + i, exponential(wide(row[i]) - most) * share);
    store(row + target, right);
    return loss;
}

template <class T>
void step(T* logits, int64_t rows, int64_t size, const int64_t* targets, const float* weights, float* losses,
          bool learns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        losses[r] = float(row_step(logits + r * size, size, targets[r], weights[r], learns));
}

}  // namespace

// `narrow`: logits are bf16, else fp32. `losses` are weighted; with `learns` the logits become their weighted gradient.
extern "C" void puyu_softmax_step(void* logits, int64_t narrow, int64_t rows, int64_t size, const int64_t* targets,
                                  const float* weights, float* losses, int64_t learns, int64_t threads) {
    if (narrow)
        step(static_cast<Bf16*>(logits), rows, size, targets, weights, losses, learns, int(threads));
    else
        step(static_cast<float*>(logits), rows, size, targets, weights, losses, learns, int(threads));
}
