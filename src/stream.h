// The launches of the kernels by which benchmarks know what a GPU and its driver can do.
#pragma once

#include <cstdint>

namespace mla {

// Reads `bytes` at `address`, both multiples of 16, with `ctas` CTAs, and adds all words by exclusive or to the one at `sum`.
// Asynchronous. Throws std::invalid_argument for anything else.
void launch_stream(uintptr_t address, int64_t bytes, uintptr_t sum, int ctas, int device, uintptr_t stream);

// A kernel that does nothing, launched by itself, beside the one before or behind it.
void launch_empty(bool beside, int device, uintptr_t stream);

// As many of them as a call of mla.decode can have, queued as its launches are, all with other parameters than before. Throws
// std::invalid_argument for any other number.
void queue_empty(int launches, int device, uintptr_t stream);

}  // namespace mla
