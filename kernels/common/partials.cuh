// Partial results: O and lse2 of a piece that is not its whole item, in float32.
//
// O lies as mma and wgmma leave it, so that storing and loading need no exchange: in fragments of 16 rows x 8 columns, of which each
// of 32 lanes has 16 bytes. Lane 4 g + q has columns 2 q and 2 q + 1 of row g, then of row g + 8.
#pragma once

#include "dtype.cuh"
#include "math.cuh"
#include "plan_view.h"

namespace mla {

constexpr int kFragmentRows = 16, kFragmentColumns = 8;

// The calling lane's share of a fragment.
__device__ __forceinline__ float4* partial_fragment(const DecodeParams& p, int block_rows, int d_v, int slot,
                                                    int row_tile, int column_tile) {
  const int64_t tile =
      (int64_t{slot} * (block_rows / kFragmentRows) + row_tile) * (d_v / kFragmentColumns) + column_tile;
  return reinterpret_cast<float4*>(p.o_partial) + tile * 32 + threadIdx.x % 32;
}
__device__ __forceinline__ float* partial_lse2(const DecodeParams& p, int block_rows, int slot, int block_row) {
  return p.lse2_partial + (slot * block_rows + block_row);
}

// Two fragments beside each other, from column `column` on, as rows of the output: lane 4 g + q stores four columns of its rows, for
// which it takes those of two lanes, of fragment q / 2. `row`: of the request, the first of 16, of which `num_rows` or fewer exist.
template <class T>
__device__ __forceinline__ void store_fragments(const DecodeParams& p, int request, int first_token, int row,
                                                int num_rows, int column, const float4 (&o)[2]) {
  const int lane = threadIdx.x % 32, quad = lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t words[2], four[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) words[n] = half == 0 ? pack2<T>(o[n].x, o[n].y) : pack2<T>(o[n].z, o[n].w);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int from = quad * 4 + lane % 2 * 2 + i;
      const uint32_t left = __shfl_sync(0xffffffffu, words[0], from), right = __shfl_sync(0xffffffffu, words[1], from);
      four[i] = lane % 4 < 2 ? left : right;
    }
    if (quad + half * 8 >= num_rows) continue;
    const int packed = row + quad + half * 8, token = divide(packed, p.by_h_q), head = packed - token * p.lengths.h_q;
    auto* out = static_cast<uint16_t*>(p.out) + request * p.out_strides.batch +
                (first_token + token) * p.out_strides.token + head * p.out_strides.head + column;
    *reinterpret_cast<uint2*>(out + lane % 4 / 2 * kFragmentColumns + lane % 2 * 4) = make_uint2(four[0], four[1]);
  }
}

// ---- pairs (PlanWorker): the later group merges what the one before it left ----
//
// It waits for a group with lower numbers of CTAs than its own, which were dispatched before and wait for none with higher ones.
//
// The flags are in the workspace, in place of one more partial result, so that calls beside each other may share a plan. A flag that is
// up says a number of its own, which new memory holds with a chance of one in 2^64; whoever waited takes it down again.

__device__ __forceinline__ uint64_t* flag_of(const DecodeParams& p, int block_rows, int d_v, int slot) {
  const int64_t slots = 2 * int64_t{p.num_workers};
  return reinterpret_cast<uint64_t*>(p.o_partial + slots * block_rows * d_v) + slot;
}
__device__ __forceinline__ uint64_t flag_up(const uint64_t* flag) {
  return reinterpret_cast<uint64_t>(flag) * 0x9e3779b97f4a7c15ull + 0xd1b54a32d192ed03ull;
}
// By one thread, behind a barrier with those that stored it.
__device__ __forceinline__ void announce_partial(const DecodeParams& p, int block_rows, int d_v, int slot) {
  uint64_t* flag = flag_of(p, block_rows, d_v, slot);
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(flag_up(flag)) : "memory");
}
// By one thread; all may read it behind a barrier with it.
__device__ __forceinline__ void wait_for_partial(const DecodeParams& p, int block_rows, int d_v, int slot) {
  uint64_t* flag = flag_of(p, block_rows, d_v, slot);
  asm volatile(
      "{\n.reg .pred p;\n.reg .u64 seen;\nAGAIN:\nld.acquire.gpu.global.u64 seen, [%0];\nsetp.ne.u64 p, seen, %1;\n"
      "@p bra AGAIN;\n}" ::"l"(flag),
      "l"(flag_up(flag))
      : "memory");
  *flag = 0;
}

// What the two partial results of a row count in its result, and the lse2 of that.
struct PairWeights {
  float own, other, lse2;
};
__device__ __forceinline__ PairWeights pair_weights(float own, float other) {
  const float max = fmaxf(own, other), base = max == kNegInf ? 0.f : max;
  const float lse2 = lse2_of(base, exp2_fast(own - base) + exp2_fast(other - base));
  const float lse2_base = lse2 == kNegInf ? 0.f : lse2;
  return {exp2_fast(own - lse2_base), exp2_fast(other - lse2_base), lse2};
}
__device__ __forceinline__ float merge_pair(const PairWeights& w, float own, float other) {
  return w.own * own + w.other * other;
}

}  // namespace mla
