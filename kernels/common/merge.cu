// Merges two attention states: out = w_a o_a + w_b o_b with w = exp(lse_a - lse), exp(lse_b - lse), lse = log(exp lse_a + exp lse_b).
//
// A thread has a chunk of eight columns of a row, a row all its threads in one CTA. Where results go over inputs, each chunk is
// read by the thread that writes it, and the log-sum-exps by all threads of the row before one of them writes.

#include "dtype.cuh"
#include "math.cuh"
#include "merge.h"

namespace mla {

struct fp32 {};

template <class T>
constexpr int kBytes = __is_same(T, fp32) ? 4 : 2;

// The eight columns of a chunk. Aligned: in pieces of 16 bytes; else one by one, since nothing but an element is aligned.
template <class T, bool Aligned>
__device__ __forceinline__ void load_chunk(const char* from, float (&x)[kMergeColumns]) {
  if constexpr (__is_same(T, fp32)) {
    if constexpr (Aligned) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 piece = reinterpret_cast<const float4*>(from)[i];
        x[4 * i] = piece.x, x[4 * i + 1] = piece.y, x[4 * i + 2] = piece.z, x[4 * i + 3] = piece.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMergeColumns; ++i) x[i] = reinterpret_cast<const float*>(from)[i];
    }
  } else {
    if constexpr (Aligned) {
      const uint4 pairs = *reinterpret_cast<const uint4*>(from);
      const uint32_t pair[] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int i = 0; i < kMergeColumns; ++i) x[i] = to_float<T>(static_cast<uint16_t>(pair[i / 2] >> i % 2 * 16));
    } else {
#pragma unroll
      for (int i = 0; i < kMergeColumns; ++i) x[i] = to_float<T>(reinterpret_cast<const uint16_t*>(from)[i]);
    }
  }
}

template <class T, bool Aligned>
__device__ __forceinline__ void store_chunk(char* to, const float (&x)[kMergeColumns]) {
  if constexpr (__is_same(T, fp32)) {
    if constexpr (Aligned) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        reinterpret_cast<float4*>(to)[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    } else {
#pragma unroll
      for (int i = 0; i < kMergeColumns; ++i) reinterpret_cast<float*>(to)[i] = x[i];
    }
  } else {
    uint32_t pair[kMergeColumns / 2];
#pragma unroll
    for (int i = 0; i < kMergeColumns / 2; ++i) pair[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    if constexpr (Aligned) {
      *reinterpret_cast<uint4*>(to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kMergeColumns; ++i)
        reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(pair[i / 2] >> i % 2 * 16);
    }
  }
}

template <class T, bool Aligned>
__device__ __forceinline__ void merge(const MergeParams& p) {
  const int thread = static_cast<int>(threadIdx.x), row_in_cta = divide(thread, p.by_row_threads);
  const int64_t row_index = int64_t{blockIdx.x} * p.rows_per_cta + row_in_cta;
  const bool exists = row_in_cta < p.rows_per_cta && row_index < p.num_rows;
  const int row = exists ? static_cast<int>(row_index) : 0;
  const int outer = divide(row, p.by_heads), head = row - outer * p.heads;
  const int batch = divide(outer, p.by_tokens), token = outer - batch * p.tokens;
  auto at = [&](const RowStrides& s) { return batch * s.batch + token * s.token + head * s.head; };

  const char* row_a = static_cast<const char*>(p.o_a) + at(p.o_a_strides) * kBytes<T>;
  const char* row_b = static_cast<const char*>(p.o_b) + at(p.o_b_strides) * kBytes<T>;
  char* row_out = static_cast<char*>(p.out) + at(p.out_strides) * kBytes<T>;
  constexpr int kChunkBytes = kMergeColumns * kBytes<T>;
  const int first_chunk = thread - row_in_cta * p.row_threads;

  float a[kMergeColumns] = {}, b[kMergeColumns] = {};
  float lse_a = kNegInf, lse_b = kNegInf;
  if (exists) {
    load_chunk<T, Aligned>(row_a + int64_t{first_chunk} * kChunkBytes, a);
    load_chunk<T, Aligned>(row_b + int64_t{first_chunk} * kChunkBytes, b);
    lse_a = p.lse_a[at(p.lse_a_strides)], lse_b = p.lse_b[at(p.lse_b_strides)];
  }
  __syncthreads();  // all that need lse_a and lse_b have them
  if (!exists) return;

  // Other libraries mark empty rows by +inf.
  if (isinf(lse_a)) lse_a = kNegInf;
  if (isinf(lse_b)) lse_b = kNegInf;
  const float max = fmaxf(lse_a, lse_b), base = max == kNegInf ? 0.f : max;
  const float exp_a = expf(lse_a - base), exp_b = expf(lse_b - base);  // one of them is 1, or both are 0
  const float sum = exp_a + exp_b, scale = sum == 0.f ? 0.f : 1.f / sum;
  const float w_a = exp_a * scale, w_b = exp_b * scale;
  if (first_chunk == 0) p.lse[at(p.lse_strides)] = max + logf(sum);

  for (int chunk = first_chunk;;) {
#pragma unroll
    for (int i = 0; i < kMergeColumns; ++i)  // what a state without weight holds does not matter, be it NaN
      a[i] = (w_a == 0.f ? 0.f : w_a * a[i]) + (w_b == 0.f ? 0.f : w_b * b[i]);
    store_chunk<T, Aligned>(row_out + int64_t{chunk} * kChunkBytes, a);
    chunk += p.row_threads;
    if (chunk >= p.row_chunks) break;
    load_chunk<T, Aligned>(row_a + int64_t{chunk} * kChunkBytes, a);
    load_chunk<T, Aligned>(row_b + int64_t{chunk} * kChunkBytes, b);
  }
}

}  // namespace mla

#define MLA_MERGE(name, dtype, aligned)                              \
  extern "C" __global__ void __launch_bounds__(mla::kMergeThreads)   \
      mla_merge_##name(const __grid_constant__ mla::MergeParams p) { \
    mla::merge<mla::dtype, aligned>(p);                              \
  }
MLA_MERGE(bf16, bf16, true)
MLA_MERGE(fp16, fp16, true)
MLA_MERGE(fp32, fp32, true)
MLA_MERGE(bf16_unaligned, bf16, false)
MLA_MERGE(fp16_unaligned, fp16, false)
MLA_MERGE(fp32_unaligned, fp32, false)
