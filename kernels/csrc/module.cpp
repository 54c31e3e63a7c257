// The module `braid.kernels._native`: the kernels' functions, and what this CPU can run of them.
#include "arguments.hpp"
#include "tape.hpp"

extern const PyMethodDef attention_decode_methods[];
extern const PyMethodDef attention_prefill_methods[];
extern const PyMethodDef expert_methods[];
extern const PyMethodDef gate_methods[];
extern const PyMethodDef linear_methods[];
extern const PyMethodDef pool_methods[];
extern const PyMethodDef rows_methods[];
extern const PyMethodDef sample_methods[];
extern const PyMethodDef tape_methods[];

namespace {

PyObject* has_avx512(PyObject*, PyObject* const*, Py_ssize_t) {
    return PyBool_FromLong(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
}

PyObject* has_avx512_bf16(PyObject*, PyObject* const*, Py_ssize_t) {
    return PyBool_FromLong(__builtin_cpu_supports("avx512bf16"));
}

const PyMethodDef feature_methods[] = {
    method("has_avx512", has_avx512),
    method("has_avx512_bf16", has_avx512_bf16),
    {nullptr, nullptr, 0, nullptr},
};

const PyMethodDef* const PLAIN[] = {feature_methods, pool_methods, sample_methods, tape_methods};
const PyMethodDef* const KERNELS[] = {attention_decode_methods, attention_prefill_methods, expert_methods,
                                      gate_methods,             linear_methods,            rows_methods};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    PyObject* module = PyModule_Create(&definition);
    for (const PyMethodDef* methods : PLAIN)
        if (module && PyModule_AddFunctions(module, const_cast<PyMethodDef*>(methods)) != 0) Py_CLEAR(module);
    for (const PyMethodDef* methods : KERNELS)
        if (module && add_recordable(module, methods) != 0) Py_CLEAR(module);
    return module;
}
