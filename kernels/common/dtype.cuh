// The 16-bit element types as tags: data moves as raw bits, arithmetic is float32.
#pragma once

#include <cstdint>

namespace mla {

struct bf16 {};
struct fp16 {};

// Rounds two floats to nearest even; `low` goes to the lower half (the lower address).
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t bits;
  if constexpr (__is_same(T, bf16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class T>
__device__ __forceinline__ float to_float(uint16_t bits) {
  if constexpr (__is_same(T, bf16)) return __uint_as_float(uint32_t{bits} << 16);
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

}  // namespace mla
