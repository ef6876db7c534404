// Writes a batch-invariant schedule (parts.h) for the lengths as they are in memory; otherwise as plan.cu. Where a part goes follows from
// its number by size, and that from how many parts of each class the requests before have: no group is searched for.

#include "cta_sums.cuh"
#include "dependent.cuh"
#include "parts.h"

namespace mla {

// Of requests: partial results, and parts of each class.
enum { kPartials, kParts, kNumSums = kParts + parts::kNumClasses };

// A request, once the group size and the largest part are known.
struct Entry {
  int32_t items, partials;  // of an item; of each row block
  int32_t row_blocks;
  int32_t classes[parts::kNumKinds], counts[parts::kNumKinds];  // of an item
};

template <bool Small>
__device__ __forceinline__ void make_plan_of_parts(const Lengths& lengths, schedule::Shape shape, int32_t num_workers,
                                                   PlanHeader* out, parts::Limits limits) {
  using Unit = std::conditional_t<Small, int32_t, int64_t>;
  constexpr int kLong = parts::kLong, kShort = parts::kShort, kNumKinds = parts::kNumKinds;
  __shared__ Unit units_of_warps[kPlanWarps][1], sums_of_warps[kPlanWarps][kNumSums];
  __shared__ Unit units_of_group_size[schedule::kMaxGroupSize];
  __shared__ int32_t row_blocks_of_warps[kPlanWarps], largest_of_warps[kPlanWarps];
  __shared__ int32_t num_splits;
  let_next_kernel_start();
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const schedule::PlanView plan = schedule::view(out, num_workers);
  SplitItem* splits = parts::splits_of(plan, limits);
  parts::Memory memory{lengths.num_requests, reinterpret_cast<int32_t*>(splits + limits.items)};
  if constexpr (Small) {
    __shared__ int32_t near[parts::kNumKept * parts::kSmallBatch];
    memory.kept = near;
  }
  if (thread == 0) num_splits = 0;

  // Each thread has some neighbouring requests, and goes through them backward: what it has of the first stays.
  const int32_t share = schedule::blocks_of(lengths.num_requests, kPlanThreads);
  const int32_t first = min(thread * share, lengths.num_requests), end = min(first + share, lengths.num_requests);
  schedule::Request request{};
  parts::Cut cut{};
  auto look_at = [&](int32_t i) {
    request = schedule::request_at(lengths, shape, i);
    cut = parts::make_cut(request, shape);
  };
  Unit units[1] = {}, all_units[1];  // of items that have one row block each
  int32_t max_row_blocks = 0, largest = 1;
  MLA_ROLLED
  for (int32_t i = end - 1; i >= first; --i) {
    look_at(i);
    units[0] += parts::item_units(cut, shape);
    max_row_blocks = max(max_row_blocks, request.row_blocks);
    largest = max(largest, parts::largest_of(cut));
  }
  max_row_blocks = __reduce_max_sync(kAllLanes, max_row_blocks);
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane == 0) row_blocks_of_warps[warp] = max_row_blocks, largest_of_warps[warp] = largest;
  block_prefix(units, all_units, units_of_warps);  // its barrier is that of the extremes, too
  max_row_blocks = __reduce_max_sync(kAllLanes, row_blocks_of_warps[lane % kPlanWarps]);
  largest = __reduce_max_sync(kAllLanes, largest_of_warps[lane % kPlanWarps]);
  const int32_t group_size = choose_group_size(
      lengths, shape, max_row_blocks, num_workers, all_units[0], units_of_group_size,
      [&](const schedule::Request& of) { return parts::item_units(parts::make_cut(of, shape), shape); });

  // How many parts of each class there are before the thread's first request.
  auto entry_of_request = [&] {
    Entry entry{schedule::bundles(request.row_blocks, group_size), parts::partials_of(cut), request.row_blocks, {}, {}};
#pragma unroll
    for (int kind = 0; kind < kNumKinds; ++kind) {
      entry.classes[kind] = parts::class_of(parts::tiles_of(cut, kind), largest);
      entry.counts[kind] = parts::count_of(cut, kind);
    }
    return entry;
  };
  auto add = [&](const Entry& entry, Unit(&sums)[kNumSums]) {
    sums[kPartials] += Unit{entry.row_blocks} * entry.partials;
#pragma unroll
    for (int i = 0; i < parts::kNumClasses; ++i)
#pragma unroll
      for (int kind = 0; kind < kNumKinds; ++kind)
        sums[kParts + i] += entry.classes[kind] == i ? Unit{entry.items} * entry.counts[kind] : 0;
  };
  Unit before[kNumSums] = {}, all[kNumSums];
  Entry entry = entry_of_request();
  add(entry, before);
  MLA_ROLLED
  for (int32_t i = first + 1; i < end; ++i) {
    look_at(i);
    add(entry_of_request(), before);
  }
  block_prefix(before, all, sums_of_warps);

  // Where the parts of each request begin. Requests whose query tokens overlap can have more of them, or of partial results, than there is
  // room for: then all are left out.
  Unit num_parts = 0, parts_before = 0;
#pragma unroll
  for (int i = 0; i < parts::kNumClasses; ++i) {
    parts_before += before[kParts + i];
    before[kParts + i] += num_parts;
    num_parts += all[kParts + i];
  }
  if (num_parts > limits.pieces || all[kPartials] > limits.partials) num_parts = 0;
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    if (i > first) {
      add(entry, before);
      parts_before += Unit{entry.items} * (entry.counts[kLong] + entry.counts[kShort]);
      look_at(i);
      entry = entry_of_request();
    }
    Unit positions[kNumKinds] = {};
#pragma unroll
    for (int j = 0; j < parts::kNumClasses; ++j)
#pragma unroll
      for (int kind = 0; kind < kNumKinds; ++kind)
        if (entry.classes[kind] == j) positions[kind] = before[kParts + j];
    if (entry.classes[kShort] == entry.classes[kLong]) positions[kShort] += Unit{entry.items} * entry.counts[kLong];
    memory.of(parts::kFirstPart)[i] = static_cast<int32_t>(parts_before);
    memory.of(parts::kFirstSlot)[i] = static_cast<int32_t>(before[kPartials]);
    memory.of(parts::kFirstPosition + kLong)[i] = static_cast<int32_t>(positions[kLong]);
    memory.of(parts::kFirstPosition + kShort)[i] = static_cast<int32_t>(positions[kShort]);
  }
  __syncthreads();  // what is kept of the requests is complete

  const parts::Deal deal{static_cast<int32_t>(num_parts), static_cast<int32_t>(min(all[kParts], num_parts)),
                         schedule::groups_of(num_workers, group_size)};
  auto write_worker = [&](int32_t number) {
    const int32_t g = schedule::groups_of(number, group_size);
    PlanWorker& worker = plan.workers[number];
    PlanWorker range{};
    range.member = number - g * group_size;
    range.group_size = group_size;
    if (g < deal.num_groups) {
      range.first_piece = deal.first_of_group(g);
      range.end_piece = deal.first_of_group(g + 1);
    }
    if (range.first_piece == range.end_piece) {
      worker = range;
    } else {  // the last piece is written by who has it
      worker.first_piece = range.first_piece, worker.end_piece = range.end_piece;
      worker.member = range.member, worker.pairs = 0, worker.group_size = group_size;
#pragma unroll
      for (int32_t& x : worker.reserved) x = 0;
    }
  };
  auto write_part = [&](int32_t number) {
    const parts::Part part = parts::part_at(lengths, shape, memory, number);
    const parts::Deal::Place place = deal.place_of(parts::position_of(part, memory));
    const int32_t index = deal.first_of_group(place.group) + place.index;
    const Piece piece = parts::make_piece(part, memory, shape, group_size);
    plan.pieces[index] = piece;
    if (index + 1 == deal.first_of_group(place.group + 1))
      for (int32_t member = 0; member < group_size; ++member)
        plan.workers[place.group * group_size + member].last = piece;
    if (part.number > 0 || part.cut.parts() == 1) return;
    // In any order: it changes which CTA combines an item, not what it computes.
    const int32_t split = atomicAdd(&num_splits, 1);
    if (split < limits.items) splits[split] = parts::make_split(part, memory, shape, group_size);
  };
  // Side by side, by different warps.
  const int32_t first_task = schedule::blocks_of(num_workers, 32) * 32;
  MLA_ROLLED
  for (int32_t task = thread; task < first_task + deal.parts; task += kPlanThreads) {
    if (task >= first_task) write_part(task - first_task);
    else if (task < num_workers) write_worker(task);
  }
  __syncthreads();  // num_splits is complete
  if (thread == 0) {
    PlanHeader header{};
    header.splits_at = schedule::splits_at(limits.pieces, num_workers);
    header.num_groups = deal.num_groups;
    header.group_size = group_size;
    header.num_splits = min(num_splits, limits.items);
    header.batch_invariant = 1;
    *plan.header = header;
  }
}

}  // namespace mla

#define MLA_PLAN_PARTS(name, Small)                                                                          \
  extern "C" __global__ void __launch_bounds__(mla::kPlanThreads, 1)                                         \
      name(const __grid_constant__ mla::Lengths lengths, const __grid_constant__ mla::schedule::Shape shape, \
           int32_t num_workers, mla::PlanHeader* out, const __grid_constant__ mla::parts::Limits limits) {   \
    mla::make_plan_of_parts<Small>(lengths, shape, num_workers, out, limits);                                \
  }
MLA_PLAN_PARTS(mla_plan_parts_small, true)
MLA_PLAN_PARTS(mla_plan_parts_large, false)
