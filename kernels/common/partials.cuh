// Partial results: O and lse2 of a piece that is not its whole item.
//
// O lies as mma and wgmma leave it, so that storing and loading need no exchange: in fragments of 16 rows x 16 columns, of which each
// of 32 lanes has 16 bytes. Lane 4 g + q has columns 2 q and 2 q + 1 of row g, then of row g + 8, then both of the next 8 columns.
//
// It is fp16, whatever the elements are, after a division by a power of two: one for each run of columns, an eighth of a row. So no
// value is too large, and none is rounded more than others that is not 2^19 times less than the largest. Beside a row's lse2 lies for
// each run what it counts as in sums: lse2 plus that power.
#pragma once

#include "dtype.cuh"
#include "math.cuh"
#include "plan_view.h"

namespace mla {

// Params: DecodeParams or CombineParams.
//
// The calling lane's share of a fragment; the next fragment is 32 further. 32 bits count 64 GB of them.
template <class Params>
__device__ __forceinline__ uint4* partial_fragment(const Params& p, uint32_t block_rows, uint32_t d_v, uint32_t slot,
                                                   uint32_t row_tile, uint32_t fragment) {
  const uint32_t number = (slot * (block_rows / kFragmentRows) + row_tile) * (d_v / kFragmentColumns) + fragment;
  return static_cast<uint4*>(p.o_partial) + (number * 32 + threadIdx.x % 32);
}
// Of a row: its own, or what run `run` of its columns counts as.
template <class Params>
__device__ __forceinline__ float* partial_lse2(const Params& p, uint32_t block_rows, uint32_t slot,
                                               uint32_t block_row) {
  return p.lse2_partial + ((1 + kColumnRuns) * slot * block_rows + block_row);
}
// How far that of a run lies behind the row's own.
__device__ __forceinline__ uint32_t run_rows(uint32_t block_rows, uint32_t run) { return (1 + run) * block_rows; }
__device__ __forceinline__ float* run_lse2(const DecodeParams& p, uint32_t block_rows, uint32_t slot,
                                           uint32_t block_row, uint32_t run) {
  return partial_lse2(p, block_rows, slot, block_row + run_rows(block_rows, run));
}

// The power of two that a run is divided by; `sum`: of its absolute values, or more of them. What then is in the run is below 2^15, and
// the power so large that 2^lse2 may be multiplied by it. NaN and infinity stay what they are beside what fp16 holds.
__device__ __forceinline__ int run_exponent(float sum) {
  const int biased = __float_as_int(sum) >> 23 & 255;  // sum < 2^(biased - 126)
  return biased == 255 ? 0 : max(biased - 126 - 15, -100);
}
__device__ __forceinline__ float exp2_of(int exponent) { return __int_as_float((127 + exponent) << 23); }

// A lane's share of a fragment. `factor`: of row g and of row g + 8.
__device__ __forceinline__ uint4 pack_partial(const float* o, const float (&factor)[2]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack2<fp16>(o[i * 2] * factor[i % 2], o[i * 2 + 1] * factor[i % 2]);
  return {words[0], words[1], words[2], words[3]};
}
__device__ __forceinline__ void unpack_partial(const uint4& from, float (&x)[8]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = to_float<fp16>(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16));
}

// Each of the four 8 x 8 tiles of a fragment transposed: as wgmma leaves O^T, by whole warps.
__device__ __forceinline__ void transpose_tiles(uint32_t (&words)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(words[i]) : "r"(words[i]));
}

// A fragment's words, each two columns of a row, as rows of the output: neighbouring lanes exchange a word, so that each stores four
// columns, of row g (half 0) or of g + 8, at output_row() of the row's number among those of the request.
__device__ __forceinline__ uint2 four_columns(const uint32_t (&words)[4], int half) {
  const bool odd = threadIdx.x & 1;
  const uint32_t left = words[half], right = words[2 + half];  // of the two times 8 columns
  const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
  return odd ? make_uint2(got, right) : make_uint2(left, got);
}
__device__ __forceinline__ uint2* output_row(const DecodeParams& p, int request, int first_token, int row, int column) {
  const int token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
  return reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + request * p.out_strides.batch +
                                  (first_token + token) * p.out_strides.token + head * p.out_strides.head + column) +
         (threadIdx.x % 2 * 2 + threadIdx.x % 4 / 2);
}

// ---- pairs (PlanWorker): the later group merges what the one before it left ----
//
// It waits for a group with lower numbers of CTAs than its own, which were dispatched before and wait for none with higher ones.
//
// The flags are in the workspace, in place of one more partial result, so that calls beside each other may share a plan. A flag that is
// up says a number of its own, which new memory holds with a chance of one in 2^64; whoever waited takes it down again.

__device__ __forceinline__ uint64_t* flag_of(const DecodeParams& p, int block_rows, int d_v, int slot) {
  const int64_t slots = 2 * int64_t{p.num_workers};
  return reinterpret_cast<uint64_t*>(static_cast<char*>(p.o_partial) + slots * block_rows * d_v * kPartialBytes) + slot;
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

// What the two partial results of a row count in its result, and the lse2 of that. `other_run`: of the other's columns (run_lse2).
struct PairWeights {
  float own, other, lse2;
};
__device__ __forceinline__ PairWeights pair_weights(float own, float other, float other_run) {
  const float max = fmaxf(own, other), base = max == kNegInf ? 0.f : max;
  const float lse2 = lse2_of(base, exp2_fast(own - base) + exp2_fast(other - base));
  const float lse2_base = lse2 == kNegInf ? 0.f : lse2;
  return {exp2_fast(own - lse2_base), exp2_fast(other_run - lse2_base), lse2};
}

}  // namespace mla
