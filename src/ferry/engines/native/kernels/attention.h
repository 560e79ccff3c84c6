// Attention over a cache of blocks. Keys lie by channel, 16 tokens side by side: [block][head][part of 16][D][16]; values
// by token: [block][head][token][D]. The softmax goes over chunks of fixed places (arXiv 2205.14135), so a row's result
// depends on its position and not on what is computed beside it.
#pragma once
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace ferry {

constexpr long CHUNK = 256;  // keys between two rescalings
constexpr long MAX_HEAD = 256;

struct Cache {
    float *keys, *values;
    long num_heads, head_dim, block_size;

    long head(long block, long h) const { return (block * num_heads + h) * block_size * head_dim; }
};

static inline void keep(const Cache& c, long slot, long h, const float* key, const float* value) {
    const long block = slot / c.block_size, at = slot % c.block_size;
    float* k = c.keys + c.head(block, h) + at / PANEL * PANEL * c.head_dim + at % PANEL;
    for (long d = 0; d < c.head_dim; d++) k[d * PANEL] = key[d];
    std::memcpy(c.values + c.head(block, h) + at * c.head_dim, value, c.head_dim * sizeof(float));
}

struct Rows {
    const float* query[TILE];
    float* out[TILE];
    long limit[TILE];  // keys that the row sees: those before this place,
    long first[TILE];  // and from this one on
};

template <int R>
static void attend(const Cache& c, const int32_t* table, long h, float scale, const Rows& rows) {
    const long D = c.head_dim;
    float scores[R][CHUNK], sums[R][MAX_HEAD], top[R], total[R], queries[R * MAX_HEAD];
    long last = 0, start = rows.first[0];
    for (int r = 0; r < R; r++) {
        std::memcpy(queries + r * D, rows.query[r], D * sizeof(float));
        std::fill(sums[r], sums[r] + D, 0.0f);
        top[r] = -INFINITY;
        total[r] = 0.0f;
        last = std::max(last, rows.limit[r]);
        start = std::min(start, rows.first[r]);
    }
    for (long chunk = start / CHUNK * CHUNK; chunk < last; chunk += CHUNK) {
        const long count = std::min(CHUNK, last - chunk), padded = panels(count) * PANEL;
        for (long k = 0; k < padded; k += PANEL) {
            const long place = chunk + k, block = table[place / c.block_size], at = place % c.block_size;
            V8 acc[R][1][2];
            float_tile<Float32, R, 1>(queries, D, c.keys + c.head(block, h) + at * D, 0, D, acc);
            for (int r = 0; r < R; r++) {
                store(scores[r] + k, acc[r][0][0] * all(scale));
                store(scores[r] + k + LANES, acc[r][0][1] * all(scale));
            }
        }
        for (int r = 0; r < R; r++) {
            for (long k = std::max(0L, rows.limit[r] - chunk); k < padded; k++) scores[r][k] = -INFINITY;
            for (long k = 0; k < std::min(padded, rows.first[r] - chunk); k++) scores[r][k] = -INFINITY;
            V8 most = all(top[r]);
            for (long k = 0; k < padded; k += LANES) most = maximum(load(scores[r] + k), most);
            const float high = largest(most);
            if (high == -INFINITY) {
                std::fill(scores[r], scores[r] + padded, 0.0f);
                continue;
            }
            const float shrink = std::exp(top[r] - high);
            V8 weights = all(0.0f);
            for (long k = 0; k < padded; k += LANES) {
                const V8 p = exponential(load(scores[r] + k) - all(high));
                store(scores[r] + k, p);
                weights = weights + p;
            }
            total[r] = total[r] * shrink + sum(weights);
            top[r] = high;
            for (long d = 0; d < D; d++) sums[r][d] *= shrink;
        }
        for (long k = 0; k < count; k += c.block_size - (chunk + k) % c.block_size) {
            const long place = chunk + k, block = table[place / c.block_size], at = place % c.block_size;
            const long here = std::min(count - k, c.block_size - at);
            const float* values = c.values + c.head(block, h) + at * D;
            for (long d = 0; d < D; d += PANEL) {
                V8 acc[R][2];
                for (int r = 0; r < R; r++) acc[r][0] = load(sums[r] + d), acc[r][1] = load(sums[r] + d + LANES);
                for (long i = 0; i < here; i++) {
                    const V8 a = load(values + i * D + d), b = load(values + i * D + d + LANES);
                    for (int r = 0; r < R; r++) {
                        const V8 p = all(scores[r][k + i]);
                        acc[r][0] = fma(p, a, acc[r][0]);
                        acc[r][1] = fma(p, b, acc[r][1]);
                    }
                }
                for (int r = 0; r < R; r++) store(sums[r] + d, acc[r][0]), store(sums[r] + d + LANES, acc[r][1]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (long d = 0; d < D; d++) rows.out[r][d] = sums[r][d] / total[r];
}

static inline void attend_rows(const Cache& c, const int32_t* table, long h, float scale, const Rows& rows, long count) {
    switch (count) {
        case 6: return attend<6>(c, table, h, scale, rows);
        case 5: return attend<5>(c, table, h, scale, rows);
        case 4: return attend<4>(c, table, h, scale, rows);
        case 3: return attend<3>(c, table, h, scale, rows);
        case 2: return attend<2>(c, table, h, scale, rows);
        default: return attend<1>(c, table, h, scale, rows);
    }
}

}  // namespace ferry
