// Waiting for news in rings, asleep or awake; ring.hpp has their words.
#include "arguments.hpp"
#include "ring.hpp"

namespace {

bool has_news(const Header& ring) {
    return ring.written.load(std::memory_order_acquire) != ring.seen.load(std::memory_order_relaxed);
}

Header* header(PyObject* address) { return reinterpret_cast<Header*>(number(address)); }

constexpr Py_ssize_t MAX_RINGS = 1024;

// Copies the addresses out, so that the GIL need not be held; -1 with an exception set.
Py_ssize_t headers(PyObject* addresses, Header** rings) {
    const Py_ssize_t count = PyTuple_Size(addresses);
    if (count > MAX_RINGS) PyErr_Format(PyExc_ValueError, "%zd rings at once: at most %zd", count, MAX_RINGS);
    for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); ++i) rings[i] = header(PyTuple_GetItem(addresses, i));
    return PyErr_Occurred() ? -1 : count;
}

bool any_news(Header* const* rings, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; ++i)
        if (has_news(*rings[i])) return true;
    return false;
}

PyObject* doze(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(1, count)) return nullptr;
    Header* rings[MAX_RINGS];
    const Py_ssize_t num_rings = headers(args[0], rings);
    if (num_rings < 0) return nullptr;
    for (Py_ssize_t i = 0; i < num_rings; ++i) rings[i]->asleep.store(1, std::memory_order_relaxed);
    full_fence();
    return PyBool_FromLong(!any_news(rings, num_rings));
}

PyObject* rouse(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(1, count)) return nullptr;
    Header* rings[MAX_RINGS];
    const Py_ssize_t num_rings = headers(args[0], rings);
    if (num_rings < 0) return nullptr;
    for (Py_ssize_t i = 0; i < num_rings; ++i) rings[i]->asleep.store(0, std::memory_order_relaxed);
    Py_RETURN_NONE;
}

PyObject* spin(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(3, count)) return nullptr;
    Header* rings[MAX_RINGS];
    const Py_ssize_t num_rings = headers(args[0], rings);
    const int epoll_fd = static_cast<int>(PyLong_AsLong(args[1]));
    const int64_t for_ns = PyLong_AsLongLong(args[2]);
    if (num_rings < 0 || PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    const Outcome outcome = spin_until([&] { return any_news(rings, num_rings); }, epoll_fd, for_ns);
    take_back(state);
    return PyLong_FromLong(outcome);
}

}  // namespace

PyMethodDef ring_methods[] = {
    method("doze", doze),
    method("rouse", rouse),
    method("spin", spin),
    {nullptr, nullptr, 0, nullptr},
};

bool add_ring_constants(PyObject* module) {
    return PyModule_AddIntConstant(module, "HEADER_BYTES", HEADER_BYTES) == 0 &&
           PyModule_AddIntConstant(module, "QUIET", QUIET) == 0 && PyModule_AddIntConstant(module, "NEWS", NEWS) == 0 &&
           PyModule_AddIntConstant(module, "CROWDED", CROWDED) == 0;
}
