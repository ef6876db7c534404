// Writes rows of new tokens into a paged cache, their rope columns rotated on the way.
//
// A warp has a token. What it reads of positions, block table and cu_seqlens_q is user memory: a token that they lead outside of the
// cache, the block table or the table of angles is left out.

#include "append.h"
#include "dtype.cuh"
#include "math.cuh"

namespace mla {

constexpr int kChunkBytes = 2 * kAppendColumns;

__device__ __forceinline__ uint4 load_chunk(const char* row, int chunk) {
  return *reinterpret_cast<const uint4*>(row + chunk * kChunkBytes);
}

__device__ __forceinline__ void store_chunk(char* row, int chunk, uint4 x) {
  *reinterpret_cast<uint4*>(row + chunk * kChunkBytes) = x;
}

template <class T>
__device__ __forceinline__ void unpack(uint4 chunk, float (&x)[kAppendColumns]) {
  const uint32_t pairs[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < kAppendColumns; ++i) x[i] = to_float<T>(static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16));
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kAppendColumns]) {
  return make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
}

// N floats from a multiple of 16 bytes.
template <int N>
__device__ __forceinline__ void load_floats(const float* from, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

// (a, b) by an angle. Products and sums are rounded one by one, as torch's are: the same bits on any device.
__device__ __forceinline__ void turn(float& a, float& b, float cos, float sin) {
  const float x = a, y = b;
  a = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  b = __fadd_rn(__fmul_rn(y, cos), __fmul_rn(x, sin));
}

// The request whose range of cu_seqlens_q has the token, -1 if none: all lanes look at 32 requests at once, then at those between two.
__device__ __forceinline__ int find_request(const AppendParams& p, int token, int lane) {
  int first = 0, count = p.num_requests;  // it is among these
  while (count > 1) {
    const int step = (count + 31) / 32, ahead = lane * step;
    const bool begun = ahead < count && p.cu_seqlens_q[first + ahead] <= token;
    const int passed = max(__popc(__ballot_sync(0xffffffffu, begun)) - 1, 0) * step;
    first += passed;
    count = min(step, count - passed);
  }
  return p.cu_seqlens_q[first] <= token && token < p.cu_seqlens_q[first + 1] ? first : -1;
}

template <class T>
__device__ __forceinline__ void append(const AppendParams& p) {
  const int lane = threadIdx.x % 32;
  const int64_t place = int64_t{blockIdx.x} * kAppendTokensPerCta + threadIdx.x / 32;
  if (place >= p.num_tokens) return;
  const int token = static_cast<int>(place);
  const int request = p.cu_seqlens_q ? find_request(p, token, lane) : divide(token, p.by_s_q);
  if (request < 0) return;
  const int in_request = p.cu_seqlens_q ? token : token - request * p.s_q;  // a ragged tensor counts through
  const auto at = [&](TokenStrides s) { return request * s.batch + in_request * s.token; };

  const int position = p.positions[at(p.positions_strides)];
  if (position < 0) return;
  const int page_index = divide(position, p.by_page_size);
  if (page_index >= p.max_pages || (p.cos_sin && position >= p.num_angles)) return;
  const int page = p.block_table[request * p.block_table_stride + page_index];
  if (page < 0 || page >= p.num_pages) return;
  const int slot = position - page_index * p.page_size;
  const auto cache_at = [&](CacheStrides s) { return page * s.page + slot * s.token; };
  const auto bytes = [](const void* data, int64_t element) { return static_cast<const char*>(data) + 2 * element; };

  const char* latent = bytes(p.latent, at(p.latent_strides));
  char* latent_row = const_cast<char*>(bytes(p.latent_cache, cache_at(p.latent_cache_strides)));
  for (int chunk = lane; chunk < p.latent_chunks; chunk += 32)
    store_chunk(latent_row, chunk, load_chunk(latent, chunk));

  const char* rope = bytes(p.rope, at(p.rope_strides));
  char* rope_row = const_cast<char*>(bytes(p.rope_cache, cache_at(p.rope_cache_strides)));
  if (!p.cos_sin) {
    for (int chunk = lane; chunk < p.rope_chunks; chunk += 32) store_chunk(rope_row, chunk, load_chunk(rope, chunk));
    return;
  }
  const int pairs = p.rope_chunks * (kAppendColumns / 2);
  const float* cos_row = p.cos_sin + position * p.cos_sin_stride;
  const float* sin_row = cos_row + pairs;
  if (p.interleaved) {
    constexpr int kPairs = kAppendColumns / 2;
    for (int chunk = lane; chunk < p.rope_chunks; chunk += 32) {
      float x[kAppendColumns], cos[kPairs], sin[kPairs];
      unpack<T>(load_chunk(rope, chunk), x);
      load_floats(cos_row + chunk * kPairs, cos);
      load_floats(sin_row + chunk * kPairs, sin);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) turn(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
      store_chunk(rope_row, chunk, pack<T>(x));
    }
  } else {
    const int half = p.rope_chunks / 2;
    for (int chunk = lane; chunk < half; chunk += 32) {
      float a[kAppendColumns], b[kAppendColumns], cos[kAppendColumns], sin[kAppendColumns];
      unpack<T>(load_chunk(rope, chunk), a);
      unpack<T>(load_chunk(rope, chunk + half), b);
      load_floats(cos_row + chunk * kAppendColumns, cos);
      load_floats(sin_row + chunk * kAppendColumns, sin);
#pragma unroll
      for (int i = 0; i < kAppendColumns; ++i) turn(a[i], b[i], cos[i], sin[i]);
      store_chunk(rope_row, chunk, pack<T>(a));
      store_chunk(rope_row, chunk + half, pack<T>(b));
    }
  }
}

}  // namespace mla

#define MLA_APPEND(name)                                               \
  extern "C" __global__ void __launch_bounds__(mla::kAppendThreads)    \
      mla_append_##name(const __grid_constant__ mla::AppendParams p) { \
    mla::append<mla::name>(p);                                         \
  }
MLA_APPEND(bf16)
MLA_APPEND(fp16)
