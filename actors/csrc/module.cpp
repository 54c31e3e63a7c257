// The module `braid.actors._native`: rings of shared memory, the pairs of a dispatch, and a hop in four calls.
#include "arguments.hpp"

extern PyMethodDef ring_methods[], pair_methods[], hop_methods[];
bool add_ring_constants(PyObject* module);
bool add_lanes(PyObject* module);

namespace {

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    PyObject* module = PyModule_Create(&definition);
    const bool is_whole = module && PyModule_AddFunctions(module, ring_methods) == 0 &&
                          PyModule_AddFunctions(module, pair_methods) == 0 &&
                          PyModule_AddFunctions(module, hop_methods) == 0 && add_ring_constants(module) &&
                          add_lanes(module);
    if (!is_whole) Py_CLEAR(module);
    return module;
}
