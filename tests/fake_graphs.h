// Launches of the stand-in driver, by themselves and in graphs: kernels, each behind or beside the one before.
#pragma once

#include <cuda.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fake_state.h"

namespace {

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

FakeNode* node_of(CUgraphNode handle) { return reinterpret_cast<FakeNode*>(handle); }
FakeGraph* graph_of(CUgraph handle) { return reinterpret_cast<FakeGraph*>(handle); }
FakeExecutable* executable_of(CUgraphExec handle) { return reinterpret_cast<FakeExecutable*>(handle); }

std::string list_parameters(const FakeKernel& kernel, void** parameters) {
  std::string values;
  const std::vector<size_t> sizes = parameter_sizes(kernel.name);
  for (size_t i = 0; i < sizes.size(); ++i) values += (i ? "\", \"" : "\"") + hex(parameters[i], sizes[i]);
  return values + "\"";
}
// `graph`: its number; 0: by itself.
CUresult launch(const FakeLaunch& launch, CUstream stream, int graph) {
  const FakeKernel& kernel = *reinterpret_cast<FakeKernel*>(launch.kernel);
  const int device = current_device();
  if (device < 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (!launch.grid || static_cast<int>(launch.smem) > kernel.max_smem[device]) return CUDA_ERROR_INVALID_VALUE;
  if (launch.beside && compute_capability() < 90) return CUDA_ERROR_INVALID_VALUE;
  log(R"({"call": "launch", "kernel": "%s", "device": %d, "grid": %u, "block": %u, "smem": %u, "stream": %llu, "beside": %s, "graph": %d, "priority": %d, "parameters": [%s]})",
      kernel.name.c_str(), device, launch.grid, launch.block, launch.smem, reinterpret_cast<unsigned long long>(stream),
      launch.beside ? "true" : "false", graph, launch.priority, launch.parameters.c_str());
  return CUDA_SUCCESS;
}
CUresult fake_cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void**) {
  const FakeKernel& kernel = *reinterpret_cast<FakeKernel*>(function);
  const bool flat = config->gridDimY == 1 && config->gridDimZ == 1 && config->blockDimY == 1 && config->blockDimZ == 1;
  if (!flat) return CUDA_ERROR_INVALID_VALUE;
  bool beside = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) return CUDA_ERROR_INVALID_VALUE;
    beside = attribute.value.programmaticStreamSerializationAllowed;
  }
  return launch({reinterpret_cast<CUkernel>(function), config->gridDimX, config->blockDimX, config->sharedMemBytes,
                 beside, list_parameters(kernel, parameters), 0},
                config->hStream, 0);
}
bool read_node(const CUDA_KERNEL_NODE_PARAMS& node, FakeLaunch& launch) {
  if (!node.kern || node.gridDimY != 1 || node.gridDimZ != 1 || node.blockDimY != 1 || node.blockDimZ != 1)
    return false;
  launch.kernel = node.kern;
  launch.grid = node.gridDimX;
  launch.block = node.blockDimX;
  launch.smem = node.sharedMemBytes;
  launch.parameters = list_parameters(*reinterpret_cast<FakeKernel*>(node.kern), node.kernelParams);
  return true;
}
CUresult fake_cuGraphAddKernelNode(CUgraphNode* node, CUgraph graph, const CUgraphNode*, size_t before,
                                   const CUDA_KERNEL_NODE_PARAMS* params) {
  auto made = std::make_unique<FakeNode>();
  if (before || capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED || !read_node(*params, made->launch))
    return CUDA_ERROR_INVALID_VALUE;
  *node = reinterpret_cast<CUgraphNode>(made.get());
  graph_of(graph)->nodes.push_back(std::move(made));
  return CUDA_SUCCESS;
}
CUresult fake_cuGraphExecKernelNodeSetParams(CUgraphExec executable, CUgraphNode node,
                                             const CUDA_KERNEL_NODE_PARAMS* params) {
  static int calls = 0;
  log(R"({"call": "cuGraphExecKernelNodeSetParams", "graph": %d, "kernel": "%s"})", executable_of(executable)->number,
      reinterpret_cast<FakeKernel*>(params->kern)->name.c_str());
  if (++calls == number("FAKE_CUDA_FAIL_SET", 0)) return CUDA_ERROR_LAUNCH_FAILED;
  return read_node(*params, executable_of(executable)->launches.at(node_of(node))) ? CUDA_SUCCESS
                                                                                   : CUDA_ERROR_INVALID_VALUE;
}
CUresult fake_cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  const FakeExecutable& graph = *executable_of(executable);
  for (const FakeNode* node : graph.order)
    if (const CUresult result = launch(graph.launches.at(node), stream, graph.number)) return result;
  return CUDA_SUCCESS;
}
CUresult fake_cuGraphCreate(CUgraph* graph, unsigned) {
  *graph = reinterpret_cast<CUgraph>(new FakeGraph);
  return CUDA_SUCCESS;
}
CUresult fake_cuGraphKernelNodeSetAttribute(CUgraphNode node, CUkernelNodeAttrID id,
                                            const CUkernelNodeAttrValue* value) {
  if (id != CU_LAUNCH_ATTRIBUTE_PRIORITY) return CUDA_ERROR_INVALID_VALUE;
  node_of(node)->launch.priority = value->priority;
  return CUDA_SUCCESS;
}
CUresult fake_cuGraphAddDependencies(CUgraph, const CUgraphNode* from, const CUgraphNode* to,
                                     const CUgraphEdgeData* edge, size_t count) {
  const bool beside = edge->type == CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC;
  if (count != 1 || node_of(*to)->before || edge->from_port != (beside ? CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC : 0))
    return CUDA_ERROR_INVALID_VALUE;
  node_of(*to)->before = node_of(*from);
  node_of(*to)->launch.beside = beside;
  return CUDA_SUCCESS;
}
// Of a chain, in which each node but one has one before it.
CUresult fake_cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
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

}  // namespace
