// Sums over the CTA that makes a plan, kPlanThreads threads.
#pragma once

#include "../params.h"

namespace mla {

// The sums over the CTA, for every thread. `scratch`, by warp, must not be in use any more.
template <int N>
__device__ __forceinline__ void block_sums(int64_t (&x)[N], int64_t (*scratch)[N]) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[threadIdx.x / 32][i] = x[i];
  __syncthreads();  // those of all warps are there
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = 0;
#pragma unroll 1
  for (int warp = 0; warp < kPlanThreads / 32; ++warp)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += scratch[warp][i];
}

__device__ __forceinline__ int64_t block_sum(int64_t x, int64_t* scratch) {
  __syncthreads();  // the scratch of an earlier sum has been read
  int64_t sum[1] = {x};
  block_sums(sum, reinterpret_cast<int64_t (*)[1]>(scratch));
  return sum[0];
}

// The sum over the threads before this one, and in `total` over all.
__device__ int64_t block_prefix(int64_t x, int64_t* scratch, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t inclusive = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t before = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int64_t before_warp = 0;
  total = 0;
  for (int i = 0; i < kPlanThreads / 32; ++i) {
    if (i < warp) before_warp += scratch[i];
    total += scratch[i];
  }
  return before_warp + inclusive - x;
}

}  // namespace mla
