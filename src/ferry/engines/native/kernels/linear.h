// Products of rows with packed weights. Each output is one sum in the order of K, whatever rows are beside it: a row's
// result does not depend on its batch.
//
// Packed float weights:   [N/16][K][16].  Packed 8-bit weights: [N/16][K/2][16][2], so that one product-and-add of 16-bit
// pairs makes 16 sums advance by two. N and K are padded with zeros to whole panels and pairs.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "vectors.h"

namespace ferry {

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

struct Linear {
    int64_t kind, rows, cols;  // weight [rows = N, cols = K]
    const void* data;
    const float* scales;  // [N], of INT8 only
    const float* bias;    // [N] or null
};

constexpr long TILE = 6;        // rows that share loaded weights, at most
constexpr long BAND = 96;       // rows that stay in the cache while all weights pass
constexpr long UNPACK_FROM = 4;   // rows from which weights of 16 bits are widened once, not for each tile
constexpr long SMALL = 1 << 21;   // products below which waking threads costs more than it brings

static inline long panels(long rows) { return (rows + PANEL - 1) / PANEL; }
static inline long pairs(long cols) { return (cols + 1) / 2; }

// How `count` rows are cut into tiles: as even as can be, for a tile of one or two rows waits for its own sums.
static inline long tile_rows(long left) {
    const long tiles = (left + TILE - 1) / TILE;
    return (left + tiles - 1) / tiles;
}

// R rows with P panels: 2 * R * P sums that do not wait for each other.
template <class W, int R, int P>
static inline void float_tile(const float* x, long ldx, const typename W::Item* w, long stride, long k_count,
                              V8 (&acc)[R][P][2]) {
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) acc[r][p][0] = acc[r][p][1] = all(0.0f);
    for (long k = 0; k < k_count; k++) {
        for (int p = 0; p < P; p++) {
            const typename W::Item* at = w + p * stride + k * PANEL;
            const V8 a = W::load8(at), b = W::load8(at + LANES);
            for (int r = 0; r < R; r++) {
                const V8 v = all(x[r * ldx + k]);
                acc[r][p][0] = fma(v, a, acc[r][p][0]);
                acc[r][p][1] = fma(v, b, acc[r][p][1]);
            }
        }
    }
}

static inline void put(float* out, V8 a, V8 b, const float* bias, long count, bool add) {
    if (count == PANEL && !bias) {
        store(out, add ? load(out) + a : a);
        store(out + LANES, add ? load(out + LANES) + b : b);
        return;
    }
    float both[PANEL];
    store(both, a);
    store(both + LANES, b);
    for (long i = 0; i < count; i++) {
        const float v = bias ? both[i] + bias[i] : both[i];
        out[i] = add ? out[i] + v : v;
    }
}

template <class W, int R, int P>
static void float_rows(const float* x, long ldx, const typename W::Item* w, const Linear& l, long panel, float* out,
                       long ldo, bool add) {
    V8 acc[R][P][2];
    float_tile<W, R, P>(x, ldx, w, l.cols * PANEL, l.cols, acc);
    for (int p = 0; p < P; p++) {
        const long n = (panel + p) * PANEL, count = std::min(PANEL, (long)l.rows - n);
        for (int r = 0; r < R; r++)
            put(out + r * ldo + n, acc[r][p][0], acc[r][p][1], l.bias ? l.bias + n : nullptr, count, add);
    }
}

// All rows with P panels.
template <class W, int P>
static void float_panels(const float* x, long m, long ldx, const typename W::Item* w, const Linear& l, long panel,
                         float* out, long ldo, bool add) {
    for (long r = 0, rows; r < m; r += rows) {
        rows = tile_rows(m - r);
        const float* from = x + r * ldx;
        float* to = out + r * ldo;
        if constexpr (P == 1) {
            switch (rows) {
                case 6: float_rows<W, 6, 1>(from, ldx, w, l, panel, to, ldo, add); continue;
                case 5: float_rows<W, 5, 1>(from, ldx, w, l, panel, to, ldo, add); continue;
                case 4: float_rows<W, 4, 1>(from, ldx, w, l, panel, to, ldo, add); continue;
                default: break;
            }
        }
        switch (rows) {
            case 3: float_rows<W, 3, P>(from, ldx, w, l, panel, to, ldo, add); break;
            case 2: float_rows<W, 2, P>(from, ldx, w, l, panel, to, ldo, add); break;
            default: float_rows<W, 1, P>(from, ldx, w, l, panel, to, ldo, add); break;
        }
    }
}

template <class W>
static void float_linear(Pool& pool, const Linear& l, const float* x, long m, float* out, bool add) {
    const typename W::Item* data = (const typename W::Item*)l.data;
    const long num = panels(l.rows), stride = l.cols * PANEL;
    const long chunks = m * l.rows * l.cols < SMALL ? 1 : std::min(num, pool.size() * 4);
    pool.run(chunks, [&](long chunk) {
        const long first = num * chunk / chunks, last = num * (chunk + 1) / chunks;
        long panel = first;
        if (m == 1)
            for (; panel + 4 <= last; panel += 4)
                float_panels<W, 4>(x, m, l.cols, data + panel * stride, l, panel, out, l.rows, add);
        if (m == 2 || m == 3)
            for (; panel + 2 <= last; panel += 2)
                float_panels<W, 2>(x, m, l.cols, data + panel * stride, l, panel, out, l.rows, add);
        std::vector<float> wide(sizeof(typename W::Item) < 4 && m >= UNPACK_FROM ? stride : 0);
        for (long band = 0; band < m; band += BAND) {
            const long rows = std::min(BAND, m - band);
            for (long p = panel; p < last; p++) {
                const typename W::Item* w = data + p * stride;
                if (wide.empty()) {
                    float_panels<W, 1>(x + band * l.cols, rows, l.cols, w, l, p, out + band * l.rows, l.rows, add);
                } else {
                    for (long i = 0; i < stride; i += LANES) store(wide.data() + i, W::load8(w + i));
                    float_panels<Float32, 1>(x + band * l.cols, rows, l.cols, wide.data(), l, p, out + band * l.rows,
                                             l.rows, add);
                }
            }
        }
    });
}

// R rows of 8-bit numbers, held in 16 bits, with `P` panels: exact sums.
template <int R, int P>
static inline void int8_tile(const int16_t* x, long ldx, const int8_t* w, long stride, long pair_count,
                             I8 (&acc)[R][P][2]) {
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) acc[r][p][0] = acc[r][p][1] = I8{};
    for (long k = 0; k < pair_count; k++) {
        for (int p = 0; p < P; p++) {
            const int8_t* at = w + p * stride + k * 2 * PANEL;
#if defined(__AVX2__)
            const __m256i a = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at));
            const __m256i b = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(at + PANEL)));
            for (int r = 0; r < R; r++) {
                int32_t two;
                std::memcpy(&two, x + r * ldx + 2 * k, 4);
                const __m256i v = _mm256_set1_epi32(two);
                acc[r][p][0] = (I8)_mm256_add_epi32((__m256i)acc[r][p][0], _mm256_madd_epi16(v, a));
                acc[r][p][1] = (I8)_mm256_add_epi32((__m256i)acc[r][p][1], _mm256_madd_epi16(v, b));
            }
#else
            for (int r = 0; r < R; r++) {
                const int32_t x0 = x[r * ldx + 2 * k], x1 = x[r * ldx + 2 * k + 1];
                for (int i = 0; i < LANES; i++) {
                    acc[r][p][0][i] += x0 * at[2 * i] + x1 * at[2 * i + 1];
                    acc[r][p][1][i] += x0 * at[PANEL + 2 * i] + x1 * at[PANEL + 2 * i + 1];
                }
            }
#endif
        }
    }
}

template <int R, int P>
static void int8_rows(const int16_t* x, const float* x_scales, long ldx, const int8_t* w, const Linear& l, long panel,
                      float* out, long ldo, bool add) {
    I8 acc[R][P][2];
    const long count_k = pairs(l.cols);
    int8_tile<R, P>(x, ldx, w, count_k * 2 * PANEL, count_k, acc);
    for (int p = 0; p < P; p++) {
        const long n = (panel + p) * PANEL, count = std::min(PANEL, (long)l.rows - n);
        for (int r = 0; r < R; r++) {
            float* to = out + r * ldo + n;
            if (count == PANEL && !l.bias) {
                for (int half = 0; half < 2; half++) {
                    V8 v = __builtin_convertvector(acc[r][p][half], V8) * all(x_scales[r]);
                    v = v * load(l.scales + n + half * LANES);
                    store(to + half * LANES, add ? load(to + half * LANES) + v : v);
                }
                continue;
            }
            for (long i = 0; i < count; i++) {
                float v = (float)acc[r][p][i / LANES][i % LANES] * x_scales[r];
                v = v * l.scales[n + i];
                if (l.bias) v = v + l.bias[n + i];
                to[i] = add ? to[i] + v : v;
            }
        }
    }
}

static void int8_linear(Pool& pool, const Linear& l, const int16_t* x, const float* x_scales, long m, float* out,
                        bool add) {
    const int8_t* data = (const int8_t*)l.data;
    const long num = panels(l.rows), ldx = pairs(l.cols) * 2, stride = ldx * PANEL;
    const long chunks = m * l.rows * l.cols < SMALL ? 1 : std::min(num, pool.size() * 4);
    pool.run(chunks, [&](long chunk) {
        const long first = num * chunk / chunks, last = num * (chunk + 1) / chunks;
        for (long band = 0; band < m; band += BAND) {
            const long end = std::min(m, band + BAND);
            long p = first;
            if (m == 1)
                for (; p + 2 <= last; p += 2)
                    int8_rows<1, 2>(x, x_scales, ldx, data + p * stride, l, p, out, l.rows, add);
            for (; p < last; p++) {
                const int8_t* w = data + p * stride;
                for (long r = band, rows; r < end; r += rows) {
                    rows = tile_rows(end - r);
                    const int16_t* xr = x + r * ldx;
                    float* to = out + r * l.rows;
                    switch (rows) {
                        case 6: int8_rows<6, 1>(xr, x_scales + r, ldx, w, l, p, to, l.rows, add); break;
                        case 5: int8_rows<5, 1>(xr, x_scales + r, ldx, w, l, p, to, l.rows, add); break;
                        case 4: int8_rows<4, 1>(xr, x_scales + r, ldx, w, l, p, to, l.rows, add); break;
                        case 3: int8_rows<3, 1>(xr, x_scales + r, ldx, w, l, p, to, l.rows, add); break;
                        case 2: int8_rows<2, 1>(xr, x_scales + r, ldx, w, l, p, to, l.rows, add); break;
                        default: int8_rows<1, 1>(xr, x_scales + r, ldx, w, l, p, to, l.rows, add); break;
                    }
                }
            }
        }
    });
}

// A row as 8-bit numbers (in 16 bits) and its scale: max|x| / 127, rounded to nearest, ties to even. A row with a value
// that is not finite gets a scale that is not a number, and so does everything made of it. Of the smallest rows the scale
// has few bits, and may be too small: so numbers are cut at 127.
static inline float round_row(const float* x, long count, int16_t* out) {
    const long padded = pairs(count) * 2, whole = count / LANES * LANES;
    float most = 0.0f;
    bool is_finite = true;
    V8 top = all(0.0f);
    I8 strange = I8{};
    for (long i = 0; i < whole; i += LANES) {
        const V8 size = absolute(load(x + i));
        top = maximum(size, top);
        strange |= ~(size < all(INFINITY));
    }
    for (int i = 0; i < LANES; i++) is_finite = is_finite && strange[i] == 0;
    most = largest(top);
    for (long i = whole; i < count; i++) {
        most = std::max(most, std::fabs(x[i]));
        is_finite = is_finite && std::isfinite(x[i]);
    }
    const float scale = most / 127.0f;
    if (!is_finite || scale == 0.0f) {
        std::fill(out, out + padded, (int16_t)0);
        return is_finite ? 1.0f : NAN;
    }
    const V8 magic = all(ROUNDING), by = all(scale);
    for (long i = 0; i < whole; i += LANES) {
        I8 rounded = (I8)(load(x + i) / by + magic) - (I8)magic;
        rounded = rounded > 127 ? I8{} + 127 : rounded;
        rounded = rounded < -127 ? I8{} - 127 : rounded;
        typedef int16_t S8 __attribute__((vector_size(16)));
        const S8 narrow = __builtin_convertvector(rounded, S8);
        std::memcpy(out + i, &narrow, sizeof narrow);
    }
    for (long i = whole; i < count; i++)
        out[i] = (int16_t)std::min(127.0f, std::max(-127.0f, std::nearbyint(x[i] / scale)));
    for (long i = count; i < padded; i++) out[i] = 0;
    return scale;
}

}  // namespace ferry
