// O and its way to memory where operands were swapped, so that wgmma left O^T: of each chunk of its half of the columns a warp has 16.
// Lane 4 g + q holds, of columns g and g + 8 of these, rows 2 q and 2 q + 1, then of g and g + 8 rows 2 q + 8 and 2 q + 9: in `o`
// [chunk][upper rows][upper columns][2]. What is said of its four rows is in their order.
#pragma once

#include "rows.cuh"

namespace mla::sm90 {

constexpr int kChunkFragments = kChunkColumns / kFragmentColumns;

// Over the eight lanes of a warp that have the same rows.
__device__ __forceinline__ float quads_max(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
__device__ __forceinline__ float quads_sum(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Of both warpgroups. Not fused, so that the bits do not depend on which one had which tiles.
__device__ __forceinline__ float sum_of_both(float own, float own_weight, float other, float other_weight) {
  return __fadd_rn(__fmul_rn(own, own_weight), __fmul_rn(other, other_weight));
}

// To the output or, if it `leaves`, to the piece's partial result: o * scale + other * what is at `other_slot`, if that is not negative.
// `first_fragment`: where the warp's columns of its first chunk are.
template <class T, int Chunks>
__device__ __forceinline__ void store_transposed(const DecodeParams& p, const RowBlock& block, int first_fragment,
                                                 const float (&o)[Chunks][8], const float (&scale)[4], bool leaves,
                                                 int other_slot, const float (&other)[4]) {
  constexpr int d_v = 2 * Chunks * kChunkColumns;
  auto fragment_of = [&](int slot, int chunk) {
    return partial_fragment(p, kFragmentRows, d_v, slot, 0, first_fragment + chunk * kChunkFragments);
  };
  uint4 others[Chunks];
  if (other_slot >= 0)
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) others[chunk] = __ldcg(fragment_of(other_slot, chunk));
#pragma unroll
  for (int chunk = 0; chunk < Chunks; ++chunk) {
    float x[8] = {};
    if (other_slot >= 0) {
      uint32_t words[4] = {others[chunk].x, others[chunk].y, others[chunk].z, others[chunk].w};
      transpose_tiles(words);
      unpack_partial({words[0], words[1], words[2], words[3]}, x);
    }
    uint32_t words[4];  // of the tile of columns i / 2 and rows i % 2, in groups of 8
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float y[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = i % 2 * 2 + j;
        y[j] = o[chunk][i % 2 * 4 + i / 2 * 2 + j] * scale[row];
        if (other_slot >= 0) y[j] += other[row] * x[i * 2 + j];
      }
      words[i] = leaves ? pack2<fp16>(y[0], y[1]) : pack2<T>(y[0], y[1]);
    }
    transpose_tiles(words);
    if (leaves) {
      *fragment_of(block.partial_slot, chunk) = {words[0], words[1], words[2], words[3]};
    } else {
      store_rows(p, block.request, block.first_token, block.first_row, block.num_rows,
                 (first_fragment + chunk * kChunkFragments) * kFragmentColumns, words);
    }
  }
}

}  // namespace mla::sm90
