// Lays out the (row, expert) pairs of a dispatch and reads them: what pairs.py defines, without its many small steps.
#include "arguments.hpp"

#include <cstring>
#include <vector>

namespace {

using Int = int64_t;

// split(experts, slots, owner_of, num_owners, order): counts of owners -1, 0 ..
PyObject* split(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(5, count)) return nullptr;
    const Span<const Int> experts(args[0], PyBUF_SIMPLE), slots(args[1], PyBUF_SIMPLE), owner_of(args[2], PyBUF_SIMPLE);
    const Int num_owners = PyLong_AsLongLong(args[3]);
    const Span<Int> order(args[4], PyBUF_WRITABLE);
    if (PyErr_Occurred() || !order.holds(slots.size())) return nullptr;
    std::vector<Py_ssize_t> places(num_owners + 2);  // of owner o at o + 2: first their number, then where they begin
    for (Py_ssize_t i = 0; i < slots.size(); ++i) {
        const Int slot = slots.data()[i];
        const Int expert = slot >= 0 && slot < experts.size() ? experts.data()[slot] : -1;
        const Int owner = expert >= 0 && expert < owner_of.size() ? owner_of.data()[expert] : num_owners;
        if (owner < -1 || owner >= num_owners)
            return PyErr_Format(PyExc_IndexError, "slot %lld has no expert with an owner", (long long)slot);
        ++places[owner + 2];
    }
    PyObject* counts = PyTuple_New(num_owners + 1);
    if (!counts) return nullptr;
    for (Int owner = -1; owner < num_owners; ++owner)
        PyTuple_SetItem(counts, owner + 1, PyLong_FromSsize_t(places[owner + 2]));
    for (Int owner = 0; owner < num_owners; ++owner) places[owner + 1] += places[owner];  // begins of owner at o + 1
    for (Py_ssize_t i = 0; i < slots.size(); ++i) {
        const Int slot = slots.data()[i];
        order.data()[places[owner_of.data()[experts.data()[slot]] + 1]++] = slot;
    }
    return counts;
}

// encode(x, row_bytes, experts, slots, top_k, out): number of rows
PyObject* encode(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(6, count)) return nullptr;
    const char* x = reinterpret_cast<const char*>(number(args[0]));
    const Py_ssize_t row_bytes = PyLong_AsSsize_t(args[1]);
    const Span<const Int> experts(args[2], PyBUF_SIMPLE), slots(args[3], PyBUF_SIMPLE);
    const Int top_k = PyLong_AsLongLong(args[4]);
    const Span<char> out(args[5], PyBUF_WRITABLE);
    if (PyErr_Occurred()) return nullptr;
    const Py_ssize_t num_pairs = slots.size();
    int32_t* const rows_out = reinterpret_cast<int32_t*>(out.data());
    char* const x_out = out.data() + 8 * num_pairs;
    Py_ssize_t num_rows = 0;
    Int last = -1;
    for (Py_ssize_t i = 0; i < num_pairs; ++i) {
        const Int slot = slots.data()[i], row = slot / top_k;
        if (slot < 0 || slot >= experts.size() || row < last)
            return PyErr_Format(PyExc_IndexError, "slot %lld is out of order or bounds", (long long)slot);
        if (row != last) {
            if (!out.holds(8 * num_pairs + (num_rows + 1) * row_bytes)) return nullptr;
            std::memcpy(x_out + num_rows * row_bytes, x + row * row_bytes, row_bytes);
            ++num_rows;
            last = row;
        }
        rows_out[i] = static_cast<int32_t>(num_rows - 1);
        rows_out[num_pairs + i] = static_cast<int32_t>(experts.data()[slot]);
    }
    return PyLong_FromSsize_t(num_rows);
}

// check(payload, num_pairs, num_rows, num_experts): whether all rows and experts are within bounds
PyObject* check(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(4, count)) return nullptr;
    const Span<const uint32_t> pairs(args[0], PyBUF_SIMPLE);
    const Py_ssize_t num_pairs = PyLong_AsSsize_t(args[1]);
    const uint64_t num_rows = number(args[2]), num_experts = number(args[3]);
    if (PyErr_Occurred() || !pairs.holds(2 * num_pairs)) return nullptr;
    bool is_within = true;
    for (Py_ssize_t i = 0; i < num_pairs; ++i)
        is_within &= pairs.data()[i] < num_rows && pairs.data()[num_pairs + i] < num_experts;
    return PyBool_FromLong(is_within);
}

// decode(payload, num_pairs, first_row, local, rows, places): whether every expert has a place
PyObject* decode(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(6, count)) return nullptr;
    const Span<const uint32_t> pairs(args[0], PyBUF_SIMPLE);
    const Py_ssize_t num_pairs = PyLong_AsSsize_t(args[1]);
    const Int first_row = PyLong_AsLongLong(args[2]);
    const Span<const Int> local(args[3], PyBUF_SIMPLE);
    const Span<Int> rows(args[4], PyBUF_WRITABLE), places(args[5], PyBUF_WRITABLE);
    if (PyErr_Occurred() || !pairs.holds(2 * num_pairs) || !rows.holds(num_pairs) || !places.holds(num_pairs))
        return nullptr;
    bool is_resident = true;
    for (Py_ssize_t i = 0; i < num_pairs; ++i) {
        const uint32_t expert = pairs.data()[num_pairs + i];
        if (expert >= local.size()) return PyErr_Format(PyExc_IndexError, "expert %u of %zd", expert, local.size());
        rows.data()[i] = first_row + pairs.data()[i];
        places.data()[i] = local.data()[expert];
        is_resident &= places.data()[i] >= 0;
    }
    return PyBool_FromLong(is_resident);
}

// scatter(payload, row_bytes, slots, out): row i of the payload to place slots[i]
PyObject* scatter(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(4, count)) return nullptr;
    const Span<const char> payload(args[0], PyBUF_SIMPLE);
    const Py_ssize_t row_bytes = PyLong_AsSsize_t(args[1]);
    const Span<const Int> slots(args[2], PyBUF_SIMPLE);
    const Span<char> out(args[3], PyBUF_WRITABLE);
    if (PyErr_Occurred() || !payload.holds(slots.size() * row_bytes)) return nullptr;
    for (Py_ssize_t i = 0; i < slots.size(); ++i) {
        const Int slot = slots.data()[i];
        if (slot < 0 || (slot + 1) * row_bytes > out.size())
            return PyErr_Format(PyExc_IndexError, "slot %lld is out of bounds", (long long)slot);
        std::memcpy(out.data() + slot * row_bytes, payload.data() + i * row_bytes, row_bytes);
    }
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef pair_methods[] = {
    method("split", split),   method("encode", encode),   method("check", check),
    method("decode", decode), method("scatter", scatter), {nullptr, nullptr, 0, nullptr},
};
