// The launch of merge_states.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace mla {

// o_a, o_b, out, then lse_a, lse_b, lse.
constexpr size_t kMergeTensors = 6;

// Merges rows [sizes[0], sizes[1], sizes[2]] of d columns; strides count elements. Asynchronous, allocates nothing and may be
// captured in a graph. Throws std::out_of_range for a dtype without kernels, std::invalid_argument for sizes that they cannot have.
void launch_merge(std::string_view dtype, const std::array<uintptr_t, kMergeTensors>& addresses,
                  const std::array<std::array<int64_t, 3>, kMergeTensors>& strides, const std::array<int64_t, 3>& sizes,
                  int64_t d, int device, uintptr_t stream);

}  // namespace mla
