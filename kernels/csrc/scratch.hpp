// Memory that a kernel needs while it runs; it is kept for the next one, so that the steady state allocates nothing.
#pragma once
#include <cstddef>

namespace braid {

// At least so many bytes, at a multiple of 64, the calling thread's own until it asks again.
char* scratch(size_t bytes);

}  // namespace braid
