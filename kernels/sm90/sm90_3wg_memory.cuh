// Shared memory of sm90_3wg: what lies in it, where a thread finds it, and its mbarriers.
#pragma once

#include <cstddef>

#include "walk.cuh"

namespace mla::sm90 {

template <class C>
struct Smem {
  uint8_t q[TileLayout<C>::q_bytes];
  uint8_t tiles[C::stages][TileLayout<C>::bytes];
  uint8_t p[kChunkBytes];                             // of the latest tile; whoever writes the next has multiplied it
  RowBlock block[2];                                  // by parity of the piece; no tiles: there is no more
  float row_sum[2][kConsumers][C::block_rows];        // by parity of the piece
  float row_max[kConsumers][C::block_rows];           // that the latest P of a warpgroup is relative to
  uint64_t full[C::stages][TileLayout<C>::k_chunks];  // a chunk of the tile is there
  uint64_t free[C::stages][kConsumers];               // a warpgroup is done with its half of the columns
  uint64_t free_rope[C::stages];                      // the tile's owner is done with RoPE
  uint64_t landed[kConsumers];  // a half of the last tile of a request is there, but for its zeros
  uint64_t q_full, q_free;
  uint64_t other_there;  // the other partial result of a pair, in a stage
};

// A place in the ring, and the parity of the round.
template <class C>
struct RingPlace {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == C::stages) stage = 0, parity ^= 1;
  }
};

// By 32-bit addresses.
template <class C>
struct Memory {
  using L = TileLayout<C>;
  uint32_t smem;

  __device__ __forceinline__ uint32_t of(size_t offset) const { return smem + static_cast<uint32_t>(offset); }
  __device__ __forceinline__ uint32_t q() const { return of(offsetof(Smem<C>, q)); }
  __device__ __forceinline__ uint32_t tile(int stage) const { return of(offsetof(Smem<C>, tiles)) + stage * L::bytes; }
  __device__ __forceinline__ uint32_t p() const { return of(offsetof(Smem<C>, p)); }
  __device__ __forceinline__ uint32_t block(int parity) const {
    return of(offsetof(Smem<C>, block) + parity * sizeof(RowBlock));
  }
  __device__ __forceinline__ uint32_t row_sum(int parity, int warpgroup, int row) const {
    return of(offsetof(Smem<C>, row_sum)) + ((parity * kConsumers + warpgroup) * C::block_rows + row) * 4;
  }
  __device__ __forceinline__ uint32_t row_max(int warpgroup, int row) const {
    return of(offsetof(Smem<C>, row_max)) + (warpgroup * C::block_rows + row) * 4;
  }
  __device__ __forceinline__ uint32_t full(int stage, int chunk) const {
    return of(offsetof(Smem<C>, full)) + (stage * L::k_chunks + chunk) * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t free(int stage, int half) const {
    return of(offsetof(Smem<C>, free)) + (stage * kConsumers + half) * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t free_rope(int stage) const {
    return of(offsetof(Smem<C>, free_rope)) + stage * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t landed(int half) const {
    return of(offsetof(Smem<C>, landed)) + half * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t q_full() const { return of(offsetof(Smem<C>, q_full)); }
  __device__ __forceinline__ uint32_t q_free() const { return of(offsetof(Smem<C>, q_free)); }
  __device__ __forceinline__ uint32_t other_there() const { return of(offsetof(Smem<C>, other_there)); }

  // By one thread.
  __device__ __forceinline__ void init_mbarriers(bool by_boxes) const {
    for (int stage = 0; stage < C::stages; ++stage) {
      for (int chunk = 0; chunk < L::k_chunks; ++chunk) mbarrier_init(full(stage, chunk), by_boxes ? 1 : kCopyWarps);
      for (int half = 0; half < kConsumers; ++half) mbarrier_init(free(stage, half), kWarpgroupWarps);
      mbarrier_init(free_rope(stage), kWarpgroupWarps);
    }
    for (int half = 0; half < kConsumers; ++half) mbarrier_init(landed(half), 1);
    mbarrier_init(q_full(), kQWarps);
    mbarrier_init(q_free(), kConsumers * kWarpgroupWarps);
    mbarrier_init(other_there(), 1);
    fence_mbarrier_init();
  }
};

}  // namespace mla::sm90
