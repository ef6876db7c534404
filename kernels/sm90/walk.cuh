// How a producer walks the pieces that its CTA computes, and brings Q and the description of each to those who multiply.
#pragma once

#include "rows.cuh"

namespace mla::sm90 {

// The CTA: two warpgroups that multiply, and the producer behind them. Of its warps two load KV, the others copy Q.
constexpr int kWarpgroupThreads = 128, kWarpgroupWarps = 4, kConsumers = 2;
constexpr int kCopyWarps = 2, kQWarps = 2;

// Of a worker's range, see reads_once().
constexpr int kManyTokens = 1024;

// From the last piece to the first: that may have to be merged with the last one of the group before, which is then long there.
template <class C>
class PieceWalk {
 public:
  __device__ __forceinline__ explicit PieceWalk(const DecodeParams& params)
      : p(params),
        plan(schedule::view(params.plan, params.num_workers)),
        worker(plan.workers[blockIdx.x]),
        units_per_group(params.plan->units_per_group) {
    index = worker.end_piece - 1;
    block = make_row_block(p, worker.last, worker.member, C::block_rows);
    if (!more() || !has_work(block)) advance();
  }
  __device__ __forceinline__ bool more() const { return index >= worker.first_piece; }
  __device__ __forceinline__ void advance() {
    index = next_piece(p, plan.pieces, worker, index - 1, -1, C::block_rows);
    block = block_of(index);
  }
  // Without tiles, if there is no such piece.
  __device__ __forceinline__ RowBlock block_of(int of) const {
    RowBlock found{};
    if (of >= worker.first_piece) found = make_row_block(p, plan.pieces[of], worker.member, C::block_rows);
    return found;
  }
  __device__ __forceinline__ RowBlock first_block() const { return block_of(worker.first_piece); }
  // What those who multiply are told.
  __device__ __forceinline__ RowBlock description() const {
    RowBlock told = block;
    told.group_size = worker.group_size;
    if (more() && index == worker.first_piece) told.pairs |= worker.pairs & kMergesFirst;
    if (more() && index == worker.end_piece - 1) told.pairs |= worker.pairs & kLeavesLast;
    return told;
  }
  // Whether no two workers of the call read the same KV, and each reads much: then L2 need not keep it. The same for all of them, as what
  // some keep leaves the others no gain. With few tokens a worker it takes longer: 33.0 to 33.5 -> 33.6 to 34.6 us at 16 requests of 4,096
  // tokens and 64 heads, but 580 -> 561 at 128 of 16,384 (measured, H200: sm90_3wg.md).
  __device__ __forceinline__ bool reads_once() const {
    return worker.group_size == 1 && (units_per_group == 0 || units_per_group >= kManyTokens / kTileTokens);
  }
  // Of the lane's box, in tile `tile` of the piece or in one of the next.
  __device__ __forceinline__ Slot box_slot_at(int tile) const {
    return box_slot(p, block.request, block.first_tile + tile, block.len);
  }
  // Of row `row` of the tile.
  __device__ __forceinline__ Slot row_slot_at(int tile, int row) const {
    return slot_of(p, block.request, (block.first_tile + tile) * kTileTokens + row, block.len);
  }

  RowBlock block;

 private:
  const DecodeParams& p;
  const schedule::PlanView plan;
  int index;

 public:
  const PlanWorker worker;

 private:
  const int64_t units_per_group;  // 0 if batch-invariant
};

// By kQWarps warps of the producer: Q of each piece to `q_at` once `q_free` says that nobody reads the one before any more, and what
// the piece is to `block_at`, one place for each parity. A description without rows says that there is no more. Parts of an item
// (common/parts.h) that follow each other have the same Q, which stays.
template <class C>
__device__ __forceinline__ void copy_q_of_pieces(const DecodeParams& p, PieceWalk<C>& walk, uint32_t q_at,
                                                 uint32_t block_at, uint32_t q_full, uint32_t q_free) {
  const int thread = threadIdx.x % (32 * kQWarps);
  int request = -1, first_row = 0;      // whose Q is there
  for (int parity = 0;; parity ^= 1) {  // of the piece
    mbarrier_wait(q_free, parity ^ 1);
    const RowBlock block = walk.description();
    if (walk.more() && (block.request != request || block.first_row != first_row)) {
      copy_q<C>(p, block, q_at, thread, 32 * kQWarps);
      request = block.request, first_row = block.first_row;
    }
    if (thread == 0) store_shared_struct(block_at + parity * static_cast<uint32_t>(sizeof(RowBlock)), block);
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    __syncwarp();  // all lanes have fenced their copies
    if (thread % 32 == 0) mbarrier_arrive(q_full);
    if (!walk.more()) break;
    walk.advance();
  }
}

}  // namespace mla::sm90
