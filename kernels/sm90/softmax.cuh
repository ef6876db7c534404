// Verbs of the online softmax on accumulators of wgmma: a thread has two rows (`half`: row g and row g + 8 of its warp's 16) and of each
// 16 of a tile's 64 logits; the four lanes of a quad share a row. Base 2, logits carry scale * log2(e).
#pragma once

#include "../common/math.cuh"
#include "ptx.cuh"

namespace mla::sm90 {

// In base 2: P may be as large as 2^8 until O is rescaled; the row sum undoes it exactly.
constexpr float kMaxGrowth = 8.f;

// Logits in base 2.
__device__ __forceinline__ void scale_logits(float (&s)[32], float scale_log2) {
#pragma unroll
  for (int i = 0; i < 32; ++i) s[i] *= scale_log2;
}
// `seen`: how many tokens of the tile each row sees, less the thread's first column (2 q); any number.
__device__ __forceinline__ void mask_tail(float (&s)[32], const int (&seen)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i)
    if (i / 4 * 8 + i % 2 >= seen[i / 2 % 2]) s[i] = kNegInf;
}
__device__ __forceinline__ void row_max(const float (&s)[32], float (&max)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x = fmaxf(s[half * 2], s[half * 2 + 1]);
#pragma unroll
    for (int n = 1; n < 8; ++n) x = fmaxf(x, fmaxf(s[n * 4 + half * 2], s[n * 4 + half * 2 + 1]));
    max[half] = lanes_max<4>(x);
  }
}
// Raises the max that P refers to if the tile's exceeds it by more than kMaxGrowth. `factor`: by what O and the row sum must be
// multiplied.
__device__ __forceinline__ void raise_max(float (&max)[2], const float (&tile_max)[2], float (&factor)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float raised = tile_max[half] > max[half] + kMaxGrowth ? tile_max[half] : max[half];
    factor[half] = exp2_fast(max[half] - raised);
    max[half] = raised;
  }
}
// Logits become P; its sum over the thread's columns is added to the sums, which are rescaled first.
__device__ __forceinline__ void exp2_rows(float (&s)[32], const float (&max)[2], const float (&factor)[2],
                                          float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float of_tile = 0.f;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[n * 4 + half * 2 + e];
        x = exp2_fast(x - max[half]);
        of_tile += x;
      }
    sum[half] = sum[half] * factor[half] + of_tile;
  }
}
// P as A operands of the four k-steps of 16 tokens.
template <class T>
__device__ __forceinline__ void pack_p(const float (&s)[32], uint32_t (&p)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) p[k][i] = pack2<T>(s[k * 8 + i * 2], s[k * 8 + i * 2 + 1]);
}
// Most tiles raise no max: then the warp does nothing.
template <int N>
__device__ __forceinline__ void rescale_rows(float (&o)[N], const float (&factor)[2]) {
  if (!__any_sync(0xffffffffu, factor[0] != 1.f || factor[1] != 1.f)) return;
#pragma unroll
  for (int i = 0; i < N; ++i) o[i] *= factor[i / 2 % 2];
}

}  // namespace mla::sm90
