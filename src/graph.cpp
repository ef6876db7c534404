#include "graph.h"

#include <cstring>

namespace mla {
namespace {

// Lets this thread do what another one's capture would forbid all of them.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode.function(&mode_); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode.function(&mode_); }

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace

bool Graph::Node::is(const KernelLaunch& other) const {
  if (kernel != other.kernel || launch.gridDimX != other.blocks || parameters.empty()) return false;
  const unsigned char* at = parameters.data();
  for (int i = 0; i < KernelLaunch::kMaxArguments && other.sizes[i]; at += other.sizes[i++])
    if (std::memcmp(at, other.arguments[i], other.sizes[i]) != 0) return false;
  return true;
}

void Graph::Node::point_to(const KernelLaunch& other) {
  parameters.clear();
  launch.gridDimX = other.blocks;
  launch.kernelParams = const_cast<void**>(other.arguments.data());
}

void Graph::Node::keep(const KernelLaunch& other) {
  for (int i = 0; i < KernelLaunch::kMaxArguments && other.sizes[i]; ++i) {
    const auto* const argument = static_cast<const unsigned char*>(other.arguments[i]);
    parameters.insert(parameters.end(), argument, argument + other.sizes[i]);
  }
}

Graph::Graph(const Chain& chain, int device, uintptr_t stream)
    : device_(device), stream_(reinterpret_cast<CUstream>(stream)) {
  const RelaxedCapture relaxed;
  int priority;
  driver().cuStreamGetPriority(stream_, &priority);
  CUgraph graph;
  driver().cuGraphCreate(&graph, 0);
  const Node* before = nullptr;
  Node* node = nodes_.data();
  for (const KernelLaunch& each : chain) {
    add(graph, each, priority, before, *node);
    before = node++;
  }
  driver().cuGraphInstantiateWithFlags(&executable_, graph, 0);  // `graph` stays, as what changes it names its nodes
}

void Graph::add(CUgraph graph, const KernelLaunch& launch, int priority, const Node* before, Node& node) {
  node.kernel = launch.kernel;
  node.launch.kern = launch.kernel->handle;
  node.launch.gridDimY = node.launch.gridDimZ = 1;
  node.launch.blockDimX = launch.threads;
  node.launch.blockDimY = node.launch.blockDimZ = 1;
  node.launch.sharedMemBytes = launch.kernel->smem_bytes;
  node.point_to(launch);
  driver().cuGraphAddKernelNode(&node.handle, graph, nullptr, 0, &node.launch);
  node.keep(launch);
  CUlaunchAttributeValue value{};
  value.priority = priority;
  driver().cuGraphKernelNodeSetAttribute(node.handle, CU_LAUNCH_ATTRIBUTE_PRIORITY, &value);
  if (!before) return;
  CUgraphEdgeData edge{};
  if (launch.start == Start::beside_kernel_before) {
    edge.type = CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
    edge.from_port = CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC;
  }
  driver().add_graph_dependencies(graph, &before->handle, &node.handle, &edge, 1);
}

bool Graph::is(const Chain& chain, int device, uintptr_t stream) const {
  if (device != device_ || reinterpret_cast<CUstream>(stream) != stream_) return false;
  const Node* node = nodes_.data();
  for (const KernelLaunch& each : chain)
    if (!(node++)->is(each)) return false;
  return node == nodes_.data() + nodes_.size() || !node->kernel;
}

void Graph::set(const Chain& chain) {
  Node* node = nodes_.data();
  for (const KernelLaunch& each : chain) {
    Node& changed = *node++;
    if (changed.is(each)) continue;
    changed.point_to(each);
    driver().cuGraphExecKernelNodeSetParams(executable_, changed.handle, &changed.launch);
    changed.keep(each);
  }
}

void Graph::launch() const { driver().cuGraphLaunch(executable_, stream_); }

}  // namespace mla
