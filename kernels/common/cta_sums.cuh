// Sums over the CTA that makes a plan, kPlanThreads threads.
#pragma once

#include "../params.h"

namespace mla {

// The sum over the CTA, for every thread. `scratch` holds one value per warp.
template <class T>
__device__ T block_sum(T x, T* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();  // the scratch of an earlier sum has been read
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (int i = 0; i < kPlanThreads / 32; ++i) sum += scratch[i];
  return sum;
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
