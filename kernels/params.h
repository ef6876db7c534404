// What the host passes to the kernels: plain structs, no CUDA headers, so that g++ and nvcc read the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla {

// Division of 0 <= n < 2^31 by a divisor that only the launch knows, as a multiplication: n * multiplier >> shift.
// With s = ceil(log2 divisor) and multiplier = ceil(2^(31 + s) / divisor) < 2^32 the error stays below one part in n.
struct FastDivisor {
  uint32_t multiplier;
  uint32_t shift;
};

inline FastDivisor make_fast_divisor(int32_t divisor) {
  uint32_t log2 = 0;
  while ((int64_t{1} << log2) < divisor) ++log2;
  const uint64_t unit = uint64_t{1} << (31 + log2), d = static_cast<uint64_t>(divisor);
  return {static_cast<uint32_t>((unit + d - 1) / d), 31 + log2};
}

// Where element (request, token, head, 0) of a per-query tensor lies: data + request * batch + token * token + head * head.
// Strides in elements. For a ragged tensor `batch` is 0 and `token` counts through the whole tensor.
struct RowStrides {
  int64_t batch, token, head;
};

// Where row (page, slot) of a paged cache lies: data + page * page + slot * token. Strides in elements.
struct CacheStrides {
  int64_t page, token;
};

// A CUtensorMap as the driver encodes it.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// A schedule in device memory: this header, PlanWorker[num_workers], the pieces, the SplitItems, and what only
// the planner reads.
// What the words mean and how large the whole is: common/schedule.h and, of a batch-invariant one, common/parts.h.
struct PlanHeader {
  int64_t units_per_group;  // 0 if batch-invariant
  int64_t item_span;        // units from one item to the next; 0: as many as the item has
  int64_t splits_at;        // bytes from here to the SplitItems
  int32_t num_groups;       // that may have work, at most num_workers / group_size
  int32_t group_size;       // workers side by side on the same KV, one row block each
  int32_t num_splits;       // valid SplitItems
  int32_t batch_invariant;  // what is added to what, and in which order, depends on each request alone
  int32_t overhead;         // units of an item ahead of its tokens
  int32_t reserved;
};

// A range of KV tiles of one item. Row and slot are those of member 0.
struct alignas(16) Piece {
  int32_t request;
  int32_t first_token;  // of the request's query tokens, in the whole query
  int32_t num_tokens;   // query tokens of the request
  int32_t len;          // KV tokens of the request
  int32_t first_row;    // of the request's packed rows: token * h_q + head
  int32_t first_tile, end_tile;
  int32_t partial_slot;  // -1: the piece is the whole item, its result is final
};

// What one CTA computes: pieces [first_piece, end_piece), of each the row block `member` of the bundle.
struct alignas(16) WorkerRange {
  int32_t first_piece, end_piece;
  int32_t member;
  int32_t pairs;       // of kMergesFirst and kLeavesLast
  int32_t group_size;  // as in PlanHeader
  int32_t reserved[3];
};
struct alignas(16) PlanWorker : WorkerRange {
  Piece last;  // a copy of the last piece, if there is any: who begins with it reads it with the rest
};
// An item in two pieces is a pair, where the pipeline merges pairs: the later group merges what the one before it left.
constexpr int32_t kMergesFirst = 1;  // the worker's first piece is the later one of a pair
constexpr int32_t kLeavesLast = 2;   // its last piece is the earlier one

// An item in several pieces, whose partial results the combine kernel merges: that of piece 0 is at first_slot, that of piece i > 0 at
// second_slot + (i - 1) * slot_step.
struct alignas(16) SplitItem {
  int32_t request, first_token, num_tokens, first_row;  // as in Piece
  int32_t num_pieces;
  int32_t first_slot, second_slot, slot_step;  // of member 0
};

// What is attended to: the part of a problem that a schedule depends on.
struct Lengths {
  const int32_t* seq_lens;      // [num_requests], clamped to [0, max_len]
  const int32_t* cu_seqlens_q;  // [num_requests + 1], or null: every request has s_q query tokens
  int32_t num_requests;
  int32_t s_q;      // query tokens of each request; unused when ragged
  int32_t total_q;  // query tokens of all requests
  int32_t h_q;
  int64_t max_len;  // tokens that a row of the block table reaches
};

struct DecodeParams {
  Lengths lengths;

  // Query rows: d_v columns of q_nope, then d_qk - d_v of q_rope.
  const void* q_nope;
  const void* q_rope;
  RowStrides q_nope_strides, q_rope_strides;

  // Cache rows: d_v columns of latent, then d_qk - d_v of rope.
  const void* latent;
  const void* rope;
  CacheStrides latent_strides, rope_strides;
  const int32_t* block_table;  // [num_requests, max_pages]
  int64_t block_table_stride;  // elements between requests
  int32_t num_pages;           // in the pool; page ids are clamped to it
  int32_t page_size;

  void* out;  // [.., h_q, d_v]
  RowStrides out_strides;
  float* lse;  // [.., h_q] or null, natural logarithm
  RowStrides lse_strides;

  float scale_log2;  // softmax scale * log2(e)
  int32_t causal;    // bottom-right aligned

  FastDivisor by_page_size, by_h_q;  // filled in by the launch

  const PlanHeader* plan;   // lengths as they were when it was made; num_workers as here
  int32_t num_workers;      // CTAs of the grid
  int32_t batch_invariant;  // the planner is to make such a plan, and partial results have that many slots
  void* o_partial;          // [slots, block_rows, d_v], of kPartialBytes
  float* lse2_partial;      // [slots, 1 + kColumnRuns, block_rows], base 2

  // What boxes of the cache are fetched by, filled in by the launch for the pipelines that do: 3-D (column, slot, page), boxes of
  // 64 columns x box_rows slots x 1 page, 128-byte swizzle, zeros for what lies outside. A box of the rope map is as wide, although
  // it has only d_qk - d_v columns; without rope columns there is no such map.
  int32_t box_rows;  // a power of two up to 64 that divides page_size; 0: there are no maps, rows are copied by address
  TensorMap latent_map, rope_map;
};

// What the combine kernel reads of them. Not the cache nor the query, which are others in each layer of a model: so its parameters are
// often those of the call before, which saves the host to set them.
struct CombineParams {
  Lengths lengths;
  void* out;
  RowStrides out_strides;
  float* lse;
  RowStrides lse_strides;
  FastDivisor by_h_q;
  const PlanHeader* plan;
  void* o_partial;
  float* lse2_partial;
};

inline CombineParams combine_params(const DecodeParams& p) {
  return {p.lengths, p.out, p.out_strides, p.lse, p.lse_strides, p.by_h_q, p.plan, p.o_partial, p.lse2_partial};
}

// TMA boxes of the cache have at least this many rows of one page; pages that none fit are copied row by row.
constexpr int kMinBoxRows = 16;

// Partial results (common/partials.cuh): bytes of a number, the runs of a row's columns that are scaled alike, and the fragments.
constexpr int kPartialBytes = 2, kColumnRuns = 8;
constexpr int kFragmentRows = 16, kFragmentColumns = 16;

// Launch shapes of the two small kernels, the first of which is one CTA; those of the pipelines are in variants.inc.
constexpr int kPlanThreads = 512, kPlanThreadsOfFew = 384;
// The combine kernel has two forms. The CTAs of the first one are on an SM in twos: where these have a warp for each task, they are faster
// than more (measured: DESIGN.md, decision 18). The second one is for more tasks.
constexpr int kCombineThreads = 256, kFewCombineCtas = 2, kManyCombineCtas = 4;  // of a worker

static_assert(sizeof(TensorMap) == 128);
static_assert(sizeof(PlanHeader) == 48 && sizeof(PlanWorker) == 64 && sizeof(Piece) == 32 && sizeof(SplitItem) == 32);

}  // namespace mla
