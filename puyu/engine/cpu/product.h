// Matrix products of the native step: rows of activations times a Matrix, for packed int8 and int4 weights and dense
// ones.
//
// Packed weights meet activations that are rounded to int8 with one scale for each `unit` inputs: the products of a
// unit are exact integers, then one float multiplication and addition each, always in the order of the inputs. So a
// row's result never depends on the rows beside it, nor on which of the tiles below computes it.

#pragma once

#include <type_traits>

#include "dots.h"

namespace puyu {

// Rows of activations as integers: codes [rows, in], and for each unit its scale, sum of codes, and scale * sum.
struct Codes {
    int8_t *codes;
    float *scales, *sums;
    int32_t *counts;
    int64_t in, units;
};

inline int64_t codes_bytes(int64_t rows, int64_t in, int64_t unit) {
    return rounded(rows * in, 64) + 3 * rounded(rows * (in / unit) * 4, 64);
}

inline Codes make_codes(char *place, int64_t rows, int64_t in, int64_t unit) {
    Codes c;
    c.in = in, c.units = in / unit;
    int64_t part = rounded(rows * c.units * 4, 64);
    c.codes = reinterpret_cast<int8_t *>(place);
    place += rounded(rows * in, 64);
    c.scales = reinterpret_cast<float *>(place);
    c.sums = reinterpret_cast<float *>(place + part);
    c.counts = reinterpret_cast<int32_t *>(place + 2 * part);
    return c;
}

// Round one row to integers, unit by unit. A row that is not finite gets scales that are not, and so do its results.
APART inline void round_row(const float *x, Codes &c, int64_t row, int64_t unit) {
    int8_t *codes = c.codes + row * c.in;
    for (int64_t u = 0; u < c.units; u++, x += unit, codes += unit) {
        float most = 0;
        int32_t broken = 0;
#pragma omp simd reduction(max : most) reduction(| : broken)
        for (int64_t i = 0; i < unit; i++) {
            float size = std::fabs(x[i]);
            most = size > most ? size : most;
            broken |= !(size < INFINITY);
        }
        float inverse = most > 0 ? 127.0f / most : 0.0f;
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < unit; i++) {
            int32_t code = broken ? 0 : int32_t(__builtin_rintf(x[i] * inverse));
            codes[i] = int8_t(code);
            count += code;
        }
        float scale = broken ? NAN : most / 127.0f;
        int64_t at = row * c.units + u;
        c.scales[at] = scale, c.counts[at] = count, c.sums[at] = scale * float(count);
    }
}

// Where in a packed matrix the walk over one pair of panels stands.
struct Walk {
    const uint8_t *codes;
    const uint16_t *scales, *zeros;

    Walk(const Matrix &m, int64_t pair) {
        int64_t bytes = (m.kind == INT4 ? m.in * 8 : m.in * 16) * PANELS;
        int64_t count = m.in / m.group * LANES * PANELS;
        codes = static_cast<const uint8_t *>(m.data) + pair * bytes;
        scales = m.scales + pair * count;
        zeros = m.zeros ? m.zeros + pair * count : nullptr;
    }
};

// MR rows from `row` on, times a pair of panels -> out.
template <int MR, bool four, bool zeros>
ALWAYS void tile(const Matrix &m, int64_t pair, const Codes &c, int64_t row, floats (&out)[MR][PANELS]) {
    const int64_t per_scale = m.group / m.unit, at = row * c.units;
    const int8_t *a = c.codes + row * c.in;
    Walk walk(m, pair);
    floats scales[PANELS], offsets[PANELS];
    UNROLL for (int r = 0; r < MR; r++)
        UNROLL for (int p = 0; p < PANELS; p++) out[r][p] = floats{};
    for (int64_t u = 0; u < c.units; u++, a += m.unit) {
        sums acc[MR][PANELS];
        UNROLL for (int r = 0; r < MR; r++)
            UNROLL for (int p = 0; p < PANELS; p++)
                acc[r][p] = whole((four ? -8 : -128) * c.counts[at + r * c.units + u]);
        add_unit<MR, four>(walk.codes, a, c.in, m.unit, acc);
        if (u % per_scale == 0) {
            UNROLL for (int p = 0; p < PANELS; p++) {
                scales[p] = half_floats(walk.scales), walk.scales += LANES;
                if (zeros) offsets[p] = half_floats(walk.zeros), walk.zeros += LANES;
            }
        }
        UNROLL for (int r = 0; r < MR; r++) {
            floats scale = floats{} + c.scales[at + r * c.units + u], sum = floats{} + c.sums[at + r * c.units + u];
            UNROLL for (int p = 0; p < PANELS; p++) {
                out[r][p] = fused(as_floats(acc[r][p]) * scales[p], scale, out[r][p]);
                if (zeros) out[r][p] = fused(offsets[p], sum, out[r][p]);
            }
        }
    }
}

// All rows times a pair of panels; `take(row, values)` gets each result.
template <bool four, bool zeros, typename Take>
inline void column(const Matrix &m, int64_t pair, const Codes &c, int64_t rows, const Take &take) {
    auto some = [&]<int MR>(int64_t row, std::integral_constant<int, MR>) {
        floats out[MR][PANELS];
        tile<MR, four, zeros>(m, pair, c, row, out);
        UNROLL for (int r = 0; r < MR; r++) take(row + r, out[r]);
    };
    // tiles of equal size: eight rows are 4 + 4, not 6 + 2, which would unpack the weights for two rows alone
    for (int64_t row = 0, left = (rows + TILE - 1) / TILE; left; left--) {
        int64_t count = (rows - row + left - 1) / left;
        switch (count) {
            case 1: some(row, std::integral_constant<int, 1>{}); break;
            case 2: some(row, std::integral_constant<int, 2>{}); break;
            case 3: some(row, std::integral_constant<int, 3>{}); break;
            case 4: some(row, std::integral_constant<int, 4>{}); break;
            case 5: some(row, std::integral_constant<int, 5>{}); break;
            case 6: some(row, std::integral_constant<int, 6>{}); break;
        }
        row += count;
    }
}

template <typename Take>
inline void column_of(const Matrix &m, int64_t pair, const Codes &c, int64_t rows, const Take &take) {
    if (m.kind == INT8) return column<false, false>(m, pair, c, rows, take);
    if (m.zeros) return column<true, true>(m, pair, c, rows, take);
    column<true, false>(m, pair, c, rows, take);
}

// So many pieces that the last ones even out what the threads have to do.
inline int64_t piece_of(const Team &team, int64_t n) {
    int64_t piece = n / (team.count * 8);
    return piece > 1 ? piece : 1;
}

// y[row] (+)= W x[row] + bias. Called by all threads of a team; ends with a barrier.
template <bool add>
inline void packed_product(Team &team, const Matrix &m, const Codes &c, float *y, int64_t rows) {
    const float *bias = static_cast<const float *>(m.bias);
    constexpr int64_t width = PANELS * LANES;
    int64_t pairs = (m.out + width - 1) / width;
    team.each(pairs, piece_of(team, pairs), [&](int64_t pair) {
        int64_t column = pair * width, count = smaller(m.out - column, width);
        column_of(m, pair, c, rows, [&](int64_t row, const floats (&values)[PANELS]) {
            float *place = y + row * m.out + column;
            if (count == width && !bias) {
                UNROLL for (int p = 0; p < PANELS; p++)
                    store(place + p * LANES, add ? values[p] + load(place + p * LANES) : values[p]);
                return;
            }
            for (int64_t lane = 0; lane < count; lane++) {
                float value = values[lane / LANES][lane % LANES] + (bias ? bias[column + lane] : 0.0f);
                place[lane] = add ? place[lane] + value : value;
            }
        });
    });
}

// y[row] = silu(gate[row]) * up[row]; a pair of panels is one of the gate and one of the up projection.
inline void packed_gated(Team &team, const Matrix &m, const Codes &c, float *y, int64_t rows) {
    const float *bias = static_cast<const float *>(m.bias);
    int64_t half = m.out / 2;
    team.each(half / LANES, piece_of(team, half / LANES), [&](int64_t pair) {
        column_of(m, pair, c, rows, [&](int64_t row, const floats (&values)[PANELS]) {
            float *place = y + row * half + pair * LANES;
            floats gate = values[0], up = values[1];
            if (bias) gate += load(bias + pair * LANES), up += load(bias + half + pair * LANES);
            for (int64_t lane = 0; lane < LANES; lane++) place[lane] = silu(gate[lane]) * up[lane];
        });
    });
}

// ---- dense weights: one dot product after another; for few rows, or where rows must not depend on each other ----

template <typename T>
APART void four_dots(const T *const (&w)[4], const float *v, int64_t size, float (&sums)[4]) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    const T *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3];
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < size; i++) {
        s0 += get(w0[i]) * v[i];
        s1 += get(w1[i]) * v[i];
        s2 += get(w2[i]) * v[i];
        s3 += get(w3[i]) * v[i];
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

// y[row] (+)= W x[row] + bias; outputs are divided among the threads, four at a time.
template <typename T, bool add>
void dense_product(Team &team, const Matrix &m, const float *x, float *y, int64_t rows) {
    const T *weight = static_cast<const T *>(m.data), *bias = static_cast<const T *>(m.bias);
    int64_t in = m.in, out = m.out;
    int64_t fours = (out + 3) / 4;
    team.each(fours, piece_of(team, fours), [&](int64_t four) {
        int64_t o = four * 4;
        int64_t count = smaller(out - o, 4);
        const T *w[4];
        for (int64_t r = 0; r < 4; r++) w[r] = weight + (o + (r < count ? r : 0)) * in;
        for (int64_t b = 0; b < rows; b++) {
            float sums[4];
            four_dots(w, x + b * in, in, sums);
            for (int64_t r = 0; r < count; r++) {
                float value = sums[r] + (bias ? get(bias[o + r]) : 0.0f);
                float &place = y[b * out + o + r];
                place = add ? place + value : value;
            }
        }
    });
}

template <typename T>
void dense_gated(Team &team, const Matrix &m, const float *x, float *y, int64_t rows) {
    const T *weight = static_cast<const T *>(m.data), *bias = static_cast<const T *>(m.bias);
    int64_t in = m.in, half = m.out / 2;
    int64_t twos = (half + 1) / 2;
    team.each(twos, piece_of(team, twos), [&](int64_t two) {
        int64_t o = two * 2;
        int64_t next = o + 1 < half ? o + 1 : o;
        const T *const w[4] = {weight + o * in, weight + (o + half) * in, weight + next * in, weight + (next + half) * in};
        for (int64_t b = 0; b < rows; b++) {
            float sums[4];
            four_dots(w, x + b * in, in, sums);
            if (bias) {
                sums[0] += get(bias[o]), sums[1] += get(bias[o + half]);
                sums[2] += get(bias[next]), sums[3] += get(bias[next + half]);
            }
            y[b * half + o] = silu(sums[0]) * sums[1];
            y[b * half + next] = silu(sums[2]) * sums[3];
        }
    });
}

}  // namespace puyu
