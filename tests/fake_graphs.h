// Graphs of the stand-in driver: kernels, each behind or beside the one before, and what they are launched with.
#pragma once

#include <cuda.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct FakeLaunch {
  CUkernel kernel;
  unsigned grid, block, smem;
  bool beside;             // the kernel before
  std::string parameters;  // a JSON list
  int priority;
};

struct FakeNode {
  FakeLaunch launch;
  const FakeNode* before = nullptr;
};

struct FakeGraph {
  std::vector<std::unique_ptr<FakeNode>> nodes;
};

struct FakeExecutable {
  int number;  // from 1
  std::vector<const FakeNode*> order;
  std::map<const FakeNode*, FakeLaunch> launches;
};

inline FakeNode* node_of(CUgraphNode handle) { return reinterpret_cast<FakeNode*>(handle); }
inline FakeGraph* graph_of(CUgraph handle) { return reinterpret_cast<FakeGraph*>(handle); }
inline FakeExecutable* executable_of(CUgraphExec handle) { return reinterpret_cast<FakeExecutable*>(handle); }

inline CUresult fake_cuGraphCreate(CUgraph* graph, unsigned) {
  *graph = reinterpret_cast<CUgraph>(new FakeGraph);
  return CUDA_SUCCESS;
}
inline CUresult fake_cuGraphKernelNodeSetAttribute(CUgraphNode node, CUkernelNodeAttrID id,
                                                   const CUkernelNodeAttrValue* value) {
  if (id != CU_LAUNCH_ATTRIBUTE_PRIORITY) return CUDA_ERROR_INVALID_VALUE;
  node_of(node)->launch.priority = value->priority;
  return CUDA_SUCCESS;
}
inline CUresult fake_cuGraphAddDependencies(CUgraph, const CUgraphNode* from, const CUgraphNode* to,
                                            const CUgraphEdgeData* edge, size_t count) {
  const bool beside = edge->type == CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
  if (count != 1 || node_of(*to)->before || edge->from_port != (beside ? CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC : 0))
    return CUDA_ERROR_INVALID_VALUE;
  node_of(*to)->before = node_of(*from);
  node_of(*to)->launch.beside = beside;
  return CUDA_SUCCESS;
}
// Of a chain, in which each node but one has one before it.
inline CUresult fake_cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
  static int number = 0;
  auto* made = new FakeExecutable{++number, {}, {}};
  const FakeNode* before = nullptr;
  for (size_t i = 0; i < graph_of(graph)->nodes.size(); ++i)
    for (const auto& node : graph_of(graph)->nodes)
      if (node->before == before && !made->launches.count(node.get())) {
        made->order.push_back(node.get());
        made->launches[node.get()] = node->launch;
        before = node.get();
        break;
      }
  if (made->order.size() != graph_of(graph)->nodes.size()) return CUDA_ERROR_INVALID_VALUE;
  *executable = reinterpret_cast<CUgraphExec>(made);
  return CUDA_SUCCESS;
}
