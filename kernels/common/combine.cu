// Merges the partial results of split items: out = sum_s w_s o_s with w_s = 2^(lse2_s - lse2), lse2 = log2 sum_s 2^lse2_s.
//
// A task is 16 rows of an item and 16 columns. Its parts are asked for four at a time, a chunk. One in eight chunks after the other makes a
// sum, relative to the max of its own parts, and these eight are added one after the other. As many warps share them as there are for all
// tasks, if there is more than one: so the bits depend on the parts alone.
//
// A call waits for this kernel from the end of the last decode CTA to its own, and nearly all of that is instructions that wait for one
// another. So there is one barrier at most, no lane reckons what another one must know first, but the max of its quad, there are no
// branches between what may overlap, and what can be is reckoned ahead of the wait for the parts. What that gave: DESIGN.md, decision 18.

#include "dependent.cuh"
#include "schedule.h"
#include "sums.cuh"

namespace mla {

template <class T, int DV, int CtasPerWorker>
__device__ __forceinline__ void combine(const CombineParams& p, schedule::Shape shape) {
  // If any warps share a task, so many do at least: what they keep is shared memory of all CTAs.
  constexpr unsigned log2_least_shares = CtasPerWorker == kFewCombineCtas ? 1 : 2;
  __shared__ Kept<(kCombineWarps >> log2_least_shares) * kSums> kept;
  constexpr unsigned column_blocks = DV / kFragmentColumns, log2_blocks = DV == 512 ? 5 : 4;
  static_assert(column_blocks == 1 << log2_blocks);
  const unsigned warp = threadIdx.x / 32;
  const int quad = threadIdx.x % 32 / 4, in_quad = threadIdx.x % 4;
  const SplitItem* first_splits = schedule::splits_of(p.plan);
  const unsigned group_size = p.plan->group_size, num_items = p.plan->num_splits;

  unsigned rows = group_size * shape.block_rows;  // of an item, at most
  if (!p.lengths.cu_seqlens_q) rows = min(rows, static_cast<unsigned>(p.lengths.s_q) * p.lengths.h_q);
  const unsigned row_tiles = (rows + kFragmentRows - 1) / kFragmentRows;
  const unsigned num_row_tiles = num_items * row_tiles, num_tasks = num_row_tiles << log2_blocks;
  // Warps of a task: as many as there are for all of them.
  unsigned log2_shares = kLog2CombineWarps;
  while (log2_shares > 0 && num_row_tiles > gridDim.x << (kLog2CombineWarps - log2_shares) >> log2_blocks)
    log2_shares = log2_shares > log2_least_shares ? log2_shares - 1 : 0;
  const unsigned shares = 1u << log2_shares, share = warp % shares;  // the warps, and which of them this is

  SplitItem item;
  int first_row;  // of the task
  Parts parts{};
  auto look_up = [&](unsigned task, const SplitItem* splits) {
    if (task >= num_tasks) return;
    unsigned number = task >> log2_blocks;
    int row_tile = 0;  // of the item
    for (; number >= num_items; ++row_tile) number -= num_items;
    item = splits[number];
    const int block_tiles = shape.block_rows / kFragmentRows, member = row_tile >> (31 - __clz(block_tiles));
    first_row = item.first_row + row_tile * kFragmentRows;
    parts.num_rows = item.num_tokens * p.lengths.h_q - first_row;
    parts.row_tile = row_tile - member * block_tiles, parts.column_block = task % column_blocks;
    parts.first = (item.first_slot + member) * block_tiles;
    parts.before_second = (item.second_slot + member - item.slot_step) * block_tiles;
    parts.step = item.slot_step * block_tiles;
    parts.number = parts.num_rows > 0 ? item.num_pieces : 0;
  };
  // Columns of row g (half 0) or g + 8 of the output, and its log-sum-exp with the first of them.
  auto store = [&](int half, unsigned column, const RowState& state, auto words) {
    const int of_16 = quad + half * 8, row = first_row + of_16;
    if (of_16 >= parts.num_rows) return;
    const int token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
    auto at = [&](const RowStrides& strides) {
      return item.request * strides.batch + (item.first_token + token) * strides.token + head * strides.head;
    };
    *reinterpret_cast<decltype(words)*>(static_cast<uint16_t*>(p.out) + at(p.out_strides) + column) = words;
    if (p.lse && column == 0) p.lse[at(p.lse_strides)] = lse2_of(state.max, state.sum) * kLn2;
  };
  // +0 is added as it may have been before: sums without parts are added where warps share them, and are not where they do not.
  auto scaled_pair = [](const RowState& state, float x, float y) {
    const float scale = inverse_fast(state.sum);
    return pack2<T>(fmaf(x, scale, 0.f), fmaf(y, scale, 0.f));
  };

  unsigned task = (blockIdx.x * kCombineWarps + warp) >> log2_shares;
  look_up(task, first_splits);
  wait_for_kernel_before();

  if ((shares == 1 ? task : blockIdx.x * kCombineWarps >> log2_shares) >= num_tasks) return;
  const unsigned place = shares == 1 ? warp : warp / shares * kSums;
#pragma unroll 1
  for (;;) {
    Sum sum;
#pragma unroll 1
    for (unsigned number = share;;) {
      sum = kNothing;
#pragma unroll 1
      for (unsigned chunk = number; chunk * kChunkParts < parts.number; chunk += kSums)
        add_chunk<DV>(sum, p, shape.block_rows, parts, chunk);
      if (shares == 1 && number > 0) add_kept(sum, kept, place);
      const unsigned of_sum = number;
      number += shares;
      if (shares == 1 && (number == kSums || number * kChunkParts >= parts.number)) break;
      keep(kept, shares == 1 ? place : place + of_sum, sum);
      if (number >= kSums) break;
    }
    if (shares > 1) break;

    asm volatile("" : "+r"(first_row));  // no address of the output ahead of the parts: registers
    // Each lane of a quad gets 8 columns: the first and the second 8 of row g, then those of row g + 8.
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = scaled_pair(sum.rows[i % 2], sum.o[i * 2], sum.o[i * 2 + 1]);
    const bool lower = in_quad >= 2;
    const RowState row = {lower ? sum.rows[1].max : sum.rows[0].max, lower ? sum.rows[1].sum : sum.rows[0].sum};
    store(lower, parts.column_block * kFragmentColumns + in_quad % 2 * 8, row, quad_transposed(words));
    task += gridDim.x * kCombineWarps;
    if (task >= num_tasks) return;
    look_up(task, schedule::splits_of(p.plan));
  }

  __syncthreads();  // all sums are there
  if (task >= num_tasks) return;
  // Of the lane's share of a fragment there are four pairs of columns.
#pragma unroll 1
  for (unsigned pair = share; pair < 4; pair += shares) {
    RowState row = kept_state(kept, place, pair);
    float2 o = kept_pair(kept, place, pair);
    const auto add_sums = [&](auto first) {  // as many as before it
#pragma unroll
      for (unsigned i = first.value; i < 2 * first.value; ++i) {
        const float2 added = kept_pair(kept, place + i, pair);
        const Factors factors = add_state(row, kept_state(kept, place + i, pair));
        o = make_float2(add(o.x, added.x, factors), add(o.y, added.y, factors));
      }
    };
    add_sums(Index<1>{});
    if (parts.number > 2 * kChunkParts) add_sums(Index<2>{});
    if (parts.number > 4 * kChunkParts) add_sums(Index<4>{});
    static_assert(kSums == 8);
    store(static_cast<int>(pair % 2), parts.column_block * kFragmentColumns + pair / 2 * 8 + in_quad * 2, row,
          scaled_pair(row, o.x, o.y));
  }
}

}  // namespace mla

// Of a worker's CTAs, which do not wait for one another, those on an SM at one time: code for sm_86 would spill with the registers of four.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MLA_RESIDENT(ctas) (mla::ctas < 3 ? mla::ctas : 3)
#else
#define MLA_RESIDENT(ctas) mla::ctas
#endif
#define MLA_COMBINE(dtype, d_v, tasks, ctas)                                               \
  extern "C" __global__ void __launch_bounds__(mla::kCombineThreads, MLA_RESIDENT(ctas))   \
      mla_combine_##dtype##_v##d_v##_##tasks(const __grid_constant__ mla::CombineParams p, \
                                             mla::schedule::Shape shape) {                 \
    mla::combine<mla::dtype, d_v, mla::ctas>(p, shape);                                    \
  }
#define MLA_COMBINE_BOTH(dtype, d_v)            \
  MLA_COMBINE(dtype, d_v, few, kFewCombineCtas) \
  MLA_COMBINE(dtype, d_v, many, kManyCombineCtas)
MLA_COMBINE_BOTH(bf16, 512)
MLA_COMBINE_BOTH(fp16, 512)
MLA_COMBINE_BOTH(bf16, 256)
MLA_COMBINE_BOTH(fp16, 256)
