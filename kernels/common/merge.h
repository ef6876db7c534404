// What merge_states passes to its kernel, and how its threads share the work.
#pragma once

#include "../params.h"

namespace mla {

// Two attention states over disjoint KV, and theirs merged: rows of d columns with one log-sum-exp each. `out` may be o_a or o_b,
// and `lse` lse_a or lse_b; nothing that is written lies elsewhere under what is read.
struct MergeParams {
  const void *o_a, *o_b;
  void* out;
  const float *lse_a, *lse_b;  // natural logarithm; infinite for a row of an empty state
  float* lse;
  RowStrides o_a_strides, o_b_strides, out_strides, lse_a_strides, lse_b_strides, lse_strides;
  int32_t num_rows;       // row = (batch * tokens + token) * heads + head
  int32_t tokens, heads;  // the last two of a row's three dimensions
  int32_t row_chunks;     // d in chunks of kMergeColumns
  int32_t row_threads;    // that share a row; each takes every row_threads-th chunk
  int32_t rows_per_cta;   // row_threads * rows_per_cta <= kMergeThreads
  FastDivisor by_tokens, by_heads, by_row_threads;
};

constexpr int kMergeThreads = 256, kMergeColumns = 8;

static_assert(sizeof(MergeParams) == 6 * 8 + 6 * 24 + 6 * 4 + 3 * 8);

}  // namespace mla
