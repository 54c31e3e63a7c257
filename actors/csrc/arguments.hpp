// What stands between Python and the native half of the data plane.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

#include <cstdint>

inline uint64_t number(PyObject* value) { return PyLong_AsUnsignedLongLong(value); }

inline bool takes(Py_ssize_t wanted, Py_ssize_t given) {
    if (wanted != given) PyErr_Format(PyExc_TypeError, "%zd arguments wanted, %zd given", wanted, given);
    return wanted == given;
}

// The memory of a contiguous object with a buffer, as elements of type T.
template <class T>
class Span {
  public:
    Span(PyObject* object, int flags) : is_held_(PyObject_GetBuffer(object, &buffer_, flags) == 0) {}
    ~Span() {
        if (is_held_) PyBuffer_Release(&buffer_);
    }
    Span(const Span&) = delete;
    Span& operator=(const Span&) = delete;

    // False, with an exception set, unless there are so many elements.
    bool holds(Py_ssize_t wanted) const {
        if (is_held_ && (wanted < 0 || size() < wanted))
            PyErr_Format(PyExc_ValueError, "%zd elements of %zu bytes wanted, %zd given", wanted, sizeof(T), size());
        return is_held_ && wanted >= 0 && size() >= wanted;
    }
    Py_ssize_t size() const { return buffer_.len / static_cast<Py_ssize_t>(sizeof(T)); }
    T* data() const { return static_cast<T*>(buffer_.buf); }

  private:
    Py_buffer buffer_;
    bool is_held_;
};

// Takes the GIL back. A thread that comes back when the interpreter has ended gets it no more: CPython before 3.14 unwinds
// it then, which would run destructors that need the GIL. It waits for the end of the process instead.
inline void take_back(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (const abi::__forced_unwind&) {
        while (true) pause();
    }
}

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef method(const char* name, FastFunction function) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}
