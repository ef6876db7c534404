// Shared memory of sm90_swap: what lies in it, where a thread finds it, and its mbarriers.
#pragma once

#include <cstddef>

#include "walk.cuh"

namespace mla::sm90 {

// What the warpgroups tell each other of a piece, beside half of O.
template <class C>
struct alignas(16) Exchanged {
  float row_sums[kConsumers * kWarpgroupWarps][C::block_rows];   // of P, for a warp's tokens
  float row_sizes[kConsumers * kWarpgroupWarps][C::block_rows];  // sums of the absolute values of O, for its columns
  float row_max[kConsumers][C::block_rows];                      // that they are relative to
  int last_slot[kConsumers];  // of the ring: of the last tile, in whose first chunks the half of O is
};

template <class C>
struct Smem {
  uint8_t q[TileLayout<C>::q_bytes];
  uint8_t ring[C::stages][kChunkBytes];
  uint8_t p[kConsumers][C::block_rows * kRowBytes];             // [rows][tokens], of each warpgroup's tile
  RowBlock block[2];                                            // by parity of the piece; no tiles: there is no more
  float tile_max[kConsumers * kWarpgroupWarps][C::block_rows];  // of the 16 tokens of a warp
  Exchanged<C> exchanged[2];                                    // by parity of the piece
  uint64_t full[C::stages];                                     // the chunk is there
  uint64_t free[C::stages];                                     // nobody reads it any more
  uint64_t landed;  // the last tile of a request is there, but for its zeros
  uint64_t q_full, q_free;
};

// The slot `chunks` behind another one; at most one round.
template <class C>
__device__ __forceinline__ int slot_behind(int slot, int chunks) {
  return slot + chunks >= C::stages ? slot + chunks - C::stages : slot + chunks;
}

// A chunk's place in the ring, and the parity of the round.
template <class C>
struct RingPlace {
  int slot = 0, parity = 0;
  __device__ __forceinline__ void advance(int chunks) {
    slot += chunks;
    if (slot >= C::stages) slot -= C::stages, parity ^= 1;
  }
  __device__ __forceinline__ RingPlace after(int chunks) const {
    RingPlace next = *this;
    next.advance(chunks);
    return next;
  }
};

// By 32-bit addresses.
template <class C>
struct Memory {
  using L = TileLayout<C>;
  static constexpr int rows = C::block_rows;
  // The chunks of a piece's last tile in which the half of O that the other warpgroup stores goes to it.
  static constexpr int exchange_chunks = L::half_chunks / 2;
  static_assert(exchange_chunks * kChunkBytes == kWarpgroupThreads * L::half_chunks * rows / 2 * 4);

  uint32_t smem;

  __device__ __forceinline__ uint32_t of(size_t offset) const { return smem + static_cast<uint32_t>(offset); }
  __device__ __forceinline__ uint32_t q() const { return of(offsetof(Smem<C>, q)); }
  __device__ __forceinline__ uint32_t chunk(int slot) const { return of(offsetof(Smem<C>, ring)) + slot * kChunkBytes; }
  __device__ __forceinline__ uint32_t p() const { return of(offsetof(Smem<C>, p)); }
  __device__ __forceinline__ uint32_t block(int parity) const {
    return of(offsetof(Smem<C>, block)) + parity * static_cast<uint32_t>(sizeof(RowBlock));
  }
  __device__ __forceinline__ uint32_t tile_max(int warp, int row) const {
    return of(offsetof(Smem<C>, tile_max)) + (warp * rows + row) * 4;
  }
  __device__ __forceinline__ uint32_t exchanged(int parity, size_t offset) const {
    return of(offsetof(Smem<C>, exchanged) + offset) + parity * static_cast<uint32_t>(sizeof(Exchanged<C>));
  }
  __device__ __forceinline__ uint32_t row_sums(int parity, int warp, int row) const {
    return exchanged(parity, offsetof(Exchanged<C>, row_sums)) + (warp * rows + row) * 4;
  }
  __device__ __forceinline__ uint32_t row_sizes(int parity, int warp, int row) const {
    return exchanged(parity, offsetof(Exchanged<C>, row_sizes)) + (warp * rows + row) * 4;
  }
  __device__ __forceinline__ uint32_t row_max(int parity, int warpgroup, int row) const {
    return exchanged(parity, offsetof(Exchanged<C>, row_max)) + (warpgroup * rows + row) * 4;
  }
  __device__ __forceinline__ uint32_t last_slot(int parity, int warpgroup) const {
    return exchanged(parity, offsetof(Exchanged<C>, last_slot)) + warpgroup * 4;
  }
  // Of the half of O behind `slot`, four elements of this thread's.
  __device__ __forceinline__ uint32_t half_of_o(int slot, int chunk_of_o, int i) const {
    const int byte = (chunk_of_o * rows / 8 + i) * kWarpgroupThreads * 16;
    return chunk(slot_behind<C>(slot, byte / kChunkBytes)) + byte % kChunkBytes + threadIdx.x % kWarpgroupThreads * 16;
  }
  __device__ __forceinline__ uint32_t full(int slot) const {
    return of(offsetof(Smem<C>, full)) + slot * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t free(int slot) const {
    return of(offsetof(Smem<C>, free)) + slot * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t landed() const { return of(offsetof(Smem<C>, landed)); }
  __device__ __forceinline__ uint32_t q_full() const { return of(offsetof(Smem<C>, q_full)); }
  __device__ __forceinline__ uint32_t q_free() const { return of(offsetof(Smem<C>, q_free)); }

  // Ahead of `full` of a warpgroup's tile. It takes the room of older ones, partly of the other warpgroup's, which is two tiles behind if one
  // of its chunks is late; and while that is on its way, `full` would be taken for complete by the parity of the round before. Who
  // releases a chunk of a tile has seen all of it. Pairs with that release; the producer waits for it as well.
  __device__ __forceinline__ void wait_for_room(RingPlace<C> tile) const {
    static_assert((C::stages - 1 + L::k_chunks - 1) / L::k_chunks % 2 == 1, "chunk 1 takes the room of the other's");
    const RingPlace<C> room = tile.after(1);
    mbarrier_wait(free(room.slot), room.parity ^ 1);
  }

  // By one thread.
  __device__ __forceinline__ void init_mbarriers(bool by_boxes) const {
    for (int slot = 0; slot < C::stages; ++slot) {
      mbarrier_init(full(slot), by_boxes ? 1 : kCopyWarps);
      mbarrier_init(free(slot), kWarpgroupWarps);
    }
    mbarrier_init(landed(), 1);
    mbarrier_init(q_full(), kQWarps);
    mbarrier_init(q_free(), kConsumers * kWarpgroupThreads);
    fence_mbarrier_init();
  }
};

}  // namespace mla::sm90
