// One function = one PTX instruction (PTX ISA 7.x, sm_80 and later).
#pragma once

#include <cstdint>

#include "../common/dtype.cuh"

namespace mla::sm80 {

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
__device__ __forceinline__ void store_shared(uint32_t to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
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
  for (int i = 0; i < static_cast<int>(sizeof(Struct) / 16); ++i)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[i].x), "=r"(words[i].y), "=r"(words[i].z), "=r"(words[i].w)
                 : "r"(from + i * 16)
                 : "memory");
}
// N floats, rounded to 16 bits.
template <class T, int N>
__device__ __forceinline__ void store_shared_as(uint32_t to, const float (&x)[N]) {
  if constexpr (N == 1) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(static_cast<uint16_t>(pack2<T>(x[0], 0.f))) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2)
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + i * 2), "r"(pack2<T>(x[i], x[i + 1])) : "memory");
  }
}

// Tells the compiler that all lanes hold the same value, so that it can live in a uniform register.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Copies 16 bytes past L1, both addresses `Offset` bytes on (ptxas does not fold an addition into the instruction by itself);
// with `valid` false writes 16 zero bytes and reads nothing.
template <int Offset>
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %3], [%1 + %3], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0), "n"(Offset)
               : "memory");
}
// `Count` such copies, `Step` bytes apart, from number `First`.
template <int Count, int Step, int First = 0>
__device__ __forceinline__ void cp_async_strided(uint32_t to, const void* from, bool valid) {
  if constexpr (Count > 0) {
    cp_async_16<First * Step>(to, from, valid);
    cp_async_strided<Count - 1, Step, First + 1>(to, from, valid);
  }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's latest groups are still in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8]. Of d, lane (4 g + q) holds columns 2 q, 2 q + 1 of rows g (d[0], d[1]) and g + 8 (d[2], d[3]).
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (__is_same(T, bf16)) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace mla::sm80
