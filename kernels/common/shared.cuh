// Shared memory as every pipeline uses it.
#pragma once

#include <cstdint>

namespace mla {

// Shared memory is addressed by 32-bit numbers throughout: ptxas rebuilds the address of a C++ object on every use (on sm_90
// with a read of a special register), a number that it cannot see through it keeps.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return address;
}

template <int N>
__device__ __forceinline__ void load_shared(float (&x)[N], uint32_t from) {
  static_assert(N == 1 || N == 2 || N % 4 == 0);
  if constexpr (N == 1) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x[0]) : "r"(from) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(from) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(x[i]), "=f"(x[i + 1]), "=f"(x[i + 2]), "=f"(x[i + 3])
                   : "r"(from + i * 4)
                   : "memory");
  }
}
__device__ __forceinline__ float load_shared(uint32_t from) {
  float x[1];
  load_shared(x, from);
  return x[0];
}
__device__ __forceinline__ uint4 load_shared_words(uint32_t from) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_shared_quad(uint32_t to, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
// Any struct of 16-byte size and alignment multiples.
template <class Struct>
__device__ __forceinline__ void store_shared_struct(uint32_t to, const Struct& x) {
  static_assert(sizeof(Struct) % 16 == 0 && alignof(Struct) == 16);
  const uint4* words = reinterpret_cast<const uint4*>(&x);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Struct) / 16); ++i)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 16), "r"(words[i].x), "r"(words[i].y),
                 "r"(words[i].z), "r"(words[i].w)
                 : "memory");
}
template <class Struct>
__device__ __forceinline__ void load_shared_struct(Struct& x, uint32_t from) {
  static_assert(sizeof(Struct) % 16 == 0 && alignof(Struct) == 16);
  uint4* words = reinterpret_cast<uint4*>(&x);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Struct) / 16); ++i) words[i] = load_shared_words(from + i * 16);
}

// Tells the compiler that all lanes hold the same value, so that it can live in a uniform register.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

}  // namespace mla
