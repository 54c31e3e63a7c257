// What the two dtypes have in common: 16 dwords at a time, each one float, or two bf16 of one sum.
#pragma once
#include "vectors.hpp"

namespace braid {

template <class T>
struct Operand;

template <>
struct Operand<float> {
    static constexpr int PER_DWORD = 1;
    static constexpr int WIDTH = 16;  // elements of a vector

    static __m512i load(const float* from) { return _mm512_loadu_si512(from); }
    static __m512i load_first(const float* from, ptrdiff_t count) {  // the others are 0 and not touched
        return _mm512_maskz_loadu_epi32(first_lanes(count), from);
    }
    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
};

template <>
struct Operand<bf16> {
    static constexpr int PER_DWORD = 2;
    static constexpr int WIDTH = 32;

    static __m512i load(const bf16* from) { return _mm512_loadu_si512(from); }
    static __m512i load_first(const bf16* from, ptrdiff_t count) {
        return _mm512_maskz_loadu_epi16(count >= WIDTH ? ~__mmask32(0) : (__mmask32(1) << count) - 1, from);
    }
    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
};

constexpr ptrdiff_t round_up(ptrdiff_t value, ptrdiff_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// The values of a bf16 weight as they enter the product: what is summed up to divide by must be the same.
inline __m512 widen(__m256bh rounded) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)rounded), 16));
}

}  // namespace braid
