// What append passes to its kernel, and how its threads share the work.
#pragma once

#include "../params.h"

namespace mla {

// Where element (request, token, 0) lies: data + request * batch + token * token. Strides in elements; for ragged tokens `batch` is 0
// and `token` counts through the whole tensor.
struct TokenStrides {
  int64_t batch, token;
};

// New rows of the cache: latent columns, then rope columns, for tokens at positions of requests.
struct AppendParams {
  const void *latent, *rope;
  void *latent_cache, *rope_cache;
  const int32_t* block_table;   // [num_requests, max_pages]
  const int32_t* positions;     // of the tokens, from 0; whatever is not in the block table's reach is left out
  const int32_t* cu_seqlens_q;  // [num_requests + 1], or null: every request has s_q tokens
  const float* cos_sin;         // [num_angles, rope columns], cos of each pair, then sin; null: nothing is rotated
  TokenStrides latent_strides, rope_strides, positions_strides;
  CacheStrides latent_cache_strides, rope_cache_strides;
  int64_t block_table_stride, cos_sin_stride;  // elements between rows
  int32_t num_tokens, num_requests, s_q;
  int32_t max_pages, num_pages, page_size;
  int32_t num_angles;
  int32_t latent_chunks, rope_chunks;  // columns in chunks of kAppendColumns
  int32_t interleaved;                 // pairs are neighbours; else the halves, and rope_chunks is even
  FastDivisor by_page_size, by_s_q;
};

constexpr int kAppendThreads = 128, kAppendColumns = 8;
constexpr int kAppendTokensPerCta = kAppendThreads / 32;  // a warp has a token

static_assert(sizeof(AppendParams) == 8 * 8 + 3 * 16 + 2 * 16 + 2 * 8 + 10 * 4 + 2 * 8);

}  // namespace mla
