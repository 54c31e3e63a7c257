// out = x weight^T (+ bias), for one matrix or one matrix per head.
#pragma once
#include "gemm.hpp"

namespace braid {

struct Strides {  // in elements
    ptrdiff_t row, head;
};

// Element (r, h, o) of `out` is the dot product of x's (r, h) with output o of head h's matrix; the matrices follow one
// another in memory from `first` on. Shared out among the threads. T: float or bf16; Out: T, or float.
template <class T, class Out>
void head_linear(const T* x, Strides x_strides, int rows, const Matrix<T>& first, int heads, const T* bias, Out* out,
                 Strides out_strides);

template <class T>
void linear(const T* x, ptrdiff_t x_stride, int rows, const Matrix<T>& matrix, T* out, ptrdiff_t out_stride) {
    head_linear<T, T>(x, {x_stride, 0}, rows, matrix, 1, nullptr, out, {out_stride, 0});
}

}  // namespace braid
