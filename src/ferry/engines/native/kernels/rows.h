// What is done to single rows between the products: norms, rotary positions, the gate. In float32, a row by itself.
#pragma once
#include <cmath>

#include "linear.h"

namespace ferry {

// x / sqrt(mean(x^2) + epsilon) * weight. Arithmetic of transformers' LlamaRMSNorm.
static inline void rms_norm(const float* x, const float* weight, long count, float epsilon, float* out) {
    V8 squares = all(0.0f);
    const long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        const V8 v = load(x + i);
        squares = fma(v, v, squares);
    }
    float total = sum(squares);
    for (long i = whole; i < count; i++) total += x[i] * x[i];
    const float by = 1.0f / std::sqrt(total / (float)count + epsilon);
    for (long i = 0; i < whole; i += LANES) store(out + i, load(weight + i) * (load(x + i) * all(by)));
    for (long i = whole; i < count; i++) out[i] = weight[i] * (x[i] * by);
}

// Turn the first 2 * half channels of a head by the angles of its position: cosines and sines [half].
static inline void rotate(float* head, const float* cosines, const float* sines, long half) {
    for (long i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

// silu(gate) * up.
static inline void gated(const float* gate, const float* up, long count, float* out) {
    const long whole = count / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        const V8 g = load(gate + i);
        store(out + i, g / (all(1.0f) + exponential(-g)) * load(up + i));
    }
    for (long i = whole; i < count; i++) out[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

}  // namespace ferry
