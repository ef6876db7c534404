// Programmatic dependent launch: a kernel that was launched to may start while the one before it in the stream still runs.
#pragma once

namespace mla {

// The kernel behind this one may start once every CTA has come here or ended; it waits for this one's results by itself.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// What the kernel before, and all before that one, wrote may be read from here on, and what they read be written. It has ended.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace mla
