// The device's planners (kernels/common/plan.cu and plan_parts.cu, as they are) without a device: a program that reads batches and
// writes the plans that they get. test_plan_on_cpu.py builds it and asks.

#include <cmath>

// 64 threads, not as many as on the device: the same code, and batches of a few hundred requests take several rounds of it.
#define kPlanThreads kPlanThreadsOfTheDevice
#define kPlanThreadsOfFew kPlanThreadsOfFewOfTheDevice
#include "params.h"
#undef kPlanThreads
#undef kPlanThreadsOfFew
namespace mla {
constexpr int kPlanThreads = 64;
constexpr int kPlanThreadsOfFew = 192;  // the fewest
}  // namespace mla
#define CTA_THREADS mla::kPlanThreadsOfFew
#include "cta_on_cpu.h"

template <class T>
T __shfl_up_sync(uint32_t mask, T value, int lanes) {
  return cta::shuffle(mask, value, cta::current % 32 < lanes ? cta::current : cta::current - lanes);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return cta::shuffle(mask, value, cta::current / 32 * 32 + lane);
}
void __syncwarp() { cta::wait(cta::warps[static_cast<size_t>(cta::current / 32)]); }
int __popc(uint32_t x) { return __builtin_popcount(x); }
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
    const bool of_few =
        !sizes.batch_invariant && !sizes.large && mla::schedule::is_few(lengths, shape, sizes.num_workers);
    cta::run(
        [] {
          const mla::schedule::Shape shape{sizes.block_rows, sizes.block_n, sizes.merges_pairs};
          const int32_t workers = sizes.num_workers;
          if (sizes.batch_invariant) {
            const bool small = !sizes.large && mla::parts::is_small(lengths, shape, sizes.num_workers);
            const auto make = small ? mla_plan_parts_small : mla_plan_parts_large;
            make(lengths, shape, workers, plan, mla::parts::limits_of(lengths, shape));
          } else {
            const bool small = !sizes.large && mla::schedule::is_small(lengths, shape, sizes.num_workers);
            const bool few = !sizes.large && mla::schedule::is_few(lengths, shape, sizes.num_workers);
            const auto make = few            ? sizes.ragged ? mla_plan_few_ragged : mla_plan_few
                              : small        ? sizes.ragged ? mla_plan_small_ragged : mla_plan_small
                              : sizes.ragged ? mla_plan_large_ragged
                                             : mla_plan_large;
            make(lengths, shape, workers, plan);
          }
        },
        sizes.backward != 0, of_few ? mla::kPlanThreadsOfFew : mla::kPlanThreads);
    std::fwrite(&bytes, sizeof(bytes), 1, stdout);
    std::fwrite(plan, 1, static_cast<size_t>(bytes), stdout);
    std::fflush(stdout);
    std::free(plan);
  }
}
