// A stand-in for a CTA of CTA_THREADS threads, in which device code runs as it is.
//
// Every thread is a fiber. One runs at a time, from barrier to barrier, and a warp runs until it waits for the others, the first warp and
// thread first or the last: where a barrier is missing, one of the orders gives another result. A barrier that not all threads reach
// ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace cta {

constexpr int kThreads = CTA_THREADS, kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Barrier {
  int expected, arrived;
  unsigned passed;
};

struct Fiber {
  ucontext_t context;
  std::array<char, 64 << 10> stack;
  bool done;
};

std::vector<Fiber> fibers(kThreads);
ucontext_t scheduler;
int current;    // the thread that runs
bool advanced;  // a barrier was passed or a thread ended
Barrier all_threads;
std::array<Barrier, kWarps> warps;
std::array<uint64_t, kThreads> exchanged;
void (*kernel)();

void give_way() { swapcontext(&fibers[current].context, &scheduler); }

void wait(Barrier& barrier) {
  const unsigned passed = barrier.passed;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    advanced = true;
  }
  while (barrier.passed == passed) give_way();
}

template <class T>
T shuffle(uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != kAllLanes) std::abort();
  std::memcpy(&exchanged[current], &value, sizeof(T));
  wait(warps[current / 32]);
  std::memcpy(&value, &exchanged[from], sizeof(T));
  wait(warps[current / 32]);
  return value;
}

void run_fiber() {
  kernel();
  fibers[current].done = advanced = true;
  give_way();
}

// Until all that is left of the warp waits for others. False if it did already.
bool run_warp(int warp, bool backward) {
  for (bool any = false;; any = true) {
    advanced = false;
    for (int lane = 0; lane < 32; ++lane) {
      current = 32 * warp + (backward ? 31 - lane : lane);
      if (!fibers[current].done) swapcontext(&scheduler, &fibers[current].context);
    }
    if (!advanced) return any;
  }
}

// Runs the kernel in the first threads, whole warps.
void run(void (*entry)(), bool backward, int threads = kThreads) {
  kernel = entry;
  all_threads = {threads, 0, 0};
  warps.fill({32, 0, 0});
  for (int i = 0; i < kThreads; ++i) {
    Fiber& fiber = fibers[static_cast<size_t>(i)];
    fiber.done = i >= threads;
    if (fiber.done) continue;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int warp = 0; warp < kWarps; ++warp) any |= run_warp(backward ? kWarps - 1 - warp : warp, backward);
  }
  if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.done; })) return;
  std::fputs("some threads wait at a barrier that others never reach\n", stderr);
  std::exit(1);
}

struct Index {
  operator int() const { return current; }
};

}  // namespace cta

// ---- What device code needs of CUDA ----

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // begins as the plan before left it

const struct {
  cta::Index x;
} threadIdx;
using std::max;
using std::min;

void __syncthreads() { cta::wait(cta::all_threads); }
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits) {
  return cta::shuffle(mask, value, cta::current ^ bits);
}
inline uint32_t __ballot_sync(uint32_t mask, bool value) {
  uint32_t bits = uint32_t{value} << cta::current % 32;
  for (int step = 16; step > 0; step /= 2) bits |= __shfl_xor_sync(mask, bits, step);
  return bits;
}
