#include <sys/mman.h>

#include "arguments.hpp"

#include "linear.hpp"

namespace braid {
namespace {

template <class T, class Out>
void finish(const float* sums, int num_rows, int panel, int outputs, const T* bias, Out* const* out) {
    const int first = panel * PANEL, last = std::min(first + PANEL, outputs);
    for (int r = 0; r < num_rows; ++r) {
        for (int at = first; at < last; at += LANES) {
            const __mmask16 lanes = first_lanes(last - at);
            __m512 sum = _mm512_load_ps(sums + r * PANEL + at - first);
            if (bias) sum = _mm512_add_ps(sum, load(bias + at, lanes));
            store(out[r] + at, sum, lanes);
        }
    }
}

// A strip is 16 outputs. The matrix's rows that it holds, from `begin` up to `end` or as many as there are of them.
Range strip_rows(int strip, int outputs, bool is_gate_up) {
    if (!is_gate_up) return {strip * LANES, std::min((strip + 1) * LANES, outputs)};
    const int half = outputs / 2, in_panel = strip % 4;
    const int begin = strip / 4 * 32 + in_panel % 2 * LANES, shift = in_panel < 2 ? 0 : half;
    return {begin + shift, std::min(begin + LANES, half) + shift};
}

template <class T>
void pack_panel(const T* weight, ptrdiff_t stride, const Matrix<T>& to, int panel, int outputs, bool is_gate_up) {
    constexpr int per_word = Matrix<T>::PER_WORD;
    const int vectors = to.vectors(panel), words = to.words();
    alignas(64) uint32_t tile[LANES][LANES];
    const __m512i column = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
    for (int v = 0; v < vectors; ++v) {
        const Range rows = strip_rows(panel * 4 + v, outputs, is_gate_up);
        uint32_t* out = const_cast<uint32_t*>(to.panel(panel)) + v * LANES;
        for (int word = 0; word < words; word += LANES) {
            const int inputs = std::min(to.inputs - word * per_word, LANES * per_word);
            for (int r = 0; r < LANES; ++r) {
                if (r >= rows.size() || inputs < LANES * per_word) __builtin_memset(tile[r], 0, sizeof tile[r]);
                if (r < rows.size())
                    __builtin_memcpy(tile[r], weight + (rows.begin + r) * stride + word * per_word, inputs * sizeof(T));
            }
            for (int w = 0; w < std::min(LANES, words - word); ++w)
                _mm512_storeu_si512(out + ptrdiff_t(word + w) * vectors * LANES,
                                    _mm512_i32gather_epi32(column, &tile[0][w], 4));
        }
    }
}

template <class T>
void pack(const T* weight, ptrdiff_t stride, int outputs, int inputs, bool is_gate_up, uint32_t* data) {
    const int padded = is_gate_up ? (outputs / 2 + 31) / 32 * PANEL : outputs;
    const Matrix<T> to{data, padded, inputs};
    parallel_for(to.panels(), [&](int panel) { pack_panel(weight, stride, to, panel, outputs, is_gate_up); });
}

}  // namespace

template <class T, class Out>
void head_linear(const T* x, Strides x_strides, int rows, const Matrix<T>& first, int heads, const T* bias, Out* out,
                 Strides out_strides) {
    const Cut cut(rows, first.panels(), int64_t(first.words()) * PANEL * 4, heads, num_threads());
    parallel_for(heads * cut.chunks(), [&](int chunk) {
        const int head = chunk / cut.chunks(), part = chunk % cut.chunks();
        const Range block = part_of(rows, cut.row_blocks, part / cut.panel_groups);
        const Range group = part_of(first.panels(), cut.panel_groups, part % cut.panel_groups);
        const Matrix<T> matrix{first.data + head * first.size(), first.outputs, first.inputs};
        const T* row[BLOCK_ROWS];
        Out* out_row[BLOCK_ROWS];
        for (int r = 0; r < block.size(); ++r) {
            row[r] = x + (block.begin + r) * x_strides.row + head * x_strides.head;
            out_row[r] = out + (block.begin + r) * out_strides.row + head * out_strides.head;
        }
        alignas(64) float sums[BLOCK_ROWS * PANEL];
        for (int panel = group.begin; panel < group.end; ++panel) {
            multiply_panel(row, block.size(), matrix, panel, matrix.panel(group.end), sums);
            finish(sums, block.size(), panel, matrix.outputs, bias, out_row);
        }
    });
}

template void head_linear(const float*, Strides, int, const Matrix<float>&, int, const float*, float*, Strides);
template void head_linear(const bf16*, Strides, int, const Matrix<bf16>&, int, const bf16*, bf16*, Strides);
template void head_linear(const bf16*, Strides, int, const Matrix<bf16>&, int, const bf16*, float*, Strides);

namespace {

// Before the weights are written: pages of 2 MiB, where whole ones fit, are read 10 to 20% faster.
PyObject* py_use_large_pages(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    const uintptr_t address = uintptr_t(arguments.integer()), size = uintptr_t(arguments.integer());
    if (!arguments.finish()) return nullptr;
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + size) / PAGE * PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may be refused
    Py_RETURN_NONE;
}

PyObject* py_pack(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    const bool is_bf16 = arguments.integer();
    const void* weight = arguments.pointer<void>();
    const ptrdiff_t stride = arguments.integer();
    const int outputs = int(arguments.integer()), inputs = int(arguments.integer());
    const bool is_gate_up = arguments.integer();
    auto* data = arguments.pointer<uint32_t>();
    if (!arguments.finish()) return nullptr;
    {
        WithoutGil without_gil;
        if (is_bf16) pack(static_cast<const bf16*>(weight), stride, outputs, inputs, is_gate_up, data);
        else pack(static_cast<const float*>(weight), stride, outputs, inputs, is_gate_up, data);
    }
    Py_RETURN_NONE;
}

PyObject* py_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    const bool is_bf16 = arguments.integer(), is_wide = arguments.integer();
    const void* x = arguments.pointer<void>();
    Strides x_strides{}, out_strides{};
    x_strides.row = arguments.integer(), x_strides.head = arguments.integer();
    const int rows = int(arguments.integer()), heads = int(arguments.integer());
    auto* data = arguments.pointer<uint32_t>();
    const int outputs = int(arguments.integer()), inputs = int(arguments.integer());
    const void* bias = arguments.pointer<void>();
    void* out = arguments.pointer<void>();
    out_strides.row = arguments.integer(), out_strides.head = arguments.integer();
    if (!arguments.finish()) return nullptr;
    const auto run = [&](auto* typed_x, auto* typed_out) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(typed_x)>>;
        head_linear(typed_x, x_strides, rows, Matrix<T>{data, outputs, inputs}, heads, static_cast<const T*>(bias),
                    typed_out, out_strides);
    };
    {
        WithoutGil without_gil;
        if (!is_bf16) run(static_cast<const float*>(x), static_cast<float*>(out));
        else if (is_wide) run(static_cast<const bf16*>(x), static_cast<float*>(out));
        else run(static_cast<const bf16*>(x), static_cast<bf16*>(out));
    }
    Py_RETURN_NONE;
}

}  // namespace
}  // namespace braid

extern const PyMethodDef linear_methods[];
const PyMethodDef linear_methods[] = {
    method("use_large_pages", braid::py_use_large_pages),
    method("pack", braid::py_pack),
    method("linear", braid::py_linear),
    {nullptr, nullptr, 0, nullptr},
};
