// One function = one PTX instruction (PTX ISA 8.0, sm_90a).
#pragma once

#include <cstdint>

#include "../common/dtype.cuh"
#include "../common/shared.cuh"
#include "../params.h"

namespace mla::sm90 {

// ---- shared memory ----

__device__ __forceinline__ void store_shared_zeros_16(uint32_t to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
// Four 8 x 8 tiles of 16-bit elements, one a register; lane i gives the address of row i % 8 of tile i / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
// The same with each tile transposed: a thread's two elements are neighbours in a column.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t to, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
// Orders this thread's ordinary accesses to shared memory before what wgmma and TMA (the async proxy) do there later; another
// thread's wgmma or TMA needs a barrier behind it as well.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// True in one lane, for a whole warp. ptxas knows that it is one: behind this TMA takes uniform registers as they are, behind any other
// condition it gets a loop over lanes.
__device__ __forceinline__ bool elect_lane() {
  __syncwarp();  // lanes that are still behind, in a wait say, would elect another
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected)::"memory");
  return elected != 0;
}

// ---- registers of a warpgroup ----

template <int Registers>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- named barriers: `threads` counts those that arrive and those that wait ----

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- mbarriers: 8 bytes of shared memory ----

constexpr int kMbarrierBytes = 8;

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised mbarriers known to TMA; a __syncthreads makes them known to the other threads.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase wait for `bytes` more bytes of TMA.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Whether the phase of this parity is complete: true for parity 1 before the first phase is.
__device__ __forceinline__ bool mbarrier_test(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done != 0;
}
// The loop is inside the statement: a branch that ptxas takes for divergent would serialise every wgmma in flight.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// ---- copies ----

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// What a box is to L2: as anything else, or what leaves it first. The first carries no policy at all, as one that says what holds anyway
// takes time; so does a choice between them at each box (measured: sm90_3wg.md).
struct KeptInL2 {};
struct EvictedFirst {
  uint64_t policy;
};
__device__ __forceinline__ EvictedFirst evicted_first() {
  EvictedFirst l2;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(l2.policy));
  return l2;
}
// One box of a 3-D map, at element (x, y, z), to `to`; its bytes count on `barrier`. Elements outside arrive as zeros, and count.
__device__ __forceinline__ void tma_load_3d(uint32_t to, const TensorMap* map, int x, int y, int z, uint32_t barrier,
                                            KeptInL2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(uint32_t to, const TensorMap* map, int x, int y, int z, uint32_t barrier,
                                            EvictedFirst l2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "l"(l2.policy)
      : "memory");
}
// `bytes`, a multiple of 16, in one piece; they count on `barrier`.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Copies 16 bytes past L1; with `valid` false writes 16 zero bytes and reads nothing.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's latest groups are still in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- wgmma: d[64 x N] += a[64 x 16] b[16 x N], by the four warps of a warpgroup ----
//
// Warp i has rows 16 i .. of d: lane 4 g + q holds, of columns 8 n + 2 q and the next, row g in d[4 n], d[4 n + 1] and row g + 8 in
// d[4 n + 2], d[4 n + 3]. Operands in shared memory are given by descriptors (tile.cuh).

// Before the first wgmma, and whenever registers of one were touched since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Pending` of the latest groups are still in flight.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// No instruction: the compiler may move no use of an accumulator past it. Goes before the first wgmma into it and behind the wait for
// the last one; in between nothing may touch it, or ptxas serialises all (C7515).
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// The same for a descriptor: derived ones are added up where they are used, not held in registers.
__device__ __forceinline__ uint64_t pinned(uint64_t descriptor) {
  uint32_t low = static_cast<uint32_t>(descriptor), high = static_cast<uint32_t>(descriptor >> 32);
  asm volatile("" : "+r"(low));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Operand lists: numbers in the text (ten from a multiple of ten on), and registers.
#define MLA_TEN(x) \
  "%" #x "0, %" #x "1, %" #x "2, %" #x "3, %" #x "4, %" #x "5, %" #x "6, %" #x "7, %" #x "8, %" #x "9, "
#define MLA_SIXTY MLA_TEN() MLA_TEN(1) MLA_TEN(2) MLA_TEN(3) MLA_TEN(4) MLA_TEN(5)
#define MLA_SIXTY_MORE MLA_TEN(6) MLA_TEN(7) MLA_TEN(8) MLA_TEN(9) MLA_TEN(10) MLA_TEN(11)
#define MLA_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MLA_TEXT_32 MLA_TEN() MLA_TEN(1) MLA_TEN(2) "%30, %31"
#define MLA_TEXT_64 MLA_SIXTY "%60, %61, %62, %63"
#define MLA_TEXT_128 MLA_SIXTY MLA_SIXTY_MORE "%120, %121, %122, %123, %124, %125, %126, %127"
#define MLA_REGISTERS_8(d, i)                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MLA_REGISTERS_32(d, i) \
  MLA_REGISTERS_8(d, i), MLA_REGISTERS_8(d, i + 8), MLA_REGISTERS_8(d, i + 16), MLA_REGISTERS_8(d, i + 24)
#define MLA_REGISTERS_64(d, i) MLA_REGISTERS_32(d, i), MLA_REGISTERS_32(d, i + 32)
#define MLA_REGISTERS_128(d, i) MLA_REGISTERS_64(d, i), MLA_REGISTERS_64(d, i + 64)

// The instruction for both element types: whether d is added to, what follows the accumulators in the text, and the operands.
#define MLA_WGMMA_OF(type, shape, count, add, rest, ...)                                                             \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " #add ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type \
               " {" MLA_TEXT_##count "}, " rest "\n}"                                                                \
               : MLA_REGISTERS_##count(d, 0)                                                                         \
               : __VA_ARGS__)
#define MLA_WGMMA(...)                      \
  if constexpr (__is_same(T, bf16)) {       \
    MLA_WGMMA_OF("bf16.bf16", __VA_ARGS__); \
  } else {                                  \
    MLA_WGMMA_OF("f16.f16", __VA_ARGS__);   \
  }

// Logits: both operands K-major in shared memory. d[64 x 64] = a b if not `Accumulate`.
template <class T, bool Accumulate>
__device__ __forceinline__ void wgmma_qk(float (&d)[32], uint64_t a, uint64_t b) {
  if constexpr (Accumulate) {
    MLA_WGMMA("m64n64k16", 32, 1, "%32, %33, add, 1, 1, 0, 0;", "l"(a), "l"(b))
  } else {
    MLA_WGMMA("m64n64k16", 32, 0, "%32, %33, add, 1, 1, 0, 0;", "l"(a), "l"(b))
  }
}
// With operands swapped, all in shared memory, N = 16 rows of Q: logits^T of 64 tokens, a and b K-major; d = a b if not `Accumulate`.
template <class T, bool Accumulate>
__device__ __forceinline__ void wgmma_kq(float (&d)[8], uint64_t a, uint64_t b) {
  if constexpr (Accumulate) {
    MLA_WGMMA("m64n16k16", 8, 1, "%8, %9, add, 1, 1, 0, 0;", "l"(a), "l"(b))
  } else {
    MLA_WGMMA("m64n16k16", 8, 0, "%8, %9, add, 1, 1, 0, 0;", "l"(a), "l"(b))
  }
}
// O^T of 64 columns: V, a, is MN-major, P, b, is K-major.
template <class T>
__device__ __forceinline__ void wgmma_vp(float (&d)[8], uint64_t a, uint64_t b) {
  MLA_WGMMA("m64n16k16", 8, 1, "%8, %9, add, 1, 1, 1, 0;", "l"(a), "l"(b))
}
// Values: b is MN-major in shared memory, N = 2 R columns of V; a is K-major in shared memory,
template <class T, int R>
__device__ __forceinline__ void wgmma_pv(float (&d)[R], uint64_t a, uint64_t b) {
  static_assert(R == 64 || R == 128);
  if constexpr (R == 64) {
    MLA_WGMMA("m64n128k16", 64, 1, "%64, %65, add, 1, 1, 0, 1;", "l"(a), "l"(b))
  } else {
    MLA_WGMMA("m64n256k16", 128, 1, "%128, %129, add, 1, 1, 0, 1;", "l"(a), "l"(b))
  }
}
// or in registers: of columns 2 q, 2 q + 1, row g in a[0] and row g + 8 in a[1]; of columns 2 q + 8, 2 q + 9 likewise in a[2], a[3].
template <class T, int R>
__device__ __forceinline__ void wgmma_pv(float (&d)[R], const uint32_t (&a)[4], uint64_t b) {
  static_assert(R == 64 || R == 128);
  if constexpr (R == 64) {
    MLA_WGMMA("m64n128k16", 64, 1, "{%64, %65, %66, %67}, %68, add, 1, 1, 1;", "r"(a[0]), "r"(a[1]), "r"(a[2]),
              "r"(a[3]), "l"(b))
  } else {
    MLA_WGMMA("m64n256k16", 128, 1, "{%128, %129, %130, %131}, %132, add, 1, 1, 1;", "r"(a[0]), "r"(a[1]), "r"(a[2]),
              "r"(a[3]), "l"(b))
  }
}

#undef MLA_WGMMA
#undef MLA_WGMMA_OF
#undef MLA_REGISTERS_128
#undef MLA_REGISTERS_64
#undef MLA_REGISTERS_32
#undef MLA_REGISTERS_8
#undef MLA_TEXT_128
#undef MLA_TEXT_64
#undef MLA_TEXT_32
#undef MLA_TEXT_8
#undef MLA_SIXTY_MORE
#undef MLA_SIXTY
#undef MLA_TEN

}  // namespace mla::sm90
