#include "stream.h"

#include <atomic>
#include <stdexcept>
#include <string>

#include "chain.h"
#include "launch_kernel.h"
#include "params.h"

namespace mla {
namespace {

constexpr int kStreamThreads = 512;  // of stream.cu
constexpr int64_t kVectorBytes = 16;
constexpr unsigned kEmptyThreads = 32;

const Kernel& empty_kernel(int device) { return get_kernel("empty", "mla_empty", device, Occupancy::any); }

}  // namespace

void launch_stream(uintptr_t address, int64_t bytes, uintptr_t sum, int ctas, int device, uintptr_t stream) {
  if (address % kVectorBytes != 0 || bytes % kVectorBytes != 0 || bytes < 0)
    throw std::invalid_argument("address and bytes must be multiples of 16");
  if (ctas < 1) throw std::invalid_argument("ctas must be positive");
  const ContextGuard guard(device);
  const int64_t vectors = bytes / kVectorBytes;
  launch(make_launch(get_kernel("stream", "mla_stream", device, Occupancy::any), static_cast<unsigned>(ctas),
                     kStreamThreads, Start::after_kernel_before, address, vectors, sum),
         stream);
}

void launch_empty(bool beside, int device, uintptr_t stream) {
  const ContextGuard guard(device);
  const DecodeParams params{};
  launch(make_launch(empty_kernel(device), 1, kEmptyThreads, start_of(beside), params), stream);
}

void queue_empty(int launches, int device, uintptr_t stream) {
  if (launches < 1 || launches > Chain::kMaxLaunches)
    throw std::invalid_argument("launches must be 1 to " + std::to_string(Chain::kMaxLaunches));
  const ContextGuard guard(device);
  static std::atomic<int> calls{0};
  DecodeParams params{};
  params.causal = ++calls;
  const bool overlaps = overlaps_launches(device);
  Chain chain;
  for (int i = 0; i < launches; ++i)
    chain.add(make_launch(empty_kernel(device), 1, kEmptyThreads, start_of(overlaps && i > 0), params));
  queue_chain(chain, device, stream, captured(stream));
}

}  // namespace mla
