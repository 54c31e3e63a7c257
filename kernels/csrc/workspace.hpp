// Memory that a kernel keeps between its calls, as fresh pages cost more than the work on them.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace braid {

class Workspace {
  public:
    Workspace() = default;
    ~Workspace() { std::free(memory_); }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // Room for `count` of T, starting at a cache line; what an earlier call put there is lost when it must grow.
    template <class T>
    T* room(ptrdiff_t count) {
        const size_t wanted = static_cast<size_t>(count) * sizeof(T);
        if (wanted > size_) grow(wanted);
        return static_cast<T*>(memory_);
    }

  private:
    static constexpr size_t LINE = 64, HUGE_PAGE = size_t(1) << 21;

    void grow(size_t wanted) {
        const size_t alignment = wanted < HUGE_PAGE ? LINE : HUGE_PAGE;
        std::free(memory_);
        size_ = (wanted + alignment - 1) / alignment * alignment;
        memory_ = std::aligned_alloc(alignment, size_);
        if (!memory_) {
            size_ = 0;
            throw std::bad_alloc();
        }
        if (alignment == HUGE_PAGE) madvise(memory_, size_, MADV_HUGEPAGE);  // a wish: 4 KiB pages serve as well
    }

    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace braid
