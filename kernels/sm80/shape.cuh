// How a variant divides its work among warps and threads.
#pragma once

#include "ptx.cuh"

namespace mla::sm80 {

template <class C>
struct Shape {
  static constexpr int groups = 2, group_warps = 4, group_threads = 32 * group_warps;
  static constexpr int tile_groups = C::block_rows == 16 ? 2 : 1;  // groups that take tiles in turn
  static constexpr int row_groups = groups / tile_groups;          // groups that have different rows of the same tiles
  static constexpr int group_rows = C::block_rows / row_groups;
  static constexpr int row_tiles = group_rows / 16;
  static constexpr int ring_stages =
      C::stages / tile_groups;  // groups with tiles of their own have a ring of their own
  static constexpr int ring_warps = C::warps / tile_groups;

  static constexpr int kv_row = (C::d_qk + 8) * 2, p_row = (C::block_n + 8) * 2, logits_row = C::block_n * 4;  // bytes

  // Logits: 16 columns a k-step.
  static constexpr int k_steps = C::d_qk / 16, warp_k_steps = (k_steps + group_warps - 1) / group_warps;
  static constexpr bool tight = row_tiles == 2 && C::d_v > 256;                    // O and Q fill the registers
  static constexpr int pass_tokens = row_tiles == 2 || C::block_n < 32 ? 16 : 32;  // at a time
  // Independent sums over the columns of d_qk, as an mma waits for the one before.
  static constexpr int logit_chains = row_tiles * pass_tokens / 8 < 4 ? 2 : 1;

  // The group's copies go between the steps of its logits if nobody else's rows are in the way, or else, later, of its values: by
  // then the other group, half a tile behind, has left the stage as well.
  static constexpr bool copies_beside_logits = tile_groups > 1;

  static constexpr int row_threads = group_threads / group_rows;  // softmax threads per row
  static constexpr int row_tokens = C::block_n / row_threads;     // logits per softmax thread
  static constexpr int warp_v = C::d_v / group_warps;             // columns of O that a warp owns

  static constexpr int load_rows = C::block_n / row_groups;              // rows of a tile that a group copies
  static constexpr int copy_threads = group_threads / load_rows;         // threads per row
  static constexpr int address_rows = 64;                                // KV rows that a group looks up at once
  static constexpr int row_chunks = C::d_qk / 8, v_chunks = C::d_v / 8;  // of 16 bytes
  static constexpr int latent_copies = v_chunks / copy_threads;          // per thread and tile
  static constexpr int rope_copies = (row_chunks - v_chunks + copy_threads - 1) / copy_threads;

  static_assert(C::warps == groups * group_warps && C::stages % tile_groups == 0 && ring_stages >= 2);
  static_assert(C::block_n % pass_tokens == 0 && warp_v % 16 == 0 && v_chunks % copy_threads == 0 && row_threads <= 32);
  static_assert(C::d_v % (16 * group_warps) == 0 && address_rows % load_rows == 0 && address_rows <= group_threads);
};

// What this thread's index means to each step.
template <class C>
struct Place {
  using S = Shape<C>;
  unsigned thread;

  __device__ __forceinline__ int lane() const { return thread % 32; }
  __device__ __forceinline__ int group() const { return thread / S::group_threads; }
  __device__ __forceinline__ int warp() const { return thread / 32 % S::group_warps; }  // of the group
  __device__ __forceinline__ int member() const { return thread % S::group_threads; }
  __device__ __forceinline__ int tile_group() const { return S::tile_groups > 1 ? group() : 0; }
  __device__ __forceinline__ int row_group() const { return S::row_groups > 1 ? group() : 0; }
  // mma fragments: rows quad and quad + 8, columns pair and pair + 1
  __device__ __forceinline__ int quad() const { return thread % 32 / 4; }
  __device__ __forceinline__ int pair() const { return thread % 4 * 2; }
  // softmax: the row of the group, and which of its tokens
  __device__ __forceinline__ int soft_row() const { return thread % S::group_threads / S::row_threads; }
  __device__ __forceinline__ int soft_lane() const { return thread % S::row_threads; }
  // loads: which of the tile's rows that the group copies, and which of its chunks
  __device__ __forceinline__ int copy_row() const { return thread % S::group_threads / S::copy_threads; }
  __device__ __forceinline__ int copy_chunk() const { return thread % S::copy_threads; }
};

// Among the threads of a group.
template <class C>
__device__ __forceinline__ void group_barrier(const Place<C>& me) {
  barrier_sync(1 + me.group(), Shape<C>::group_threads);
}

}  // namespace mla::sm80
