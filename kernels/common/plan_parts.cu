// Writes a batch-invariant schedule (parts.h) for the lengths as they are in memory; otherwise as plan.cu.

#include "cta_sums.cuh"
#include "dependent.cuh"
#include "parts.h"

namespace mla {

// Of requests: parts, partial results, units of the rest, parts of each class.
enum { kParts, kPartials, kRestUnits, kOfClass, kNumSums = kOfClass + parts::kNumClasses };

// What the planner of small batches keeps in shared memory (parts::Memory).
struct Near {
  int32_t first_unit[parts::kSmallBatch + 1], load[parts::kSmallWorkers + 1];
  int32_t parts[3 * (parts::kSmallBatch + 1) + parts::kNumClasses * (parts::kSmallWorkers + 1)];
};

// By one warp: `slots(g, level)` parts of `size` units have room in a group below a level. The least one that `number` parts find room
// below.
template <class Unit, class Slots>
__device__ __forceinline__ Unit least_level(Unit low, Unit high, Unit number, int32_t first, int32_t end, Slots slots) {
  MLA_ROLLED
  while (low < high) {
    const Unit middle = low + (high - low) / 2;
    Unit room = 0;
    MLA_ROLLED
    for (int32_t g = first; g < end; ++g) room += slots(g, middle);
    if (warp_sum(room) >= number) high = middle;
    else low = middle + 1;
  }
  return low;
}

template <bool Small>
__device__ __forceinline__ void make_plan_of_parts(const Lengths& lengths, schedule::Shape shape, int32_t num_workers,
                                                   PlanHeader* out, parts::Limits limits) {
  using Unit = std::conditional_t<Small, int32_t, int64_t>;
  constexpr int kRest = parts::kRest, kNumClasses = parts::kNumClasses;
  __shared__ Unit sums_of_warps[kPlanWarps][kNumSums], units_of_warps[kPlanWarps][1];
  __shared__ Unit units_of_group_size[schedule::kMaxGroupSize];
  __shared__ int32_t row_blocks_of_warps[kPlanWarps], part_of_warps[kPlanWarps];
  __shared__ int32_t parts_of_class[kNumClasses], size_of_class[kNumClasses];
  __shared__ int32_t num_splits;
  let_next_kernel_start();
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const schedule::PlanView plan = schedule::view(out, num_workers);
  SplitItem* splits = parts::splits_of(plan, limits);
  parts::Memory<Unit> memory{lengths.num_requests, num_workers, nullptr, nullptr, nullptr};
  if constexpr (Small) {
    __shared__ Near near;
    memory.first_unit = near.first_unit;
    memory.load = near.load;
    memory.parts = near.parts;
  } else {
    memory = parts::memory_of(plan, lengths, limits, num_workers);
  }
  if (thread == 0) num_splits = 0;
  if (thread < kNumClasses) size_of_class[thread] = 0;
  MLA_ROLLED
  for (int32_t g = thread; g < num_workers; g += kPlanThreads) memory.load[g] = 0;

  // Each thread has some neighbouring requests. What they cost if each is one item:
  const int32_t share = schedule::blocks_of(lengths.num_requests, kPlanThreads);
  const int32_t first = min(thread * share, lengths.num_requests), end = min(first + share, lengths.num_requests);
  Unit units[1] = {}, all_units[1];
  int32_t max_row_blocks = 0, max_part = 0;
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    const parts::Cut cut = parts::make_cut(request, shape);
    units[0] += parts::item_units(cut, shape);
    max_row_blocks = max(max_row_blocks, request.row_blocks);
    max_part = max(max_part, parts::part_units(cut, shape));
  }
  max_row_blocks = __reduce_max_sync(kAllLanes, max_row_blocks);
  max_part = __reduce_max_sync(kAllLanes, max_part);
  if (lane == 0) {
    row_blocks_of_warps[warp] = max_row_blocks;
    part_of_warps[warp] = max_part;
  }
  block_prefix(units, all_units, units_of_warps);  // its barrier is that of the other two, too
  max_row_blocks = __reduce_max_sync(kAllLanes, row_blocks_of_warps[lane % kPlanWarps]);
  max_part = __reduce_max_sync(kAllLanes, part_of_warps[lane % kPlanWarps]);
  const int32_t group_size = choose_group_size(
      lengths, shape, max_row_blocks, num_workers, all_units[0], units_of_group_size,
      [&](const schedule::Request& request) { return parts::item_units(parts::make_cut(request, shape), shape); });
  const int32_t num_groups = schedule::groups_of(num_workers, group_size);

  // What those before a thread's requests have.
  struct Counted {
    Unit parts, partials;
    int32_t size, size_class;
  };
  auto count = [&](int32_t i) -> Counted {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    const parts::Cut cut = parts::make_cut(request, shape);
    const int32_t size = parts::part_units(cut, shape);
    return {Unit{schedule::bundles(request.row_blocks, group_size)} * cut.parts,
            Unit{request.row_blocks} * parts::partials_of(cut), size, parts::class_of(size, max_part)};
  };
  auto add = [&](const Counted& of, Unit(&sums)[kNumSums]) {
    sums[kParts] += of.parts;
    sums[kPartials] += of.partials;
    sums[kRestUnits] += of.size_class == kRest ? of.parts * of.size : 0;
#pragma unroll
    for (int each = 0; each < kNumClasses; ++each) sums[kOfClass + each] += each == of.size_class ? of.parts : 0;
  };
  Unit before[kNumSums] = {}, all[kNumSums];
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    const Counted counted = count(i);
    if (counted.parts > 0) atomicMax(&size_of_class[counted.size_class], counted.size);
    add(counted, before);
  }
  block_prefix(before, all, sums_of_warps);
  // Requests whose query tokens overlap can have more than there is room for: then none has any.
  const bool fits = all[kParts] <= limits.pieces && all[kPartials] <= limits.partials;
  auto write_place = [&](int32_t i, const Unit(&sums)[kNumSums]) {
    memory.first_unit[i] = fits ? sums[kRestUnits] : 0;
    memory.first_part()[i] = fits ? static_cast<int32_t>(sums[kParts]) : 0;
    memory.first_slot()[i] = static_cast<int32_t>(sums[kPartials]);
  };
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    write_place(i, before);
    const Counted counted = count(i);
#pragma unroll
    for (int each = 0; each < kNumClasses; ++each)
      if (each == counted.size_class) memory.first_of_class()[i] = static_cast<int32_t>(before[kOfClass + each]);
    add(counted, before);
  }
  if (thread == 0) {
    write_place(lengths.num_requests, all);
#pragma unroll
    for (int each = 0; each < kNumClasses; ++each)
      parts_of_class[each] = fits ? static_cast<int32_t>(all[kOfClass + each]) : 0;
  }
  __syncthreads();  // all parts are counted

  // A warp deals: each of its lanes has some neighbouring groups.
  if (warp == 0) {
    const int32_t groups = schedule::blocks_of(num_groups, 32);
    const int32_t first_group = min(lane * groups, num_groups), end_group = min(first_group + groups, num_groups);
    auto lanes_before = [&](Unit x) {
      Unit upto = x;
      MLA_ROLLED
      for (int step = 1; step < 32; step *= 2) {
        const Unit other = __shfl_up_sync(kAllLanes, upto, step);
        if (lane >= step) upto += other;
      }
      return upto - x;
    };
    Unit fullest = 0;
    auto emptiest = [&] {
      Unit least = fullest;
      MLA_ROLLED
      for (int32_t g = first_group; g < end_group; ++g) least = min(least, memory.load[g]);
      return warp_min(least);
    };
    MLA_ROLLED
    for (int size_class = 0; size_class < kRest; ++size_class) {
      const int32_t number = parts_of_class[size_class], size = size_of_class[size_class];
      int32_t* first_of_group = memory.first_of_group(size_class);
      if (lane == 0) first_of_group[num_groups] = number;
      const FastDivisor by_size = make_fast_divisor(max(size, 1));
      auto slots = [&](int32_t g, Unit level) -> Unit {
        const Unit room = level - memory.load[g];
        if constexpr (Small) return room > 0 ? divide(room, by_size) : 0;
        else return room > 0 ? schedule::quotient<Unit>(room, size) : 0;
      };
      Unit level = 0;
      if (number > 0) {
        const Unit high = fullest + Unit{schedule::ceil_div(number, num_groups)} * size;
        level = least_level<Unit>(emptiest() + size, high, number, first_group, end_group, slots);
      }
      Unit mine = 0;
      MLA_ROLLED
      for (int32_t g = first_group; g < end_group; ++g) mine += slots(g, level);
      Unit begin = min(lanes_before(mine), Unit{number});
      MLA_ROLLED
      for (int32_t g = first_group; g < end_group; ++g) {
        first_of_group[g] = static_cast<int32_t>(begin);
        const Unit taken = min(slots(g, level), number - begin);
        memory.load[g] += taken * size;
        begin += taken;
      }
      fullest = max(fullest, level);
    }
    // The rest: up to the least level that takes them all.
    const Unit rest = memory.first_unit[lengths.num_requests];
    auto missing = [&](int32_t g, Unit level) { return max(level - memory.load[g], Unit{0}); };
    Unit level = 0;
    if (rest > 0) {
      const Unit high = fullest + schedule::ceil_div<Unit>(rest, num_groups);
      level = least_level<Unit>(emptiest(), high, rest, first_group, end_group, missing);
    }
    Unit mine = 0;
    MLA_ROLLED
    for (int32_t g = first_group; g < end_group; ++g) mine += missing(g, level);
    Unit begin = lanes_before(mine);
    MLA_ROLLED
    for (int32_t g = first_group; g < end_group; ++g) {
      const Unit taken = missing(g, level);
      memory.load[g] = begin;
      begin += taken;
    }
  }
  __syncthreads();  // the groups' shares are known
  const int32_t number_of_rest = parts_of_class[kRest];
  MLA_ROLLED
  for (int32_t g = thread; g <= num_groups; g += kPlanThreads)
    memory.first_of_group(kRest)[g] =
        g < num_groups ? parts::parts_ahead<Unit>(lengths, shape, memory, memory.load[g], number_of_rest) : number_of_rest;
  __syncthreads();  // the groups' parts are known

  MLA_ROLLED
  for (int32_t worker = thread; worker < num_workers; worker += kPlanThreads) {
    const int32_t g = schedule::groups_of(worker, group_size);
    PlanWorker range{};
    range.member = worker - g * group_size;
    range.group_size = group_size;
    if (g < num_groups) {
      range.first_piece = parts::pieces_before(memory, g);
      range.end_piece = parts::pieces_before(memory, g + 1);
    }
    plan.workers[worker] = range;
  }
  __syncthreads();  // the workers are there, but for their last pieces

  MLA_ROLLED
  for (int32_t number = thread; number < memory.first_part()[lengths.num_requests]; number += kPlanThreads) {
    const parts::Part part = parts::part_at(lengths, shape, memory, number);
    const int32_t size_class = parts::class_of(parts::part_units(part.cut, shape), max_part);
    const int32_t* first_of_group = memory.first_of_group(size_class);
    const int32_t g = schedule::last_not_above(first_of_group, num_groups, part.number_of_class);
    const int32_t index = parts::piece_index(memory, size_class, part.number_of_class, g);
    const Piece piece = parts::make_piece(part, memory, shape, group_size);
    plan.pieces[index] = piece;
    if (index + 1 == parts::pieces_before(memory, g + 1))
      for (int32_t member = 0; member < group_size; ++member) plan.workers[g * group_size + member].last = piece;
    if (part.number > 0 || part.cut.parts == 1) continue;
    // In any order: it changes which CTA combines an item, not what it computes.
    const int32_t split = atomicAdd(&num_splits, 1);
    if (split < limits.items) splits[split] = parts::make_split(part, memory, shape, group_size);
  }
  __syncthreads();  // num_splits is complete
  if (thread == 0) {
    PlanHeader header{};
    header.splits_at = schedule::splits_at(limits.pieces, num_workers);
    header.num_groups = num_groups;
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
