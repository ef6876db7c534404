// Verbs of the online softmax that every pipeline shares. Base 2 throughout: logits carry scale * log2(e).
#pragma once

#include "../params.h"

namespace mla {

__device__ __forceinline__ int divide(int n, FastDivisor by) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * by.multiplier >> by.shift);
}

// body(Index<First>{}), ..., body(Index<End - 1>{}): a loop whose counter is a constant in each round.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int End, int First = 0, class Body>
__device__ __forceinline__ void unrolled(Body&& body) {
  if constexpr (First < End) {
    body(Index<First>{});
    unrolled<End, First + 1>(body);
  }
}

constexpr float kNegInf = -__builtin_huge_valf();
// Of a row that has seen no token: finite, so that differences of two are, and below every logit.
constexpr float kNoMax = -1e30f;
constexpr float kLn2 = 0.69314718055994530942f;

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; exp2(-inf) = 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {  // 1 ulp, no branch
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// What a row's O is to be multiplied by; 0 for a row that saw no token.
__device__ __forceinline__ float inverse_fast(float sum) { return sum == 0.f ? 0.f : reciprocal_fast(sum); }

// Over aligned runs of `Width` lanes; every lane gets the result.
template <int Width>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = Width / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
template <int Width>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = Width / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Of a row's tokens: the sum of 2^(logit - max).
struct RowState {
  float max, sum;
};
// log2 of a row's sum of 2^logit, given its sum relative to 2^max; -inf for a row that saw no token.
__device__ __forceinline__ float lse2_of(float max, float sum) { return sum == 0.f ? kNegInf : max + __log2f(sum); }

}  // namespace mla
