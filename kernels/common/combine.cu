// Merges the partial results of split items: out = sum_s w_s o_s with w_s = 2^(lse2_s - lse2), lse2 = log2 sum_s 2^lse2_s.
//
// A CTA takes 16 rows of an item and some of their columns, 16 a warp or 16 for several warps, which then share the parts: with
// few tasks all parts are in flight at once, with many no warp waits for another. Parts are added eight at a time, and these sums one
// after the other, however many warps share them: the bits depend on the parts alone.

#include "dtype.cuh"
#include "math.cuh"
#include "partials.cuh"
#include "schedule.h"

namespace mla {

constexpr int kCombineWarps = kCombineThreads / 32;
constexpr int kChunkParts = 8;  // that are asked for at once, and added before anything else is
constexpr int kLanesPerRow = kCombineThreads / kFragmentRows;

// What the kernel before in the stream wrote may be read from here on. It may still run when this one starts.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class T, int DV>
__device__ __forceinline__ void combine(const DecodeParams& p, schedule::Shape shape) {
  __shared__ float4 sums[kCombineWarps][2][32];
  __shared__ float2 states[kLanesPerRow][kFragmentRows];  // max and sum of some of a row's parts
  constexpr int column_blocks = DV / kFragmentColumns;    // that a warp takes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
  const SplitItem* splits = schedule::splits_of(p.plan);
  const int group_size = p.plan->group_size, num_items = p.plan->num_splits;
  const int block_row_tiles = shape.block_rows / kFragmentRows;

  int rows = group_size * shape.block_rows;  // of an item, at most
  if (!p.lengths.cu_seqlens_q) rows = static_cast<int>(min(int64_t{rows}, int64_t{p.lengths.s_q} * p.lengths.h_q));
  const int row_tiles = (rows + kFragmentRows - 1) / kFragmentRows;
  int sharing = 1;  // warps that share the parts of their columns
  while (sharing < kCombineWarps &&
         int64_t{num_items} * row_tiles * column_blocks * 2 * sharing <= int64_t{kCombineWarps} * gridDim.x)
    sharing *= 2;
  const int warps_apart = kCombineWarps / sharing, sharer = warp / warps_apart;
  const int tasks_per_row_tile = column_blocks / warps_apart;
  const int num_tasks = num_items * row_tiles * tasks_per_row_tile;

  auto item_of = [&](int task) { return splits[task / tasks_per_row_tile % max(num_items, 1)]; };
  SplitItem item{};
  if (static_cast<int>(blockIdx.x) < num_tasks) item = item_of(blockIdx.x);
  wait_for_kernel_before();

#pragma unroll 1
  for (int task = blockIdx.x; task < num_tasks; task += gridDim.x) {
    if (task != static_cast<int>(blockIdx.x)) item = item_of(task);
    const int row_tile = task / tasks_per_row_tile / num_items;
    const int column_block = task % tasks_per_row_tile * warps_apart + warp % warps_apart;
    const int member = row_tile / block_row_tiles, block_tile = row_tile % block_row_tiles;
    const int first_row = item.first_row + row_tile * kFragmentRows;
    const int num_rows = item.num_tokens * p.lengths.h_q - first_row;
    if (num_rows <= 0) continue;
    const int num_parts = item.num_pieces;
    auto slot_of = [&](int part) {
      return (part == 0 ? item.first_slot : item.second_slot + (part - 1) * item.slot_step) + member;
    };
    const int run = column_block / (column_blocks / kColumnRuns);

    // The first parts of the warp are asked for before anybody knows what they count.
    uint4 x[kChunkParts];
    float part_lse2[kChunkParts / 2];  // of row lane % 16, of part lane / 16 of each two
    auto load_chunk = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kChunkParts; ++i) {
        const int part = chunk * kChunkParts + i;
        if (part >= num_parts) break;
        x[i] = *partial_fragment(p, shape.block_rows, DV, slot_of(part), block_tile, column_block);
      }
#pragma unroll
      for (int i = 0; i < kChunkParts / 2; ++i) {
        const int part = chunk * kChunkParts + i * 2 + lane / kFragmentRows, row = lane % kFragmentRows;
        part_lse2[i] = part < num_parts && row < num_rows
                           ? *run_lse2(p, shape.block_rows, slot_of(part), block_tile * kFragmentRows + row, run)
                           : kNegInf;
      }
    };
    if (sharer * kChunkParts < num_parts) load_chunk(sharer);

    // lse2 of the rows: each of 16 threads looks at some of a row's parts.
    float max = kNegInf, sum = 0.f;
#pragma unroll 1
    for (int part = threadIdx.x / kFragmentRows; part < num_parts; part += kLanesPerRow) {
      const int row = threadIdx.x % kFragmentRows;
      const float lse2 = row < num_rows
                             ? *partial_lse2(p, shape.block_rows, slot_of(part), block_tile * kFragmentRows + row)
                             : kNegInf;
      const float raised = fmaxf(max, lse2), base = raised == kNegInf ? 0.f : raised;
      sum = sum * exp2_fast(max - base) + exp2_fast(lse2 - base);
      max = raised;
    }
    states[threadIdx.x / kFragmentRows][threadIdx.x % kFragmentRows] = make_float2(max, sum);
    __syncthreads();  // the states are there
    float lse2;       // of row lane % 16
    {
      float base = kNegInf, total = 0.f;
#pragma unroll
      for (int i = 0; i < kLanesPerRow; ++i) base = fmaxf(base, states[i][lane % kFragmentRows].x);
      if (base == kNegInf) base = 0.f;
#pragma unroll
      for (int i = 0; i < kLanesPerRow; ++i) {
        const float2 state = states[i][lane % kFragmentRows];
        total += state.y * exp2_fast(state.x - base);
      }
      lse2 = lse2_of(base, total);
    }
    const float lse2_base = lse2 == kNegInf ? 0.f : lse2;

    float o[8] = {};
#pragma unroll 1
    for (int first = 0; first * kChunkParts < num_parts; first += sharing) {
      const int chunk = first + sharer;
      float part_sum[8] = {};
      if (chunk * kChunkParts < num_parts) {
#pragma unroll
        for (int i = 0; i < kChunkParts; ++i) {
          if (chunk * kChunkParts + i >= num_parts) break;
          const float weight = exp2_fast(part_lse2[i / 2] - lse2_base);
          const float weights[2] = {__shfl_sync(0xffffffffu, weight, i % 2 * kFragmentRows + quad),
                                    __shfl_sync(0xffffffffu, weight, i % 2 * kFragmentRows + quad + 8)};
          float of_part[8];
          unpack_partial(x[i], of_part);
#pragma unroll
          for (int j = 0; j < 8; ++j) part_sum[j] += weights[j / 2 % 2] * of_part[j];
        }
        if ((chunk + sharing) * kChunkParts < num_parts) load_chunk(chunk + sharing);
      }
      if (sharing > 1) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          sums[warp][i][lane] =
              make_float4(part_sum[i * 4], part_sum[i * 4 + 1], part_sum[i * 4 + 2], part_sum[i * 4 + 3]);
        __syncthreads();  // the sums of this round are there
#pragma unroll 1
        for (int i = 0; i < sharing && sharer == 0; ++i)
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const float4 of_warp = sums[warp + i * warps_apart][n][lane];
            o[n * 4] += of_warp.x, o[n * 4 + 1] += of_warp.y;
            o[n * 4 + 2] += of_warp.z, o[n * 4 + 3] += of_warp.w;
          }
        __syncthreads();  // they have been read
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) o[i] += part_sum[i];
      }
    }

    if (sharer == 0) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack2<T>(o[i * 2], o[i * 2 + 1]);
      store_rows(p, item.request, item.first_token, first_row, num_rows, column_block * kFragmentColumns, words);
      if (p.lse && column_block == 0 && lane < min(num_rows, kFragmentRows)) {
        const int row = first_row + lane, token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
        p.lse[item.request * p.lse_strides.batch + (item.first_token + token) * p.lse_strides.token +
              head * p.lse_strides.head] = lse2 * kLn2;
      }
    }
    if (sharing == 1) __syncthreads();  // the states have been read
  }
}

}  // namespace mla

#define MLA_COMBINE(dtype, d_v)                                                                               \
  extern "C" __global__ void __launch_bounds__(mla::kCombineThreads, mla::kCombineCtasPerWorker)              \
      mla_combine_##dtype##_v##d_v(const __grid_constant__ mla::DecodeParams p, mla::schedule::Shape shape) { \
    mla::combine<mla::dtype, d_v>(p, shape);                                                                  \
  }
MLA_COMBINE(bf16, 512)
MLA_COMBINE(fp16, 512)
MLA_COMBINE(bf16, 256)
MLA_COMBINE(fp16, 256)
