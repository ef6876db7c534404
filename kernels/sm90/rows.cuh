// The rows of a block: which query rows a piece is computed for, Q's way into shared memory, and the way of the results.
#pragma once

#include "../common/partials.cuh"
#include "../common/schedule.h"
#include "softmax.cuh"
#include "tile.cuh"

namespace mla::sm90 {

// A piece as one worker computes it.
struct alignas(16) RowBlock {
  int request, first_token;  // as in Piece
  // Of the request's packed rows those of this block, as far as they exist; none, or fewer: nothing to do.
  int first_row, num_rows;
  int len, num_tokens;  // of the request: KV and query tokens
  int first_tile, num_tiles;
  int unmasked_tiles;  // so many of the first tiles are visible to all rows as a whole; may be negative
  int partial_slot;    // -1: the result is final
  int group_size;      // workers that have row blocks for this KV
  int pairs;           // as in PlanWorker, of those that concern this piece
};

// How many KV tokens a row of the block sees; rows that do not exist count like others.
__device__ __forceinline__ int visible_tokens(const DecodeParams& p, const RowBlock& block, int block_row) {
  if (!p.causal) return block.len;
  return min(block.len, block.len - block.num_tokens + divide(block.first_row + block_row, p.by_h_q) + 1);
}
__device__ __forceinline__ RowBlock make_row_block(const DecodeParams& p, const Piece& piece, int member,
                                                   int block_rows) {
  RowBlock block{};
  block.request = piece.request;
  block.first_token = piece.first_token;
  block.first_row = piece.first_row + member * block_rows;
  block.num_rows = min(piece.num_tokens * p.lengths.h_q - block.first_row, block_rows);
  // A plan may have been made for a longer block table.
  block.len = static_cast<int>(min(int64_t{piece.len}, p.lengths.max_len));
  block.num_tokens = piece.num_tokens;
  block.first_tile = piece.first_tile;
  block.num_tiles = piece.end_tile - piece.first_tile;
  block.unmasked_tiles = visible_tokens(p, block, 0) / kTileTokens - block.first_tile;
  block.partial_slot = piece.partial_slot < 0 ? -1 : piece.partial_slot + member;
  return block;
}

// Some of a worker's pieces hold no row block for it, or no tile.
__device__ __forceinline__ bool has_work(const RowBlock& block) { return block.num_rows > 0 && block.num_tiles > 0; }

// The worker's next piece with work from number `index` on, in steps of `step`, or the first number outside its range.
__device__ __forceinline__ int next_piece(const DecodeParams& p, const Piece* pieces, const PlanWorker& worker,
                                          int index, int step, int block_rows) {
  // Not `first_piece <= index && index < end_piece`: of that nvcc 13.0 makes one step instead of a loop, if it begins at first_piece.
  while (step > 0 ? index < worker.end_piece : worker.first_piece <= index) {
    if (has_work(make_row_block(p, pieces[index], worker.member, block_rows))) break;
    index += step;
  }
  return warp_uniform(index);
}

// Where a row's elements lie in a tensor of query rows.
__device__ __forceinline__ int64_t row_offset(const DecodeParams& p, const RowBlock& block, int block_row,
                                              const RowStrides& strides) {
  const int row = block.first_row + block_row, token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
  return block.request * strides.batch + (block.first_token + token) * strides.token + head * strides.head;
}

// Copies Q into its chunks by cp.async, by `num_threads` threads, a multiple of 8; rows that do not exist become zeros. To be waited
// for, and fenced for wgmma, by every thread.
template <class C>
__device__ __forceinline__ void copy_q(const DecodeParams& p, const RowBlock& block, uint32_t q_at, int thread,
                                       int num_threads) {
  using L = TileLayout<C>;
  const int unit = thread % 8;
#pragma unroll 1
  for (int block_row = thread / 8; block_row < C::block_rows; block_row += num_threads / 8) {
    const bool exists = block_row < block.num_rows;
    const int from_row = exists ? block_row : 0;
    const auto* nope = static_cast<const uint16_t*>(p.q_nope) + row_offset(p, block, from_row, p.q_nope_strides);
    const uint32_t to = q_at + swizzled(block_row, unit);
#pragma unroll
    for (int chunk = 0; chunk < L::v_chunks; ++chunk)
      cp_async_16(to + chunk * L::q_chunk_bytes, nope + chunk * kChunkColumns + unit * 8, exists);
    if constexpr (L::rope > 0) {
      const auto* rope = static_cast<const uint16_t*>(p.q_rope) + row_offset(p, block, from_row, p.q_rope_strides);
      if (unit * 8 < L::rope) cp_async_16(to + L::v_chunks * L::q_chunk_bytes, rope + unit * 8, exists);
    }
  }
}

// ---- results, by whole warps: `o` as wgmma leaves it, of N / 2 columns, of which `column` is the thread's first (2 q included) ----

// Row g (half 0) or g + 8 (half 1), multiplied by `scale`, if it exists; T: the element type. The quad that shares a row exchanges its
// columns (a thread has two of every 8), so that each thread stores 16 bytes, instead of 4 for the output and 8 for partial results.
__device__ __forceinline__ float lane_swap(float x, int distance) { return __shfl_xor_sync(0xffffffffu, x, distance); }
__device__ __forceinline__ uint32_t lane_swap(uint32_t x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}
template <class T, int N>
__device__ __forceinline__ void store_output(const DecodeParams& p, const RowBlock& block, int block_row, int column,
                                             const float (&o)[N], int half, float scale) {
  const int in_quad = threadIdx.x % 4;
  const bool odd = in_quad & 1, upper = in_quad & 2, exists = block_row < block.num_rows;
  auto* to = static_cast<uint16_t*>(p.out) + row_offset(p, block, exists ? block_row : 0, p.out_strides) + column +
             in_quad * (8 - 2);
#pragma unroll
  for (int n = 0; n < N / 4; n += 4) {  // 32 columns: thread i of the quad gets the i-th 8 of them
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = pack2<T>(o[(n + i) * 4 + half * 2] * scale, o[(n + i) * 4 + half * 2 + 1] * scale);
    uint32_t four[2][2];  // columns of the thread and its neighbour, of the 8 numbered `odd` and 2 + `odd`
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t kept = odd ? x[2 * i + 1] : x[2 * i], got = lane_swap(odd ? x[2 * i] : x[2 * i + 1], 1);
      four[i][0] = odd ? got : kept;
      four[i][1] = odd ? kept : got;
    }
    uint4 eight;
    const uint32_t got[2] = {lane_swap(upper ? four[0][0] : four[1][0], 2),
                             lane_swap(upper ? four[0][1] : four[1][1], 2)};
    eight.x = upper ? got[0] : four[0][0];
    eight.y = upper ? got[1] : four[0][1];
    eight.z = upper ? four[1][0] : got[0];
    eight.w = upper ? four[1][1] : got[1];
    if (exists) *reinterpret_cast<uint4*>(to + n * 8) = eight;
  }
}
// Of a warp: its 16 rows, `row_tile`, and of their columns the half `half_of_columns`.
template <class C, int N>
__device__ __forceinline__ void store_partial(const DecodeParams& p, int slot, int row_tile, int half_of_columns,
                                              const float (&o)[N], const float (&scale)[2], const float (&lse2)[2]) {
  constexpr int half_runs = kColumnRuns / 2;
  const int lane = threadIdx.x % 32;
  static_assert(half_runs == 4, "one for each lane of a quad");
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};  // beside each other, as they wait for nothing
#pragma unroll
    for (int i = half * 2; i < N; i += 4) sums[i / 4 % 4] += fabsf(o[i]) + fabsf(o[i + 1]);
    const float sum = lanes_sum<4>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const int exponent = run_exponent(sum * scale[half]);
    factor[half] = scale[half] * exp2_of(-exponent);
    *run_lse2(p, C::block_rows, slot, row_tile * kFragmentRows + lane / 4 + half * 8,
              half_of_columns * half_runs + lane % 4) = lse2[half] + exponent;
  }
  uint4* to = partial_fragment(p, C::block_rows, C::d_v, slot, row_tile, half_of_columns * (N / 8));
#pragma unroll
  for (int n = 0; n < N / 8; ++n) to[n * 32] = pack_partial(o + n * 8, factor);
}
// Merges with them those at `from` in shared memory, the calling lane's share of the first; `lse2` becomes that of both. `other_run`: of
// these columns.
template <int N>
__device__ __forceinline__ void merge_partial(uint32_t from, const float (&other_lse2)[2], const float (&other_run)[2],
                                              float (&o)[N], float (&scale)[2], float (&lse2)[2]) {
  float other[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const PairWeights weights = pair_weights(lse2[half], other_lse2[half], other_run[half]);
    scale[half] *= weights.own, other[half] = weights.other, lse2[half] = weights.lse2;
  }
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    float x[8];
    unpack_partial(load_shared_words(from + n * 32 * 16), x);
#pragma unroll
    for (int i = 0; i < 8; ++i) o[n * 8 + i] = scale[i / 2 % 2] * o[n * 8 + i] + other[i / 2 % 2] * x[i];
  }
  scale[0] = scale[1] = 1.f;
}
// `partial`: to where the combine kernel or another worker finds it.
template <class C>
__device__ __forceinline__ void store_lse(const DecodeParams& p, const RowBlock& block, int block_row, float lse2,
                                          bool partial) {
  if (partial) {
    *partial_lse2(p, C::block_rows, block.partial_slot, block_row) = lse2;
  } else if (p.lse) {
    p.lse[row_offset(p, block, block_row, p.lse_strides)] = lse2 * kLn2;
  }
}

}  // namespace mla::sm90
