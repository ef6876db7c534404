// Sums of partial results, as the combine kernel has them: a warp's lanes have a fragment of 16 rows and columns, as in partials.cuh, and
// what its rows count.
#pragma once

#include "dtype.cuh"
#include "partials.cuh"

namespace mla {

constexpr unsigned kLog2CombineWarps = 3, kCombineWarps = 1 << kLog2CombineWarps;
static_assert(kCombineThreads == 32 * kCombineWarps);
constexpr unsigned kChunkParts = 4;  // each lane of a quad knows what one of them counts
constexpr unsigned kSums = 8;
static_assert(kSums == kCombineWarps);

// What O of some parts and of others behind them is to be multiplied by, to be added; `state` becomes that of both.
struct Factors {
  float before, behind;
};
__device__ __forceinline__ Factors add_state(RowState& state, const RowState& behind) {
  const float raised = fmaxf(state.max, behind.max);
  const Factors factors{exp2_fast(state.max - raised), exp2_fast(behind.max - raised)};
  state = {raised, fmaf(behind.sum, factors.behind, state.sum * factors.before)};
  return factors;
}
__device__ __forceinline__ float add(float before, float behind, Factors factors) {
  return fmaf(behind, factors.behind, before * factors.before);
}

// What a lane has of the sum of some parts: as of a fragment, in rows g and g + 8.
struct Sum {
  float o[8];
  RowState rows[2];
};
constexpr Sum kNothing = {{}, {{kNoMax, 0.f}, {kNoMax, 0.f}}};

// The parts of a task.
struct Parts {
  unsigned row_tile, column_block;  // in each of them
  unsigned number;
  unsigned first, before_second, step;  // where they begin, in row tiles of all partial results
  int num_rows;                         // that exist; more than 16: all

  __device__ __forceinline__ unsigned begin_of(unsigned part) const {
    return part == 0 ? first : before_second + part * step;
  }
};

// Adds parts kChunkParts * chunk and so on.
template <int DV>
__device__ __forceinline__ void add_chunk(Sum& sum, const CombineParams& p, unsigned block_rows, const Parts& parts,
                                          unsigned chunk) {
  const unsigned first = chunk * kChunkParts, own = first + threadIdx.x % 4;
  const int quad = threadIdx.x % 32 / 4;
  // As if a partial result had 16 rows: others are several, but for the way from a row's lse2 to that of a run.
  const float* lse2_at = partial_lse2(p, kFragmentRows, parts.begin_of(own), parts.row_tile * kFragmentRows + quad);
  const unsigned of_run = run_rows(block_rows, parts.column_block / (DV / kFragmentColumns / kColumnRuns));
  float lse2[2], weight[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool counts = own < parts.number && quad + half * 8 < parts.num_rows;
    lse2[half] = counts ? lse2_at[half * 8] : kNegInf;
    weight[half] = counts ? lse2_at[half * 8 + of_run] : kNegInf;
  }
  uint4 x[kChunkParts];
#pragma unroll
  for (unsigned i = 0; i < kChunkParts; ++i) {
    const uint4* at =
        partial_fragment(p, kFragmentRows, DV, parts.begin_of(first + i), parts.row_tile, parts.column_block);
    x[i] = first + i < parts.number ? *at : uint4{};
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RowState& row = sum.rows[half];
    const float raised = fmaxf(row.max, lanes_max<4>(lse2[half])), before = exp2_fast(row.max - raised);
    row = {raised, fmaf(row.sum, before, lanes_sum<4>(exp2_fast(lse2[half] - raised)))};
    weight[half] = exp2_fast(weight[half] - raised);
#pragma unroll
    for (int j = half * 2; j < 8; j += 4) sum.o[j] *= before, sum.o[j + 1] *= before;
  }
#pragma unroll
  for (unsigned i = 0; i < kChunkParts; ++i) {
    float of_part[8], counts[2];
    unpack_partial(x[i], of_part);
#pragma unroll
    for (int half = 0; half < 2; ++half) counts[half] = __shfl_sync(0xffffffffu, weight[half], (threadIdx.x & 28) + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.o[j] = fmaf(counts[j / 2 % 2], of_part[j], sum.o[j]);
  }
}

// Of four words of each lane of a quad: lane 0 gets the first ones of all, lane 1 the third ones, lane 2 the second ones, lane 3 the last.
__device__ __forceinline__ uint4 quad_transposed(const uint32_t (&words)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  uint32_t of_pair[2][2];  // word, lane
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t kept = odd ? words[2 + i] : words[i];
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[2 + i], 1);
    of_pair[i][0] = odd ? got : kept, of_pair[i][1] = odd ? kept : got;
  }
  uint32_t kept[2], got[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    kept[i] = upper ? of_pair[1][i] : of_pair[0][i];
    got[i] = __shfl_xor_sync(0xffffffffu, upper ? of_pair[0][i] : of_pair[1][i], 2);
  }
  return upper ? uint4{got[0], got[1], kept[0], kept[1]} : uint4{kept[0], kept[1], got[0], got[1]};
}

// Sums that wait for others, each a warp's, three float4 a lane. Where warps share tasks: of a task all, be there parts for them or not.
// Where they do not: of each warp one.
template <unsigned Places>
struct Kept {
  float4 words[3][Places * 32];
};
template <unsigned Places>
__device__ __forceinline__ void keep(Kept<Places>& kept, unsigned place, const Sum& sum) {
  const unsigned at = place * 32 + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    kept.words[i][at] = make_float4(sum.o[i * 4], sum.o[i * 4 + 1], sum.o[i * 4 + 2], sum.o[i * 4 + 3]);
  kept.words[2][at] = make_float4(sum.rows[0].max, sum.rows[0].sum, sum.rows[1].max, sum.rows[1].sum);
}
// `sum` is behind what was kept.
template <unsigned Places>
__device__ __forceinline__ void add_kept(Sum& sum, const Kept<Places>& kept, unsigned place) {
  const unsigned at = place * 32 + threadIdx.x % 32;
  const float4 low = kept.words[0][at], high = kept.words[1][at], rows = kept.words[2][at];
  const float before[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  RowState of_both[2] = {{rows.x, rows.y}, {rows.z, rows.w}};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Factors factors = add_state(of_both[half], sum.rows[half]);
    sum.rows[half] = of_both[half];
#pragma unroll
    for (int j = half * 2; j < 8; j += j % 2 ? 3 : 1) sum.o[j] = add(before[j], sum.o[j], factors);
  }
}
// Of one: pairs 0 and 2 are two columns of row g, of the first 8 and the next, pairs 1 and 3 those of row g + 8; pair 4 is the state of row g,
// 5 that of row g + 8.
template <unsigned Places>
__device__ __forceinline__ float2 kept_pair(const Kept<Places>& kept, unsigned place, unsigned pair) {
  return reinterpret_cast<const float2*>(&kept.words[pair / 2][place * 32 + threadIdx.x % 32])[pair % 2];
}
template <unsigned Places>
__device__ __forceinline__ RowState kept_state(const Kept<Places>& kept, unsigned place, unsigned pair) {
  const float2 state = kept_pair(kept, place, 4 + pair % 2);
  return {state.x, state.y};
}

}  // namespace mla
