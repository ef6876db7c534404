// One function = one PTX instruction (PTX ISA 7.x, sm_80 and later).
#pragma once

#include <cstdint>

#include "../common/dtype.cuh"
#include "../common/shared.cuh"

namespace mla::sm80 {

// N floats, rounded to 16 bits.
template <class T, int N>
__device__ __forceinline__ void store_shared_as(uint32_t to, const float (&x)[N]) {
  static_assert(N == 2 || N == 4);
  if constexpr (N == 2) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack2<T>(x[0], x[1])) : "memory");
  } else {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(pack2<T>(x[0], x[1])), "r"(pack2<T>(x[2], x[3]))
                 : "memory");
  }
}

__device__ __forceinline__ void load_global(uint32_t (&x)[4],
                                            const void* from) {  // 16 bytes that no kernel writes meanwhile
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "l"(from));
}
__device__ __forceinline__ void store_global(void* to, const uint32_t (&x)[4]) {
  *static_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
}

// Lanes 4 g to 4 g + 3 as the rows of a matrix of words: exchanges word i + Distance of the even lane (of bit Distance) for word i of
// its partner's, `Bit` lanes on.
template <int Bit, int Distance>
__device__ __forceinline__ void exchange_words(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & Bit;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i & Distance) continue;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + Distance], Bit);
    x[i] = odd ? other : x[i];
    x[i + Distance] = odd ? x[i + Distance] : other;
  }
}
// Word i of lane j and word j of lane i change places.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  exchange_words<1, 1>(x);
  exchange_words<2, 2>(x);
}

// Copies 16 bytes past L1, both addresses `Offset` bytes on (ptxas does not fold an addition into the instruction by itself);
// with `valid` false writes 16 zero bytes and reads nothing.
template <int Offset>
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %3], [%1 + %3], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0), "n"(Offset)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last `Pending` groups of this thread's copies have landed.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Arrives at the mbarrier when all copies of this thread so far have landed.
__device__ __forceinline__ void cp_async_arrive(uint32_t mbarrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(mbarrier) : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t mbarrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t mbarrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(mbarrier) : "memory");
}
// Whether a phase has ended: the first has parity 0, and the one before the first, which has ended, 1.
__device__ __forceinline__ bool mbarrier_ended(uint32_t mbarrier, int parity) {
  uint32_t ended;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(ended)
               : "r"(mbarrier), "r"(parity)
               : "memory");
  return ended;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t mbarrier, int parity) {
  while (!mbarrier_ended(mbarrier, parity)) {
  }
}

// Barriers of some of the CTA's warps; number 0 is that of __syncthreads.
__device__ __forceinline__ void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// 8 x 8 tiles of 16-bit elements; lane i gives the address of row i % 8 of tile i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
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
