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

// Where a thread's results go, of the warp's columns of its first chunk: to the output, rows g and g + 8, or to the piece's partial result,
// `fragment`. And another group's that they are added to. Null: not there.
struct ResultPlaces {
  uint2* rows[2];
  uint4 *fragment, *other;
};
// `first_fragment`: where these columns are. `slot`, `other_slot`: negative: none.
template <class C>
__device__ __forceinline__ ResultPlaces result_places(const DecodeParams& p, const RowBlock& block, int slot,
                                                      int other_slot, int first_fragment) {
  ResultPlaces places{};
  auto fragment_of = [&](int of) { return partial_fragment(p, kFragmentRows, C::d_v, of, 0, first_fragment); };
  if (other_slot >= 0) places.other = fragment_of(other_slot);
  if (slot >= 0) {
    places.fragment = fragment_of(slot);
    return places;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = static_cast<int>(threadIdx.x) % 32 / 4 + half * 8;
    if (row < block.num_rows)
      places.rows[half] =
          output_row(p, block.request, block.first_token, block.first_row + row, first_fragment * kFragmentColumns);
  }
  return places;
}

// o * scale + other * what is there of another group's.
template <class T, int Chunks>
__device__ __forceinline__ void store_transposed(const ResultPlaces& to, const float (&o)[Chunks][8],
                                                 const float (&scale)[4], const float (&other)[4]) {
  constexpr int of_chunk = kChunkFragments * 32;
  uint4 others[Chunks];
  if (to.other)
#pragma unroll
    for (int chunk = 0; chunk < Chunks; ++chunk) others[chunk] = __ldcg(to.other + chunk * of_chunk);
#pragma unroll
  for (int chunk = 0; chunk < Chunks; ++chunk) {
    float x[8] = {};
    if (to.other) {
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
        if (to.other) y[j] += other[row] * x[i * 2 + j];
      }
      words[i] = to.fragment ? pack2<fp16>(y[0], y[1]) : pack2<T>(y[0], y[1]);
    }
    transpose_tiles(words);
    if (to.fragment) {
      to.fragment[chunk * of_chunk] = {words[0], words[1], words[2], words[3]};
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint2 four = four_columns(words, half);
      if (to.rows[half]) to.rows[half][chunk * kChunkColumns / 4] = four;
    }
  }
}

}  // namespace mla::sm90
