// What racecheck can follow: for each way by which our kernels hand over shared memory a kernel that is right, control_NAME, and the
// same with a planted race, control_NAME_raced. test_sanitizer.py holds the tool to what it must and must not report of them.
//
// 256 threads, two groups of four warps; 32 KB of shared memory. All but the barriers is there to be handed over.

#include <cstdint>

#define CONTROL(name)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) control_##name(int* out, const int* in) { name<false>(out, in); } \
  extern "C" __global__ void __launch_bounds__(256) control_##name##_raced(int* out, const int* in) {                 \
    name<true>(out, in);                                                                                              \
  }

constexpr int kRounds = 9, kGroupThreads = 128, kWarps = 8, kStages = 4, kStageBytes = 4096;

extern __shared__ __align__(128) unsigned char bytes[];

__device__ __forceinline__ uint32_t shared(int offset) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(bytes));
  asm volatile("" : "+r"(address));
  return address + offset;
}
__device__ __forceinline__ void store(uint32_t to, int x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ int load(uint32_t from) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
__device__ __forceinline__ void copy(uint32_t to, const int* from) {  // 16 bytes
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
__device__ __forceinline__ void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void init(uint32_t mbarrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(mbarrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t mbarrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(mbarrier) : "memory");
}
__device__ __forceinline__ void arrive_with_copies(uint32_t mbarrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(mbarrier) : "memory");
}
__device__ __forceinline__ void wait(uint32_t mbarrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(mbarrier),
      "r"(parity)
      : "memory");
}

// A ring's mbarriers behind its stages: a stage's data is there, has been read.
__device__ __forceinline__ uint32_t full_at(int stage) { return shared(kStages * kStageBytes + stage * 8); }
__device__ __forceinline__ uint32_t empty_at(int stage) { return full_at(kStages + stage); }
__device__ __forceinline__ void make_ring(int arrivals) {
  if (threadIdx.x < 2 * kStages) init(full_at(threadIdx.x), arrivals);
  __syncthreads();
}

// Barriers of a group between its own barriers' rounds, and one of all threads.
template <bool Race>
__device__ void group_barriers(int* out, const int*) {
  const int thread = threadIdx.x, group = thread / kGroupThreads, member = thread % kGroupThreads;
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    for (int j = 0; j < 1 + group; ++j) {
      store(shared(group * 512 + member * 4), thread + i);
      barrier_sync(1 + group, kGroupThreads);
      sum += load(shared(group * 512 + (member + 37) % kGroupThreads * 4));
      barrier_sync(1 + group, kGroupThreads);
    }
    store(shared(1024 + thread * 4), thread);
    if (!Race) __syncthreads();
    sum += load(shared(1024 + (thread ^ kGroupThreads) * 4));
    __syncthreads();
  }
  out[thread] = sum;
}
CONTROL(group_barriers)

// A group arrives, the other waits, and the other way round.
template <bool Race>
__device__ void hand_over(int* out, const int*) {
  const int thread = threadIdx.x, member = thread % kGroupThreads;
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    if (thread < kGroupThreads) {
      store(shared(member * 4), i + member);
      barrier_arrive(1, 2 * kGroupThreads);
      if (Race) store(shared(member * 4), i);
      barrier_sync(2, 2 * kGroupThreads);
    } else {
      barrier_sync(1, 2 * kGroupThreads);
      sum += load(shared((member + 37) % kGroupThreads * 4));
      barrier_arrive(2, 2 * kGroupThreads);
    }
  }
  out[thread] = sum;
}
CONTROL(hand_over)

// A warp's own copies, two stages in flight, that its other lanes read.
template <bool Race>
__device__ void own_copies(int* out, const int* in) {
  const int thread = threadIdx.x, lane = thread % 32;
  const uint32_t own = shared(thread / 32 * 1024);
  for (int stage = 0; stage < 2; ++stage) {
    copy(own + stage * 512 + lane * 16, in + lane * 4);
    commit();
  }
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    const uint32_t stage = own + i % 2 * 512;
    wait_for_copies<1>();
    if (!Race) __syncwarp();
    sum += load(stage + (lane + 5) % 32 * 16);
    __syncwarp();
    copy(stage + lane * 16, in + lane * 4);
    commit();
  }
  wait_for_copies<0>();
  out[thread] = sum;
}
CONTROL(own_copies)

// mbarriers, an arrival a thread: a group stores, the other loads.
template <bool Race>
__device__ void ring(int* out, const int*) {
  const int thread = threadIdx.x, member = thread % kGroupThreads;
  make_ring(kGroupThreads);
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    const int stage = i % kStages, parity = i / kStages % 2;
    const uint32_t at = shared(stage * kStageBytes);
    if (thread < kGroupThreads) {
      wait(empty_at(stage), parity ^ 1);
      store(at + member * 4, i + member);
      arrive(full_at(stage));
      if (Race) store(at + member * 4, i);
    } else {
      wait(full_at(stage), parity);
      sum += load(at + (member + 37) % kGroupThreads * 4);
      arrive(empty_at(stage));
    }
  }
  out[thread] = sum;
}
CONTROL(ring)

// All threads copy, to the stage of the round before, and read.
template <bool Race, bool ByWarps>
__device__ __forceinline__ void ring_of_copies(int* out, const int* in) {
  const int thread = threadIdx.x;
  make_ring(ByWarps ? kWarps : 32 * kWarps);
  auto end_copy = [&](int stage) {
    if (ByWarps) commit();
    else arrive_with_copies(full_at(stage));
  };
  auto arrive_for_warp = [&](int empty, int full) {
    wait_for_copies<1>();
    __syncwarp();  // the whole warp has read, and its copies but the latest have landed
    if (thread % 32 == 0) {
      arrive(empty < 0 ? full_at(0) : empty_at(empty));
      arrive(full_at(full));
    }
  };
  for (int stage = 0; stage < kStages - 1; ++stage) {
    copy(shared(stage * kStageBytes + thread * 16), in + thread * 4);
    end_copy(stage);
  }
  if (ByWarps) arrive_for_warp(-1, 1);
  int sum = 0;
  for (int i = 0; i < kRounds; ++i) {
    const int stage = i % kStages, before = (i + kStages - 1) % kStages, parity = i / kStages % 2;
    wait(full_at(stage), parity);
    sum += load(shared(stage * kStageBytes + (thread ^ 133) * 16));
    if (Race) copy(shared(before * kStageBytes + thread * 16), in + thread * 4);
    wait(empty_at(before), (i + kStages - 1) / kStages % 2 ^ 1);
    if (!Race) copy(shared(before * kStageBytes + thread * 16), in + thread * 4);
    end_copy(before);
    if (ByWarps) arrive_for_warp(stage, (stage + 2) % kStages);
    else arrive(empty_at(stage));
  }
  wait_for_copies<0>();
  out[thread] = sum;
}
template <bool Race>
__device__ void copies(int* out, const int* in) {
  ring_of_copies<Race, false>(out, in);
}
CONTROL(copies)

// The same, but that one lane arrives for its warp.
template <bool Race>
__device__ void warp_arrivals(int* out, const int* in) {
  ring_of_copies<Race, true>(out, in);
}
CONTROL(warp_arrivals)
