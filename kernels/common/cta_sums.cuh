// Sums over a warp and over the CTA that makes a plan, kPlanThreads threads, and the group size that follows from them.
#pragma once

#include "plan_sizes.h"

namespace mla {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kPlanWarps = kPlanThreads / 32;
static_assert(kPlanWarps <= 32);

__device__ __forceinline__ int32_t warp_sum(int32_t x) { return __reduce_add_sync(kAllLanes, x); }
__device__ __forceinline__ int64_t warp_sum(int64_t x) {
  MLA_ROLLED
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ __forceinline__ int32_t warp_min(int32_t x) { return __reduce_min_sync(kAllLanes, x); }
__device__ __forceinline__ int64_t warp_min(int64_t x) {
  MLA_ROLLED
  for (int step = 16; step > 0; step /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Over the lanes before this one.
__device__ __forceinline__ int32_t warp_prefix(int32_t x) {
  int32_t upto = x;  // this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, upto, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) upto += before;
  }
  return upto - x;
}

// `x` becomes the sum over the threads before this one, `all` that over all. `scratch`, by warp, must not be in use any more.
template <class T, int N>
__device__ __forceinline__ void block_prefix(T (&x)[N], T (&all)[N], T (*scratch)[N]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T upto[N];  // this one
#pragma unroll
  for (int i = 0; i < N; ++i) upto[i] = x[i];
#pragma unroll
  for (int step = 1; step < 32; step *= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T before = __shfl_up_sync(kAllLanes, upto[i], step);
      if (lane >= step) upto[i] += before;
    }
  if (lane == 31)
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[warp][i] = upto[i];
  __syncthreads();  // the sums of all warps are there
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T of_warp = lane < kPlanWarps ? scratch[lane][i] : 0;
    all[i] = warp_sum(of_warp);
    x[i] = warp_sum(lane < warp ? of_warp : T{0}) + upto[i] - x[i];
  }
}

// schedule::best_group_size, of a warp: each lane has what all items cost in bundles of its size, in groups of it.
__device__ __forceinline__ int32_t size_of_lane() { return threadIdx.x % schedule::kMaxGroupSize + 1; }
template <class Unit>
__device__ __forceinline__ int32_t best_group_size(Unit units, int32_t groups, int32_t max_row_blocks,
                                                   int32_t num_workers) {
  constexpr Unit never = sizeof(Unit) == 4 ? INT32_MAX : static_cast<Unit>(INT64_MAX);
  const bool possible = size_of_lane() <= schedule::largest_group_size(max_row_blocks, num_workers);
  const Unit cost = possible ? schedule::busiest_group(units, groups) : never;
  const uint32_t best = __ballot_sync(kAllLanes, cost == warp_min(cost));
  return static_cast<int32_t>((31u - __clz(best)) % schedule::kMaxGroupSize) + 1;
}
// The same from the lengths. `units`: of the items of all requests, if each had one; `item_units`: of those of a request. In
// `scratch` there is one for each size.
template <class Unit, class ItemUnits>
__device__ __forceinline__ int32_t choose_group_size(const Lengths& lengths, schedule::Shape shape,
                                                     int32_t max_row_blocks, int32_t num_workers, Unit units,
                                                     Unit* scratch, ItemUnits item_units) {
  if (max_row_blocks <= 1) return 1;
  if (lengths.cu_seqlens_q) {
    MLA_ROLLED
    for (int32_t size = threadIdx.x / 32 + 1; size <= schedule::kMaxGroupSize; size += kPlanWarps) {
      Unit sum = 0;
      MLA_ROLLED
      for (int32_t i = threadIdx.x % 32; i < lengths.num_requests; i += 32) {
        const schedule::Request request = schedule::request_at(lengths, shape, i);
        sum += Unit{schedule::bundles<Unit>(request.row_blocks, size)} * item_units(request);
      }
      sum = warp_sum(sum);
      if (threadIdx.x % 32 == 0) scratch[size - 1] = sum;
    }
    __syncthreads();  // the sums of all sizes are there
    units = scratch[size_of_lane() - 1];
  } else {
    units *= schedule::bundles<Unit>(max_row_blocks, size_of_lane());
  }
  return best_group_size(units, schedule::groups_of(num_workers, size_of_lane()), max_row_blocks, num_workers);
}

}  // namespace mla
