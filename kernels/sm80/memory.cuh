// Shared memory, and where in it a thread finds what it needs.
#pragma once

#include <cstddef>

#include "shape.cuh"

namespace mla::sm80 {

// Where a KV row lies in memory; latent == nullptr: past the end of the request.
struct alignas(16) RowAddress {
  const uint16_t *latent, *rope;
};

// The tiles whose row addresses a group looks up next: piece, first of them and last of the piece, its request.
struct alignas(16) Cursor {
  int index, tile, end_tile;
  int request, len;
  int unused[3];
};

template <class C>
struct Smem {
  using S = Shape<C>;
  uint16_t kv[C::stages][C::block_n][C::d_qk + 8];
  struct alignas(128) Group {
    float logits[S::group_warps][S::group_rows][C::block_n];  // partial, by warp; see Memory::logits
    uint16_t p[S::group_rows][C::block_n + 8];
    float rescale[S::group_rows];                          // what O must be multiplied by before P V is added
    int rescale_tile;                                      // `tiles` of the last tile for which any of them was not 1
    float row_max[S::group_rows], row_sum[S::group_rows];  // at the end of a piece
    int given_stage;                                       // where the half of O lies that the group gives away
    RowAddress addresses[S::address_rows];                 // of the rows to be loaded next
    Cursor cursor;
    int piece_index[S::group_warps];                   // each warp's, as registers are short in the loop
    float parked[S::tight ? 3 : 0][S::group_threads];  // each thread's part of the softmax, likewise
  } groups[S::groups];
  // mbarriers: a tile has landed, a tile has been read
  uint64_t full[S::own_columns ? 0 : C::stages], empty[S::own_columns ? 0 : C::stages];
};

// By 32-bit addresses.
template <class C>
struct Memory {
  using S = Shape<C>;
  using Group = typename Smem<C>::Group;
  uint32_t smem;
  const Place<C>& me;

  __device__ __forceinline__ uint32_t kv(int stage, int token, int column) const {
    const uint32_t ring = smem + static_cast<uint32_t>(offsetof(Smem<C>, kv));
    const int first = me.tile_group() * S::ring_stages;
    // Apart, the two are kept, the stage's in a uniform register: 1 to 2 % less for 32 and 64 rows; 10 % more at (512, 512), 99 KB.
    if constexpr (C::block_rows > 16 && C::d_qk > C::d_v)
      return ring + (first * C::block_n + token) * S::kv_row + column * 2 +
             stage * static_cast<int>(C::block_n * S::kv_row);
    else return ring + ((first + stage) * C::block_n + token) * S::kv_row + column * 2;
  }
  __device__ __forceinline__ uint32_t full(int stage) const {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, full)) + (me.tile_group() * S::ring_stages + stage) * 8;
  }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + C::stages * 8; }
  __device__ __forceinline__ uint32_t group(int group, size_t offset) const {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, groups) + offset) + group * static_cast<int>(sizeof(Group));
  }
  // Neighbouring rows have their 16-byte chunks in different banks: chunk c of a row is stored in place of chunk c ^ f(row).
  __device__ __forceinline__ uint32_t logits(int warp, int row, int token) const {
    const int swizzle = C::block_n >= 32 ? row % 2 * 4 + (row & 2) : row & 2;
    return group(me.group(), offsetof(Group, logits)) + (warp * S::group_rows + row) * S::logits_row +
           (token / 4 ^ swizzle) * 16 + token % 4 * 4;
  }
  __device__ __forceinline__ uint32_t p(int row, int token) const {
    return group(me.group(), offsetof(Group, p)) + row * S::p_row + token * 2;
  }
  __device__ __forceinline__ uint32_t rescale(int row) const {
    return group(me.group(), offsetof(Group, rescale)) + row * 4;
  }
  __device__ __forceinline__ uint32_t rescale_tile() const { return group(me.group(), offsetof(Group, rescale_tile)); }
  __device__ __forceinline__ uint32_t row_max(int of_group, int row) const {
    return group(of_group, offsetof(Group, row_max)) + row * 4;
  }
  __device__ __forceinline__ uint32_t row_sum(int of_group, int row) const {
    return group(of_group, offsetof(Group, row_sum)) + row * 4;
  }
  __device__ __forceinline__ uint32_t given_stage(int of_group) const {
    return group(of_group, offsetof(Group, given_stage));
  }
  __device__ __forceinline__ uint32_t given(int of_group, int stage, int member) const {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, kv)) +
           (of_group * S::ring_stages + stage) * static_cast<int>(C::block_n * S::kv_row) + member * 16;
  }
  __device__ __forceinline__ uint32_t address(int row) const {
    return group(me.group(), offsetof(Group, addresses)) + row * static_cast<int>(sizeof(RowAddress));
  }
  __device__ __forceinline__ uint32_t cursor() const { return group(me.group(), offsetof(Group, cursor)); }
  __device__ __forceinline__ uint32_t index() const {
    return group(me.group(), offsetof(Group, piece_index)) + me.warp() * 4;
  }
  __device__ __forceinline__ uint32_t parked(int i) const {
    return group(me.group(), offsetof(Group, parked)) + (i * S::group_threads + me.member()) * 4;
  }
};

}  // namespace mla::sm80
