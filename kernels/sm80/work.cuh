// The pieces of work that the schedule gives this CTA, and where a row of a piece lies in the caller's tensors.
#pragma once

#include "../common/math.cuh"
#include "../common/plan_view.h"
#include "ptx.cuh"

namespace mla::sm80 {

// A query row of the caller's; token: of all query tokens.
struct Row {
  int request, token, head;
};
// Where the elements of a row lie in a tensor of query rows.
__device__ __forceinline__ int64_t offset_of(const Row& row, const RowStrides& strides) {
  return row.request * strides.batch + row.token * strides.token + row.head * strides.head;
}

template <class C>
struct Work {
  const DecodeParams& p;

  // The plan is found anew each time: no registers are spent on it in the loop.
  __device__ __forceinline__ schedule::PlanView plan() const {
    int num_workers = p.num_workers;
    asm volatile("" : "+r"(num_workers));
    return schedule::view(p.plan, num_workers);
  }
  __device__ __forceinline__ const Piece* pieces() const { return plan().pieces; }
  __device__ __forceinline__ PlanWorker worker() const {  // without its last piece
    uint32_t words[4];
    load_global(words, &plan().workers[blockIdx.x]);
    PlanWorker worker{};
    worker.first_piece = static_cast<int>(words[0]);
    worker.end_piece = static_cast<int>(words[1]);
    worker.member = static_cast<int>(words[2]);
    return worker;
  }

  __device__ __forceinline__ int first_row_of(const Piece& piece) const {
    return piece.first_row + worker().member * C::block_rows;
  }
  // That exist of this worker's block; may be none, or more than the block has.
  __device__ __forceinline__ int num_rows_of(const Piece& piece) const {
    return piece.num_tokens * p.lengths.h_q - first_row_of(piece);
  }
  __device__ __forceinline__ int len_of(
      const Piece& piece) const {  // a plan may have been made for a longer block table
    return static_cast<int>(min(int64_t{piece.len}, p.lengths.max_len));
  }
  __device__ __forceinline__ int slot_of(const Piece& piece) const { return piece.partial_slot + worker().member; }
  // The worker's next piece at or after number `index` of which tile number `tile` and a row of this block exist, or end_piece.
  __device__ __forceinline__ int next_piece_at(int index, int tile) const {
    const int end_piece = worker().end_piece;
    while (index < end_piece &&
           (num_rows_of(pieces()[index]) <= 0 || pieces()[index].first_tile + tile >= pieces()[index].end_tile))
      ++index;
    return warp_uniform(index);
  }
  // Which of the caller's rows a row of the block is.
  __device__ __forceinline__ Row row_of(const Piece& piece, int block_row) const {
    const int row = first_row_of(piece) + block_row, token = divide(row, p.by_h_q);
    return {piece.request, piece.first_token + token, row - token * p.lengths.h_q};
  }
};

}  // namespace mla::sm80
