#include "append.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "chain.h"
#include "common/append.h"
#include "registry.h"

namespace mla {
namespace {

int32_t size_at_least(int64_t least, int64_t size, const char* name) {
  if (size < least || size > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string(name) + " must be " + std::to_string(least) + " to 2^31 - 1");
  return static_cast<int32_t>(size);
}

int32_t chunks_of(int64_t columns, int64_t multiple, const char* name) {
  if (columns % multiple)
    throw std::invalid_argument(std::string(name) + " must be multiples of " + std::to_string(multiple));
  return size_at_least(0, columns, name) / kAppendColumns;
}

}  // namespace

void launch_append(std::string_view dtype, const AppendAddresses& addresses, const AppendStrides& strides,
                   const AppendSizes& sizes, bool interleaved, int device, uintptr_t stream) {
  const char* entry = find_dtype(dtype) == Dtype::bf16 ? "mla_append_bf16" : "mla_append_fp16";
  const auto [latent, rope, latent_cache, rope_cache, block_table, positions, cu_seqlens_q, cos_sin] = addresses;

  AppendParams p{};
  p.latent = reinterpret_cast<const void*>(latent);
  p.rope = reinterpret_cast<const void*>(rope);
  p.latent_cache = reinterpret_cast<void*>(latent_cache);
  p.rope_cache = reinterpret_cast<void*>(rope_cache);
  p.block_table = reinterpret_cast<const int32_t*>(block_table);
  p.positions = reinterpret_cast<const int32_t*>(positions);
  p.cu_seqlens_q = reinterpret_cast<const int32_t*>(cu_seqlens_q);
  p.cos_sin = reinterpret_cast<const float*>(cos_sin);
  p.latent_strides = {strides[0], strides[1]};
  p.rope_strides = {strides[2], strides[3]};
  p.positions_strides = {strides[4], strides[5]};
  p.latent_cache_strides = {strides[6], strides[7]};
  p.rope_cache_strides = {strides[8], strides[9]};
  p.block_table_stride = strides[10];
  p.cos_sin_stride = strides[11];
  p.num_tokens = size_at_least(1, sizes[0], "tokens");
  p.num_requests = size_at_least(1, sizes[1], "requests");
  p.s_q = size_at_least(cu_seqlens_q ? 0 : 1, sizes[2], "s_q");
  if (!cu_seqlens_q && int64_t{p.num_requests} * p.s_q != p.num_tokens)
    throw std::invalid_argument("tokens must be requests * s_q");
  p.max_pages = size_at_least(0, sizes[3], "max_pages");
  p.num_pages = size_at_least(0, sizes[4], "pages");
  p.page_size = size_at_least(1, sizes[5], "page_size");
  p.num_angles = size_at_least(0, sizes[6], "rows of cos_sin");
  p.latent_chunks = chunks_of(sizes[7], kAppendColumns, "latent columns");
  p.rope_chunks = chunks_of(sizes[8], cos_sin && !interleaved ? 2 * kAppendColumns : kAppendColumns, "rope columns");
  p.interleaved = interleaved;
  p.by_page_size = make_fast_divisor(p.page_size);
  p.by_s_q = make_fast_divisor(p.s_q ? p.s_q : 1);

  const ContextGuard guard(device);
  const int64_t ctas = (int64_t{p.num_tokens} + kAppendTokensPerCta - 1) / kAppendTokensPerCta;
  queue_alone(get_kernel("append", entry, device, Occupancy::any), static_cast<unsigned>(ctas), kAppendThreads, p,
              device, stream);
}

}  // namespace mla
