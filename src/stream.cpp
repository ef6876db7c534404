#include "stream.h"

#include <stdexcept>

#include "launch_kernel.h"

namespace mla {
namespace {

constexpr int kStreamThreads = 512;  // of stream.cu
constexpr int64_t kVectorBytes = 16;

}  // namespace

void launch_stream(uintptr_t address, int64_t bytes, uintptr_t sum, int ctas, int device, uintptr_t stream) {
  if (address % kVectorBytes != 0 || bytes % kVectorBytes != 0 || bytes < 0)
    throw std::invalid_argument("address and bytes must be multiples of 16");
  if (ctas < 1) throw std::invalid_argument("ctas must be positive");
  const ContextGuard guard(device);
  launch_kernel(get_kernel("stream", "mla_stream", device, Occupancy::any), static_cast<unsigned>(ctas), kStreamThreads,
                stream, address, bytes / kVectorBytes, sum);
}

}  // namespace mla
