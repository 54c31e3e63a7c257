// Shares the chunks of one loop between the calling thread and the helpers.
//
// Chunks are claimed one by one, so a helper that the system does not schedule costs nothing but the chunk that it holds.
// Which thread computes a chunk is left to chance: a chunk must write what no other one writes, and always the same bits.
#pragma once
#include <type_traits>

namespace braid {

// Threads that compute, the caller included. The helpers serve one caller at a time; another one meanwhile works alone.
void set_threads(int count);
int num_threads();

void run_chunks(int chunks, void (*function)(void* body, int chunk), void* body);

// body(chunk) for each chunk in 0 .. chunks-1; returns when all are done.
template <class Body>
void parallel_for(int chunks, Body&& body) {
    if (chunks <= 1 || num_threads() == 1) {
        for (int chunk = 0; chunk < chunks; ++chunk) body(chunk);
        return;
    }
    using Plain = std::remove_reference_t<Body>;
    run_chunks(
        chunks, [](void* it, int chunk) { (*static_cast<Plain*>(it))(chunk); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace braid
