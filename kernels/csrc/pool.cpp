#include "pool.hpp"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "arguments.hpp"

namespace braid {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto SPIN_TIME = std::chrono::microseconds(50);  // a helper awake costs a core; woken it comes 5-50 us late
constexpr auto YIELD_IS_LONG = std::chrono::microseconds(5);  // then another thread ran: the core is wanted
constexpr int PAUSES = 64;                                    // between two looks at the clock, about 2 us

class Pool {
  public:
    void set_threads(int count) {
        if (count == num_threads()) return;
        while (is_taken_.exchange(true, std::memory_order_acquire)) sched_yield();
        stop();
        if (sched_getaffinity(0, sizeof cores_, &cores_) != 0) CPU_ZERO(&cores_);
        callers_core_ = -1;
        for (int i = 1; i < count; ++i) helpers_.emplace_back([this] { help(); });
        num_threads_.store(count, std::memory_order_relaxed);
        is_taken_.store(false, std::memory_order_release);
    }

    int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

    void run(int chunks, void (*function)(void*, int), void* body) {
        if (is_taken_.exchange(true, std::memory_order_acquire)) {  // by another thread's job: do without helpers
            for (int chunk = 0; chunk < chunks; ++chunk) function(body, chunk);
            return;
        }
        if (const int core = sched_getcpu(); core != callers_core_) clear(core);
        function_ = function, body_ = body, chunks_ = chunks;
        pending_.store(chunks, std::memory_order_relaxed);
        unclaimed_.store(chunks);  // publishes the job
        if (sleepers_.load() > 0) wake();
        while (claim_one()) {}
        for (int looks = 0; pending_.load(std::memory_order_acquire) > 0; ++looks) {
            if (looks < 1000) _mm_pause();
            else sched_yield();  // whoever holds the last chunk may want this core
        }
        is_taken_.store(false, std::memory_order_release);
    }

  private:
    // What is read of the job after a claim stays as it is until this chunk is reported done.
    bool claim_one() {
        if (unclaimed_.load(std::memory_order_relaxed) <= 0) return false;
        const int left = unclaimed_.fetch_sub(1);
        if (left <= 0) return false;
        function_(body_, chunks_ - left);
        pending_.fetch_sub(1, std::memory_order_release);
        return true;
    }

    // Keeps the helpers off the caller's core. Where another process takes turns with this one and looks out for its own
    // turn on the other core, the system wakes a helper on the caller's core, and there it waits until all is done.
    void clear(int core) {
        callers_core_ = core;
        cpu_set_t others = cores_;
        if (core < 0 || core >= CPU_SETSIZE || !CPU_ISSET(core, &others) || CPU_COUNT(&others) < 2) return;
        CPU_CLR(core, &others);
        for (auto& helper : helpers_) pthread_setaffinity_np(helper.native_handle(), sizeof others, &others);
    }

    void help() {
        while (!quit_.load(std::memory_order_relaxed)) {
            if (claim_one()) continue;
            if (!spin()) sleep();
        }
    }

    bool spin() const {  // until there is work; false when none came, or the core is wanted
        const auto start = Clock::now();
        for (auto now = start; now - start < SPIN_TIME;) {
            for (int i = 0; i < PAUSES; ++i) {
                if (unclaimed_.load(std::memory_order_relaxed) > 0) return true;
                _mm_pause();
            }
            const auto before = Clock::now();
            sched_yield();
            now = Clock::now();
            if (now - before > YIELD_IS_LONG) return unclaimed_.load(std::memory_order_relaxed) > 0;
        }
        return false;
    }

    void sleep() {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);  // before the last look, as `run` publishes before it looks for sleepers
        wanted_.wait(lock, [this] { return unclaimed_.load() > 0 || quit_.load(); });
        sleepers_.fetch_sub(1);
    }

    void wake() {
        { std::lock_guard<std::mutex> lock(mutex_); }  // nobody is between the last look and the wait
        wanted_.notify_all();
    }

    void stop() {
        quit_.store(true);
        wake();
        for (auto& helper : helpers_) helper.join();
        helpers_.clear();
        quit_.store(false);
    }

    void (*function_)(void*, int) = nullptr;
    void* body_ = nullptr;
    int chunks_ = 0;
    std::atomic<int> num_threads_{1};
    std::atomic<bool> is_taken_{false};
    alignas(64) std::atomic<int> unclaimed_{0};
    alignas(64) std::atomic<int> pending_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> quit_{false};
    std::mutex mutex_;
    std::condition_variable wanted_;
    std::vector<std::thread> helpers_;
    cpu_set_t cores_;         // that this process may use
    int callers_core_ = -1;   // that the helpers were last kept off
};

// Never destroyed: at the end of the process its helpers may still be asleep in it.
Pool& pool() {
    static Pool* const it = new Pool;
    return *it;
}

PyObject* py_set_threads(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    const long long threads = arguments.integer();
    if (!arguments.finish()) return nullptr;
    if (threads < 1 || threads > 1024) {
        PyErr_Format(PyExc_ValueError, "1 to 1024 threads can compute, not %lld", threads);
        return nullptr;
    }
    set_threads(static_cast<int>(threads));
    Py_RETURN_NONE;
}

// For tests: adds 1 to each of `chunks` int64, in one parallel_for each time.
PyObject* py_count_chunks(PyObject*, PyObject* const* values, Py_ssize_t count) {
    Arguments arguments(values, count);
    auto* counts = arguments.pointer<long long>();
    const int chunks = static_cast<int>(arguments.integer());
    const long long times = arguments.integer();
    if (!arguments.finish()) return nullptr;
    {
        WithoutGil without_gil;
        for (long long i = 0; i < times; ++i) parallel_for(chunks, [&](int chunk) { counts[chunk] += 1; });
    }
    Py_RETURN_NONE;
}

}  // namespace

void set_threads(int count) { pool().set_threads(count); }
int num_threads() { return pool().num_threads(); }
void run_chunks(int chunks, void (*function)(void*, int), void* body) { pool().run(chunks, function, body); }

}  // namespace braid

extern const PyMethodDef pool_methods[];
const PyMethodDef pool_methods[] = {
    method("set_threads", braid::py_set_threads),
    method("count_chunks", braid::py_count_chunks),
    {nullptr, nullptr, 0, nullptr},
};
