// Reads memory once, with several 16-byte loads of each thread under way, and does nothing else that takes time: what `mla bench` holds
// decode against. On an H200 no way to read KV was more than 4 % faster: 1,048,576 tokens took 266 us by bulk copies into shared memory,
// and 269 (a loose program) to 278 (`mla bench`) this way.
#include <cstdint>

namespace mla {

constexpr int kStreamThreads = 512, kLoadsAtOnce = 4;

__device__ __forceinline__ uint32_t folded(const uint4& x) { return x.x ^ x.y ^ x.z ^ x.w; }

}  // namespace mla

// Adds all words, by exclusive or, to what is at `sum`: nothing can be left out.
extern "C" __global__ void __launch_bounds__(mla::kStreamThreads)
    mla_stream(const uint4* from, int64_t num_vectors, uint32_t* sum) {
  using namespace mla;
  __shared__ uint32_t of_warps[kStreamThreads / 32];
  const int64_t step = int64_t{gridDim.x} * kStreamThreads;
  int64_t i = int64_t{blockIdx.x} * kStreamThreads + threadIdx.x;
  uint32_t words = 0;
  for (; i + (kLoadsAtOnce - 1) * step < num_vectors; i += kLoadsAtOnce * step) {
    uint4 x[kLoadsAtOnce];
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) x[k] = __ldcs(from + i + k * step);
#pragma unroll
    for (int k = 0; k < kLoadsAtOnce; ++k) words ^= folded(x[k]);
  }
  for (; i < num_vectors; i += step) words ^= folded(__ldcs(from + i));
  words = __reduce_xor_sync(0xffffffffu, words);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = words;
  __syncthreads();  // those of all warps are there
  if (threadIdx.x < 32) {
    words = __reduce_xor_sync(0xffffffffu, threadIdx.x < kStreamThreads / 32 ? of_warps[threadIdx.x] : 0u);
    if (threadIdx.x == 0) atomicXor(sum, words);
  }
}
