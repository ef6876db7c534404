// Merges the partial results of split items: out = sum_s w_s o_s with w_s = 2^(lse2_s - lse2), lse2 = log2 sum_s 2^lse2_s.
//
// A task is 16 rows of an item and 16 columns a warp. With few tasks all warps of a CTA share the parts of 16 columns, so that all parts
// are in flight at once; with many no warp waits for another. Parts are added four at a time, one in eight of these sums after the other,
// and then these eight, however many warps share them: the bits depend on the parts alone.

#include "dependent.cuh"
#include "dtype.cuh"
#include "math.cuh"
#include "partials.cuh"
#include "schedule.h"

namespace mla {

constexpr unsigned kCombineWarps = kCombineThreads / 32;
constexpr unsigned kChunkParts = 4;                  // that are asked for at once
constexpr unsigned kStateParts = 2 * kCombineWarps;  // whose lse2 the lanes of a CTA ask for at once, each four times

template <class T, int DV>
__device__ __forceinline__ void combine(const CombineParams& p, schedule::Shape shape) {
  __shared__ float4 sums[kCombineWarps - 1][2][32];        // of the warps behind the first, where all share the parts
  __shared__ float2 states[kCombineWarps][kFragmentRows];  // max and sum of some of a row's parts
  constexpr unsigned column_blocks = DV / kFragmentColumns, log2_blocks = DV == 512 ? 5 : 4, log2_warps = 3;
  static_assert(column_blocks == 1 << log2_blocks && kCombineWarps == 1 << log2_warps);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
  const SplitItem* splits = schedule::splits_of(p.plan);
  const unsigned group_size = p.plan->group_size, num_items = p.plan->num_splits;

  unsigned rows = group_size * shape.block_rows;  // of an item, at most
  if (!p.lengths.cu_seqlens_q) rows = min(rows, static_cast<unsigned>(p.lengths.s_q) * p.lengths.h_q);
  const unsigned row_tiles = (rows + kFragmentRows - 1) / kFragmentRows;
  const bool shares = num_items * row_tiles * uint64_t{column_blocks} <= gridDim.x;
  const unsigned log2_tasks = shares ? log2_blocks : log2_blocks - log2_warps;  // of a row tile
  const unsigned num_tasks = num_items * row_tiles << log2_tasks;

  SplitItem item{};
  int row_tile = 0, member = 0, block_tile = 0;  // of the item, the row block and its row tile
  auto look_up = [&](unsigned task) {
    const unsigned number = task >> log2_tasks, of_item = number / num_items;
    item = splits[number - of_item * num_items];
    row_tile = static_cast<int>(of_item);
    const int log2_row_tiles = 31 - __clz(shape.block_rows / kFragmentRows);  // of a row block
    member = row_tile >> log2_row_tiles;
    block_tile = row_tile - (member << log2_row_tiles);
  };
  unsigned task = blockIdx.x;
  if (task < num_tasks) look_up(task);
  wait_for_kernel_before();

#pragma unroll 1
  while (task < num_tasks) {
    const unsigned of_row_tile = task & ((1u << log2_tasks) - 1);
    const unsigned column_block = shares ? of_row_tile : of_row_tile * kCombineWarps + warp;
    const unsigned run = column_block / (column_blocks / kColumnRuns);
    const int first_row = item.first_row + row_tile * kFragmentRows;
    const int num_rows = item.num_tokens * p.lengths.h_q - first_row;
    const unsigned num_parts = num_rows > 0 ? item.num_pieces : 0;
    const unsigned num_chunks = (num_parts + kChunkParts - 1) / kChunkParts;
    const unsigned first_slot = item.first_slot + member, before_second = item.second_slot + member - item.slot_step;
    auto slot_of = [&](unsigned part) { return part == 0 ? first_slot : before_second + part * item.slot_step; };
    const int row = lane % kFragmentRows, block_row = block_tile * kFragmentRows + row;

    // The warp's first parts are asked for before anybody knows what they count.
    uint4 x[kChunkParts];
    float part_lse2[kChunkParts / 2];  // of the lane's row, of part lane / 16 of each two
    auto load_chunk = [&](unsigned chunk) {
#pragma unroll
      for (unsigned i = 0; i < kChunkParts; ++i) {
        const unsigned part = chunk * kChunkParts + i;
        if (part >= num_parts) break;
        x[i] = *partial_fragment(p, shape.block_rows, DV, slot_of(part), block_tile, column_block);
      }
#pragma unroll
      for (unsigned i = 0; i < kChunkParts / 2; ++i) {
        const unsigned part = chunk * kChunkParts + i * 2 + lane / kFragmentRows;
        part_lse2[i] = part < num_parts && row < num_rows
                           ? *run_lse2(p, shape.block_rows, slot_of(part), block_row, run)
                           : kNegInf;
      }
    };
    // lse2 of the rows: each of 16 lanes looks at some of a row's parts.
    float state_lse2[4];
    auto load_states = [&](unsigned first) {
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned part = first + lane / kFragmentRows + i * kStateParts;
        state_lse2[i] =
            part < num_parts && row < num_rows ? *partial_lse2(p, shape.block_rows, slot_of(part), block_row) : kNegInf;
      }
    };
    load_states(warp * 2);
    const unsigned first_sum = shares ? warp : 0, end_sum = shares ? warp + 1 : kCombineWarps;
    if (first_sum < num_chunks) load_chunk(first_sum);

    float max = kNegInf, sum = 0.f;
    auto add_state = [&](float other_max, float other_sum) {
      const float raised = fmaxf(max, other_max), base = raised == kNegInf ? 0.f : raised;
      sum = sum * exp2_fast(max - base) + other_sum * exp2_fast(other_max - base);
      max = raised;
    };
#pragma unroll 1
    for (unsigned first = warp * 2; first < num_parts;) {
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) add_state(state_lse2[i], 1.f);
      first += 4 * kStateParts;
      if (first < num_parts) load_states(first);
    }
    add_state(__shfl_xor_sync(0xffffffffu, max, kFragmentRows), __shfl_xor_sync(0xffffffffu, sum, kFragmentRows));
    if (lane < kFragmentRows) states[warp][row] = make_float2(max, sum);
    __syncthreads();  // the states are there
    max = kNegInf, sum = 0.f;
#pragma unroll
    for (unsigned i = 0; i < kCombineWarps; ++i) max = fmaxf(max, states[i][row].x);
    const float base = max == kNegInf ? 0.f : max;
#pragma unroll
    for (unsigned i = 0; i < kCombineWarps; ++i) sum += states[i][row].y * exp2_fast(states[i][row].x - base);
    const float lse2 = lse2_of(base, sum), lse2_base = lse2 == kNegInf ? 0.f : lse2;

    float o[8] = {}, of_sum[8] = {};
    unsigned number = first_sum, chunk = number;  // of the sum, and of the parts
#pragma unroll 1
    while (number < end_sum && chunk < num_chunks) {
#pragma unroll
      for (unsigned i = 0; i < kChunkParts; ++i) {
        if (chunk * kChunkParts + i >= num_parts) break;
        const float weight = exp2_fast(part_lse2[i / 2] - lse2_base);
        const float weights[2] = {__shfl_sync(0xffffffffu, weight, i % 2 * kFragmentRows + quad),
                                  __shfl_sync(0xffffffffu, weight, i % 2 * kFragmentRows + quad + 8)};
        float of_part[8];
        unpack_partial(x[i], of_part);
#pragma unroll
        for (int j = 0; j < 8; ++j) of_sum[j] += weights[j / 2 % 2] * of_part[j];
      }
      chunk += kCombineWarps;
      const bool ends = chunk >= num_chunks;
      if (ends) chunk = ++number;
      if (number < end_sum && chunk < num_chunks) load_chunk(chunk);
      if (ends)
#pragma unroll
        for (int i = 0; i < 8; ++i) o[i] += of_sum[i], of_sum[i] = 0.f;
    }
    if (shares && num_chunks > 1) {
      if (warp > 0)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          sums[warp - 1][i][lane] = make_float4(o[i * 4], o[i * 4 + 1], o[i * 4 + 2], o[i * 4 + 3]);
      __syncthreads();  // the sums are there
      if (warp == 0)
#pragma unroll 1
        for (unsigned i = 1; i < min(num_chunks, kCombineWarps); ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float4 of_warp = sums[i - 1][j][lane];
            o[j * 4] += of_warp.x, o[j * 4 + 1] += of_warp.y;
            o[j * 4 + 2] += of_warp.z, o[j * 4 + 3] += of_warp.w;
          }
    }
    if (num_rows > 0 && (!shares || warp == 0)) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack2<T>(o[i * 2], o[i * 2 + 1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint2 four = four_columns(words, half);
        const int of_16 = static_cast<int>(quad) + half * 8;
        if (of_16 < num_rows)
          *output_row(p, item.request, item.first_token, first_row + of_16, column_block * kFragmentColumns) = four;
      }
      if (p.lse && column_block == 0 && lane < min(num_rows, kFragmentRows)) {
        const int of_request = first_row + row, token = divide(of_request, p.by_h_q);
        p.lse[item.request * p.lse_strides.batch + (item.first_token + token) * p.lse_strides.token +
              (of_request - token * p.lengths.h_q) * p.lse_strides.head] = lse2 * kLn2;
      }
    }
    if (shares) break;  // each CTA has one task at most
    __syncthreads();    // the states have been read
    task += gridDim.x;
    if (task < num_tasks) look_up(task);
  }
}

}  // namespace mla

#define MLA_COMBINE(dtype, d_v)                                                                                \
  extern "C" __global__ void __launch_bounds__(mla::kCombineThreads, mla::kCombineCtasPerWorker)               \
      mla_combine_##dtype##_v##d_v(const __grid_constant__ mla::CombineParams p, mla::schedule::Shape shape) { \
    mla::combine<mla::dtype, d_v>(p, shape);                                                                   \
  }
MLA_COMBINE(bf16, 512)
MLA_COMBINE(fp16, 512)
MLA_COMBINE(bf16, 256)
MLA_COMBINE(fp16, 256)
