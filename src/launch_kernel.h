// Launches of kernels, in one dimension.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "driver.h"
#include "module.h"

namespace mla {

// Beside it: by programmatic dependent launch. The kernel waits for the one before by itself.
enum class Start { after_kernel_before, beside_kernel_before };
inline Start start_of(bool beside) { return beside ? Start::beside_kernel_before : Start::after_kernel_before; }

struct KernelLaunch {
  static constexpr int kMaxArguments = 5;

  const Kernel* kernel = nullptr;
  unsigned blocks = 0, threads = 0;
  Start start = Start::after_kernel_before;
  // The kernel's parameters, in order: where they are, until they are queued, and their sizes.
  std::array<void*, kMaxArguments> arguments{};
  std::array<size_t, kMaxArguments> sizes{};
};

template <class... Args>
KernelLaunch make_launch(const Kernel& kernel, unsigned blocks, unsigned threads, Start start, const Args&... args) {
  static_assert(sizeof...(args) <= KernelLaunch::kMaxArguments);
  return {&kernel, blocks, threads, start, {const_cast<Args*>(&args)...}, {sizeof(args)...}};
}

// The device's context is current.
inline void launch(const KernelLaunch& launch, uintptr_t stream) {
  CUlaunchConfig config{};
  CUlaunchAttribute beside{};
  beside.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  beside.value.programmaticStreamSerializationAllowed = 1;
  config.attrs = &beside;
  config.numAttrs = launch.start == Start::beside_kernel_before;
  config.gridDimX = launch.blocks;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = launch.threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = launch.kernel->smem_bytes;
  config.hStream = reinterpret_cast<CUstream>(stream);
  // The driver copies the parameters. It takes a CUkernel for a CUfunction and finds the current context's instance of it.
  driver().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(launch.kernel->handle),
                            const_cast<void**>(launch.arguments.data()), nullptr);
}

}  // namespace mla
