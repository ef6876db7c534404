// How a variant divides its work among warps and threads.
#pragma once

#include "ptx.cuh"

namespace mla::sm80 {

template <class C>
struct Shape {
  // Each warp of a group pays for a tile what a tile costs whatever its size. So where O leaves the registers, two warps share one.
  static constexpr int group_warps = C::block_rows == 16 ? C::d_v / 128 : 4;
  static constexpr int group_threads = 32 * group_warps, groups = C::warps / group_warps;
  static constexpr int tile_groups = C::block_rows == 16 ? groups : 1;  // groups that take tiles in turn
  static constexpr int row_groups = groups / tile_groups;  // groups that have different rows of the same tiles
  static constexpr int group_rows = C::block_rows / row_groups;
  static constexpr int row_tiles = group_rows / 16;
  static constexpr int ring_stages = C::stages / tile_groups;  // groups with tiles of their own have their own ring

  static constexpr int kv_row = (C::d_qk + 8) * 2, p_row = (C::block_n + 8) * 2, logits_row = C::block_n * 4;  // bytes

  // Logits: 16 columns a k-step.
  static constexpr int k_steps = C::d_qk / 16, warp_k_steps = (k_steps + group_warps - 1) / group_warps;
  static constexpr bool tight = row_tiles == 2 && C::d_v > 256;                    // O and Q fill the registers
  static constexpr int pass_tokens = row_tiles == 2 || C::block_n < 32 ? 16 : 32;  // at a time
  // Independent sums over the columns of d_qk, as an mma waits for the one before.
  static constexpr int logit_chains = row_tiles * pass_tokens / 8 < 4 ? 2 : 1;

  static constexpr int ring_bytes = ring_stages * C::block_n * kv_row;
  // Where groups take tiles in turn, a warp is the only one that reads its columns of a tile, as K and as V: it copies them itself,
  // and nobody else needs to know. One more stage is in flight, but the copies come later in a tile. Where the ring is large anyway, the
  // group copies, as with a shared ring, and mbarriers say what has landed (measured: sm80.md).
  static constexpr bool own_columns = tile_groups > 1 && ring_bytes <= 64 << 10;
  // Arrivals at the stages of a shared ring: one a warp instead of one a thread. A warp then waits for its copies of a tile two tiles
  // ahead, so the ring needs four stages. compute-sanitizer does not follow a lane that speaks for its warp
  // (tests/gpu/sanitizer_controls.cu).
  static constexpr bool warp_arrivals = tight && C::block_n == 16;
  static constexpr int ring_arrivals = C::warps / tile_groups * (warp_arrivals ? 1 : 32);
  // K is loaded a step ahead of its use where the registers suffice.
  static constexpr bool k_ahead = !(tight && C::block_n == 16 && C::d_qk == C::d_v);

  static constexpr int row_threads = group_threads / group_rows;  // softmax threads per row
  static constexpr int row_tokens = C::block_n / row_threads;     // logits per softmax thread
  static constexpr int warp_v = C::d_v / group_warps;             // columns of O that a warp owns

  // Loads: of `load_rows` rows of a tile by a group, a thread copies chunks (16 bytes) of one row in `copy_sets`, `copy_lines` times.
  // With columns of its own, a warp copies 128 bytes of each of four rows at once; otherwise the group all its rows.
  static constexpr int load_rows = C::block_n / row_groups;
  static constexpr int copy_threads = own_columns ? 8 : group_threads / load_rows;  // of a row, at once
  static constexpr int copy_rows = own_columns ? 4 : load_rows, copy_sets = load_rows / copy_rows;
  static constexpr int row_chunks = C::d_qk / 8, v_chunks = C::d_v / 8, rope_chunks = row_chunks - v_chunks;
  static constexpr int copy_lines = v_chunks / copy_threads / (own_columns ? group_warps : 1);
  static constexpr int rope_threads =
      rope_chunks > 0 ? rope_chunks / group_warps : 2;  // of a row, with columns of its own
  static constexpr int rope_rows = 32 / rope_threads;
  static constexpr int rope_sets = own_columns ? load_rows / rope_rows : 1;
  static constexpr int rope_lines = own_columns ? rope_chunks > 0 : (rope_chunks + copy_threads - 1) / copy_threads;
  static constexpr int rope_copies = rope_sets * rope_lines,
                       tile_copies = rope_copies + copy_sets * copy_lines;  // per thread
  // In the second half of the values only: ptxas lets no load of V pass a copy, and the other group has longer to leave the stage.
  static constexpr bool late_copies = tight && C::block_n > 16;
  static constexpr int address_rows =
      own_columns || late_copies ? group_threads : 64;  // KV rows that a group looks up at once

  static_assert(C::warps == groups * group_warps && (tile_groups > 1 ? groups >= 2 : groups == 2));
  static_assert(C::stages % tile_groups == 0 && ring_stages >= 2);
  static_assert(C::block_n % pass_tokens == 0 && warp_v % 16 == 0 && v_chunks % copy_threads == 0 && row_threads <= 32);
  static_assert(!own_columns || (warp_v % 64 == 0 && load_rows % 16 == 0 && rope_chunks % group_warps == 0));
  static_assert(!warp_arrivals || ring_stages == 4);
  static_assert(tile_groups == 1 || group_rows * C::d_v / 2 * 4 <= C::block_n * kv_row, "half of O fits into a stage");
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
  // loads: which of the rows that are copied at once, and which chunk; of RoPE, with columns of its own
  __device__ __forceinline__ int copy_row() const { return (S::own_columns ? lane() : member()) / S::copy_threads; }
  __device__ __forceinline__ int copy_chunk() const {
    return thread % S::copy_threads + (S::own_columns ? warp() * S::warp_v / 8 : 0);
  }
  __device__ __forceinline__ int rope_chunk() const { return warp() * S::rope_threads + thread % S::rope_threads; }
};

// Among the threads of a group.
template <class C>
__device__ __forceinline__ void group_barrier(const Place<C>& me) {
  barrier_sync(1 + me.group(), Shape<C>::group_threads);
}

}  // namespace mla::sm80
