// A stand-in for libcuda.so.1: enough of the driver to see, without a GPU, what the extension would do with one.
//
// It has two devices. Every call that changes something is appended to $FAKE_CUDA_LOG, one JSON object a line. Knobs:
//   FAKE_CUDA_VERSION   what cuDriverGetVersion says (default 12030)
//   FAKE_CUDA_FAIL      "<call>=<code>": that call fails
//   FAKE_CUDA_LACKS     a call that it does not have
//   FAKE_CUDA_CAPTURING 1: streams are being captured
//   FAKE_CUDA_SMEM      "<bytes per SM>,<bytes per block, opt-in>" (default: those of an H100)
//   FAKE_CUDA_SM        the compute capability (default 90)
//   FAKE_CUDA_FAIL_SET  n: the n-th cuGraphExecKernelNodeSetParams fails, with 719
#include <cuda.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "fake_graphs.h"

namespace {

CUresult fake_cuInit(unsigned) {
  log(R"({"call": "cuInit"})");
  return CUDA_SUCCESS;
}
CUresult fake_cuGetErrorName(CUresult code, const char** name) {
  *name = code == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : nullptr;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult fake_cuGetErrorString(CUresult, const char** text) {
  *text = "what it means";
  return CUDA_SUCCESS;
}
CUresult fake_cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal >= 0 && ordinal < kDevices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult fake_cuDeviceGetAttribute(int* value, CUdevice_attribute name, CUdevice) {
  if (name == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR) *value = smem(0);
  else if (name == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) *value = smem(1);
  else if (name == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = compute_capability() / 10;
  else if (name == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = compute_capability() % 10;
  else return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}
CUresult fake_cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  log(R"({"call": "cuDevicePrimaryCtxRetain", "device": %d})", device);
  *context = reinterpret_cast<CUcontext>(&contexts[device]);
  return CUDA_SUCCESS;
}
CUresult fake_cuCtxGetCurrent(CUcontext* context) {
  *context = stack.empty() ? nullptr : stack.back();
  return CUDA_SUCCESS;
}
CUresult fake_cuCtxPushCurrent(CUcontext context) {
  stack.push_back(context);
  log(R"({"call": "cuCtxPushCurrent", "device": %d})", current_device());
  return CUDA_SUCCESS;
}
CUresult fake_cuCtxPopCurrent(CUcontext* context) {
  log(R"({"call": "cuCtxPopCurrent", "device": %d})", current_device());
  *context = stack.back();
  stack.pop_back();
  return CUDA_SUCCESS;
}
CUresult fake_cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**, unsigned,
                                CUlibraryOption* options, void** values, unsigned num_options) {
  if (*static_cast<const unsigned*>(image) != kFatbinMagic) return CUDA_ERROR_INVALID_IMAGE;
  const bool preserved = num_options == 1 && options[0] == CU_LIBRARY_BINARY_IS_PRESERVED && values[0];
  log(R"({"call": "cuLibraryLoadData", "image": %llu, "preserved": %d})", reinterpret_cast<unsigned long long>(image),
      preserved);
  *library = reinterpret_cast<CUlibrary>(const_cast<void*>(image));
  return CUDA_SUCCESS;
}
CUresult fake_cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  static std::map<std::pair<CUlibrary, std::string>, FakeKernel> kernels;
  FakeKernel& found = kernels[{library, name}];
  found.name = name;
  *kernel = reinterpret_cast<CUkernel>(&found);
  return CUDA_SUCCESS;
}
CUresult fake_cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
  log(R"({"call": "cuKernelGetFunction", "kernel": "%s", "device": %d})",
      reinterpret_cast<FakeKernel*>(kernel)->name.c_str(), current_device());
  *function = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}
CUresult fake_cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
  FakeKernel* changed = reinterpret_cast<FakeKernel*>(kernel);
  if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
    log(R"({"call": "cuKernelSetAttribute", "kernel": "%s", "device": %d, "carveout": %d})", changed->name.c_str(),
        device, value);
    return CUDA_SUCCESS;
  }
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > smem(1)) return CUDA_ERROR_INVALID_VALUE;
  log(R"({"call": "cuKernelSetAttribute", "kernel": "%s", "device": %d, "smem": %d})", changed->name.c_str(), device,
      value);
  changed->max_smem[device] = value;
  return CUDA_SUCCESS;
}
// The map that it makes is the number of the encoding, 16 times.
CUresult fake_cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                     const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                     const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                     CUtensorMapFloatOOBfill fill) {
  static cuuint64_t number = 0;
  const auto misaligned = [](const void* pointer, uintptr_t to) { return reinterpret_cast<uintptr_t>(pointer) % to; };
  if (misaligned(map, 64) || misaligned(address, 16) || rank != 3) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 3; ++i)
    if (dims[i] < 1 || dims[i] > 1ull << 32 || box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i)
    if (strides[i] % 16 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
  ++number;
  log(R"({"call": "cuTensorMapEncodeTiled", "map": %llu, "type": %d, "address": %llu, "dims": [%llu, %llu, %llu], "strides": [%llu, %llu], "box": [%u, %u, %u], "steps": [%u, %u, %u], "modes": [%d, %d, %d, %d]})",
      static_cast<unsigned long long>(number), type, reinterpret_cast<unsigned long long>(address),
      static_cast<unsigned long long>(dims[0]), static_cast<unsigned long long>(dims[1]),
      static_cast<unsigned long long>(dims[2]), static_cast<unsigned long long>(strides[0]),
      static_cast<unsigned long long>(strides[1]), box[0], box[1], box[2], steps[0], steps[1], steps[2], interleave,
      swizzle, promotion, fill);
  for (cuuint64_t& word : map->opaque) word = number;
  return CUDA_SUCCESS;
}
CUresult fake_cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  if (current_device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
  *status = number("FAKE_CUDA_CAPTURING", 0) ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult fake_cuStreamGetPriority(CUstream stream, int* priority) {
  *priority = reinterpret_cast<uintptr_t>(stream) == kUrgentStream ? -5 : 0;
  return CUDA_SUCCESS;
}
CUresult fake_cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return CUDA_SUCCESS;
}

// A call that FAKE_CUDA_FAIL names is replaced by this.
template <class... Args>
CUresult fail(Args...) {
  return static_cast<CUresult>(atoi(strchr(getenv("FAKE_CUDA_FAIL"), '=') + 1));
}
template <class... Args>
void* pick(const char* name, CUresult (*call)(Args...)) {
  return reinterpret_cast<void*>(failure(name) ? fail<Args...> : call);
}

}  // namespace

extern "C" CUresult cuDriverGetVersion(int* found) {
  *found = version();
  return CUDA_SUCCESS;
}

extern "C" CUresult cuGetProcAddress_v2(const char* name, void** address, int since, cuuint64_t,
                                        CUdriverProcAddressQueryResult*) {
  *address = nullptr;
  if (const char* lacking = getenv("FAKE_CUDA_LACKS"); lacking && !strcmp(name, lacking)) return CUDA_ERROR_NOT_FOUND;
  if (!strcmp(name, "cuDriverGetVersion")) *address = reinterpret_cast<void*>(cuDriverGetVersion);
#define FAKE(call) \
  if (!strcmp(name, #call)) *address = pick(#call, fake_##call);
  FAKE(cuInit)
  FAKE(cuGetErrorName)
  FAKE(cuGetErrorString)
  FAKE(cuDeviceGet)
  FAKE(cuDeviceGetAttribute)
  FAKE(cuDevicePrimaryCtxRetain)
  FAKE(cuCtxGetCurrent)
  FAKE(cuCtxPushCurrent)
  FAKE(cuCtxPopCurrent)
  FAKE(cuStreamIsCapturing)
  FAKE(cuLibraryLoadData)
  FAKE(cuLibraryGetKernel)
  FAKE(cuKernelGetFunction)
  FAKE(cuKernelSetAttribute)
  FAKE(cuTensorMapEncodeTiled)
  FAKE(cuLaunchKernelEx)
  FAKE(cuStreamGetPriority)
  FAKE(cuThreadExchangeStreamCaptureMode)
  FAKE(cuGraphCreate)
  FAKE(cuGraphAddKernelNode)
  FAKE(cuGraphKernelNodeSetAttribute)
  FAKE(cuGraphInstantiateWithFlags)
  FAKE(cuGraphExecKernelNodeSetParams)
  FAKE(cuGraphLaunch)
#undef FAKE
  // Its form with data of edges, which drivers before 12.3 do not have.
  if (!strcmp(name, "cuGraphAddDependencies") && version() >= since) *address = pick(name, fake_cuGraphAddDependencies);
  return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
