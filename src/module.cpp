#include "module.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "images.h"

namespace mla {
namespace {

CUlibrary load_library(const Image& image) {
  // The image lives as long as this module, so the driver need not copy it.
  CUlibraryOption options[] = {CU_LIBRARY_BINARY_IS_PRESERVED};
  void* values[] = {reinterpret_cast<void*>(uintptr_t{1})};
  CUlibrary library;
  driver().cuLibraryLoadData(&library, image.begin, nullptr, nullptr, 0, options, values, 1);
  return library;
}

int attribute(CUdevice_attribute name, CUdevice device) {
  int value;
  driver().cuDeviceGetAttribute(&value, name, device);
  return value;
}

// More than half of an SM's shared memory leaves no room for a second CTA. Persistent kernels want that: their schedule
// is cut for one CTA per SM, and two on one SM would leave another SM idle.
unsigned smem_for_one_block(int needed, CUdevice device) {
  const int half = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, device) / 2 + 1024;
  const int largest = attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device);
  return static_cast<unsigned>(std::max(needed, std::min(half, largest)));
}

}  // namespace

const Kernel& get_kernel(std::string_view image, std::string_view entry, int device, Occupancy occupancy,
                         int smem_bytes) {
  static std::mutex mutex;
  static std::map<std::string_view, CUlibrary> libraries;
  static std::map<int, std::map<std::string, Kernel, std::less<>>> by_device;
  const std::lock_guard<std::mutex> lock(mutex);

  auto& kernels = by_device[device];
  if (const auto found = kernels.find(entry); found != kernels.end()) return found->second;

  const Image& source = find_image(image);
  auto library = libraries.find(source.name);
  if (library == libraries.end()) library = libraries.emplace(source.name, load_library(source)).first;

  Kernel kernel{};
  driver().cuLibraryGetKernel(&kernel.handle, library->second, std::string(entry).c_str());
  CUdevice handle;
  driver().cuDeviceGet(&handle, device);
  if (occupancy == Occupancy::one_block_per_sm) {
    kernel.smem_bytes = smem_for_one_block(smem_bytes, handle);
    driver().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, static_cast<int>(kernel.smem_bytes),
                                  kernel.handle, handle);
  } else {
    // An SM is divided between shared memory and L1, and must be idle to be divided anew: as the persistent kernels have it.
    driver().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, CU_SHAREDMEM_CARVEOUT_MAX_SHARED,
                                  kernel.handle, handle);
  }
  return kernels.emplace(entry, kernel).first->second;
}

void load_now(const Kernel& kernel) {
  CUfunction function;
  driver().cuKernelGetFunction(&function, kernel.handle);
}

}  // namespace mla
