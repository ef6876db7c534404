// Kernels, loaded from the embedded images when first needed and kept for the life of the process.
#pragma once

#include <string_view>

#include "driver.h"

namespace mla {

struct Kernel {
  CUkernel handle;
  unsigned smem_bytes;  // dynamic shared memory to launch it with
};

// How much shared memory a launch asks for.
enum class Occupancy {
  any,               // no dynamic shared memory
  one_block_per_sm,  // what the kernel needs, or as much as keeps a second CTA off the SM
};

// The entry point of an image, ready to be launched on a device. Safe to call from any thread.
const Kernel& get_kernel(std::string_view image, std::string_view entry, int device, Occupancy occupancy,
                         int smem_bytes = 0);

// Brings the kernel's machine code into the device's context, which otherwise happens at its first launch.
void load_now(const Kernel& kernel);

}  // namespace mla
