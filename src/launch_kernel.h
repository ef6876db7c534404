// One launch of a kernel, in one dimension.
#pragma once

#include <cstdint>

#include "driver.h"
#include "module.h"

namespace mla {

// Beside it: by programmatic dependent launch. The kernel waits for the one before by itself.
enum class Start { after_kernel_before, beside_kernel_before };

// The arguments are the kernel's parameters, in order. The device's context is current.
template <class... Args>
void launch_kernel(const Kernel& kernel, unsigned blocks, unsigned threads, uintptr_t stream, Start start,
                   const Args&... args) {
  CUlaunchConfig config{};
  CUlaunchAttribute beside{};
  beside.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  beside.value.programmaticStreamSerializationAllowed = 1;
  config.attrs = &beside;
  config.numAttrs = start == Start::beside_kernel_before;
  config.gridDimX = blocks;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = kernel.smem_bytes;
  config.hStream = reinterpret_cast<CUstream>(stream);
  void* pointers[] = {const_cast<Args*>(&args)...};  // the driver copies what they point to
  // The driver takes a CUkernel for a CUfunction and finds the current context's instance of it.
  driver().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel.handle), pointers, nullptr);
}

}  // namespace mla
