// What runs over the tiles of a sequence's latents in the absorbed form of MLA: the queries of some heads of one row.
//
// Every score and every sum has one chain of additions, which knows nothing of the other rows and heads beside it. In
// bf16 the weights of a tile are rounded to bf16 before they meet the values (and the sum they are divided by).
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "operands.hpp"

namespace braid {
namespace {

constexpr int TILE = 64;  // keys, and tokens of a cache block
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Decode {
    const void* q;  // [rows, heads, latent_dim]
    ptrdiff_t q_row_stride, q_head_stride;
    const void* cache;  // [blocks, TILE, latent_dim]
    const int64_t* positions;
    const void* tables;
    ptrdiff_t table_stride;
    bool wide_tables;
    void* out;  // [rows, heads, value_dim]
    ptrdiff_t out_row_stride, out_head_stride;
    int rows, heads, latent_dim, value_dim;
    float scale;

    int64_t block(int row, int64_t index) const {
        const ptrdiff_t at = row * table_stride + index;
        return wide_tables ? static_cast<const int64_t*>(tables)[at] : static_cast<const int32_t*>(tables)[at];
    }
    int padded_values() const { return static_cast<int>(round_up(value_dim, 2 * LANES)); }
};

// Lane i of the result is the sum of sums[i]'s lanes, each in the same order.
inline __m512 add_up(const __m512 (&sums)[16]) {
    __m512 quarters[4];
    for (int i = 0; i < 4; ++i) {
        const __m512* s = sums + 4 * i;
        const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
        const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
        const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
        quarters[i] =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 halves[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                         _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// What comes next is brought to the L2 cache while the values of a tile, which are there already, are summed up.
struct Prefetch {
    const char* next;
    const char* end;

    template <int LINES>
    void some_lines() {
        if (next >= end) return;
        for (int line = 0; line < LINES; ++line) _mm_prefetch(next + line * 64, _MM_HINT_T1);
        next += LINES * 64;
    }
};

// What one split came to, for each of some heads.
struct SplitResult {
    float* highest;  // scores
    float* totals;   // of weights
    float* sums;     // [heads, padded_values], in the order of `LaneGroup::add_values`
};

// Some heads of one row: the queries that go through a tile together. Vectors hold 16 / HEADS keys of HEADS heads each.
template <class T, int HEADS>
class LaneGroup {
    using Op = Operand<T>;
    static constexpr int KEYS = LANES / HEADS;

  public:
    // `room` and `sums` stay in use: padded queries, and weighted sums [HEADS, padded_values] in the order of
    // `add_values`.
    void start(const Decode& decode, int row, int first_head, T* room, float* sums) {
        row_ = row, first_head_ = first_head, sums_ = sums, q_ = room;
        std::fill_n(highest_, LANES, LOWEST);
        std::fill_n(totals_[0], 2 * LANES, 0.0f);
        is_first_ = true;
        const ptrdiff_t padded = padded_dim(decode);
        for (int head = 0; head < HEADS; ++head) {
            T* const to = room + head * padded;
            const bool exists = first_head + head < decode.heads;
            const T* const from = static_cast<const T*>(decode.q) + row * decode.q_row_stride;
            const ptrdiff_t size = exists ? decode.latent_dim : 0;
            if (exists) std::memcpy(to, from + (first_head + head) * decode.q_head_stride, size * sizeof(T));
            std::memset(to + size, 0, (padded - size) * sizeof(T));
        }
    }

    static ptrdiff_t padded_dim(const Decode& decode) { return round_up(decode.latent_dim, Op::WIDTH); }

    // keys: the tile's first latent; count: how many of the tile's keys this row sees.
    void add_tile(const Decode& decode, const T* keys, int count, Prefetch next) {
        alignas(64) float scores[TILE * HEADS];
        const int vectors = (count + KEYS - 1) / KEYS;
        for (int i = 0; i < vectors; ++i) {
            const T* of_key[KEYS];
            for (int key = 0; key < KEYS; ++key)
                of_key[key] = keys + std::min(i * KEYS + key, count - 1) * ptrdiff_t(decode.latent_dim);
            _mm512_store_ps(scores + i * LANES, score(decode, of_key, next));
        }
        alignas(64) float keep[LANES];
        alignas(64) int32_t weights[TILE * HEADS / Op::PER_DWORD];
        weigh(decode, scores, vectors, count, keep, weights);
        const int whole = decode.value_dim / (2 * LANES) * (2 * LANES);
        for (int value = 0; value < whole; value += 2 * LANES)
            add_values<false>(decode, keys, count, value, keep, weights, next);
        if (whole < decode.value_dim) add_values<true>(decode, keys, count, whole, keep, weights, next);
        is_first_ = false;
    }

    void finish(int heads, ptrdiff_t padded_values, const SplitResult& to) const {
        __m512 sum = load(totals_[0]);
        if (HEADS == 8) sum = _mm512_add_ps(sum, load(totals_[1]));
        else sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4e));
        sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, HEADS == 8 ? 0x4e : 0xb1));
        store(to.totals, sum, first_lanes(heads));
        std::copy_n(highest_, heads, to.highest);
        std::copy_n(sums_, heads * padded_values, to.sums);
    }

    int row() const { return row_; }
    int first_head() const { return first_head_; }

  private:
    // Lane key * HEADS + head: the product of that head's query with that key.
    __m512 score(const Decode& decode, const T* const (&of_key)[KEYS], Prefetch& next) const {
        __m512 sums[LANES];
        for (auto& sum : sums) sum = _mm512_setzero_ps();
        const ptrdiff_t size = decode.latent_dim, padded = padded_dim(decode);
        const ptrdiff_t whole = size / Op::WIDTH * Op::WIDTH;
        for (ptrdiff_t d = 0; d < whole; d += Op::WIDTH) {
            next.some_lines<1>();
            __m512i latent[KEYS];
            for (int key = 0; key < KEYS; ++key) latent[key] = Op::load(of_key[key] + d);
#pragma GCC unroll 8
            for (int head = 0; head < HEADS; ++head) {
                const __m512i query = Op::load(q_ + head * padded + d);
#pragma GCC unroll 4
                for (int key = 0; key < KEYS; ++key)
                    sums[key * HEADS + head] = Op::multiply_add(sums[key * HEADS + head], query, latent[key]);
            }
        }
        if (whole < size) {
            __m512i latent[KEYS];
            for (int key = 0; key < KEYS; ++key) latent[key] = Op::load_first(of_key[key] + whole, size - whole);
#pragma GCC unroll 8
            for (int head = 0; head < HEADS; ++head) {
                const __m512i query = Op::load(q_ + head * padded + whole);
#pragma GCC unroll 4
                for (int key = 0; key < KEYS; ++key)
                    sums[key * HEADS + head] = Op::multiply_add(sums[key * HEADS + head], query, latent[key]);
            }
        }
        return add_up(sums);
    }

    // From scores to weights e^(score - highest), and by what the sums so far shrink (`keep`, one for each head).
    void weigh(const Decode& decode, float* scores, int vectors, int count, float* keep, int32_t* weights) {
        const __m512 scale = _mm512_set1_ps(decode.scale);
        __m512 highest = _mm512_set1_ps(LOWEST);
        for (int i = 0; i < vectors; ++i) {
            const __mmask16 seen = first_lanes(ptrdiff_t(count - i * KEYS) * HEADS);
            const __m512 scaled = _mm512_mul_ps(_mm512_load_ps(scores + i * LANES), scale);
            const __m512 score = _mm512_mask_blend_ps(seen, _mm512_set1_ps(LOWEST), scaled);
            _mm512_store_ps(scores + i * LANES, score);
            highest = _mm512_max_ps(highest, score);
        }
        highest = _mm512_max_ps(highest, _mm512_shuffle_f32x4(highest, highest, 0x4e));
        if (HEADS == 4) highest = _mm512_max_ps(highest, _mm512_shuffle_f32x4(highest, highest, 0xb1));
        highest = _mm512_max_ps(load(highest_), highest);
        const __m512 kept = exp(_mm512_sub_ps(load(highest_), highest));
        _mm512_store_ps(keep, kept);
        __m512 totals[2] = {_mm512_mul_ps(load(totals_[0]), kept), _mm512_mul_ps(load(totals_[1]), kept)};
        for (int i = 0; i < vectors; ++i) {
            const __m512 weight = exp(_mm512_sub_ps(_mm512_load_ps(scores + i * LANES), highest));
            __m512& total = totals[HEADS == 8 ? i % 2 : 0];
            total = _mm512_add_ps(total, store_weights(weight, weights + i * LANES / Op::PER_DWORD));
        }
        store(highest_, highest), store(totals_[0], totals[0]), store(totals_[1], totals[1]);
    }

    // weights: [keys / PER_DWORD, HEADS] dwords; returns the weights as they will be used.
    static __m512 store_weights(__m512 weight, int32_t* to) {
        if constexpr (Op::PER_DWORD == 1) {
            _mm512_store_ps(to, weight);
            return weight;
        } else {
            const __m256bh rounded = _mm512_cvtneps_pbh(weight);
            const __m256i order = HEADS == 8 ? _mm256_setr_epi16(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
                                             : _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
            _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_permutexvar_epi16(order, (__m256i)rounded));
            return widen(rounded);
        }
    }

    // 32 values of each head, in two vectors. In bf16 dwords 4i .. 4i+3 of them are the values 8i .. 8i+3 and 8i+4 ..
    // 8i+7: that is how two keys' values come out of the cheapest interleaving; `merge_splits` sorts them.
    template <bool IS_TAIL>
    void add_values(const Decode& decode, const T* keys, int count, int value, const float* keep,
                    const int32_t* weights, Prefetch& next) {
        const ptrdiff_t padded = decode.padded_values(), stride = decode.latent_dim;
        const int rest = decode.value_dim - value;
        __m512 sums[HEADS][2];
        for (auto& of_head : sums) of_head[0] = of_head[1] = _mm512_setzero_ps();
        const T* of_key = keys + value;
        const int steps = (count + Op::PER_DWORD - 1) / Op::PER_DWORD;
        for (int step = 0; step < steps; ++step, of_key += Op::PER_DWORD * stride, weights += HEADS) {
            next.some_lines<2>();
            __m512i latent[2];
            if constexpr (Op::PER_DWORD == 1) {
                latent[0] = IS_TAIL ? Op::load_first(of_key, rest) : Op::load(of_key);
                latent[1] =
                    IS_TAIL ? Op::load_first(of_key + LANES, std::max(rest - LANES, 0)) : Op::load(of_key + LANES);
            } else {
                // A last key without a second one meets itself, with weight 0: what comes after it may be NaN.
                const T* const second_key = 2 * step + 1 < count ? of_key + stride : of_key;
                const __m512i first = IS_TAIL ? Op::load_first(of_key, rest) : Op::load(of_key);
                const __m512i second = IS_TAIL ? Op::load_first(second_key, rest) : Op::load(second_key);
                latent[0] = _mm512_unpacklo_epi16(first, second);
                latent[1] = _mm512_unpackhi_epi16(first, second);
            }
#pragma GCC unroll 8
            for (int head = 0; head < HEADS; ++head) {
                const __m512i weight = _mm512_set1_epi32(weights[head]);
                sums[head][0] = Op::multiply_add(sums[head][0], latent[0], weight);
                sums[head][1] = Op::multiply_add(sums[head][1], latent[1], weight);
            }
        }
#pragma GCC unroll 8
        for (int head = 0; head < HEADS; ++head) {
            const __m512 factor = _mm512_set1_ps(keep[head]);
            for (int i = 0; i < 2; ++i) {
                float* const at = sums_ + head * padded + value + i * LANES;
                const __m512 sum = sums[head][i];
                _mm512_store_ps(at, is_first_ ? sum : _mm512_fmadd_ps(_mm512_load_ps(at), factor, sum));
            }
        }
    }

    float highest_[LANES];
    float totals_[2][LANES];  // of the keys that are the same modulo 4, and added up alike for any HEADS
    const T* q_;
    float* sums_;
    int row_, first_head_;
    bool is_first_;
};

}  // namespace
}  // namespace braid
