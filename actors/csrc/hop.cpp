// An expert hop over rings, each side's share in one call: dispatch and take_rows here, take_dispatch and answer there.
//
// Whatever is not the plain case is left as it is for the Python forms (dispatch.py, expert_server.py), which define
// what happens to it: another kind of message, a part of one, a peer that breaks the rules, a ring without room.
#include <vector>

#include "lane.hpp"

namespace {

constexpr uint16_t DISPATCH = 20, ROWS = 21;  // as messages.py numbers and packs them
constexpr uint32_t DISPATCH_BYTES = 28, ROWS_BYTES = 46;

using Int = int64_t;

struct Dispatch {
    uint64_t number, epoch;
    uint16_t layer;
    uint8_t phase, dtype;
    uint32_t num_rows, num_pairs;
};

Int count_rows(const Int* slots, Py_ssize_t num_slots, Int top_k) {
    Int rows = 0;
    for (Py_ssize_t i = 0; i < num_slots; ++i) rows += i == 0 || slots[i] / top_k != slots[i - 1] / top_k;
    return rows;
}

// The frame of one owner's slots (ascending) into its ring, told at once; its bytes, or -1 where it does not fit now.
Int send(Lane* lane, Dispatch head, const char* x, Int row_bytes, const Int* experts, const Int* slots, Int top_k) {
    const Int num_pairs = head.num_pairs;
    const Int payload = 8 * num_pairs + head.num_rows * row_bytes;
    const uint64_t total = FRAME_BYTES + DISPATCH_BYTES + payload;
    if (!lane || !lane->is_clear() || total > ANNOUNCE_BYTES || !lane->out.collect_room()) return -1;
    Outgoing& out = lane->out;
    if (total > out.room() || out.place() + total > out.size) return -1;
    char* to = put_head(out.bytes + out.place(), DISPATCH, DISPATCH_BYTES, payload);
    put(to, head.number);
    put(to, head.epoch);
    put(to, head.layer);
    put(to, head.phase);
    put(to, head.dtype);
    put(to, head.num_rows);
    put(to, head.num_pairs);
    char *row_to = to, *expert_to = to + 4 * num_pairs, *x_to = to + 8 * num_pairs;
    int32_t row = -1;
    for (Int i = 0; i < num_pairs; ++i) {
        if (i == 0 || slots[i] / top_k != slots[i - 1] / top_k) {
            std::memcpy(x_to, x + slots[i] / top_k * row_bytes, row_bytes);
            x_to += row_bytes;
            ++row;
        }
        put(row_to, row);
        put(expert_to, static_cast<int32_t>(experts[slots[i]]));
    }
    out.written += total;
    out.announce();
    return payload;
}

// dispatch(lanes, owner_of, experts, top_k, x, row_bytes, number, epoch, layer, phase, dtype, order, loads):
// a tuple for each owner that has slots: (owner, first in order, slots, bytes or -1, when it was sent in seconds).
// Those of owners -1 and those with -1 bytes were not sent; the others have the numbers from `number` on, in turn.
PyObject* dispatch(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(13, count)) return nullptr;
    const Lanes lanes(args[0]);
    const Span<const Int> owner_of(args[1], PyBUF_SIMPLE), experts(args[2], PyBUF_SIMPLE);
    const Int top_k = PyLong_AsLongLong(args[3]);
    const char* x = reinterpret_cast<const char*>(number(args[4]));
    const Int row_bytes = PyLong_AsLongLong(args[5]);
    Dispatch head{};
    head.number = number(args[6]);
    head.epoch = number(args[7]);
    head.layer = static_cast<uint16_t>(number(args[8]));
    head.phase = static_cast<uint8_t>(number(args[9]));
    head.dtype = static_cast<uint8_t>(number(args[10]));
    const Span<Int> order(args[11], PyBUF_WRITABLE), loads(args[12], PyBUF_WRITABLE);
    const Py_ssize_t num_slots = experts.size(), num_owners = lanes.size();
    if (PyErr_Occurred() || !order.holds(num_slots) || !loads.holds(owner_of.size())) return nullptr;
    std::vector<Py_ssize_t> ends(num_owners + 2);  // of owner o at o + 2: first their number, then where they end
    for (Py_ssize_t i = 0; i < num_slots; ++i) {
        const Int expert = experts.data()[i];
        const Int owner = expert >= 0 && expert < owner_of.size() ? owner_of.data()[expert] : num_owners;
        if (owner < -1 || owner >= num_owners)
            return PyErr_Format(PyExc_IndexError, "slot %zd has no expert with an owner", i);
        ++ends[owner + 2];
    }
    for (Py_ssize_t owner = 0; owner <= num_owners; ++owner) ends[owner + 1] += ends[owner];
    for (Py_ssize_t i = 0; i < num_slots; ++i) order.data()[ends[owner_of.data()[experts.data()[i]] + 1]++] = i;
    PyObject* parts = PyList_New(0);
    for (Int owner = -1, first = 0; parts && owner < num_owners; ++owner) {
        const Int end = ends[owner + 1];
        if (end == first) continue;
        const Int* slots = order.data() + first;
        head.num_pairs = static_cast<uint32_t>(end - first);
        head.num_rows = static_cast<uint32_t>(count_rows(slots, end - first, top_k));
        Int sent = -1;
        if (owner >= 0) sent = send(lanes[owner], head, x, row_bytes, experts.data(), slots, top_k);
        head.number += sent >= 0;
        PyObject* part = Py_BuildValue("LLLLd", owner, first, end - first, sent, now_ns() / 1e9);
        if (!part || PyList_Append(parts, part) != 0) Py_CLEAR(parts);
        Py_XDECREF(part);
        first = end;
    }
    for (Py_ssize_t i = 0; i < num_slots; ++i) ++loads.data()[experts.data()[i]];  // while they are away
    return parts;
}

bool has_news(const Lanes& lanes) {
    for (Py_ssize_t i = 0; i < lanes.size(); ++i) {
        const Lane* lane = lanes[i];
        if (!lane) continue;
        if (!lane->is_open || lane->is_hung || lane->in.arrived != lane->in.read) return true;
        if (lane->in.words->written.load(std::memory_order_acquire) != lane->in.arrived) return true;
    }
    return false;
}

Outcome wait_for(const Lanes& lanes, int epoll_fd, Int for_ns) {
    PyThreadState* state = PyEval_SaveThread();
    const Outcome outcome = spin_until([&] { return has_news(lanes); }, epoll_fd, for_ns);
    take_back(state);
    return outcome;
}

// The only lane with a message, which is whole and of this kind; -1: none, or it is for the slower ways.
Py_ssize_t only_one(const Lanes& lanes, uint16_t kind, uint32_t meta_len, Frame& frame) {
    Py_ssize_t found = -1;
    for (Py_ssize_t i = 0; i < lanes.size(); ++i) {
        Frame other;
        const Head head = lanes[i] ? head_of(*lanes[i], kind, meta_len, found < 0 ? frame : other) : Head::none;
        if (head == Head::other || (head == Head::whole && found >= 0)) return -1;
        if (head == Head::whole) found = i;
    }
    return found;
}

// take_rows(lanes, epoll_fd, for_ns): an Outcome, or the first answer that is there, not yet consumed:
// (lane, number, queue ns, compute ns, held ns, payload bytes, where it lies in the ring, bytes of the frame)
PyObject* take_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(3, count)) return nullptr;
    const Lanes lanes(args[0]);
    const int epoll_fd = static_cast<int>(PyLong_AsLong(args[1]));
    const Int for_ns = PyLong_AsLongLong(args[2]);
    if (PyErr_Occurred()) return nullptr;
    const Outcome outcome = wait_for(lanes, epoll_fd, for_ns);
    if (outcome != NEWS) return PyLong_FromLong(outcome);
    for (Py_ssize_t i = 0; i < lanes.size(); ++i) {
        Frame frame;
        if (!lanes[i] || head_of(*lanes[i], ROWS, ROWS_BYTES, frame) != Head::whole) continue;
        const char* from = frame.meta;
        const uint64_t number = take<uint64_t>(from);
        take<uint32_t>(from);
        const uint64_t queue_ns = take<uint64_t>(from), compute_ns = take<uint64_t>(from), held_ns = take<uint64_t>(from);
        return Py_BuildValue("nKKKKKKK", i, number, queue_ns, compute_ns, held_ns, frame.payload_len, frame.start,
                             frame.num_bytes());
    }
    return PyLong_FromLong(NEWS);
}

// scatter_rows(lane, start, row_bytes, slots, out): row i of what lies at `start` to place slots[i] of out
PyObject* scatter_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(5, count)) return nullptr;
    if (!PyObject_TypeCheck(args[0], lane_type)) return PyErr_Format(PyExc_TypeError, "a Lane was wanted");
    const Lane& lane = *reinterpret_cast<Lane*>(args[0]);
    const uint64_t start = number(args[1]);
    const Int row_bytes = PyLong_AsLongLong(args[2]);
    const Span<const Int> slots(args[3], PyBUF_SIMPLE);
    const Span<char> out(args[4], PyBUF_WRITABLE);
    if (PyErr_Occurred()) return nullptr;
    if (!lane.is_open || row_bytes < 0 || start + slots.size() * row_bytes > lane.in.size)
        return PyErr_Format(PyExc_ValueError, "the ring has no such rows");
    for (Py_ssize_t i = 0; i < slots.size(); ++i) {
        const Int slot = slots.data()[i];
        if (slot < 0 || (slot + 1) * row_bytes > out.size())
            return PyErr_Format(PyExc_IndexError, "slot %lld is out of bounds", (long long)slot);
        std::memcpy(out.data() + slot * row_bytes, lane.in.bytes + start + i * row_bytes, row_bytes);
    }
    Py_RETURN_NONE;
}

// take_dispatch(lanes, row_bytes, dtype, places_of, num_experts, x, rows, places, epoll_fd, for_ns): an Outcome, or the
// only dispatch that is there, its rows copied to x and its pairs told in rows and places, and room for its answer:
// (lane, number, layer, rows, pairs, when it came in ns, where the answer goes in the ring, bytes of the frame).
// places_of: [layers, num_experts], -1 for who is not here.
PyObject* take_dispatch(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(10, count)) return nullptr;
    const Lanes lanes(args[0]);
    const uint64_t row_bytes = number(args[1]), dtype = number(args[2]);
    const Span<const Int> places_of(args[3], PyBUF_SIMPLE);
    const uint64_t num_experts = number(args[4]);
    const Span<char> x(args[5], PyBUF_WRITABLE);
    const Span<Int> rows(args[6], PyBUF_WRITABLE), places(args[7], PyBUF_WRITABLE);
    const int epoll_fd = static_cast<int>(PyLong_AsLong(args[8]));
    const Int for_ns = PyLong_AsLongLong(args[9]);
    if (PyErr_Occurred()) return nullptr;
    const Outcome outcome = wait_for(lanes, epoll_fd, for_ns);
    if (outcome != NEWS) return PyLong_FromLong(outcome);
    const Int arrived = now_ns();
    Frame frame;
    const Py_ssize_t index = only_one(lanes, DISPATCH, DISPATCH_BYTES, frame);
    if (index < 0 || frame.num_bytes() != lanes[index]->in.num_bytes()) return PyLong_FromLong(NEWS);
    const char* from = frame.meta;
    Dispatch head;
    head.number = take<uint64_t>(from);
    head.epoch = take<uint64_t>(from);
    head.layer = take<uint16_t>(from);
    head.phase = take<uint8_t>(from);
    head.dtype = take<uint8_t>(from);
    head.num_rows = take<uint32_t>(from);
    head.num_pairs = take<uint32_t>(from);
    const uint64_t num_rows = head.num_rows, num_pairs = head.num_pairs, x_bytes = num_rows * row_bytes;
    const uint64_t first_place = head.layer * num_experts;
    const bool is_plain = num_pairs && head.dtype == dtype && frame.payload_len == 8 * num_pairs + x_bytes &&
                          x_bytes <= static_cast<uint64_t>(x.size()) &&
                          num_pairs <= static_cast<uint64_t>(std::min(rows.size(), places.size())) &&
                          first_place + num_experts <= static_cast<uint64_t>(places_of.size());
    if (!is_plain) return PyLong_FromLong(NEWS);
    const char *row_from = frame.payload, *expert_from = frame.payload + 4 * num_pairs;
    for (uint64_t i = 0; i < num_pairs; ++i) {  // each is read once: its sender may write there while we look
        const uint32_t row = take<uint32_t>(row_from), expert = take<uint32_t>(expert_from);
        const Int place = expert < num_experts ? places_of.data()[first_place + expert] : -1;
        if (row >= num_rows || place < 0) return PyLong_FromLong(NEWS);
        rows.data()[i] = row;
        places.data()[i] = place;
    }
    Lane& lane = *lanes[index];
    const uint64_t head_bytes = FRAME_BYTES + ROWS_BYTES, total = head_bytes + num_pairs * row_bytes;
    Outgoing& out = lane.out;
    if (!lane.is_clear() || !out.collect_room() || total > out.room() || out.place() + total > out.size)
        return PyLong_FromLong(NEWS);
    lane.reserved = total;
    std::memcpy(x.data(), expert_from, x_bytes);
    lane.in.consume(frame.num_bytes());
    return Py_BuildValue("nKIIILKK", index, head.number, (unsigned)head.layer, head.num_rows, head.num_pairs, arrived,
                         out.place() + head_bytes, frame.num_bytes());
}

// answer(lane, number, pairs, arrived, started, ended): sends the rows that were computed where they go; times in ns
PyObject* answer(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(6, count)) return nullptr;
    if (!PyObject_TypeCheck(args[0], lane_type)) return PyErr_Format(PyExc_TypeError, "a Lane was wanted");
    Lane& lane = *reinterpret_cast<Lane*>(args[0]);
    const uint64_t dispatch_number = number(args[1]);
    const uint32_t num_pairs = static_cast<uint32_t>(number(args[2]));
    const Int arrived = PyLong_AsLongLong(args[3]), started = PyLong_AsLongLong(args[4]);
    const Int ended = PyLong_AsLongLong(args[5]);
    if (PyErr_Occurred()) return nullptr;
    const uint64_t head_bytes = FRAME_BYTES + ROWS_BYTES;
    if (!lane.is_open || lane.reserved < head_bytes) return PyErr_Format(PyExc_ValueError, "nothing was reserved");
    char* to = put_head(lane.out.bytes + lane.out.place(), ROWS, ROWS_BYTES, lane.reserved - head_bytes);
    put(to, dispatch_number);
    put(to, num_pairs);
    put(to, static_cast<uint64_t>(started - arrived));
    put(to, static_cast<uint64_t>(ended - started));
    put(to, static_cast<uint64_t>(now_ns() - arrived));
    std::memset(to, 0, 10);
    lane.out.written += lane.reserved;
    lane.reserved = 0;
    lane.out.announce();
    Py_RETURN_NONE;
}

}  // namespace

PyMethodDef hop_methods[] = {
    method("dispatch", dispatch),
    method("take_rows", take_rows),
    method("scatter_rows", scatter_rows),
    method("take_dispatch", take_dispatch),
    method("answer", answer),
    {nullptr, nullptr, 0, nullptr},
};
