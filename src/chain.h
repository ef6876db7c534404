// The launches of one call, one behind or beside the other.
#pragma once

#include <array>
#include <cstdint>

#include "launch_kernel.h"

namespace mla {

class Chain {
 public:
  static constexpr int kMaxLaunches = 3;

  void add(const KernelLaunch& launch) { launches_[static_cast<size_t>(size_++)] = launch; }
  const KernelLaunch* begin() const { return launches_.data(); }
  const KernelLaunch* end() const { return begin() + size_; }

 private:
  std::array<KernelLaunch, kMaxLaunches> launches_{};
  int size_ = 0;
};

// Queues them. Where the driver can, and the stream is not being captured, as a graph that is kept for these kernels on this stream, with
// the parameters of this call: for the host that is about one launch. The device's context is current. From any thread.
void queue_chain(const Chain& chain, int device, uintptr_t stream, bool captured);

// The same for a kernel by itself, with one parameter.
template <class Params>
void queue_alone(const Kernel& kernel, unsigned blocks, unsigned threads, const Params& params, int device,
                 uintptr_t stream) {
  Chain chain;
  chain.add(make_launch(kernel, blocks, threads, Start::after_kernel_before, params));
  queue_chain(chain, device, stream, captured(stream));
}

}  // namespace mla
