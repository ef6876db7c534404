#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <utility>

namespace mla {
namespace {

struct LoadedDriver {
  Driver calls;
  int version = 0;
  std::string problem;
};

std::string describe(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

std::string needed_driver() {
  return "mla needs an NVIDIA driver >= " + std::to_string(MLA_MIN_DRIVER) + " (CUDA " + describe(MLA_MIN_CUDA) +
         ") to run on a GPU";
}

std::string failure_text(const Driver& calls, CUresult result) {
  const char *name = nullptr, *text = nullptr;
  calls.cuGetErrorName.function(result, &name);
  calls.cuGetErrorString.function(result, &text);
  return std::string(name ? name : "unknown error") + " (" + std::to_string(result) +
         "): " + (text ? text : "no description");
}

// Fills in the entry points; returns the names of those that the driver lacks and we need.
std::string look_up_calls(Driver& calls, decltype(&::cuGetProcAddress) get_address) {
  const auto look_up = [&](auto& call, int since) {
    CUdriverProcAddressQueryResult status{};
    void* address = nullptr;
    get_address(call.name, &address, since, CU_GET_PROC_ADDRESS_DEFAULT, &status);
    call.function = reinterpret_cast<decltype(call.function)>(address);
    return address != nullptr;
  };
  std::string missing;
#define X(call, since) \
  if (!look_up(calls.call, since)) missing += " " #call;
  MLA_DRIVER_CALLS(X)
#undef X
#define X(call, since) look_up(calls.call, since);
  MLA_OPTIONAL_DRIVER_CALLS(X)
#undef X
  look_up(calls.add_graph_dependencies, 12030);
  return missing;
}

LoadedDriver load() {
  LoadedDriver loaded;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    loaded.problem = needed_driver() + "; none was found (" + (reason ? reason : "dlopen failed") + ")";
    return loaded;
  }
  // dlsym, as cuGetProcAddress_v2 itself is younger (12.0) than drivers that we must still be able to name.
  const auto get_version = reinterpret_cast<CUresult (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  if (get_version) get_version(&loaded.version);
  const auto get_address = reinterpret_cast<decltype(&::cuGetProcAddress)>(dlsym(library, "cuGetProcAddress_v2"));
  if (loaded.version < MLA_MIN_CUDA || !get_address) {
    loaded.problem = needed_driver() + "; the installed one supports CUDA " + describe(loaded.version) + " at most";
    return loaded;
  }
  if (const std::string missing = look_up_calls(loaded.calls, get_address); !missing.empty()) {
    loaded.problem =
        "libcuda.so.1 lacks" + missing + ", although it says that it supports CUDA " + describe(loaded.version);
    return loaded;
  }
  if (const CUresult result = loaded.calls.cuInit.function(0); result != CUDA_SUCCESS)
    loaded.problem = "cuInit failed: " + failure_text(loaded.calls, result);
  return loaded;
}

const LoadedDriver& loaded_driver() {
  static const LoadedDriver loaded = load();
  return loaded;
}

// Retained once and for good, as PyTorch does: it goes with the process.
CUcontext primary_context(int device) {
  thread_local std::pair<int, CUcontext> last{-1, nullptr};  // each call asks a few times
  if (last.first == device) return last.second;
  static std::mutex mutex;
  static std::map<int, CUcontext> contexts;
  const std::lock_guard<std::mutex> lock(mutex);
  CUcontext& context = contexts[device];
  if (!context) {
    CUdevice handle;
    driver().cuDeviceGet(&handle, device);
    driver().cuDevicePrimaryCtxRetain(&context, handle);
  }
  last = {device, context};
  return context;
}

}  // namespace

CudaError::CudaError(std::string api, int code, std::string text)
    : std::runtime_error(code < 0 ? text : api + " failed: " + text),
      api_(std::move(api)),
      code_(code),
      text_(std::move(text)) {}

void throw_cuda_error(const char* api, CUresult result) {
  throw CudaError(api, static_cast<int>(result), failure_text(loaded_driver().calls, result));
}

const Driver& driver() {
  const LoadedDriver& loaded = loaded_driver();
  if (!loaded.problem.empty()) throw CudaError("cuInit", -1, loaded.problem);
  return loaded.calls;
}

std::string driver_problem() { return loaded_driver().problem; }
int driver_version() { return loaded_driver().version; }

int compute_capability(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& capability = known[device];
  if (capability == 0) {
    CUdevice handle;
    int major, minor;
    driver().cuDeviceGet(&handle, device);
    driver().cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle);
    driver().cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle);
    capability = major * 10 + minor;
  }
  return capability;
}

bool overlaps_launches(int device) { return compute_capability(device) >= 90; }

bool capturing(int device, uintptr_t stream) {
  const ContextGuard guard(device);  // the default stream is that of the current context
  return captured(stream);
}

bool captured(uintptr_t stream) {
  CUstreamCaptureStatus status;
  driver().cuStreamIsCapturing(reinterpret_cast<CUstream>(stream), &status);
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

bool is_current(int device) {
  CUcontext current = nullptr;
  driver().cuCtxGetCurrent(&current);
  return current == primary_context(device);
}

ContextGuard::ContextGuard(int device) {
  if (is_current(device)) return;
  driver().cuCtxPushCurrent(primary_context(device));
  pushed_ = true;
}

ContextGuard::~ContextGuard() {
  CUcontext popped;
  if (pushed_) loaded_driver().calls.cuCtxPopCurrent.function(&popped);
}

}  // namespace mla
