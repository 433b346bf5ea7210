// Rows of the key/value cache, as numbers or as codes (puyu/model/kv_cache.py): `at(slot)` reads one, `write` makes one.
//
// Codes are asymmetric: number = code * scale + offset, with one scale and one offset (half floats) for each token and
// head. Int4 has two codes a byte, the even one in the low nibble.

#pragma once

#include "common.h"

namespace puyu {

typedef uint8_t bytes __attribute__((vector_size(16), aligned(1)));
typedef uint8_t half_bytes __attribute__((vector_size(8), aligned(1)));
typedef uint16_t pairs_of_bytes __attribute__((vector_size(16)));

template <typename T>
struct CachedNumbers {
    T *rows;
    int64_t size;

    static CachedNumbers of(const Shape &s, const Call &call, int64_t layer) {
        return CachedNumbers{static_cast<T *>(call.cache), s.head_dim}.from(layer * 2 * s.kv_heads * s.num_slots);
    }
    CachedNumbers from(int64_t row) const { return {rows + row * size, size}; }

    struct Row {
        const T *x;
        float number(int64_t i) const { return get(x[i]); }
        floats vector(int64_t i) const { return load(x + i); }
    };
    Row at(int64_t slot) const { return {rows + slot * size}; }

    void write(int64_t slot, const float *x) const {
        for (int64_t i = 0; i < size; i++) put(rows[slot * size + i], x[i]);
    }
};

template <bool four>
struct CachedCodes {
    uint8_t *codes;
    uint16_t *sides;
    int64_t size;

    static CachedCodes of(const Shape &s, const Call &call, int64_t layer) {
        CachedCodes all{static_cast<uint8_t *>(call.cache), static_cast<uint16_t *>(call.sides), s.head_dim};
        return all.from(layer * 2 * s.kv_heads * s.num_slots);
    }
    int64_t width() const { return four ? size / 2 : size; }
    CachedCodes from(int64_t row) const { return {codes + row * width(), sides + 2 * row, size}; }

    struct Row {
        const uint8_t *x;
        float scale, offset;
        float number(int64_t i) const {
            int code = four ? x[i / 2] >> (i % 2 * 4) & 15 : x[i];
            return float(code) * scale + offset;
        }
        floats vector(int64_t i) const {
            bytes some;
            if (four) {
                auto both = __builtin_convertvector(*reinterpret_cast<const half_bytes *>(x + i / 2), pairs_of_bytes);
                some = bytes((both | both << 4) & 0x0f0f);
            } else {
                some = *reinterpret_cast<const bytes *>(x + i);
            }
            return __builtin_convertvector(__builtin_convertvector(some, ints), floats) * scale + offset;
        }
    };
    Row at(int64_t slot) const {
        return {codes + slot * width(), half_float(sides[2 * slot]), half_float(sides[2 * slot + 1])};
    }

    // The nearest codes for the rounded scale and offset.
    void write(int64_t slot, const float *x) const {
        float low = x[0], high = x[0];
        for (int64_t i = 1; i < size; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
        constexpr float last = four ? 15 : 255;
        sides[2 * slot] = half_bits((high - low) / last), sides[2 * slot + 1] = half_bits(low);
        float scale = half_float(sides[2 * slot]), offset = half_float(sides[2 * slot + 1]);
        scale = scale > 0 ? scale : 1;
        uint8_t *place = codes + slot * width();
        auto code_of = [&](int64_t i) {
            float code = __builtin_rintf((x[i] - offset) / scale);
            return uint8_t(code > 0 ? (code < last ? code : last) : 0);
        };
        for (int64_t i = 0; i < width(); i++)
            place[i] = four ? uint8_t(code_of(2 * i) | code_of(2 * i + 1) << 4) : code_of(i);
    }
};

}  // namespace puyu
