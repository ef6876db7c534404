// Writes a batch-invariant schedule (parts.h) for the lengths as they are in memory; otherwise as plan.cu.

#include "cta_sums.cuh"
#include "dependent.cuh"
#include "parts.h"

namespace mla {

// Of requests: units and parts on each line, and partial results.
enum { kUnits, kParts = parts::kNumLines, kPartials = 2 * parts::kNumLines, kNumSums };

// What the planner of small batches keeps in shared memory (parts::Memory).
struct Near {
  int32_t units[parts::kNumLines * (parts::kSmallBatch + 1)], load[parts::kSmallWorkers + 1];
  int32_t parts[(parts::kNumLines + 1) * (parts::kSmallBatch + 1) + parts::kNumLines * (parts::kSmallWorkers + 1)];
};

template <bool Small>
__device__ __forceinline__ void make_plan_of_parts(const Lengths& lengths, schedule::Shape shape, int32_t num_workers,
                                                   PlanHeader* out, parts::Limits limits) {
  using Unit = std::conditional_t<Small, int32_t, int64_t>;
  constexpr int kLong = parts::kLong, kShort = parts::kShort, kNumLines = parts::kNumLines;
  __shared__ Unit sums_of_warps[2][kPlanWarps][kNumSums], room_of_warps[kPlanWarps][1];
  __shared__ Unit units_of_group_size[schedule::kMaxGroupSize];
  __shared__ int32_t row_blocks_of_warps[kPlanWarps];
  __shared__ int32_t num_requests, num_splits;
  let_next_kernel_start();
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const schedule::PlanView plan = schedule::view(out, num_workers);
  SplitItem* splits = parts::splits_of(plan, limits);
  parts::Memory<Unit> memory{lengths.num_requests, num_workers, nullptr, nullptr, nullptr};
  if constexpr (Small) {
    __shared__ Near near;
    memory.units = near.units;
    memory.load = near.load;
    memory.parts = near.parts;
  } else {
    memory = parts::memory_of(plan, lengths, limits, num_workers);
  }
  if (thread == 0) {
    num_splits = 0;
    num_requests = lengths.num_requests;
  }

  // Each thread has some neighbouring requests. What they and those before them have, if each is one item:
  const int32_t share = schedule::blocks_of(lengths.num_requests, kPlanThreads);
  const int32_t first = min(thread * share, lengths.num_requests), end = min(first + share, lengths.num_requests);
  auto add_request = [&](int32_t i, int32_t items_at_most, int32_t group_size, Unit(&sums)[kNumSums]) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    const parts::Cut cut = parts::make_cut(request, shape);
    const Unit items = min(schedule::bundles(request.row_blocks, group_size), items_at_most);
#pragma unroll
    for (int line = 0; line < kNumLines; ++line) {
      const parts::Run run = parts::run_of(cut, line);
      sums[kUnits + line] += items * parts::units_of(run, shape);
      sums[kParts + line] += items * run.parts;
    }
    sums[kPartials] += Unit{min(request.row_blocks, items_at_most)} * parts::partials_of(cut);
    return request.row_blocks;
  };
  Unit before[kNumSums] = {}, all[kNumSums];
  int32_t max_row_blocks = 0;
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) max_row_blocks = max(max_row_blocks, add_request(i, 1, 1, before));
  max_row_blocks = __reduce_max_sync(kAllLanes, max_row_blocks);
  if (lane == 0) row_blocks_of_warps[warp] = max_row_blocks;
  block_prefix(before, all, sums_of_warps[0]);  // its barrier is that of the row blocks, too
  max_row_blocks = __reduce_max_sync(kAllLanes, row_blocks_of_warps[lane % kPlanWarps]);
  const int32_t group_size = choose_group_size(
      lengths, shape, max_row_blocks, num_workers, all[kUnits + kLong] + all[kUnits + kShort], units_of_group_size,
      [&](const schedule::Request& request) { return parts::item_units(parts::make_cut(request, shape), shape); });
  const int32_t num_groups = schedule::groups_of(num_workers, group_size);
  // The same with all items that they are.
  const bool ragged = lengths.cu_seqlens_q != nullptr;
  if (max_row_blocks > 1 && !ragged) {
    const Unit items = schedule::bundles(max_row_blocks, group_size);
#pragma unroll
    for (int i = 0; i < kNumSums; ++i) {
      const Unit times = i == kPartials ? max_row_blocks : items;
      before[i] *= times, all[i] *= times;
    }
  } else if (max_row_blocks > 1) {
#pragma unroll
    for (int i = 0; i < kNumSums; ++i) before[i] = 0;
    MLA_ROLLED
    for (int32_t i = first; i < end; ++i) add_request(i, INT32_MAX, group_size, before);
    block_prefix(before, all, sums_of_warps[1]);
  }

  // Where each request begins on the lines. Requests whose query tokens overlap can have more parts or partial results than there is
  // room for: from the first of these on, all are left out.
  auto write_place = [&](int32_t i, const Unit(&sums)[kNumSums]) {
#pragma unroll
    for (int line = 0; line < kNumLines; ++line) {
      memory.first_unit(line)[i] = sums[kUnits + line];
      memory.first_part(line)[i] = static_cast<int32_t>(min(sums[kParts + line], Unit{limits.pieces}));
    }
    memory.first_slot()[i] = static_cast<int32_t>(min(sums[kPartials], Unit{limits.partials}));
  };
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    write_place(i, before);
    if (i + 1 == end && !ragged) break;
    add_request(i, INT32_MAX, group_size, before);
    if (before[kParts + kLong] + before[kParts + kShort] > limits.pieces || before[kPartials] > limits.partials)
      atomicMin(&num_requests, i);
  }
  if (thread == 0) write_place(lengths.num_requests, all);
  __syncthreads();  // the lines are complete

  // The long parts of each group.
  auto place_of = [&](int line, Unit unit) {
    return parts::place_of(lengths, shape, memory, num_requests, line, unit);
  };
  const Unit long_units = memory.first_unit(kLong)[num_requests], short_units = memory.first_unit(kShort)[num_requests];
  MLA_ROLLED
  for (int32_t g = thread; g <= num_groups; g += kPlanThreads) {
    const parts::Place<Unit> place = place_of(kLong, parts::range_begin(long_units, num_groups, g));
    memory.first_of_group(kLong)[g] = place.parts;
    memory.load[g] = place.units;
  }
  __syncthreads();  // the loads are complete

  // The short ones: up to the least level that takes them all, which each warp finds by itself.
  auto load_of = [&](int32_t g) { return memory.load[g + 1] - memory.load[g]; };
  auto missing = [&](int32_t g, Unit level) { return max(level - load_of(g), Unit{0}); };
  Unit least = load_of(0);
  MLA_ROLLED
  for (int32_t g = lane; g < num_groups; g += 32) least = min(least, load_of(g));
  Unit level = warp_min(least) + schedule::ceil_div<Unit>(short_units, num_groups);
  MLA_ROLLED
  for (Unit high = schedule::ceil_div<Unit>(long_units + short_units, num_groups); level < high;) {
    const Unit middle = level + (high - level) / 2;
    Unit room = 0;
    for (int32_t g = lane; g < num_groups; g += 32) room += missing(g, middle);
    if (warp_sum(room) >= short_units) high = middle;
    else level = middle + 1;
  }
  const int32_t groups = schedule::blocks_of(num_groups, kPlanThreads);  // of a thread
  const int32_t first_group = min(thread * groups, num_groups), end_group = min(first_group + groups, num_groups);
  Unit room[1] = {}, all_room[1];
  MLA_ROLLED
  for (int32_t g = first_group; g < end_group; ++g) room[0] += missing(g, level);
  block_prefix(room, all_room, room_of_warps);
  MLA_ROLLED
  for (int32_t g = first_group; g < end_group; ++g) {
    memory.first_of_group(kShort)[g] = place_of(kShort, room[0]).parts;
    room[0] += missing(g, level);
  }
  if (thread == 0) memory.first_of_group(kShort)[num_groups] = memory.first_part(kShort)[num_requests];
  __syncthreads();  // the groups' parts are known

  const int32_t *longs = memory.first_of_group(kLong), *shorts = memory.first_of_group(kShort);
  MLA_ROLLED
  for (int32_t worker = thread; worker < num_workers; worker += kPlanThreads) {
    const int32_t g = schedule::groups_of(worker, group_size);
    PlanWorker range{};
    range.member = worker - g * group_size;
    range.group_size = group_size;
    if (g < num_groups) {
      range.first_piece = longs[g] + shorts[g];
      range.end_piece = longs[g + 1] + shorts[g + 1];
    }
    plan.workers[worker] = range;
  }
  __syncthreads();  // the workers are there, but for their last pieces

  // In a group the long ones come first.
  MLA_ROLLED
  for (int line = 0; line < kNumLines; ++line) {
    MLA_ROLLED
    for (int32_t number = thread; number < memory.first_part(line)[num_requests]; number += kPlanThreads) {
      const parts::Part part = parts::part_at(lengths, shape, memory, num_requests, line, number);
      const int32_t g = schedule::last_not_above(memory.first_of_group(line), num_groups, number);
      const int32_t index = number + (line == kLong ? shorts[g] : longs[g + 1]);
      const Piece piece = parts::make_piece(part, memory, shape, group_size);
      plan.pieces[index] = piece;
      if (index + 1 == longs[g + 1] + shorts[g + 1])
        for (int32_t member = 0; member < group_size; ++member) plan.workers[g * group_size + member].last = piece;
      if (part.number > 0 || part.cut.parts() == 1) continue;
      // In any order: it changes which CTA combines an item, not what it computes.
      const int32_t split = atomicAdd(&num_splits, 1);
      if (split < limits.items) splits[split] = parts::make_split(part, memory, shape, group_size);
    }
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
