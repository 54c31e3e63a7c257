// What the MHA form of MLA does to a tile of keys: packs it for products, and takes 6 query rows through it.
#pragma once
#include <algorithm>
#include <limits>

#include "operands.hpp"

namespace braid {
namespace {

constexpr int BLOCK = 64;  // tokens of a cache block, and keys of a packed panel
constexpr int TILE = 256;  // keys between two corrections of the sums
constexpr int ROWS = 6;    // query rows that go through a product together: 24 of 32 registers hold their sums
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

inline void transpose(__m512i (&rows)[16]) {  // of dwords
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

// Keys [count, size] with a stride -> [dwords, BLOCK]; keys from `count` on and what pads a dword are 0.
template <class T>
void pack_keys(const T* keys, ptrdiff_t stride, int count, int size, int32_t* to) {
    using Op = Operand<T>;
    const int dwords = (size + Op::PER_DWORD - 1) / Op::PER_DWORD;
    for (int first_key = 0; first_key < BLOCK; first_key += LANES)
        for (int first = 0; first < dwords; first += LANES) {
            __m512i rows[LANES];
            for (int i = 0; i < LANES; ++i) {
                const int key = first_key + i;
                rows[i] = key < count ? Op::load_first(keys + key * stride + first * Op::PER_DWORD,
                                                       size - first * Op::PER_DWORD)
                                      : _mm512_setzero_si512();
            }
            transpose(rows);
            for (int i = 0; i < std::min(LANES, dwords - first); ++i)
                _mm512_storeu_si512(to + (first + i) * BLOCK + first_key, rows[i]);
        }
}

// Values [count, size] with a stride -> [BLOCK / PER_DWORD, padded]; values from `count` on and padding are 0.
template <class T>
void pack_values(const T* values, ptrdiff_t stride, int count, int size, int padded, int32_t* to) {
    constexpr int PER = Operand<T>::PER_DWORD;
    for (int step = 0; step < BLOCK / PER; ++step)
        for (int value = 0; value < padded; value += LANES) {
            const T* const from = values + step * PER * stride + value;
            const __mmask16 first = step * PER < count ? first_lanes(std::max(size - value, 0)) : __mmask16(0);
            __m512i both;
            if constexpr (PER == 1) {
                both = _mm512_maskz_loadu_epi32(first, from);
            } else {
                const __mmask16 second = step * PER + 1 < count ? first : __mmask16(0);
                const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, from + stride));
                both = _mm512_or_si512(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from)),
                                       _mm512_slli_epi32(high, 16));
            }
            _mm512_storeu_si512(to + step * padded + value, both);
        }
}

// sums[row][vector] += x[row][step] * packed[step][vector] over steps; dwords, of which x's are broadcast.
template <class T, int VECTORS>
inline void multiply(__m512 (&sums)[ROWS][VECTORS], const int32_t* x, ptrdiff_t x_stride, const int32_t* packed,
                     ptrdiff_t packed_stride, int steps) {
    for (int step = 0; step < steps; ++step, packed += packed_stride) {
        __m512i column[VECTORS];
        for (int i = 0; i < VECTORS; ++i) column[i] = _mm512_loadu_si512(packed + i * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
            const __m512i factor = _mm512_set1_epi32(x[row * x_stride + step]);
            for (int i = 0; i < VECTORS; ++i) sums[row][i] = Operand<T>::multiply_add(sums[row][i], factor, column[i]);
        }
    }
}

// scores: [ROWS, BLOCK] of one panel, with row stride TILE.
template <class T>
[[gnu::noinline]] void score_panel(const int32_t* q, int nope, int rope, const int32_t* nope_panel,
                                   const int32_t* rope_panel, float* scores) {
    __m512 sums[ROWS][4];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    multiply<T>(sums, q, nope + rope, nope_panel, BLOCK, nope);
    multiply<T>(sums, q + nope, nope + rope, rope_panel, BLOCK, rope);
    for (int row = 0; row < ROWS; ++row)
        for (int i = 0; i < 4; ++i) _mm512_storeu_ps(scores + row * TILE + i * LANES, sums[row][i]);
}

// sums: [ROWS, 16 * VECTORS] with a stride, shrunk by `keep` (not read if is_first), plus weights times values.
template <class T, int VECTORS>
[[gnu::noinline]] void add_values(const int32_t* weights, const int32_t* values, ptrdiff_t stride, int steps,
                                  const float* keep, bool is_first, float* to) {
    __m512 sums[ROWS][VECTORS];
    for (auto& row : sums)
        for (auto& sum : row) sum = _mm512_setzero_ps();
    multiply<T>(sums, weights, TILE / Operand<T>::PER_DWORD, values, stride, steps);
    for (int row = 0; row < ROWS; ++row)
        for (int i = 0; i < VECTORS; ++i) {
            float* const at = to + row * stride + i * LANES;
            const __m512 sum = sums[row][i];
            _mm512_storeu_ps(at, is_first ? sum : _mm512_fmadd_ps(_mm512_loadu_ps(at), _mm512_set1_ps(keep[row]), sum));
        }
}

// One row's scores of a tile, of which it sees the first `seen` of `computed`, to weights; returns the factor by which
// sums so far shrink.
template <class T>
float weigh(const float* scores, ptrdiff_t seen, int computed, float scale, float& highest, float& total,
            int32_t* weights) {
    const __m512 factor = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(LOWEST);
    __m512 top = lowest;
    for (ptrdiff_t i = 0; i < seen; i += LANES)
        top = _mm512_mask_max_ps(top, first_lanes(seen - i), top, _mm512_mul_ps(_mm512_loadu_ps(scores + i), factor));
    const float new_highest = std::max(highest, _mm512_reduce_max_ps(top));
    const __m512 level = _mm512_set1_ps(new_highest);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < computed; i += LANES) {
        const __m512 difference = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + i), factor), level);
        const __m512 weight =
            i < seen ? _mm512_maskz_mov_ps(first_lanes(seen - i), exp(difference)) : _mm512_setzero_ps();
        if constexpr (Operand<T>::PER_DWORD == 1) {
            _mm512_storeu_ps(weights + i, weight);
            sum = _mm512_add_ps(sum, weight);
        } else {
            const __m256bh rounded = _mm512_cvtneps_pbh(weight);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i / 2), (__m256i)rounded);
            sum = _mm512_add_ps(sum, widen(rounded));
        }
    }
    const float keep = _mm512_cvtss_f32(exp(_mm512_set1_ps(highest - new_highest)));
    highest = new_highest;
    total = total * keep + _mm512_reduce_add_ps(sum);
    return keep;
}

}  // namespace
}  // namespace braid
