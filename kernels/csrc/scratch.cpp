#include "scratch.hpp"

#include <cstdlib>
#include <new>

namespace braid {
namespace {

struct Block {
    char* data = nullptr;
    size_t size = 0;
    ~Block() { std::free(data); }
};

}  // namespace

char* scratch(size_t bytes) {
    thread_local Block block;
    if (block.size < bytes) {
        std::free(block.data);
        block.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;  // room to grow without asking each time
        block.data = static_cast<char*>(std::aligned_alloc(4096, block.size));
        if (!block.data) throw std::bad_alloc();
    }
    return block.data;
}

}  // namespace braid
