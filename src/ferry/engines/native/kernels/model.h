// One step of a decoder: packed tokens of many sequences in, logits of some of them out. The structs are what Python
// fills (`library.py` has the same fields in the same order).
#pragma once
#include "attention.h"

namespace ferry {

struct Layer {
    Linear qkv, attention_out, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm;  // [D] or null
    float *keys, *values;
    int64_t window;  // tokens that a token sees, itself included; 0 = all
};

struct Model {
    int64_t num_layers, hidden, ffn, num_heads, num_groups, head_dim, rotary_dim, block_size;
    float epsilon, scale;
    const float *cosines, *sines;  // [max_model_len, rotary_dim / 2]
    const float* final_norm;
    Linear embedding, head;
    const Layer* layers;
};

struct Batch {
    int64_t num_tokens, num_sequences, num_logits, table_width;
    const int32_t* tokens;       // [T]
    const int32_t* positions;    // [T]
    const int64_t* slots;        // [T]
    const int32_t* starts;       // [B + 1]: where each sequence's tokens begin
    const int32_t* tables;       // [B, table_width]: its blocks
    const int32_t* logits_rows;  // [R]
    float* logits;               // [R, V]
};

// Memory between products, kept from step to step.
struct Workspace {
    Pool pool;
    std::vector<float> hidden, wide, narrow, scales;
    std::vector<int16_t> rounded;

    explicit Workspace(int num_threads) : pool(num_threads) {}
};

template <class W>
static void gather_rows(const Linear& l, const int32_t* tokens, long count, float* out) {
    const typename W::Item* data = (const typename W::Item*)l.data;
    for (long t = 0; t < count; t++) {
        const typename W::Item* from = data + (tokens[t] / PANEL * l.cols) * PANEL + tokens[t] % PANEL;
        for (long k = 0; k < l.cols; k++) out[t * l.cols + k] = W::one(from[k * PANEL]);
    }
}

static void embed(const Linear& l, const int32_t* tokens, long count, float* out) {
    if (l.kind == BFLOAT16) return gather_rows<Bfloat16>(l, tokens, count, out);
    if (l.kind == FLOAT16) return gather_rows<Float16>(l, tokens, count, out);
    gather_rows<Float32>(l, tokens, count, out);
}

static void rows_in_parallel(Pool& pool, long count, long cost, const std::function<void(long)>& body) {
    const long chunks = count * cost < SMALL / 16 ? 1 : std::min(count, pool.size() * 4);
    pool.run(chunks, [&](long chunk) {
        for (long t = count * chunk / chunks; t < count * (chunk + 1) / chunks; t++) body(t);
    });
}

// The product of rows made by `fill(t, row)`, each rounded first where the weights have 8 bits.
template <class F>
static void linear(Workspace& w, const Linear& l, long m, float* scratch, float* out, bool add, const F& fill) {
    const long ldx = pairs(l.cols) * 2;
    if (l.kind == INT8 && (long)w.rounded.size() < m * ldx) w.rounded.resize(m * ldx);
    if ((long)w.scales.size() < m) w.scales.resize(m);
    rows_in_parallel(w.pool, m, l.cols, [&](long t) {
        float* row = scratch + t * l.cols;
        const float* made = fill(t, row);
        if (l.kind == INT8) w.scales[t] = round_row(made, l.cols, w.rounded.data() + t * ldx);
    });
    const float* x = m ? fill.rows(scratch) : scratch;
    switch (l.kind) {
        case INT8: return int8_linear(w.pool, l, w.rounded.data(), w.scales.data(), m, out, add);
        case BFLOAT16: return float_linear<Bfloat16>(w.pool, l, x, m, out, add);
        case FLOAT16: return float_linear<Float16>(w.pool, l, x, m, out, add);
        default: return float_linear<Float32>(w.pool, l, x, m, out, add);
    }
}

struct Normed {
    const float *from, *weight;
    long count;
    float epsilon;
    const float* operator()(long t, float* row) const {
        rms_norm(from + t * count, weight, count, epsilon, row);
        return row;
    }
    const float* rows(const float* scratch) const { return scratch; }
};

struct AsItIs {
    const float* from;
    long count;
    const float* operator()(long t, float*) const { return from + t * count; }
    const float* rows(const float*) const { return from; }
};

struct Gated {
    const float* from;
    long count;
    const float* operator()(long t, float* row) const {
        gated(from + t * 2 * count, from + t * 2 * count + count, count, row);
        return row;
    }
    const float* rows(const float* scratch) const { return scratch; }
};

static void place(const Model& m, const Layer& l, const Cache& cache, const Batch& b, long t, float* qkv) {
    const long D = m.head_dim, half = m.rotary_dim / 2, position = b.positions[t];
    const float *cosines = m.cosines + position * half, *sines = m.sines + position * half;
    float* key = qkv + m.num_heads * D;
    const float* value = key + m.num_groups * D;
    for (long h = 0; h < m.num_heads + m.num_groups; h++) {
        float* head = qkv + h * D;
        const float* norm = h < m.num_heads ? l.query_norm : l.key_norm;
        if (norm) rms_norm(head, norm, D, m.epsilon, head);
        rotate(head, cosines, sines, half);
    }
    for (long g = 0; g < m.num_groups; g++) keep(cache, b.slots[t], g, key + g * D, value + g * D);
}

static void attention(Workspace& w, const Model& m, const Layer& l, const Cache& cache, const Batch& b, float* qkv,
                      float* out) {
    const long D = m.head_dim, each = m.num_heads / m.num_groups, width = (m.num_heads + 2 * m.num_groups) * D;
    rows_in_parallel(w.pool, b.num_tokens, width, [&](long t) { place(m, l, cache, b, t, qkv + t * width); });
    w.pool.run(b.num_sequences * m.num_groups, [&](long task) {
        const long s = task / m.num_groups, g = task % m.num_groups;
        const int32_t* table = b.tables + s * b.table_width;
        const long first = b.starts[s], count = (b.starts[s + 1] - first) * each;
        Rows rows;
        for (long done = 0; done < count; done += TILE) {
            const long here = std::min(TILE, count - done);
            for (long r = 0; r < here; r++) {
                const long t = first + (done + r) / each, h = g * each + (done + r) % each;
                rows.query[r] = qkv + t * width + h * D;
                rows.out[r] = out + (t * m.num_heads + h) * D;
                rows.limit[r] = b.positions[t] + 1;
                rows.first[r] = l.window ? std::max(0L, rows.limit[r] - l.window) : 0;
            }
            attend_rows(cache, table, g, m.scale, rows, here);
        }
    });
}

static void forward(Workspace& w, const Model& m, const Batch& b) {
    const long T = b.num_tokens, H = m.hidden, width = (m.num_heads + 2 * m.num_groups) * m.head_dim;
    w.hidden.resize(std::max((long)w.hidden.size(), T * H));
    w.wide.resize(std::max((long)w.wide.size(), T * std::max(std::max(width, H), 2 * m.ffn)));
    w.narrow.resize(std::max((long)w.narrow.size(), T * std::max(std::max(H, m.ffn), m.num_heads * m.head_dim)));
    float *hidden = w.hidden.data(), *wide = w.wide.data(), *narrow = w.narrow.data();
    embed(m.embedding, b.tokens, T, hidden);
    for (long i = 0; i < m.num_layers; i++) {
        const Layer& l = m.layers[i];
        const Cache cache{l.keys, l.values, m.num_groups, m.head_dim, m.block_size};
        linear(w, l.qkv, T, narrow, wide, false, Normed{hidden, l.attention_norm, H, m.epsilon});
        attention(w, m, l, cache, b, wide, narrow);
        linear(w, l.attention_out, T, nullptr, hidden, true, AsItIs{narrow, m.num_heads * m.head_dim});
        linear(w, l.gate_up, T, narrow, wide, false, Normed{hidden, l.mlp_norm, H, m.epsilon});
        linear(w, l.down, T, narrow, hidden, true, Gated{wide, m.ffn});
    }
    for (long r = 0; r < b.num_logits; r++) std::memcpy(wide + r * H, hidden + b.logits_rows[r] * H, H * sizeof(float));
    linear(w, m.head, b.num_logits, narrow, b.logits, false, Normed{wide, m.final_norm, H, m.epsilon});
}

}  // namespace ferry
