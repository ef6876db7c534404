// The end of a piece in sm90_swap: the warpgroups exchange sums and maxima of the rows, and half of their O^T. What belongs to a thread's
// query row 8 n + pair + j has number 2 n + j. The barriers in between are in sm90_swap.cu.
#pragma once

#include "sm90_swap_memory.cuh"

namespace mla::sm90 {

template <class C>
struct Exchange {
  using L = TileLayout<C>;
  static constexpr int rows = C::block_rows, columns = rows / 8;
  using Rows = float[columns * 2];
  using HalfOfO = float[L::half_chunks][rows / 2];
  const Memory<C>& at;
  int parity, warpgroup, warp, lane;
  int quad = lane / 4, pair = lane % 4 * 2;

  // ---- ahead of the barrier: what the other warpgroup needs ----

  // Of the warp: `sum` of P, `size` of O, over all its lanes, and the max they are relative to.
  __device__ __forceinline__ void give_rows(const Rows& sum, const Rows& size, const Rows& max) const {
    if (quad == 0)
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        store_shared_quad(at.row_sums(parity, warpgroup * kWarpgroupWarps + warp, n * 8 + pair),
                          {sum[n * 2], size[n * 2], sum[n * 2 + 1], size[n * 2 + 1]});
        if (warp == 0) store_shared(at.row_max(parity, warpgroup, n * 8 + pair), max[n * 2], max[n * 2 + 1]);
      }
  }
  // Where the half of O will be.
  __device__ __forceinline__ void give_slot(int slot) const {
    if (threadIdx.x % kWarpgroupThreads == 0) store_shared(at.last_slot(parity, warpgroup), __int_as_float(slot));
  }
  __device__ __forceinline__ void give_half(int slot, const HalfOfO& o) const {
#pragma unroll
    for (int chunk = 0; chunk < L::half_chunks; ++chunk)
#pragma unroll
      for (int i = 0; i < rows / 8; ++i)
        store_shared_quad(at.half_of_o(slot, chunk, i),
                          {o[chunk][i * 4], o[chunk][i * 4 + 1], o[chunk][i * 4 + 2], o[chunk][i * 4 + 3]});
  }

  // ---- behind it ----

  // `max` becomes that of both; `weight`: of the own sums and of the other warpgroup's.
  __device__ __forceinline__ void take_max(Rows& max, Rows (&weight)[2]) const {
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      float of_other[2];
      load_shared(of_other, at.row_max(parity, warpgroup ^ 1, n * 8 + pair));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int i = n * 2 + j;
        const float both = fmaxf(max[i], of_other[j]);
        weight[0][i] = exp2_fast(max[i] - both), weight[1][i] = exp2_fast(of_other[j] - both);
        max[i] = both;
      }
    }
  }
  __device__ __forceinline__ int take_slot() const {
    return __float_as_int(load_shared(at.last_slot(parity, warpgroup ^ 1)));
  }
  __device__ __forceinline__ void take_half(int slot, HalfOfO& o, const Rows (&weight)[2]) const {
#pragma unroll
    for (int chunk = 0; chunk < L::half_chunks; ++chunk)
#pragma unroll
      for (int i = 0; i < rows / 8; ++i) {
        float x[4];
        load_shared(x, at.half_of_o(slot, chunk, i));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = i * 2 + j % 2;
          o[chunk][i * 4 + j] = of_both(o[chunk][i * 4 + j], weight[0][row], x[j], weight[1][row]);
        }
      }
  }
  // Of rows 2 n and 2 n + 1: sum and size, as in shared memory, of all warps.
  __device__ __forceinline__ void take_sums(int n, const Rows (&weight)[2], float (&total)[4]) const {
    float of_warpgroup[2][4] = {};
#pragma unroll
    for (int i = 0; i < kConsumers * kWarpgroupWarps; ++i) {
      const int from = i / kWarpgroupWarps;  // 0: the own
      float x[4];
      load_shared(x, at.row_sums(parity, (warpgroup ^ from) * kWarpgroupWarps + i % kWarpgroupWarps, n * 8 + pair));
#pragma unroll
      for (int j = 0; j < 4; ++j) of_warpgroup[from][j] += x[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      total[j] = of_both(of_warpgroup[0][j], weight[0][n * 2 + j / 2], of_warpgroup[1][j], weight[1][n * 2 + j / 2]);
  }

 private:
  // Not fused, so that the bits do not depend on which warpgroup had which tiles.
  static __device__ __forceinline__ float of_both(float own, float own_weight, float other, float other_weight) {
    return __fadd_rn(__fmul_rn(own, own_weight), __fmul_rn(other, other_weight));
  }
};

}  // namespace mla::sm90
