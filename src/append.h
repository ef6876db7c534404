// The launch of append.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace mla {

// latent, rope, latent cache, rope cache, block_table, positions, cu_seqlens_q, cos_sin. 0 where there is none of the last two, and
// for rope and its cache where there are no rope columns.
using AppendAddresses = std::array<uintptr_t, 8>;

// In elements: (request, token) of latent, of rope and of positions; (page, slot) of the latent cache and of the rope cache; rows of
// block_table and of cos_sin.
using AppendStrides = std::array<int64_t, 12>;

// num_tokens, num_requests, s_q (0 with cu_seqlens_q), max_pages, num_pages, page_size, rows of cos_sin, latent columns, rope columns.
using AppendSizes = std::array<int64_t, 9>;

// Writes rows of new tokens into a paged cache. Asynchronous, allocates nothing and may be captured in a graph. Throws
// std::out_of_range for a dtype without kernels, std::invalid_argument for sizes that the kernel cannot have.
void launch_append(std::string_view dtype, const AppendAddresses& addresses, const AppendStrides& strides,
                   const AppendSizes& sizes, bool interleaved, int device, uintptr_t stream);

}  // namespace mla
