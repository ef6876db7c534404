// Merges the partial results of split items: out = sum_s w_s o_s with w_s = 2^(lse2_s - lse2), lse2 = log2 sum_s 2^lse2_s.
//
// A task is one row and 128 of its columns, a float4 per lane. With few tasks the eight warps of a CTA share a task's splits,
// with many each warp has its own; the order of the additions depends only on that, so reruns give the same bits. By a
// batch-invariant plan each warp has its own always: the order is that of the pieces, whatever else there is to combine.

#include "dtype.cuh"
#include "math.cuh"
#include "schedule.h"

namespace mla {

constexpr int kCombineWarps = kCombineThreads / 32, kTaskColumns = 128;

template <class T, int DV>
__device__ __forceinline__ void combine(const DecodeParams& p, schedule::Shape shape) {
  __shared__ float4 sums[kCombineWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SplitItem* splits = schedule::splits_of(p.plan);
  const int tasks_per_item = p.plan->group_size * shape.block_rows * (DV / kTaskColumns);
  const int num_tasks = p.plan->num_splits * tasks_per_item;
  const bool share = num_tasks <= static_cast<int>(gridDim.x) && !p.plan->batch_invariant;
  const int task_warps = share ? kCombineWarps : 1;
  const int tasks_per_cta = kCombineWarps / task_warps, member_warp = warp % task_warps;

  for (int first_task = blockIdx.x * tasks_per_cta; first_task < num_tasks; first_task += gridDim.x * tasks_per_cta) {
    const int task = first_task + warp / task_warps;
    const SplitItem item = splits[min(task / tasks_per_item, p.plan->num_splits - 1)];
    const int row_in_bundle = task % tasks_per_item / (DV / kTaskColumns);
    const int column = task % (DV / kTaskColumns) * kTaskColumns + lane * 4;
    const int member = row_in_bundle / shape.block_rows, block_row = row_in_bundle % shape.block_rows;
    const int row = item.first_row + row_in_bundle;
    const bool exists = task < num_tasks && row < item.num_tokens * p.lengths.h_q;

    const int num_splits = exists ? item.num_pieces : 0;
    const int first_row = (item.first_slot + member) * shape.block_rows + block_row;
    const int step = item.slot_step * shape.block_rows;
    const int second_row = first_row + (item.second_slot - item.first_slot) * shape.block_rows;
    auto partial_row = [&](int split) { return int64_t{split == 0 ? first_row : second_row + (split - 1) * step}; };

    float max = kNegInf;
    for (int split = lane; split < num_splits; split += 32) max = fmaxf(max, p.lse2_partial[partial_row(split)]);
    max = lanes_max<32>(max);
    const float base = max == kNegInf ? 0.f : max;
    float sum = 0.f;
    for (int split = lane; split < num_splits; split += 32) sum += exp2_fast(p.lse2_partial[partial_row(split)] - base);
    const float lse2 = lse2_of(base, lanes_sum<32>(sum));
    const float lse2_base = lse2 == kNegInf ? 0.f : lse2;

    float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
    for (int split = member_warp; split < num_splits; split += task_warps) {
      const float weight = exp2_fast(p.lse2_partial[partial_row(split)] - lse2_base);
      const float4 x = *reinterpret_cast<const float4*>(p.o_partial + partial_row(split) * DV + column);
      o.x = fmaf(weight, x.x, o.x), o.y = fmaf(weight, x.y, o.y);
      o.z = fmaf(weight, x.z, o.z), o.w = fmaf(weight, x.w, o.w);
    }
    if (task_warps > 1) {
      __syncthreads();  // the sums of the task before have been read
      sums[warp][lane] = o;
      __syncthreads();
      o = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int w = 0; w < kCombineWarps; ++w) {
        const float4 x = sums[w][lane];
        o.x += x.x, o.y += x.y, o.z += x.z, o.w += x.w;
      }
    }
    if (!exists || member_warp != 0) continue;
    const int64_t token = item.first_token + row / p.lengths.h_q, head = row % p.lengths.h_q;
    auto* out = static_cast<uint16_t*>(p.out) + item.request * p.out_strides.batch + token * p.out_strides.token +
                head * p.out_strides.head + column;
    *reinterpret_cast<uint2*>(out) = make_uint2(pack2<T>(o.x, o.y), pack2<T>(o.z, o.w));
    if (p.lse && column == 0)
      p.lse[item.request * p.lse_strides.batch + token * p.lse_strides.token + head * p.lse_strides.head] = lse2 * kLn2;
  }
}

}  // namespace mla

#define MLA_COMBINE(dtype, d_v)                                                                               \
  extern "C" __global__ void __launch_bounds__(mla::kCombineThreads)                                          \
      mla_combine_##dtype##_v##d_v(const __grid_constant__ mla::DecodeParams p, mla::schedule::Shape shape) { \
    mla::combine<mla::dtype, d_v>(p, shape);                                                                  \
  }
MLA_COMBINE(bf16, 512)
MLA_COMBINE(fp16, 512)
MLA_COMBINE(bf16, 256)
MLA_COMBINE(fp16, 256)
