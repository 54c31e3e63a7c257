// MLA in the form with a key and a value for each head: causal attention of consecutive rows of one sequence.
//
// Keys and values of a stretch of the cache are expanded once for all queries and packed for the products. A row goes
// through tiles of 256 absolute positions in ascending order by online softmax in fp32; each score and each sum has one
// chain of additions, so neither the rows beside it nor the cut into chunks, stretches and blocks changes a bit.
// In bf16 the weights of a tile are rounded to bf16 before they meet the values (and the sum they are divided by).
#include <algorithm>
#include <cstring>

#include "arguments.hpp"
#include "pool.hpp"
#include "workspace.hpp"

#include "linear.hpp"
#include "prefill_tiles.hpp"

namespace braid {
namespace {

constexpr int ITEM_ROWS = 96;                  // query rows of one head that a chunk takes through a stretch
constexpr ptrdiff_t STRETCH_BYTES = 24 << 20;  // of expanded keys and values at once; bounds a long context's memory

template <class T>
struct Prefill {
    const T* q;  // [rows, heads, nope + rope]
    ptrdiff_t q_row_stride, q_head_stride;
    const T* cache;  // [blocks, BLOCK, lora + rope]
    Matrix<T> kv_b;  // [heads * (nope + values), lora]
    const int64_t* table;
    int64_t start;
    int rows, heads, nope, rope, values, lora;
    float scale;
    T* out;  // [rows, heads, values]
    ptrdiff_t out_row_stride, out_head_stride;

    int64_t end() const { return start + rows; }
    int expanded() const { return heads * (nope + values); }
};

// Sizes of what is kept between the steps of a call. A dword is a float or two bf16 (consecutive dims of keys and
// queries, consecutive keys of values and weights).
template <class T>
struct Layout {
    static constexpr int PER = Operand<T>::PER_DWORD;
    int nope, rope;   // dwords of a key's two parts
    int values;       // of a head, padded to whole vectors
    int padded_rows;  // whole items
    int64_t stretch;  // keys

    explicit Layout(const Prefill<T>& call)
        : nope((call.nope + PER - 1) / PER),
          rope((call.rope + PER - 1) / PER),
          values(static_cast<int>(round_up(call.values, LANES))),
          padded_rows(static_cast<int>(round_up(call.rows, ROWS))) {
        const ptrdiff_t key_bytes = ptrdiff_t(call.expanded()) * 2 * sizeof(T);
        const ptrdiff_t longest = std::clamp<ptrdiff_t>(STRETCH_BYTES / key_bytes / TILE * TILE, TILE, 8 * TILE);
        stretch = std::min<ptrdiff_t>(longest, round_up(call.end(), TILE));
    }
    ptrdiff_t latent_elements(const Prefill<T>& call) const { return stretch * call.lora; }
    ptrdiff_t expanded_elements(const Prefill<T>& call) const { return stretch * call.expanded(); }
    ptrdiff_t nope_dwords(const Prefill<T>& call) const { return stretch * call.heads * nope; }
    ptrdiff_t rope_dwords() const { return stretch * rope; }
    ptrdiff_t value_dwords(const Prefill<T>& call) const { return stretch / PER * call.heads * values; }
    ptrdiff_t sums(const Prefill<T>& call) const { return ptrdiff_t(padded_rows) * call.heads * values; }
};

// One stretch of the sequence, first_key .. first_key + num_keys - 1, and where it is expanded and packed.
template <class T>
struct Stretch {
    int64_t first_key;
    int num_keys;
    T* latents;       // [num_keys, lora]
    T* expanded;      // [num_keys, heads, nope + values]
    int32_t* nope;    // [heads, panels, dwords, BLOCK]
    int32_t* rope;    // [panels, dwords, BLOCK]
    int32_t* values;  // [heads, keys / PER_DWORD, padded values]
    float* sums;      // [heads, padded rows, padded values]
    float* highest;   // [heads, padded rows]
    float* totals;    // [heads, padded rows]

    int panels() const { return (num_keys + BLOCK - 1) / BLOCK; }
};

template <class T>
void expand(const Prefill<T>& call, const Layout<T>& layout, const Stretch<T>& stretch) {
    const ptrdiff_t latent_dim = call.lora + call.rope;
    const int panels = stretch.panels(), width = call.nope + call.values;
    const auto block_of = [&](int panel) {
        return call.cache + call.table[stretch.first_key / BLOCK + panel] * BLOCK * latent_dim;
    };
    const auto keys_of = [&](int panel) { return std::min(BLOCK, stretch.num_keys - panel * BLOCK); };
    parallel_for(panels, [&](int panel) {
        for (int key = 0; key < keys_of(panel); ++key)
            std::memcpy(stretch.latents + (ptrdiff_t(panel) * BLOCK + key) * call.lora,
                        block_of(panel) + key * latent_dim, call.lora * sizeof(T));
        pack_keys(block_of(panel) + call.lora, latent_dim, keys_of(panel), call.rope,
                  stretch.rope + ptrdiff_t(panel) * layout.rope * BLOCK);
    });
    linear(stretch.latents, call.lora, stretch.num_keys, call.kv_b, stretch.expanded, ptrdiff_t(call.expanded()));
    parallel_for(panels * call.heads, [&](int chunk) {
        const int head = chunk / panels, panel = chunk % panels;
        const ptrdiff_t place = ptrdiff_t(head) * (layout.stretch / BLOCK) + panel;
        const T* const from = stretch.expanded + ptrdiff_t(panel) * BLOCK * call.expanded() + head * width;
        pack_keys(from, call.expanded(), keys_of(panel), call.nope, stretch.nope + place * layout.nope * BLOCK);
        pack_values(from + call.nope, call.expanded(), keys_of(panel), call.values, layout.values,
                    stretch.values + place * (BLOCK / Layout<T>::PER) * layout.values);
    });
}

// ROWS query rows of one head, from `first_row` on, through the tiles of a stretch.
template <class T>
class RowBlock {
  public:
    RowBlock(const Prefill<T>& call, const Layout<T>& layout, const Stretch<T>& stretch, int head, int first_row)
        : call_(call),
          layout_(layout),
          stretch_(stretch),
          head_(head),
          first_row_(first_row),
          num_rows_(std::min(ROWS, call.rows - first_row)) {}

    int64_t last_position() const { return call_.start + first_row_ + num_rows_ - 1; }

    void load_queries(int32_t* to) {  // [ROWS, dwords]: the two parts padded to dwords, and 0 for rows that are none
        const ptrdiff_t dwords = layout_.nope + layout_.rope;
        std::memset(to, 0, ROWS * dwords * sizeof(int32_t));
        for (int row = 0; row < num_rows_; ++row) {
            const T* const from = call_.q + (first_row_ + row) * call_.q_row_stride + head_ * call_.q_head_stride;
            std::memcpy(to + row * dwords, from, call_.nope * sizeof(T));
            std::memcpy(to + row * dwords + layout_.nope, from + call_.nope, call_.rope * sizeof(T));
        }
    }

    void add_tile(const int32_t* q, int tile) {  // counted from the start of the stretch
        const int64_t first_key = stretch_.first_key + tile * TILE;
        const int visible = static_cast<int>(std::min<int64_t>(last_position() + 1 - first_key, TILE));
        const int panels = (visible + BLOCK - 1) / BLOCK;
        const bool is_first = first_key == 0;
        alignas(64) float scores[ROWS * TILE];
        alignas(64) int32_t weights[ROWS * TILE / Layout<T>::PER];
        float keep[ROWS];
        const ptrdiff_t stretch_panels = layout_.stretch / BLOCK;
        for (int i = 0; i < panels; ++i) {
            const ptrdiff_t panel = tile * (TILE / BLOCK) + i;
            score_panel<T>(q, layout_.nope, layout_.rope,
                           stretch_.nope + (head_ * stretch_panels + panel) * layout_.nope * BLOCK,
                           stretch_.rope + panel * layout_.rope * BLOCK, scores + i * BLOCK);
        }
        const ptrdiff_t place = ptrdiff_t(head_) * layout_.padded_rows + first_row_;
        for (int row = 0; row < ROWS; ++row) {
            float &highest = stretch_.highest[place + row], &total = stretch_.totals[place + row];
            if (is_first) highest = LOWEST, total = 0;
            const int64_t seen = std::clamp<int64_t>(call_.start + first_row_ + row + 1 - first_key, 0, visible);
            keep[row] = weigh<T>(scores + row * TILE, seen, panels * BLOCK, call_.scale, highest, total,
                                 weights + row * (TILE / Layout<T>::PER));
        }
        const int32_t* values =
            stretch_.values + (head_ * layout_.stretch + tile * TILE) / Layout<T>::PER * layout_.values;
        float* const sums = stretch_.sums + place * layout_.values;
        const int steps = panels * BLOCK / Layout<T>::PER;
        for (int value = 0; value < layout_.values; value += 4 * LANES) {
            const int vectors = std::min((layout_.values - value) / LANES, 4);
            const auto add = vectors == 4   ? add_values<T, 4>
                             : vectors == 3 ? add_values<T, 3>
                             : vectors == 2 ? add_values<T, 2>
                                            : add_values<T, 1>;
            add(weights, values + value, layout_.values, steps, keep, is_first, sums + value);
        }
    }

    void finish() const {
        const ptrdiff_t place = ptrdiff_t(head_) * layout_.padded_rows + first_row_;
        for (int row = 0; row < num_rows_; ++row) {
            const __m512 total = _mm512_set1_ps(stretch_.totals[place + row]);
            T* const out = call_.out + (first_row_ + row) * call_.out_row_stride + head_ * call_.out_head_stride;
            const float* const sums = stretch_.sums + (place + row) * layout_.values;
            for (int value = 0; value < call_.values; value += LANES)
                store(out + value, _mm512_div_ps(_mm512_loadu_ps(sums + value), total),
                      first_lanes(call_.values - value));
        }
    }

  private:
    const Prefill<T>& call_;
    const Layout<T>& layout_;
    const Stretch<T>& stretch_;
    const int head_, first_row_, num_rows_;
};

template <class T>
void attend(const Prefill<T>& call, const Layout<T>& layout, const Stretch<T>& stretch) {
    const int64_t stretch_end = stretch.first_key + stretch.num_keys;
    // Rows before the stretch see nothing of it.
    const int first_row = static_cast<int>(std::max<int64_t>(stretch.first_key - call.start, 0)) / ROWS * ROWS;
    const int row_items = (call.rows - first_row + ITEM_ROWS - 1) / ITEM_ROWS;
    parallel_for(row_items * call.heads, [&](int chunk) {
        thread_local Workspace queries;
        const int head = chunk % call.heads;
        const int begin = first_row + (row_items - 1 - chunk / call.heads) * ITEM_ROWS;  // the longest ones first
        const int end = std::min(begin + ITEM_ROWS, call.rows);
        const ptrdiff_t dwords = ROWS * (layout.nope + layout.rope);
        int32_t* const q = queries.room<int32_t>(ITEM_ROWS / ROWS * dwords);
        for (int row = begin; row < end; row += ROWS)
            RowBlock<T>(call, layout, stretch, head, row).load_queries(q + (row - begin) / ROWS * dwords);
        for (int tile = 0; tile * TILE < stretch.num_keys; ++tile)
            for (int row = begin; row < end; row += ROWS) {
                RowBlock<T> rows(call, layout, stretch, head, row);
                if (rows.last_position() >= stretch.first_key + tile * TILE)
                    rows.add_tile(q + (row - begin) / ROWS * dwords, tile);
            }
        for (int row = begin; row < end; row += ROWS) {
            const RowBlock<T> rows(call, layout, stretch, head, row);
            if (rows.last_position() >= stretch.first_key && rows.last_position() < stretch_end) rows.finish();
        }
    });
}

template <class T>
void prefill(const Prefill<T>& call) {
    thread_local Workspace memory[7];
    const Layout<T> layout(call);
    const ptrdiff_t states = ptrdiff_t(layout.padded_rows) * call.heads;
    Stretch<T> stretch;
    stretch.latents = memory[0].room<T>(layout.latent_elements(call));
    stretch.expanded = memory[1].room<T>(layout.expanded_elements(call));
    stretch.nope = memory[2].room<int32_t>(layout.nope_dwords(call));
    stretch.rope = memory[3].room<int32_t>(layout.rope_dwords());
    stretch.values = memory[4].room<int32_t>(layout.value_dwords(call));
    stretch.sums = memory[5].room<float>(layout.sums(call));
    stretch.highest = memory[6].room<float>(2 * states);
    stretch.totals = stretch.highest + states;
    for (stretch.first_key = 0; stretch.first_key < call.end(); stretch.first_key += layout.stretch) {
        stretch.num_keys = static_cast<int>(std::min(layout.stretch, call.end() - stretch.first_key));
        expand(call, layout, stretch);
        attend(call, layout, stretch);
    }
}

template <class T>
PyObject* run_prefill(Arguments& arguments) {
    Prefill<T> call;
    call.q = arguments.pointer<T>();
    call.q_row_stride = arguments.integer();
    call.q_head_stride = arguments.integer();
    call.cache = arguments.pointer<T>();
    call.kv_b.data = arguments.pointer<uint32_t>();
    call.table = arguments.pointer<int64_t>();
    call.start = arguments.integer();
    call.rows = static_cast<int>(arguments.integer());
    call.heads = static_cast<int>(arguments.integer());
    call.nope = static_cast<int>(arguments.integer());
    call.rope = static_cast<int>(arguments.integer());
    call.values = static_cast<int>(arguments.integer());
    call.lora = static_cast<int>(arguments.integer());
    call.scale = static_cast<float>(arguments.real());
    call.out = arguments.pointer<T>();
    call.out_row_stride = arguments.integer();
    call.out_head_stride = arguments.integer();
    if (!arguments.finish()) return nullptr;
    call.kv_b.outputs = call.expanded();
    call.kv_b.inputs = call.lora;
    if (call.rows > 0) {
        WithoutGil without_gil;
        prefill(call);
    }
    Py_RETURN_NONE;
}

PyObject* py_mla_prefill(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    return arguments.integer() == 2 ? run_prefill<bf16>(arguments) : run_prefill<float>(arguments);
}

}  // namespace
}  // namespace braid

extern const PyMethodDef attention_prefill_methods[];
const PyMethodDef attention_prefill_methods[] = {
    method("mla_prefill", braid::py_mla_prefill),
    {nullptr, nullptr, 0, nullptr},
};
