// MLA in the absorbed form: every head of a row attends to the same cached latents, which are keys and values at once.
//
// A row's keys are cut at multiples of its split length into splits, those into tiles of 64 keys (a cache block). A
// split runs through its tiles in ascending order by online softmax (see decode_lanes.hpp); the splits are merged in
// ascending order. So a row's bits are a matter of its own position and its own sequence's latents.
#include <algorithm>
#include <atomic>
#include <vector>

#include "arguments.hpp"
#include "pool.hpp"
#include "workspace.hpp"

#include "decode_lanes.hpp"

namespace braid {
namespace {

constexpr int MAX_SPLITS = 16;  // of a row: bounds what is kept to be merged
constexpr int MIN_SPLIT_LENGTH = 512;
constexpr int MAX_SHARING = 8;  // lane groups that run over a tile together

int64_t split_length(int64_t position) {
    int64_t length = MIN_SPLIT_LENGTH;
    while (position / length >= MAX_SPLITS) length *= 2;
    return length;
}

int num_splits(int64_t position) { return static_cast<int>(position / split_length(position)) + 1; }

// Consecutive rows of one sequence, which run over its cache together, and where their splits' results stand.
struct RowGroup {
    int first_row, rows;
    int splits;               // of the row that has the most
    int longest;              // that row
    int first_item;           // one for each split
    ptrdiff_t first_partial;  // of the first row; one for each (row, split)
};

// Whether all that the shorter row sees is what the longer one sees, too, and both cut it alike.
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
        if (groups.empty() || groups.back().rows == most_rows || !share_a_sequence(decode, groups.back().longest, row))
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
