// Launches as an executable graph of the driver, which keeps their parameters.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "chain.h"
#include "driver.h"

namespace mla {

// Never destroyed, as one that may still run cannot be told from one that does not. Launched on its own stream only, as it cannot run
// beside itself. The device's context is current in all that it does.
class Graph {
 public:
  // Throws CudaError, as with a driver that has no graphs of such kernels.
  Graph(const Chain& chain, int device, uintptr_t stream);

  // Whether a launch of it is these launches on this stream.
  bool is(const Chain& chain, int device, uintptr_t stream) const;
  // Makes it so for launches of the kernels that it was made for. Sets what is different. Throws CudaError, after which it is none
  // that anyone asks for.
  void set(const Chain& chain);
  void launch() const;

 private:
  struct Node {
    CUgraphNode handle = nullptr;
    const Kernel* kernel = nullptr;
    CUDA_KERNEL_NODE_PARAMS launch{};
    std::vector<unsigned char> parameters;  // as they were set last; empty if that failed

    bool is(const KernelLaunch& other) const;
    void point_to(const KernelLaunch& other);  // for the driver to read
    void keep(const KernelLaunch& other);      // when it has
  };
  void add(CUgraph graph, const KernelLaunch& launch, int priority, const Node* before, Node& node);

  int device_;
  CUstream stream_;
  CUgraphExec executable_ = nullptr;
  std::array<Node, Chain::kMaxLaunches> nodes_;
};

}  // namespace mla
