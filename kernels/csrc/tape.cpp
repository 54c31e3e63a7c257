#include "tape.hpp"

#include <memory>
#include <vector>

namespace braid {
namespace {

struct Call {
    FastFunction function;
    std::vector<PyObject*> arguments;  // owned
};

struct Tape {
    std::vector<Call> calls;

    ~Tape() {
        for (Call& call : calls)
            for (PyObject* argument : call.arguments) Py_DECREF(argument);
    }
    void note(FastFunction function, PyObject* const* values, Py_ssize_t count) {
        for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(values[i]);
        calls.push_back({function, std::vector<PyObject*>(values, values + count)});
    }
};

thread_local std::unique_ptr<Tape> recording;

// What a recordable function of the module runs: `self` is a capsule with the function behind it.
PyObject* call_recordable(PyObject* self, PyObject* const* values, Py_ssize_t count) {
    const auto function = reinterpret_cast<FastFunction>(PyCapsule_GetPointer(self, nullptr));
    PyObject* result = function(nullptr, values, count);
    if (result && recording) recording->note(function, values, count);
    return result;
}

PyObject* py_start_tape(PyObject*, PyObject* const*, Py_ssize_t) {
    recording = std::make_unique<Tape>();
    Py_RETURN_NONE;
}

// The tape with the calls of this thread since start_tape.
PyObject* py_end_tape(PyObject*, PyObject* const*, Py_ssize_t) {
    if (!recording) return PyErr_Format(PyExc_RuntimeError, "no tape was started on this thread");
    const auto forget = [](PyObject* capsule) { delete static_cast<Tape*>(PyCapsule_GetPointer(capsule, "tape")); };
    PyObject* capsule = PyCapsule_New(recording.get(), "tape", forget);
    if (capsule) recording.release();
    recording.reset();
    return capsule;
}

PyObject* py_play(PyObject*, PyObject* const* values, Py_ssize_t count) {
    auto* tape = count == 1 ? static_cast<Tape*>(PyCapsule_GetPointer(values[0], "tape")) : nullptr;
    if (!tape) return PyErr_Occurred() ? nullptr : PyErr_Format(PyExc_TypeError, "play takes one tape");
    for (const Call& call : tape->calls) {
        PyObject* result = call.function(nullptr, call.arguments.data(), Py_ssize_t(call.arguments.size()));
        if (!result) return nullptr;
        Py_DECREF(result);
    }
    Py_RETURN_NONE;
}

}  // namespace
}  // namespace braid

int add_recordable(PyObject* module, const PyMethodDef* methods) {
    for (const PyMethodDef* it = methods; it->ml_name; ++it) {
        auto* shown = new PyMethodDef(method(it->ml_name, braid::call_recordable));  // lives as long as the process
        PyObject* behind = PyCapsule_New(reinterpret_cast<void*>(it->ml_meth), nullptr, nullptr);
        PyObject* function = behind ? PyCFunction_NewEx(shown, behind, nullptr) : nullptr;
        Py_XDECREF(behind);
        const int failed = function ? PyModule_AddObjectRef(module, it->ml_name, function) : -1;
        Py_XDECREF(function);
        if (failed) return -1;
    }
    return 0;
}

extern const PyMethodDef tape_methods[];
const PyMethodDef tape_methods[] = {
    method("start_tape", braid::py_start_tape),
    method("end_tape", braid::py_end_tape),
    method("play", braid::py_play),
    {nullptr, nullptr, 0, nullptr},
};
