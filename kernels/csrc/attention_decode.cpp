// MLA in the absorbed form: every head of a row attends to the same cached latents, which are keys and values at once.
//
// A row's keys are cut at multiples of its split length into splits, those into tiles of 64 keys (a cache block). A
// split runs through its tiles in ascending order by online softmax; the splits are merged in ascending order. Every
// score and every sum has one chain of additions, which knows nothing of the other rows and heads beside it. In bf16
// the weights of a tile are rounded to bf16 before they meet the values (and the sum they are divided by).
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "arguments.hpp"
#include "pool.hpp"
#include "workspace.hpp"

#include "operands.hpp"

namespace braid {
namespace {

constexpr int TILE = 64;        // keys, and tokens of a cache block
constexpr int MAX_SPLITS = 16;  // of a row: bounds what is kept to be merged
constexpr int MIN_SPLIT_LENGTH = 512;
constexpr int MAX_SHARING = 8;  // lane groups that run over a tile together
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

int64_t split_length(int64_t position) {
    int64_t length = MIN_SPLIT_LENGTH;
    while (position / length >= MAX_SPLITS) length *= 2;
    return length;
}

int num_splits(int64_t position) { return static_cast<int>(position / split_length(position)) + 1; }

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

// Consecutive rows of one sequence, which run over its cache together, and where their splits' results stand.
struct RowGroup {
    int first_row, rows;
    int splits;               // of the row that has the most
    int longest;              // that row
    int first_item;           // one for each split
    ptrdiff_t first_partial;  // of the first row; one for each (row, split)
};

bool share_a_sequence(const Decode& decode, int row, int other) {
    const int64_t last = decode.positions[row], other_last = decode.positions[other];
    if (split_length(last) != split_length(other_last)) return false;
    for (int64_t i = std::min(last, other_last) / TILE; i >= 0; --i)
        if (decode.block(row, i) != decode.block(other, i)) return false;
    return true;
}

std::vector<RowGroup> group_rows(const Decode& decode) {
    const int most_rows = std::max(MAX_SHARING / ((decode.heads + 7) / 8), 1);
    std::vector<RowGroup> groups;
    int items = 0;
    ptrdiff_t partials = 0;
    for (int row = 0; row < decode.rows; ++row) {
        const int splits = num_splits(decode.positions[row]);
        if (groups.empty() || groups.back().rows == most_rows || !share_a_sequence(decode, row - 1, row))
            groups.push_back({row, 0, 0, row, items, partials});
        RowGroup& group = groups.back();
        group.rows += 1;
        if (decode.positions[row] > decode.positions[group.longest]) group.longest = row;
        items += std::max(splits - group.splits, 0);
        group.splits = std::max(group.splits, splits);
        partials += splits;
    }
    return groups;
}

// One call: its items are (group of rows, split), and each may be cut between heads.
template <class T>
class DecodeCall {
  public:
    explicit DecodeCall(const Decode& decode)
        : decode_(decode), groups_(group_rows(decode)), unfinished_(groups_.size()) {
        thread_local Workspace room;
        const RowGroup& last = groups_.back();
        ptrdiff_t heads = last.first_partial;
        for (int row = last.first_row; row < decode.rows; ++row) heads += num_splits(decode.positions[row]);
        heads *= decode.heads;
        sums_ = room.room<float>(heads * (decode.padded_values() + 2));
        highest_ = sums_ + heads * decode.padded_values();
        totals_ = highest_ + heads;
        // A short sequence is cut between its heads too where threads would be idle otherwise.
        const int items = last.first_item + last.splits;
        width_ = decode.heads <= 4 || (decode.heads <= 8 && items < num_threads()) ? 4 : 8;
        const int lane_groups = (decode.heads + width_ - 1) / width_;
        const int parts = std::clamp(num_threads() / items, 1, lane_groups);
        part_heads_ = (lane_groups + parts - 1) / parts * width_;
        parts_ = (decode.heads + part_heads_ - 1) / part_heads_;
        for (size_t i = 0; i < groups_.size(); ++i) unfinished_[i] = groups_[i].splits * parts_;
        parallel_for(items * parts_, [&](int chunk) { run(chunk); });
    }

  private:
    void run(int chunk) {
        const int index = group_of(chunk / parts_), split = chunk / parts_ - groups_[index].first_item;
        if (width_ == 4) attend<4>(groups_[index], split, chunk);
        else attend<8>(groups_[index], split, chunk);
        if (unfinished_[index].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
        ptrdiff_t partial = groups_[index].first_partial;
        for (int i = 0; i < groups_[index].rows; ++i) partial += merge_splits(groups_[index].first_row + i, partial);
    }

    int group_of(int item) const {
        const auto after = std::upper_bound(groups_.begin(), groups_.end(), item,
                                            [](int it, const RowGroup& group) { return it < group.first_item; });
        return static_cast<int>(after - groups_.begin()) - 1;
    }

    // Keys first_key .. of a tile, as far as any of the group's rows sees them.
    Prefetch tile(const RowGroup& group, int64_t first_key) const {
        const int64_t keys = std::min<int64_t>(TILE, decode_.positions[group.longest] + 1 - first_key);
        const T* const from = static_cast<const T*>(decode_.cache) +
                              decode_.block(group.longest, first_key / TILE) * TILE * decode_.latent_dim;
        return {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + keys * decode_.latent_dim)};
    }

    // The tile that this thread will probably begin with after `chunk`.
    Prefetch first_tile_after(int chunk) const {
        const int item = (chunk + num_threads()) / parts_;
        if (item >= groups_.back().first_item + groups_.back().splits) return {};
        const RowGroup& group = groups_[group_of(item)];
        return tile(group, (item - group.first_item) * split_length(decode_.positions[group.longest]));
    }

    template <int HEADS>
    void attend(const RowGroup& group, int split, int chunk) {
        thread_local Workspace queries, all_sums;
        thread_local std::vector<LaneGroup<T, HEADS>> lane_groups;
        const int first_head = chunk % parts_ * part_heads_;
        const int end_head = std::min(first_head + part_heads_, decode_.heads);
        const ptrdiff_t padded_dim = HEADS * LaneGroup<T, HEADS>::padded_dim(decode_);
        const ptrdiff_t padded_values = HEADS * decode_.padded_values();
        lane_groups.resize(group.rows * ((end_head - first_head + HEADS - 1) / HEADS));
        T* q = queries.room<T>(lane_groups.size() * padded_dim);
        float* sums = all_sums.room<float>(lane_groups.size() * padded_values);
        auto starting = lane_groups.begin();
        for (int row = group.first_row; row < group.first_row + group.rows; ++row)
            for (int head = first_head; head < end_head; head += HEADS, q += padded_dim, sums += padded_values)
                starting++->start(decode_, row, head, q, sums);

        const int64_t length = split_length(decode_.positions[group.longest]);
        const int64_t end = std::min((split + 1) * length, decode_.positions[group.longest] + 1);
        for (int64_t first_key = split * length; first_key < end; first_key += TILE) {
            const T* const keys = reinterpret_cast<const T*>(tile(group, first_key).next);
            Prefetch next = first_key + TILE < end ? tile(group, first_key + TILE) : first_tile_after(chunk);
            for (auto& lane_group : lane_groups) {
                const int64_t seen = decode_.positions[lane_group.row()] + 1 - first_key;
                if (seen <= 0) continue;
                lane_group.add_tile(decode_, keys, static_cast<int>(std::min<int64_t>(seen, TILE)), next);
                next = {};
            }
        }
        ptrdiff_t partial = group.first_partial + split;
        for (size_t i = 0; i < lane_groups.size(); ++i) {
            const int row = lane_groups[i].row();
            if (decode_.positions[row] >= split * length)
                lane_groups[i].finish(std::min(HEADS, end_head - lane_groups[i].first_head()), decode_.padded_values(),
                                      at(partial, lane_groups[i].first_head()));
            const bool is_last_of_row = i + 1 == lane_groups.size() || lane_groups[i + 1].row() != row;
            if (is_last_of_row) partial += num_splits(decode_.positions[row]);
        }
    }

    SplitResult at(ptrdiff_t partial, int head) const {
        const ptrdiff_t place = partial * decode_.heads + head;
        return {highest_ + place, totals_ + place, sums_ + place * decode_.padded_values()};
    }

    // The splits of a row, the first of which is at `first`, in ascending order; returns how many there were.
    int merge_splits(int row, ptrdiff_t first) const {
        const int splits = num_splits(decode_.positions[row]);
        for (int head = 0; head < decode_.heads; ++head) {
            float highest = LOWEST, total = 0, factors[MAX_SPLITS];
            for (int i = 0; i < splits; ++i) highest = std::max(highest, *at(first + i, head).highest);
            for (int i = 0; i < splits; ++i) {
                factors[i] = _mm512_cvtss_f32(exp(_mm512_set1_ps(*at(first + i, head).highest - highest)));
                total += factors[i] * *at(first + i, head).totals;
            }
            T* const out = static_cast<T*>(decode_.out) + row * decode_.out_row_stride + head * decode_.out_head_stride;
            for (int value = 0; value < decode_.value_dim; value += 2 * LANES) {
                __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                for (int i = 0; i < splits; ++i) {
                    const float* const from = at(first + i, head).sums + value;
                    const __m512 factor = _mm512_set1_ps(factors[i]);
                    for (int j = 0; j < 2; ++j) sums[j] = _mm512_fmadd_ps(load(from + j * LANES), factor, sums[j]);
                }
                store_values(sums, total, out + value, decode_.value_dim - value);
            }
        }
        return splits;
    }

    static void store_values(__m512 (&sums)[2], float total, T* out, int count) {
        if constexpr (Operand<T>::PER_DWORD == 2) {  // see `add_values`
            const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            const __m512 first_half = _mm512_permutex2var_ps(sums[0], low, sums[1]);
            sums[1] = _mm512_permutex2var_ps(sums[0], high, sums[1]);
            sums[0] = first_half;
        }
        store(out, _mm512_div_ps(sums[0], _mm512_set1_ps(total)), first_lanes(count));
        if (count > LANES)
            store(out + LANES, _mm512_div_ps(sums[1], _mm512_set1_ps(total)), first_lanes(count - LANES));
    }

    const Decode& decode_;
    const std::vector<RowGroup> groups_;
    std::vector<std::atomic<int>> unfinished_;  // chunks of each group
    int width_, parts_, part_heads_;            // heads of a lane group; how an item is cut between heads
    float *highest_, *totals_;                  // [(row, split), heads]
    float* sums_;                               // [(row, split), heads, padded_values]
};

PyObject* py_mla_decode(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    Decode decode;
    const long long element_size = arguments.integer();
    decode.q = arguments.pointer<void>();
    decode.q_row_stride = arguments.integer();
    decode.q_head_stride = arguments.integer();
    decode.cache = arguments.pointer<void>();
    decode.positions = arguments.pointer<int64_t>();
    decode.tables = arguments.pointer<void>();
    decode.table_stride = arguments.integer();
    decode.wide_tables = arguments.integer() == 8;
    decode.out = arguments.pointer<void>();
    decode.out_row_stride = arguments.integer();
    decode.out_head_stride = arguments.integer();
    decode.rows = static_cast<int>(arguments.integer());
    decode.heads = static_cast<int>(arguments.integer());
    decode.latent_dim = static_cast<int>(arguments.integer());
    decode.value_dim = static_cast<int>(arguments.integer());
    decode.scale = static_cast<float>(arguments.real());
    if (!arguments.finish()) return nullptr;
    if (decode.rows > 0) {
        WithoutGil without_gil;
        if (element_size == 2) DecodeCall<bf16>{decode};
        else DecodeCall<float>{decode};
    }
    Py_RETURN_NONE;
}

}  // namespace
}  // namespace braid

extern const PyMethodDef attention_decode_methods[];
const PyMethodDef attention_decode_methods[] = {
    method("mla_decode", braid::py_mla_decode),
    {nullptr, nullptr, 0, nullptr},
};
