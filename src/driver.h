// The CUDA driver API without linking libcuda: it is opened, and its entry points looked up, when first needed.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mla {

// A driver call that failed, or (code -1) a driver that cannot be used.
class CudaError : public std::runtime_error {
 public:
  CudaError(std::string api, int code, std::string text);

  const std::string& api() const { return api_; }
  int code() const { return code_; }  // CUresult
  const std::string& text() const { return text_; }

 private:
  std::string api_;
  int code_;
  std::string text_;
};

[[noreturn]] void throw_cuda_error(const char* api, CUresult result);

// An entry point of the driver. Calling it throws CudaError when it fails.
template <class Signature>
struct DriverCall;
template <class... Args>
struct DriverCall<CUresult(Args...)> {
  const char* name;
  CUresult (*function)(Args...) = nullptr;

  void operator()(Args... args) const {
    if (const CUresult result = function(args...); result != CUDA_SUCCESS) throw_cuda_error(name, result);
  }
};

// Each with the CUDA version that defined the form we call; asking for it by version keeps its ABI fixed, whatever the
// driver.
#define MLA_DRIVER_CALLS(X)                   \
  X(cuInit, 2000)                             \
  X(cuDriverGetVersion, 2020)                 \
  X(cuGetErrorName, 6000)                     \
  X(cuGetErrorString, 6000)                   \
  X(cuDeviceGet, 2000)                        \
  X(cuDeviceGetAttribute, 2000)               \
  X(cuDevicePrimaryCtxRetain, 7000)           \
  X(cuCtxGetCurrent, 4000)                    \
  X(cuCtxPushCurrent, 4000)                   \
  X(cuCtxPopCurrent, 4000)                    \
  X(cuStreamGetPriority, 5050)                \
  X(cuStreamIsCapturing, 10000)               \
  X(cuThreadExchangeStreamCaptureMode, 10010) \
  X(cuLibraryLoadData, 12000)                 \
  X(cuLibraryGetKernel, 12000)                \
  X(cuKernelGetFunction, 12000)               \
  X(cuKernelSetAttribute, 12000)              \
  X(cuLaunchKernelEx, 11060)                  \
  X(cuGraphCreate, 10000)                     \
  X(cuGraphAddKernelNode, 12000)              \
  X(cuGraphKernelNodeSetAttribute, 11000)     \
  X(cuGraphInstantiateWithFlags, 11040)       \
  X(cuGraphExecKernelNodeSetParams, 12000)    \
  X(cuGraphLaunch, 10000)

// Those that we can do without: null where the driver has none.
#define MLA_OPTIONAL_DRIVER_CALLS(X) X(cuTensorMapEncodeTiled, 12000)

struct Driver {
#define X(name, version) DriverCall<decltype(::name)> name{#name};
  MLA_DRIVER_CALLS(X)
  MLA_OPTIONAL_DRIVER_CALLS(X)
#undef X
  // Optional, too. The driver calls it by the name that headers before 13 have for an older form.
  DriverCall<decltype(::cuGraphAddDependencies_v2)> add_graph_dependencies{"cuGraphAddDependencies"};
};

// The driver, initialised. Throws CudaError when there is none that can be used.
const Driver& driver();

// Why driver() throws; empty when it does not.
std::string driver_problem();

// As cuDriverGetVersion has it (12020 = CUDA 12.2); 0 without a driver.
int driver_version();

// Of a device, as 90 for 9.0.
int compute_capability(int device);

// Whether a device has programmatic dependent launch: a kernel may start while the one before still runs.
bool overlaps_launches(int device);

// Whether a stream is being captured into a graph.
bool capturing(int device, uintptr_t stream);
// The same where the device's context is current.
bool captured(uintptr_t stream);

// Whether the primary context of a device is this thread's current one.
bool is_current(int device);

// Makes the primary context of a device, which is PyTorch's too, current for the life of the guard. A thread that has
// launched nothing yet has no current context, and one that works on another device has another.
class ContextGuard {
 public:
  explicit ContextGuard(int device);
  ~ContextGuard();
  ContextGuard(const ContextGuard&) = delete;
  ContextGuard& operator=(const ContextGuard&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace mla
