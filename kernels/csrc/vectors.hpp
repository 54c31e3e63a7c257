// Sixteen numbers at a time. A lane computes the same bits whatever the mask, so that no tail rounds in its own way.
//
// To be included last: what follows is compiled for AVX-512, and the standard library's inline functions must not be, as
// the linker keeps one copy of each for the whole module, which any x86-64 must be able to import.
#pragma once
#include <cstddef>
#include <cstdint>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 takes what an intrinsic leaves open for a mistake
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include <immintrin.h>

namespace braid {

struct bf16 {
    uint16_t bits;
};

constexpr int LANES = 16;

inline __mmask16 first_lanes(ptrdiff_t count) {  // the first `count` lanes, all 16 from 16 on
    return count >= LANES ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// Lanes that are masked out are read as 0, and not touched in memory.
inline __m512 load(const float* from, __mmask16 lanes = 0xffff) { return _mm512_maskz_loadu_ps(lanes, from); }

inline __m512 load(const bf16* from, __mmask16 lanes = 0xffff) {
    const __m256i half = _mm256_maskz_loadu_epi16(lanes, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(float* to, __m512 value, __mmask16 lanes = 0xffff) { _mm512_mask_storeu_ps(to, lanes, value); }

inline void store(bf16* to, __m512 value, __mmask16 lanes = 0xffff) {  // to the nearest, ties to even
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(value));
}

// e^x to about 1 ulp; 0 below -87.3 or so, infinite above 88.7; NaN stays.
inline __m512 exp(__m512 x) {
    const __m512 top = _mm512_set1_ps(89.0f), bottom = _mm512_set1_ps(-104.0f);
    // in this order of operands min and max hand a NaN on
    const __m512 bounded = _mm512_max_ps(bottom, _mm512_min_ps(top, x));
    const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(bounded, _mm512_set1_ps(1.44269504f)), 8);
    // x - power * ln 2, ln 2 in two pieces
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), bounded);
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, power);
}

// e^x to 1e-16 or so, of x within 700 on both sides of 0; beyond that as if it were there.
inline __m512d exp(__m512d x) {
    const __m512d bounded = _mm512_max_pd(_mm512_set1_pd(-700.0), _mm512_min_pd(_mm512_set1_pd(700.0), x));
    const __m512d power = _mm512_roundscale_pd(_mm512_mul_pd(bounded, _mm512_set1_pd(1.4426950408889634)), 8);
    __m512d rest = _mm512_fnmadd_pd(power, _mm512_set1_pd(6.93145751953125e-1), bounded);
    rest = _mm512_fnmadd_pd(power, _mm512_set1_pd(1.42860682030941723212e-6), rest);
    __m512d sum = _mm512_set1_pd(1.0 / 479001600);
    for (double factor : {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
                          1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
        sum = _mm512_fmadd_pd(sum, rest, _mm512_set1_pd(factor));
    return _mm512_scalef_pd(sum, power);
}

inline __m512 silu(__m512 x) {  // x / (1 + e^-x)
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

}  // namespace braid
