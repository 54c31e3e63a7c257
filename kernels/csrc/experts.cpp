// MLPs with SwiGLU: of one matrix pair, or of each row's own expert.
#include "arguments.hpp"
#include "workspace.hpp"

#include "gemm.hpp"

namespace braid {
namespace {

// The rows of each expert; `order` lists them expert by expert, in the order given within one.
struct Groups {
    int experts;
    const int* first;  // [experts + 1], where an expert's rows begin in `order`
    const int* order;
    int size(int expert) const { return first[expert + 1] - first[expert]; }
};

// Shares out every expert's product: body(expert, rows of `order`, panels) for each chunk.
template <class T, class Body>
void for_each_chunk(const Groups& groups, const Matrix<T>& matrix, int* first_chunk, Body&& body) {
    const int threads = num_threads();  // once: another thread may change it meanwhile
    int present = 0;
    for (int e = 0; e < groups.experts; ++e) present += groups.size(e) > 0;
    const auto cut = [&](int expert) {
        return Cut(groups.size(expert), matrix.panels(), int64_t(matrix.words()) * PANEL * 4, present, threads);
    };
    first_chunk[0] = 0;
    for (int e = 0; e < groups.experts; ++e) first_chunk[e + 1] = first_chunk[e] + cut(e).chunks();
    parallel_for(first_chunk[groups.experts], [&](int chunk) {
        const int expert = int(std::upper_bound(first_chunk, first_chunk + groups.experts, chunk) - first_chunk) - 1;
        const Cut pieces = cut(expert);
        const int part = chunk - first_chunk[expert];
        Range rows = part_of(groups.size(expert), pieces.row_blocks, part / pieces.panel_groups);
        rows.begin += groups.first[expert], rows.end += groups.first[expert];
        body(expert, rows, part_of(matrix.panels(), pieces.panel_groups, part % pieces.panel_groups));
    });
}

// silu(gate) * up of one panel, rounded once: 32 activations of each row.
template <class T>
void finish_gate_up(const float* sums, int num_rows, int panel, int width, T* out) {
    const int first = panel * PANEL / 2, last = std::min(first + PANEL / 2, width);
    for (int r = 0; r < num_rows; ++r) {
        for (int at = first; at < last; at += LANES) {
            const float* gate = sums + r * PANEL + at - first;
            const __m512 value = _mm512_mul_ps(silu(_mm512_load_ps(gate)), _mm512_load_ps(gate + PANEL / 2));
            store(out + ptrdiff_t(r) * width + at, value, first_lanes(last - at));
        }
    }
}

template <class T>
void finish_rows(const float* sums, int num_rows, int panel, int outputs, const int* places, T* out, ptrdiff_t stride) {
    const int first = panel * PANEL, last = std::min(first + PANEL, outputs);
    for (int r = 0; r < num_rows; ++r)
        for (int at = first; at < last; at += LANES)
            store(out + places[r] * stride + at, _mm512_load_ps(sums + r * PANEL + at - first), first_lanes(last - at));
}

// Row order[i] of `out` <- MLP of its expert for row row_of[order[i]] of x (row order[i], if there is no row_of).
template <class T>
void grouped_mlp(const T* x, ptrdiff_t x_stride, const int64_t* row_of, const Groups& groups, const Matrix<T>& w13,
                 const Matrix<T>& w2, T* activated, int* chunks, T* out, ptrdiff_t out_stride) {
    for_each_chunk(groups, w13, chunks, [&](int expert, Range rows, Range panels) {
        const Matrix<T> matrix{w13.data + expert * w13.size(), w13.outputs, w13.inputs};
        const T* row[BLOCK_ROWS];
        for (int r = 0; r < rows.size(); ++r) {
            const int place = groups.order[rows.begin + r];
            row[r] = x + (row_of ? row_of[place] : place) * x_stride;
        }
        alignas(64) float sums[BLOCK_ROWS * PANEL];
        for (int panel = panels.begin; panel < panels.end; ++panel) {
            multiply_panel(row, rows.size(), matrix, panel, matrix.panel(panels.end), sums);
            finish_gate_up(sums, rows.size(), panel, w2.inputs, activated + ptrdiff_t(rows.begin) * w2.inputs);
        }
    });
    for_each_chunk(groups, w2, chunks, [&](int expert, Range rows, Range panels) {
        const Matrix<T> matrix{w2.data + expert * w2.size(), w2.outputs, w2.inputs};
        const T* row[BLOCK_ROWS];
        for (int r = 0; r < rows.size(); ++r) row[r] = activated + ptrdiff_t(rows.begin + r) * w2.inputs;
        alignas(64) float sums[BLOCK_ROWS * PANEL];
        for (int panel = panels.begin; panel < panels.end; ++panel) {
            multiply_panel(row, rows.size(), matrix, panel, matrix.panel(panels.end), sums);
            finish_rows(sums, rows.size(), panel, w2.outputs, groups.order + rows.begin, out, out_stride);
        }
    });
}

// Groups by expert and computes; with expert_of null all rows are one group.
template <class T>
void sorted_mlp(const T* x, ptrdiff_t x_stride, const int64_t* row_of, const int64_t* expert_of, int pairs, int experts,
                const Matrix<T>& w13, const Matrix<T>& w2, T* out, ptrdiff_t out_stride) {
    const size_t activations = (size_t(pairs) * w2.inputs * sizeof(T) + 63) / 64 * 64;
    thread_local Workspace workspace;
    char* memory = workspace.room<char>(activations + (size_t(pairs) + 2 * size_t(experts) + 3) * sizeof(int));
    T* activated = reinterpret_cast<T*>(memory);
    int* first = reinterpret_cast<int*>(memory + activations);  // [experts + 2]; shifted by one while it counts
    int* chunks = first + experts + 2;                          // [experts + 1]
    int* order = chunks + experts + 1;                          // [pairs]
    std::fill(first, first + experts + 2, 0);
    for (int i = 0; i < pairs; ++i) ++first[(expert_of ? expert_of[i] : 0) + 2];
    for (int e = 0; e < experts; ++e) first[e + 2] += first[e + 1];
    for (int i = 0; i < pairs; ++i) order[first[(expert_of ? expert_of[i] : 0) + 1]++] = i;
    grouped_mlp(x, x_stride, row_of, {experts, first, order}, w13, w2, activated, chunks, out, out_stride);
}

bool all_below(const int64_t* values, int count, int64_t limit) {
    bool is_right = true;
    for (int i = 0; values && i < count; ++i) is_right &= uint64_t(values[i]) < uint64_t(limit);
    return is_right;
}

PyObject* py_mlp(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    const bool is_bf16 = arguments.integer();
    const void* x = arguments.pointer<void>();
    const ptrdiff_t x_stride = arguments.integer();
    const int rows = int(arguments.integer());
    const auto* row_of = arguments.pointer<int64_t>();
    const auto* expert_of = arguments.pointer<int64_t>();
    const int pairs = int(arguments.integer()), experts = int(arguments.integer());
    const auto* w13 = arguments.pointer<uint32_t>();
    const auto* w2 = arguments.pointer<uint32_t>();
    const int hidden = int(arguments.integer()), width = int(arguments.integer());
    const int outputs = int(arguments.integer());
    void* out = arguments.pointer<void>();
    const ptrdiff_t out_stride = arguments.integer();
    if (!arguments.finish()) return nullptr;
    if (!all_below(row_of, pairs, rows) || !all_below(expert_of, pairs, experts)) {
        PyErr_Format(PyExc_IndexError, "a pair names a row that is not in 0..%d or an expert not in 0..%d", rows - 1,
                     experts - 1);
        return nullptr;
    }
    const auto run = [&](auto* typed_x, auto* typed_out) {
        using T = std::remove_pointer_t<decltype(typed_out)>;
        const int gate_up = (width + 31) / 32 * PANEL;
        sorted_mlp(typed_x, x_stride, row_of, expert_of, pairs, experts, Matrix<T>{w13, gate_up, hidden},
                   Matrix<T>{w2, outputs, width}, typed_out, out_stride);
    };
    {
        WithoutGil without_gil;
        if (is_bf16) run(static_cast<const bf16*>(x), static_cast<bf16*>(out));
        else run(static_cast<const float*>(x), static_cast<float*>(out));
    }
    Py_RETURN_NONE;
}

}  // namespace
}  // namespace braid

extern const PyMethodDef expert_methods[];
const PyMethodDef expert_methods[] = {
    method("mlp", braid::py_mlp),
    {nullptr, nullptr, 0, nullptr},
};
