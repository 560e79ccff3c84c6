// Eight floats at a time, with the compiler's own vectors: AVX2 where the file is compiled for it, else whatever there is.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ferry {

typedef float V8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));

constexpr long LANES = 8;
constexpr long PANEL = 16;  // outputs that lie side by side in packed weights, and keys in the cache

static inline V8 load(const float* p) {
    V8 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, V8 v) { std::memcpy(p, &v, sizeof v); }

static inline V8 all(float x) { return V8{x, x, x, x, x, x, x, x}; }

// a * b + c, rounded once where the processor can.
static inline V8 fma(V8 a, V8 b, V8 c) {
#if defined(__FMA__)
    return (V8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

static inline V8 maximum(V8 a, V8 b) { return a > b ? a : b; }

static inline float sum(V8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

static inline float largest(V8 v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
}

static inline V8 absolute(V8 v) {
    U8 bits = (U8)v & 0x7fffffffu;
    return (V8)bits;
}

constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even

// e to the power of v, within 2 units of the last place; 0 below -87. After Cephes' expf.
static inline V8 exponential(V8 v) {
    const V8 low = all(-87.0f), high = all(88.0f);
    const I8 is_zero = v < low;
    v = v > high ? high : v;
    v = v < low ? low : v;
    const V8 magic = all(ROUNDING);
    const V8 shifted = fma(v, all(1.44269504088896341f), magic);
    const V8 n = shifted - magic;
    V8 r = fma(n, all(-0.693359375f), v);
    r = fma(n, all(2.12194440e-4f), r);
    V8 p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + all(1.0f);
    const I8 power = ((I8)shifted - (I8)magic + 127) << 23;
    const V8 found = p * (V8)power;
    return (V8)((I8)found & ~is_zero);
}

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

// Eight stored weights as floats: float32, bfloat16 or float16.
struct Float32 {
    typedef float Item;
    static V8 load8(const Item* p) { return load(p); }
    static float one(Item x) { return x; }
};

struct Bfloat16 {
    typedef uint16_t Item;
    static V8 load8(const Item* p) {
#if defined(__AVX2__)
        __m128i raw = _mm_loadu_si128((const __m128i*)p);
        return (V8)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
        V8 v;
        for (int i = 0; i < LANES; i++) v[i] = from_bf16(p[i]);
        return v;
#endif
    }
    static float one(Item x) { return from_bf16(x); }
};

struct Float16 {
    typedef uint16_t Item;
    static float one(Item h) {
        // Subnormal numbers come out right by a product with a power of two.
        uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
        float x;
        std::memcpy(&x, &rest, 4);
        x *= 5.192296858534828e33f;  // 2^112
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
        bits |= sign;
        std::memcpy(&x, &bits, 4);
        return x;
    }
    static V8 load8(const Item* p) {
#if defined(__F16C__)
        return (V8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        V8 v;
        for (int i = 0; i < LANES; i++) v[i] = one(p[i]);
        return v;
#endif
    }
};

}  // namespace ferry
