// What stands between Python and a kernel: integers (addresses, sizes, strides) in, no object of Python beyond this line.
// To add functions from another file: define a `const PyMethodDef NAME_methods[]` there (see pool.cpp), name it in
// module.cpp, and give its signature in _native.pyi.
#pragma once
#include <Python.h>

// Takes the arguments of a METH_FASTCALL function one after the other; `finish` tells whether all were there and right.
class Arguments {
  public:
    Arguments(PyObject* const* values, Py_ssize_t count) : values_(values), count_(count) {}

    long long integer() {
        PyObject* value = next();
        return value ? PyLong_AsLongLong(value) : 0;
    }
    double real() {
        PyObject* value = next();
        return value ? PyFloat_AsDouble(value) : 0.0;
    }
    template <class T>
    T* pointer() {  // 0 is the null pointer
        return reinterpret_cast<T*>(integer());
    }
    bool finish() {
        if (taken_ != count_ && !PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "%zd arguments wanted, %zd given", taken_, count_);
        return !PyErr_Occurred();
    }

  private:
    PyObject* next() { return taken_ < count_ ? values_[taken_++] : (taken_++, nullptr); }

    PyObject* const* values_;
    Py_ssize_t count_;
    Py_ssize_t taken_ = 0;
};

// Lets other threads of Python run while a kernel computes.
class WithoutGil {
  public:
    WithoutGil() : state_(PyEval_SaveThread()) {}
    ~WithoutGil() { PyEval_RestoreThread(state_); }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

  private:
    PyThreadState* state_;
};

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef method(const char* name, FastFunction function) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}
