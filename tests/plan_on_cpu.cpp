// The device's planners (kernels/common/plan.cu and plan_parts.cu, as they are) without a device: a program that reads batches and
// writes the plans that they get. test_plan_on_cpu.py builds it and asks.
//
// Every thread of the CTA is a fiber. One runs at a time, from barrier to barrier, and a warp runs until it waits for the others,
// the first warp and thread first or the last: where a barrier is missing, one of the orders gives another plan. A barrier that
// not all threads reach ends the program.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// 64 threads, not as many as on the device: the same code, and batches of a few hundred requests take several rounds of it.
#define kPlanThreads kPlanThreadsOfTheDevice
#include "params.h"
#undef kPlanThreads
namespace mla {
constexpr int kPlanThreads = 64;
}

namespace cta {

constexpr int kThreads = mla::kPlanThreads, kWarps = kThreads / 32;
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

// Runs the kernel in all threads.
void run(void (*entry)(), bool backward) {
  kernel = entry;
  all_threads = {kThreads, 0, 0};
  warps.fill({32, 0, 0});
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
    fiber.done = false;
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

// ---- What plan.cu needs of CUDA ----

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
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int lanes) {
  return cta::shuffle(mask, value, cta::current % 32 < lanes ? cta::current : cta::current - lanes);
}
int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
template <class T, class Operation>
T reduce(uint32_t mask, T value, Operation operation) {
  for (int bits = 16; bits > 0; bits /= 2) value = operation(value, __shfl_xor_sync(mask, value, bits));
  return value;
}
int __reduce_add_sync(uint32_t mask, int value) {
  return reduce(mask, value, [](int a, int b) { return a + b; });
}
int __reduce_min_sync(uint32_t mask, int value) {
  return reduce(mask, value, [](int a, int b) { return std::min(a, b); });
}
int __reduce_max_sync(uint32_t mask, int value) {
  return reduce(mask, value, [](int a, int b) { return std::max(a, b); });
}
uint32_t __ballot_sync(uint32_t mask, bool value) {
  return reduce(mask, uint32_t{value} << cta::current % 32, [](uint32_t a, uint32_t b) { return a | b; });
}
template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <class T>
T atomicMin(T* at, T value) {
  const T before = *at;
  *at = std::min(before, value);
  return before;
}
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

#include "common/plan.cu"
#include "common/plan_parts.cu"

// ---- Batches in, plans out, in int32 words ----

namespace {

// Of a batch; its seq_lens follow and, if it is ragged, its cu_seqlens_q.
struct Sizes {
  int32_t num_requests, ragged, s_q, total_q, h_q, max_len, block_rows, block_n, merges_pairs, num_workers,
      batch_invariant, large, backward;  // large: planned as large batches are, even if it is small
};

mla::Lengths lengths;
Sizes sizes;
mla::PlanHeader* plan;

template <class T>
bool read_all(T* words, size_t count) {
  return std::fread(words, sizeof(T), count, stdin) == count;
}

}  // namespace

int main() {
  while (read_all(&sizes, 1)) {
    // Of just the size each, so that AddressSanitizer sees what lies beside them.
    const size_t b = static_cast<size_t>(sizes.num_requests);
    std::vector<int32_t> seq_lens(b), cu_seqlens_q(sizes.ragged ? b + 1 : 0);
    if (!read_all(seq_lens.data(), seq_lens.size()) || !read_all(cu_seqlens_q.data(), cu_seqlens_q.size())) return 1;
    lengths.seq_lens = seq_lens.data();
    lengths.cu_seqlens_q = sizes.ragged ? cu_seqlens_q.data() : nullptr;
    lengths.num_requests = sizes.num_requests;
    lengths.s_q = sizes.s_q;
    lengths.total_q = sizes.total_q;
    lengths.h_q = sizes.h_q;
    lengths.max_len = sizes.max_len;
    const mla::schedule::Shape shape{sizes.block_rows, sizes.block_n, sizes.merges_pairs};
    const int64_t bytes = sizes.batch_invariant ? mla::parts::plan_bytes(lengths, shape, sizes.num_workers)
                                                : mla::schedule::plan_bytes(lengths, shape, sizes.num_workers);
    plan = static_cast<mla::PlanHeader*>(std::malloc(static_cast<size_t>(bytes)));
    std::memset(static_cast<void*>(plan), 0x7f, static_cast<size_t>(bytes));
    cta::run(
        [] {
          const mla::schedule::Shape shape{sizes.block_rows, sizes.block_n, sizes.merges_pairs};
          const int32_t workers = sizes.num_workers;
          if (sizes.batch_invariant) {
            const bool small = !sizes.large && mla::parts::is_small(lengths, shape, workers);
            const auto make = small ? mla_plan_parts_small : mla_plan_parts_large;
            make(lengths, shape, workers, plan, mla::parts::limits_of(lengths, shape));
          } else {
            const bool small = !sizes.large && mla::schedule::is_small(lengths, shape);
            const auto make = small          ? sizes.ragged ? mla_plan_small_ragged : mla_plan_small
                              : sizes.ragged ? mla_plan_large_ragged
                                             : mla_plan_large;
            make(lengths, shape, workers, plan);
          }
        },
        sizes.backward != 0);
    std::fwrite(&bytes, sizeof(bytes), 1, stdout);
    std::fwrite(plan, 1, static_cast<size_t>(bytes), stdout);
    std::fflush(stdout);
    std::free(plan);
  }
}
