// What is done row by row between the products: look-ups, norms, rotary positions, the cache's latents, the sum of a
// token's experts.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "arguments.hpp"
#include "pool.hpp"

#include "vectors.hpp"

namespace braid {
namespace {

constexpr ptrdiff_t CHUNK_ELEMENTS = 1 << 15;  // a chunk must be worth its claim
constexpr int MAX_ROPE_HALF = 512;

// body(row) for each row of about `width` elements.
template <class Body>
void for_rows(int rows, ptrdiff_t width, Body&& body) {
    const int chunk_rows = static_cast<int>(std::max<ptrdiff_t>(CHUNK_ELEMENTS / std::max<ptrdiff_t>(width, 1), 1));
    parallel_for((rows + chunk_rows - 1) / chunk_rows, [&](int chunk) {
        const int end = std::min((chunk + 1) * chunk_rows, rows);
        for (int row = chunk * chunk_rows; row < end; ++row) body(row);
    });
}

// body(at, lanes) for each vector of a row; whole ones are told apart at compile time, as masks slow memory down.
template <class Body>
inline void for_vectors(int size, Body&& body) {
    int at = 0;
    for (; at + LANES <= size; at += LANES) body(at, std::integral_constant<__mmask16, 0xffff>());
    if (at < size) body(at, first_lanes(size - at));
}

template <class T>
inline __m512 rounded(__m512 value) {  // as if it had been stored as T
    if constexpr (sizeof(T) == 4) return value;
    else return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(value)), 16));
}

// x / sqrt(mean(x^2) + eps), rounded to T, times the weight. `delta`, if any, is first added to x, in place.
template <class T>
void rms_norm_row(T* x, const T* delta, const T* weight, float eps, int size, T* out) {
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const auto add_square = [&](int at, __mmask16 lanes, int chain) {
        __m512 value = load(x + at, lanes);
        if (delta) {
            value = rounded<T>(_mm512_add_ps(value, load(delta + at, lanes)));
            store(x + at, value, lanes);
        }
        squares[chain] = _mm512_fmadd_ps(value, value, squares[chain]);
    };
    int at = 0;
    for (; at + 2 * LANES <= size; at += 2 * LANES) add_square(at, 0xffff, 0), add_square(at + LANES, 0xffff, 1);
    for (int chain = 0; at < size; at += LANES, ++chain) add_square(at, first_lanes(size - at), chain);
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / static_cast<float>(size);
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(mean + eps)));
    for_vectors(size, [&](int place, auto lanes) {
        const __m512 normed = rounded<T>(_mm512_mul_ps(load(x + place, lanes), factor));
        store(out + place, _mm512_mul_ps(load(weight + place, lanes), normed), lanes);
    });
}

// The pairs' first and second members, 16 pairs from pair `at` on.
template <class T>
struct Pairs {
    __m512 first, second;

    Pairs(const T* x, int half, int at, bool interleaved) {
        const __mmask16 lanes = first_lanes(half - at);
        if (!interleaved) {
            first = load(x + at, lanes), second = load(x + half + at, lanes);
        } else if constexpr (sizeof(T) == 2) {
            const __m512i both = _mm512_maskz_loadu_epi32(lanes, x + 2 * at);
            first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            second = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
        } else {
            const __m512 low = load(x + 2 * at, first_lanes(2 * (half - at)));
            const __m512 high = load(x + 2 * at + LANES, first_lanes(std::max(2 * (half - at) - LANES, 0)));
            const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            first = _mm512_permutex2var_ps(low, even, high);
            second = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
        }
    }
};

// Turns each pair by its angle; first members go to the first half. `out` may be x.
template <class T>
void rope_row(const T* x, const float* cos, const float* sin, int half, bool interleaved, T* out) {
    __m512 turned[2][MAX_ROPE_HALF / LANES];  // as the interleaved input is still to be read where output goes
    for (int at = 0; at < half; at += LANES) {
        const Pairs<T> pairs(x, half, at, interleaved);
        const __mmask16 lanes = first_lanes(half - at);
        const __m512 c = load(cos + at, lanes), s = load(sin + at, lanes);
        turned[0][at / LANES] = _mm512_sub_ps(_mm512_mul_ps(pairs.first, c), _mm512_mul_ps(pairs.second, s));
        turned[1][at / LANES] = _mm512_add_ps(_mm512_mul_ps(pairs.second, c), _mm512_mul_ps(pairs.first, s));
    }
    for (int i = 0; i < 2; ++i)
        for (int at = 0; at < half; at += LANES)
            store(out + i * half + at, turned[i][at / LANES], first_lanes(half - at));
}

// shared + rows[0] * weights[0] + rows[1] * weights[1] ..., each product and sum rounded to fp32, the end to T.
template <class T>
void combine_row(const T* shared, const T* rows, ptrdiff_t stride, const float* weights, int slots, int size, T* out) {
    for_vectors(size, [&](int at, auto lanes) {
        __m512 total = shared ? load(shared + at, lanes) : _mm512_setzero_ps();
        for (int slot = 0; slot < slots; ++slot) {
            const __m512 row = load(rows + slot * stride + at, lanes);
            total = _mm512_add_ps(total, _mm512_mul_ps(row, _mm512_set1_ps(weights[slot])));
        }
        store(out + at, total, lanes);
    });
}

template <class T>
void rms_norm(Arguments& arguments) {
    T* const x = arguments.pointer<T>();
    const ptrdiff_t x_stride = arguments.integer();
    const T* const delta = arguments.pointer<const T>();
    const ptrdiff_t delta_stride = arguments.integer();
    const T* const weight = arguments.pointer<const T>();
    const float eps = static_cast<float>(arguments.real());
    T* const out = arguments.pointer<T>();
    const ptrdiff_t out_stride = arguments.integer();
    const int rows = static_cast<int>(arguments.integer()), size = static_cast<int>(arguments.integer());
    if (!arguments.finish()) return;
    WithoutGil without_gil;
    for_rows(rows, size, [&](int row) {
        rms_norm_row(x + row * x_stride, delta ? delta + row * delta_stride : nullptr, weight, eps, size,
                     out + row * out_stride);
    });
}

template <class T>
void write_latents(Arguments& arguments) {
    T* const latent = arguments.pointer<T>();
    const ptrdiff_t stride = arguments.integer();
    const T* const weight = arguments.pointer<const T>();
    const float eps = static_cast<float>(arguments.real());
    const float* const cos = arguments.pointer<const float>();
    const float* const sin = arguments.pointer<const float>();
    const ptrdiff_t angle_stride = arguments.integer();
    const int64_t* const slots = arguments.pointer<const int64_t>();
    T* const cache = arguments.pointer<T>();
    const bool interleaved = arguments.integer() != 0;
    const int rows = static_cast<int>(arguments.integer());
    const int lora = static_cast<int>(arguments.integer()), rope = static_cast<int>(arguments.integer());
    if (!arguments.finish()) return;
    WithoutGil without_gil;
    for_rows(rows, lora + rope, [&](int row) {
        T* const from = latent + row * stride;
        T* const to = cache + slots[row] * (lora + rope);
        rms_norm_row<T>(from, nullptr, weight, eps, lora, to);
        rope_row(from + lora, cos + row * angle_stride, sin + row * angle_stride, rope / 2, interleaved, to + lora);
    });
}

template <class T>
void rope(Arguments& arguments) {
    const T* const x = arguments.pointer<const T>();
    const ptrdiff_t row_stride = arguments.integer(), head_stride = arguments.integer();
    const float* const cos = arguments.pointer<const float>();
    const float* const sin = arguments.pointer<const float>();
    const ptrdiff_t angle_stride = arguments.integer();
    const bool interleaved = arguments.integer() != 0;
    T* const out = arguments.pointer<T>();
    const ptrdiff_t out_row_stride = arguments.integer(), out_head_stride = arguments.integer();
    const int rows = static_cast<int>(arguments.integer()), heads = static_cast<int>(arguments.integer());
    const int size = static_cast<int>(arguments.integer());
    if (!arguments.finish()) return;
    WithoutGil without_gil;
    for_rows(rows, heads * size, [&](int row) {
        for (int head = 0; head < heads; ++head)
            rope_row(x + row * row_stride + head * head_stride, cos + row * angle_stride, sin + row * angle_stride,
                     size / 2, interleaved, out + row * out_row_stride + head * out_head_stride);
    });
}

template <class T>
void combine(Arguments& arguments) {
    const T* const shared = arguments.pointer<const T>();
    const ptrdiff_t shared_stride = arguments.integer();
    const T* const expert_rows = arguments.pointer<const T>();
    const ptrdiff_t row_stride = arguments.integer(), slot_stride = arguments.integer();
    const float* const weights = arguments.pointer<const float>();
    const ptrdiff_t weight_stride = arguments.integer();
    T* const out = arguments.pointer<T>();
    const ptrdiff_t out_stride = arguments.integer();
    const int rows = static_cast<int>(arguments.integer()), slots = static_cast<int>(arguments.integer());
    const int size = static_cast<int>(arguments.integer());
    if (!arguments.finish()) return;
    WithoutGil without_gil;
    for_rows(rows, ptrdiff_t(slots + 1) * size, [&](int row) {
        combine_row(shared ? shared + row * shared_stride : nullptr, expert_rows + row * row_stride, slot_stride,
                    weights + row * weight_stride, slots, size, out + row * out_stride);
    });
}

// Row i of `out` <- row rows[i] of `table`, all strides in bytes.
PyObject* py_gather(PyObject*, PyObject* const* values, Py_ssize_t value_count) {
    Arguments arguments(values, value_count);
    const char* const table = arguments.pointer<const char>();
    const ptrdiff_t stride = arguments.integer();
    const long long table_rows = arguments.integer();
    const int64_t* const rows = arguments.pointer<const int64_t>();
    char* const out = arguments.pointer<char>();
    const ptrdiff_t out_stride = arguments.integer();
    const int count = static_cast<int>(arguments.integer()), row_bytes = static_cast<int>(arguments.integer());
    if (!arguments.finish()) return nullptr;
    for (int i = 0; i < count; ++i)
        if (rows[i] < 0 || rows[i] >= table_rows)
            return PyErr_Format(PyExc_IndexError, "row %lld of a table of %lld", static_cast<long long>(rows[i]),
                                table_rows);
    WithoutGil without_gil;
    for (int i = 0; i < count; ++i) std::memcpy(out + i * out_stride, table + rows[i] * stride, row_bytes);
    Py_RETURN_NONE;
}

// The first argument is the size of an element, 4 or 2.
template <void (*wide)(Arguments&), void (*narrow)(Arguments&)>
PyObject* by_element_size(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    (arguments.integer() == 2 ? narrow : wide)(arguments);
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
}

}  // namespace
}  // namespace braid

extern const PyMethodDef rows_methods[];
const PyMethodDef rows_methods[] = {
    method("rms_norm", braid::by_element_size<braid::rms_norm<float>, braid::rms_norm<braid::bf16>>),
    method("write_latents", braid::by_element_size<braid::write_latents<float>, braid::write_latents<braid::bf16>>),
    method("gather", braid::py_gather),
    method("rope", braid::by_element_size<braid::rope<float>, braid::rope<braid::bf16>>),
    method("combine", braid::by_element_size<braid::combine<float>, braid::combine<braid::bf16>>),
    {nullptr, nullptr, 0, nullptr},
};
