#include "chain.h"

#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace mla {
namespace {

// Streams come and go, and a graph that may still run cannot be told from one that does not: more than this are not made. Each takes
// about 100 KB of the device (H200).
constexpr size_t kMaxGraphs = 128;

// What a graph was made for: device, stream, kernels. How one starts follows from its kernel and the one before.
using Key = std::tuple<int, uintptr_t, std::array<const Kernel*, Chain::kMaxLaunches>>;

struct Node {
  CUgraphNode handle = nullptr;
  CUDA_KERNEL_NODE_PARAMS launch{};
  std::vector<unsigned char> parameters;  // as they were set last
};

struct Graph {
  CUgraphExec executable = nullptr;  // null where there is none to be had
  std::array<Node, Chain::kMaxLaunches> nodes;
};

// Lets this thread do what another one's capture would forbid all of them.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode.function(&mode_); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode.function(&mode_); }

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

// Puts the parameters where the node points to; false if they are as before.
bool update(Node& node, const KernelLaunch& launch) {
  bool changed = node.launch.gridDimX != launch.blocks;
  size_t at = 0;
  for (int i = 0; i < KernelLaunch::kMaxArguments && launch.sizes[i]; at += launch.sizes[i++]) {
    if (node.parameters.size() < at + launch.sizes[i]) node.parameters.resize(at + launch.sizes[i]), changed = true;
    unsigned char* const kept = node.parameters.data() + at;
    if (!changed && std::memcmp(kept, launch.arguments[i], launch.sizes[i]) == 0) continue;
    std::memcpy(kept, launch.arguments[i], launch.sizes[i]);
    changed = true;
  }
  node.launch.gridDimX = launch.blocks;
  node.launch.kernelParams = const_cast<void**>(launch.arguments.data());
  return changed;
}

void set(CUgraphExec executable, Node& node) {
  const auto& call = driver().cuGraphExecKernelNodeSetParams;
  if (const CUresult result = call.function(executable, node.handle, &node.launch); result != CUDA_SUCCESS) {
    node.parameters.clear();
    throw_cuda_error(call.name, result);
  }
}

void add_node(CUgraph graph, const KernelLaunch& launch, int priority, const Node* before, Node& node) {
  node.launch.kern = launch.kernel->handle;
  node.launch.gridDimY = node.launch.gridDimZ = 1;
  node.launch.blockDimX = launch.threads;
  node.launch.blockDimY = node.launch.blockDimZ = 1;
  node.launch.sharedMemBytes = launch.kernel->smem_bytes;
  update(node, launch);
  driver().cuGraphAddKernelNode(&node.handle, graph, nullptr, 0, &node.launch);
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

void make(const Chain& chain, uintptr_t stream, Graph& made) {
  const RelaxedCapture relaxed;
  int priority;
  driver().cuStreamGetPriority(reinterpret_cast<CUstream>(stream), &priority);
  CUgraph graph;
  driver().cuGraphCreate(&graph, 0);
  const Node* before = nullptr;
  Node* node = made.nodes.data();
  for (const KernelLaunch& launch : chain) {
    add_node(graph, launch, priority, before, *node);
    before = node++;
  }
  driver().cuGraphInstantiateWithFlags(&made.executable, graph,
                                       0);  // `graph` stays, as what changes it names its nodes
}

// Null where the launches have to be made one by one.
Graph* find_graph(const Chain& chain, int device, uintptr_t stream) {
  static std::map<Key, Graph> graphs;
  Key key{device, stream, {}};
  int size = 0;
  for (const KernelLaunch& launch : chain) std::get<2>(key)[size++] = launch.kernel;
  auto found = graphs.find(key);
  if (found == graphs.end()) {
    if (graphs.size() >= kMaxGraphs) return nullptr;
    found = graphs.emplace(key, Graph{}).first;
    try {
      if (driver().add_graph_dependencies.function) make(chain, stream, found->second);
    } catch (const CudaError&) {  // as of a driver that has no graphs of such kernels
    }
  }
  return found->second.executable ? &found->second : nullptr;
}

}  // namespace

void queue_chain(const Chain& chain, int device, uintptr_t stream, bool captured) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);  // from the parameters to the launch
  Graph* const graph = captured ? nullptr : find_graph(chain, device, stream);
  if (!graph) {
    for (const KernelLaunch& each : chain) launch(each, stream);
    return;
  }
  Node* node = graph->nodes.data();
  for (const KernelLaunch& each : chain) {
    if (update(*node, each)) set(graph->executable, *node);
    ++node;
  }
  driver().cuGraphLaunch(graph->executable, reinterpret_cast<CUstream>(stream));
}

}  // namespace mla
