// The words that the two ends of a shared-memory ring read and write at the same time, and the bounded wait for them.
//
// All bytes are counted from the ring's beginning and never wrap: `written` by the producer; by the consumer `seen`, up
// to where it has looked, and `read`, up to where it needs them no more. The byte with number n lies at
// (n - origin) % size; the producer moves `origin` only while the ring is empty.
//
// No wake-up is lost. A consumer that is about to sleep sets `asleep`, fences, and looks at `written` once more; a
// producer stores `written`, fences, and looks at `asleep`. Both fences are sequentially consistent, so one of them
// comes first: if the producer's does, the consumer sees the bytes and stays awake; if the consumer's does, the producer
// sees `asleep` and writes to the eventfd, whose counter keeps until the consumer's epoll looks at it. The same holds
// the other way round for `wants_room` and `read`. A wake-up too many is harmless: whoever wakes looks at the words.
#include "arguments.hpp"

#include <poll.h>
#include <sched.h>
#include <time.h>

#include <atomic>

namespace {

using Word = std::atomic<uint64_t>;
static_assert(Word::is_always_lock_free, "the words are shared between processes");

struct Header {
    alignas(64) Word written;  // this line is written by the producer only
    Word origin;
    Word wants_room;
    alignas(64) Word read;  // this one by the consumer only
    Word seen;
    Word asleep;
    uint64_t woken_for;  // value of `written` when room was last told of
};
constexpr size_t HEADER_BYTES = 4096;  // the ring's bytes begin on a page of their own
static_assert(sizeof(Header) <= HEADER_BYTES);

enum Outcome { QUIET = 0, NEWS = 1, CROWDED = 2 };
constexpr int64_t CROWDED_NS = 50'000;  // a yield that took this long let somebody else run: the core is wanted
constexpr int LOOKS_A_YIELD = 8;

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

bool has_news(const Header& ring) {
    return ring.written.load(std::memory_order_acquire) != ring.seen.load(std::memory_order_relaxed);
}

// Whether enough is free to be worth a wake-up.
bool has_room(uint64_t written, uint64_t read, uint64_t size) {
    return written == read || size - (written - read) >= size / 4;
}

Header* header(PyObject* address) { return reinterpret_cast<Header*>(number(address)); }

PyObject* start(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(1, count)) return nullptr;
    Header* ring = header(args[0]);
    if (PyErr_Occurred()) return nullptr;
    ring->asleep.store(1);  // until its consumer polls for the first time
    ring->woken_for = ~0ULL;
    Py_RETURN_NONE;
}

PyObject* announce(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(3, count)) return nullptr;
    Header* ring = header(args[0]);
    const uint64_t written = number(args[1]), origin = number(args[2]);
    if (PyErr_Occurred()) return nullptr;
    ring->origin.store(origin, std::memory_order_relaxed);
    ring->written.store(written, std::memory_order_release);
    full_fence();
    return PyBool_FromLong(ring->asleep.load(std::memory_order_relaxed) != 0);
}

PyObject* written(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(1, count)) return nullptr;
    Header* ring = header(args[0]);
    return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLongLong(ring->written.load(std::memory_order_acquire));
}

PyObject* origin(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(1, count)) return nullptr;
    Header* ring = header(args[0]);
    return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLongLong(ring->origin.load(std::memory_order_relaxed));
}

PyObject* read(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(1, count)) return nullptr;
    Header* ring = header(args[0]);
    return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLongLong(ring->read.load(std::memory_order_acquire));
}

PyObject* see(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(2, count)) return nullptr;
    Header* ring = header(args[0]);
    const uint64_t seen = number(args[1]);
    if (PyErr_Occurred()) return nullptr;
    ring->seen.store(seen, std::memory_order_relaxed);
    Py_RETURN_NONE;
}

PyObject* give_back(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(3, count)) return nullptr;
    Header* ring = header(args[0]);
    const uint64_t read = number(args[1]), size = number(args[2]);
    if (PyErr_Occurred()) return nullptr;
    uint64_t before = ring->read.load(std::memory_order_relaxed);
    while (before < read && !ring->read.compare_exchange_weak(before, read)) {
    }
    full_fence();
    if (!ring->wants_room.load(std::memory_order_relaxed)) Py_RETURN_FALSE;
    const uint64_t written = ring->written.load(std::memory_order_relaxed);
    // Told once for what was written last: a producer that got the word writes at least a byte before it waits again.
    if (written == ring->woken_for || !has_room(written, read, size)) Py_RETURN_FALSE;
    ring->woken_for = written;
    Py_RETURN_TRUE;
}

PyObject* watch_room(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(3, count)) return nullptr;
    Header* ring = header(args[0]);
    const uint64_t wanted = number(args[1]), size = number(args[2]);
    if (PyErr_Occurred()) return nullptr;
    ring->wants_room.store(wanted, std::memory_order_relaxed);
    full_fence();
    const uint64_t written = ring->written.load(std::memory_order_relaxed);
    return PyBool_FromLong(wanted && has_room(written, ring->read.load(std::memory_order_acquire), size));
}

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

Outcome spin_on(Header* const* rings, Py_ssize_t count, int epoll_fd, int64_t for_ns) {
    pollfd epoll{epoll_fd, POLLIN, 0};
    const int64_t deadline = now_ns() + for_ns;
    while (true) {
        for (int look = 0; look < LOOKS_A_YIELD; ++look) {
            if (any_news(rings, count)) return NEWS;
            relax();
        }
        if (poll(&epoll, 1, 0) != 0) return NEWS;  // sockets, deaths, and threads that want us to wake
        const int64_t before = now_ns();
        if (before >= deadline) return QUIET;
        sched_yield();
        if (now_ns() - before > CROWDED_NS) return any_news(rings, count) ? NEWS : CROWDED;
    }
}

PyObject* spin(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (!takes(3, count)) return nullptr;
    Header* rings[MAX_RINGS];
    const Py_ssize_t num_rings = headers(args[0], rings);
    const int epoll_fd = static_cast<int>(PyLong_AsLong(args[1]));
    const int64_t for_ns = PyLong_AsLongLong(args[2]);
    if (num_rings < 0 || PyErr_Occurred()) return nullptr;
    PyThreadState* state = PyEval_SaveThread();
    const Outcome outcome = spin_on(rings, num_rings, epoll_fd, for_ns);
    PyEval_RestoreThread(state);
    return PyLong_FromLong(outcome);
}

}  // namespace

PyMethodDef ring_methods[] = {
    method("start", start), method("announce", announce),   method("written", written),       method("origin", origin),
    method("read", read),   method("see", see),             method("give_back", give_back),   method("doze", doze),
    method("rouse", rouse), method("watch_room", watch_room), method("spin", spin),           {nullptr, nullptr, 0, nullptr},
};

bool add_ring_constants(PyObject* module) {
    return PyModule_AddIntConstant(module, "HEADER_BYTES", HEADER_BYTES) == 0 &&
           PyModule_AddIntConstant(module, "QUIET", QUIET) == 0 && PyModule_AddIntConstant(module, "NEWS", NEWS) == 0 &&
           PyModule_AddIntConstant(module, "CROWDED", CROWDED) == 0;
}
