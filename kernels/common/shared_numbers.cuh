// Arrays of numbers in memory, and of 32-bit numbers in shared memory, at an address that the compiler does not rebuild on every use
// (shared.cuh).
#pragma once

#include <cstdint>

#ifdef __CUDA_ARCH__
#include "shared.cuh"
#endif

namespace mla {

// The compiler keeps it in a register, where it would else read a special one anew on every use.
__device__ __forceinline__ int kept(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T>
struct Numbers {
  T* numbers;
  __device__ __forceinline__ T operator[](int32_t i) const { return numbers[i]; }
  __device__ __forceinline__ void set(int32_t i, T x) const { numbers[i] = x; }
};

#ifdef __CUDA_ARCH__
struct SharedNumbers {
  uint32_t address;
  __device__ __forceinline__ explicit SharedNumbers(int32_t* numbers) : address(shared_address(numbers)) {}
  __device__ __forceinline__ int32_t operator[](int32_t i) const {
    int32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address + i * 4) : "memory");
    return x;
  }
  __device__ __forceinline__ void set(int32_t i, int32_t x) const {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address + i * 4), "r"(x) : "memory");
  }
};
#else
using SharedNumbers = Numbers<int32_t>;
#endif

}  // namespace mla
