// `Lane`, the Python type: a byte stream each way. shm_pipe.py says what a pipe is to a link.
#include "lane.hpp"

#include <structmember.h>

#include <algorithm>

PyTypeObject* lane_type = nullptr;

namespace {

PyTypeObject* hold_type = nullptr;

struct Hold {
    PyObject_HEAD
    Lane* lane;
    uint64_t start;
};

Lane& lane_of(PyObject* self) { return *reinterpret_cast<Lane*>(self); }

void release(Lane& lane) {
    if (lane.is_open || lane.num_pins || !lane.out.words) return;
    PyBuffer_Release(&lane.out_memory);
    PyBuffer_Release(&lane.in_memory);
    lane.out.words = lane.in.words = nullptr;
}

PyObject* peer_gone(const char* reason) {
    if (PyObject* module = PyImport_ImportModule("braid.actors.pipe")) {
        if (PyObject* type = PyObject_GetAttrString(module, "PeerGone")) {
            PyErr_SetString(type, reason);
            Py_DECREF(type);
        }
        Py_DECREF(module);
    }
    return nullptr;
}

bool is_open(Lane& lane) {
    if (!lane.is_open) PyErr_SetString(PyExc_ValueError, "the rings of this link are closed");
    return lane.is_open;
}

}  // namespace

Lanes::Lanes(PyObject* tuple) {
    const Py_ssize_t size = PyTuple_Size(tuple);
    if (size > MOST) PyErr_Format(PyExc_ValueError, "%zd links at once: at most %zd", size, MOST);
    if (size < 0 || size > MOST) return;
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject* item = PyTuple_GetItem(tuple, i);
        const bool is_none = item == Py_None;
        if (!is_none && !PyObject_TypeCheck(item, lane_type)) {
            PyErr_SetString(PyExc_TypeError, "a Lane or None was wanted");
            return;
        }
        lanes_[size_++] = is_none ? nullptr : &lane_of(item);
        if (!is_none) ++lanes_[i]->num_pins;
    }
    is_sound_ = true;
}

Lanes::~Lanes() {
    for (Py_ssize_t i = 0; i < size_; ++i) {
        if (!lanes_[i]) continue;
        --lanes_[i]->num_pins;
        release(*lanes_[i]);
    }
}

namespace {

// Lane(out_memory, data_fd, in_memory, room_fd)
PyObject* lane_new(PyTypeObject* type, PyObject* args, PyObject*) {
    PyObject *out_memory, *in_memory;
    int data_fd, room_fd;
    if (!PyArg_ParseTuple(args, "OiOi", &out_memory, &data_fd, &in_memory, &room_fd)) return nullptr;
    auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = alloc(type, 0);  // all zero
    if (!self) return nullptr;
    Lane& lane = lane_of(self);
    if (PyObject_GetBuffer(out_memory, &lane.out_memory, PyBUF_WRITABLE) != 0) {
        Py_DECREF(self);
        return nullptr;
    }
    if (PyObject_GetBuffer(in_memory, &lane.in_memory, PyBUF_WRITABLE) != 0) {
        PyBuffer_Release(&lane.out_memory);
        Py_DECREF(self);
        return nullptr;
    }
    lane.out.words = static_cast<Header*>(lane.out_memory.buf);
    lane.out.bytes = static_cast<char*>(lane.out_memory.buf) + HEADER_BYTES;
    lane.out.size = lane.out_memory.len - HEADER_BYTES;
    lane.out.data_fd = data_fd;
    lane.in.words = static_cast<Header*>(lane.in_memory.buf);
    lane.in.bytes = static_cast<const char*>(lane.in_memory.buf) + HEADER_BYTES;
    lane.in.size = lane.in_memory.len - HEADER_BYTES;
    lane.in.room_fd = room_fd;
    lane.is_open = 1;
    return self;
}

void lane_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    lane_of(self).is_open = 0;
    release(lane_of(self));
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

// write(pieces): bytes taken; what found no room is the caller's to keep
PyObject* lane_write(PyObject* self, PyObject* pieces) {
    Lane& lane = lane_of(self);
    Outgoing& out = lane.out;
    if (!is_open(lane)) return nullptr;
    if (lane.reserved) {  // whose place must not move: an emptied ring begins anew
        lane.is_behind = 1;
        return PyLong_FromLong(0);
    }
    if (!out.collect_room()) return peer_gone("it gave back more bytes than its ring holds");
    PyObject* iterator = PyObject_GetIter(pieces);
    if (!iterator) return nullptr;
    const uint64_t before = out.written;
    bool is_full = false;
    while (PyObject* piece = is_full ? nullptr : PyIter_Next(iterator)) {
        {
            const Span<const char> bytes(piece, PyBUF_SIMPLE);
            if (bytes.holds(0)) is_full = out.write(bytes.data(), bytes.size()) < static_cast<uint64_t>(bytes.size());
        }
        Py_DECREF(piece);
        if (PyErr_Occurred()) break;
    }
    Py_DECREF(iterator);
    out.announce();
    lane.is_behind = is_full;
    return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLongLong(out.written - before);
}

// reserve(head_bytes, payload_bytes): where in the ring the payload goes, or None
PyObject* lane_reserve(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!takes(2, count)) return nullptr;
    Lane& lane = lane_of(self);
    const uint64_t head_bytes = number(args[0]), payload_bytes = number(args[1]);
    if (PyErr_Occurred() || !is_open(lane)) return nullptr;
    if (!lane.is_clear()) Py_RETURN_NONE;
    if (!lane.out.collect_room()) return peer_gone("it gave back more bytes than its ring holds");
    const uint64_t place = lane.out.place(), total = head_bytes + payload_bytes;
    if (place + total > lane.out.size || total > lane.out.room()) Py_RETURN_NONE;
    lane.reserved = total;
    return PyLong_FromUnsignedLongLong(place + head_bytes);
}

// commit(head, payload_bytes): sends what was reserved last
PyObject* lane_commit(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (!takes(2, count)) return nullptr;
    Lane& lane = lane_of(self);
    const Span<const char> head(args[0], PyBUF_SIMPLE);
    const uint64_t payload_bytes = number(args[1]);
    if (PyErr_Occurred() || !is_open(lane)) return nullptr;
    if (head.size() + payload_bytes != lane.reserved)
        return PyErr_Format(PyExc_ValueError, "%llu bytes were reserved", (unsigned long long)lane.reserved);
    std::memcpy(lane.out.bytes + lane.out.place(), head.data(), head.size());
    lane.out.written += lane.reserved;
    lane.reserved = 0;
    lane.out.announce();
    Py_RETURN_NONE;
}

// look(): whether there is something to read
PyObject* lane_look(PyObject* self, PyObject*) {
    Lane& lane = lane_of(self);
    if (!is_open(lane)) return nullptr;
    if (lane.in.look()) return PyBool_FromLong(lane.in.num_bytes() != 0);
    lane.in.arrived = lane.in.read;
    return peer_gone("it announced more bytes than its ring holds");
}

// window(): where what has arrived begins and ends, as far as it is in one piece
PyObject* lane_window(PyObject* self, PyObject*) {
    const Incoming& in = lane_of(self).in;
    const uint64_t place = in.place();
    return Py_BuildValue("KK", (unsigned long long)place, (unsigned long long)std::min(place + in.num_bytes(), in.size));
}

bool has_arrived(const Lane& lane, uint64_t num_bytes) {
    const bool has = num_bytes <= lane.in.num_bytes();
    if (!has && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "so much has not arrived");
    return has && !PyErr_Occurred();
}

PyObject* lane_consume(PyObject* self, PyObject* value) {
    Lane& lane = lane_of(self);
    const uint64_t num_bytes = number(value);
    if (!is_open(lane) || !has_arrived(lane, num_bytes)) return nullptr;
    lane.in.consume(num_bytes);
    Py_RETURN_NONE;
}

// hold(num_bytes): like consume, but they stay where they are until the Hold is gone; None where they are too many
PyObject* lane_hold(PyObject* self, PyObject* value) {
    Lane& lane = lane_of(self);
    const uint64_t num_bytes = number(value);
    if (!is_open(lane) || !has_arrived(lane, num_bytes)) return nullptr;
    auto alloc = reinterpret_cast<allocfunc>(PyType_GetSlot(hold_type, Py_tp_alloc));
    PyObject* made = alloc(hold_type, 0);
    if (!made) return nullptr;
    Hold* hold = reinterpret_cast<Hold*>(made);
    hold->start = lane.in.read;
    if (!lane.in.hold(num_bytes)) {
        Py_DECREF(made);
        Py_RETURN_NONE;
    }
    Py_INCREF(self);
    hold->lane = &lane;
    return made;
}

void hold_dealloc(PyObject* self) {
    Hold* hold = reinterpret_cast<Hold*>(self);
    PyTypeObject* type = Py_TYPE(self);
    if (hold->lane) {
        if (hold->lane->is_open) hold->lane->in.let_go(hold->start);
        Py_DECREF(reinterpret_cast<PyObject*>(hold->lane));
    }
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

// watch_room(wanted): asks the reader to tell of room; what came before is told at once
PyObject* lane_watch_room(PyObject* self, PyObject* value) {
    Lane& lane = lane_of(self);
    const int wanted = PyObject_IsTrue(value);
    if (wanted < 0 || !is_open(lane)) return nullptr;
    return PyBool_FromLong(lane.out.watch_room(wanted));
}

PyObject* memory_of(Lane& lane, const Py_buffer& ring, PyObject* const* args, Py_ssize_t count) {
    if (!takes(2, count)) return nullptr;
    const Py_ssize_t start = PyLong_AsSsize_t(args[0]), num_bytes = PyLong_AsSsize_t(args[1]);
    if (PyErr_Occurred() || !is_open(lane)) return nullptr;
    PyObject* whole = PyMemoryView_FromObject(ring.obj);
    if (!whole) return nullptr;
    PyObject* part = PySequence_GetSlice(whole, HEADER_BYTES + start, HEADER_BYTES + start + num_bytes);
    Py_DECREF(whole);
    return part;
}

// outgoing(start, num_bytes), incoming(start, num_bytes): the rings' memory
PyObject* lane_outgoing(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    return memory_of(lane_of(self), lane_of(self).out_memory, args, count);
}

PyObject* lane_incoming(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    return memory_of(lane_of(self), lane_of(self).in_memory, args, count);
}

PyObject* lane_close(PyObject* self, PyObject*) {
    lane_of(self).is_open = 0;
    release(lane_of(self));
    Py_RETURN_NONE;
}

PyMethodDef lane_methods[] = {
    {"write", lane_write, METH_O, nullptr},
    method("reserve", lane_reserve),
    method("commit", lane_commit),
    {"look", lane_look, METH_NOARGS, nullptr},
    {"window", lane_window, METH_NOARGS, nullptr},
    {"consume", lane_consume, METH_O, nullptr},
    {"hold", lane_hold, METH_O, nullptr},
    {"watch_room", lane_watch_room, METH_O, nullptr},
    method("outgoing", lane_outgoing),
    method("incoming", lane_incoming),
    {"close", lane_close, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef lane_members[] = {
    {"is_hung", T_BOOL, offsetof(Lane, is_hung), 0, nullptr},
    {"is_behind", T_BOOL, offsetof(Lane, is_behind), 0, nullptr},
    {"is_cut", T_BOOL, offsetof(Lane, is_cut), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot lane_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(lane_new)}, {Py_tp_dealloc, reinterpret_cast<void*>(lane_dealloc)},
    {Py_tp_methods, lane_methods},                  {Py_tp_members, lane_members},
    {0, nullptr},
};
PyType_Slot hold_slots[] = {{Py_tp_dealloc, reinterpret_cast<void*>(hold_dealloc)}, {0, nullptr}};

PyType_Spec lane_spec = {"braid.actors._native.Lane", sizeof(Lane), 0, Py_TPFLAGS_DEFAULT, lane_slots};
PyType_Spec hold_spec = {"braid.actors._native.Hold", sizeof(Hold), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, hold_slots};

// start(memory): makes a new ring's words ready for its first writer
PyObject* start(PyObject*, PyObject* memory) {
    const Span<char> bytes(memory, PyBUF_WRITABLE);
    if (!bytes.holds(sizeof(Header))) return nullptr;
    Header* ring = reinterpret_cast<Header*>(bytes.data());
    ring->asleep.store(1);  // until its consumer polls for the first time
    ring->woken_for = ~0ULL;
    Py_RETURN_NONE;
}

PyMethodDef setup_methods[] = {{"start", start, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};

}  // namespace

bool add_lanes(PyObject* module) {
    lane_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&lane_spec));
    hold_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&hold_spec));
    return lane_type && hold_type && PyModule_AddFunctions(module, setup_methods) == 0 &&
           PyModule_AddType(module, lane_type) == 0 && PyModule_AddType(module, hold_type) == 0;
}
