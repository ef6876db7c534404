// The launch of the kernel that only reads, by which benchmarks know what a GPU can do.
#pragma once

#include <cstdint>

namespace mla {

// Reads `bytes` at `address`, both multiples of 16, with `ctas` CTAs, and adds all words by exclusive or to the one at `sum`.
// Asynchronous. Throws std::invalid_argument for anything else.
void launch_stream(uintptr_t address, int64_t bytes, uintptr_t sum, int ctas, int device, uintptr_t stream);

}  // namespace mla
