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
#pragma once
#include <poll.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

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

inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

inline void full_fence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// Until `has_news()`, the epoll has something to tell, `for_ns` are over, or the core is wanted. Holds no lock.
template <class HasNews>
Outcome spin_until(HasNews has_news, int epoll_fd, int64_t for_ns) {
    pollfd epoll{epoll_fd, POLLIN, 0};
    const int64_t deadline = now_ns() + for_ns;
    while (true) {
        for (int look = 0; look < LOOKS_A_YIELD; ++look) {
            if (has_news()) return NEWS;
            relax();
        }
        if (poll(&epoll, 1, 0) != 0) return NEWS;  // sockets, deaths, and threads that want us to wake
        const int64_t before = now_ns();
        if (before >= deadline) return QUIET;
        sched_yield();
        if (now_ns() - before > CROWDED_NS) return has_news() ? NEWS : CROWDED;
    }
}
