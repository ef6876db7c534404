// Writes a batch-invariant schedule (parts.h) for the lengths as they are in memory; otherwise as plan.cu.

#include "cta_sums.cuh"
#include "dependent.cuh"
#include "parts.h"

extern "C" __global__ void __launch_bounds__(mla::kPlanThreads, 1)
    mla_plan_parts(const __grid_constant__ mla::Lengths lengths, mla::schedule::Shape shape, int32_t num_workers,
                   mla::PlanHeader* out) {
  using namespace mla;
  __shared__ int64_t of_warps[kPlanWarps], before_warps[kPlanWarps][2];
  __shared__ int64_t units_of_group_size[schedule::kMaxGroupSize];
  __shared__ int32_t max_row_blocks, num_requests, num_splits;
  let_next_kernel_start();
  const int thread = threadIdx.x;
  const schedule::PlanView plan = schedule::view(out, num_workers);
  const parts::Memory memory = parts::memory_of(plan, lengths, shape, num_workers);
  const int64_t max_items = schedule::max_items(lengths, shape), max_pieces = parts::max_pieces(lengths, shape),
                max_partials = parts::max_partials(lengths, shape);
  if (thread == 0) {
    max_row_blocks = num_splits = 0;
    num_requests = lengths.num_requests;
  }
  __syncthreads();
  auto cut_of = [&](int i, schedule::Request& request) {
    request = schedule::request_at(lengths, shape, i);
    return parts::make_cut(request, shape);
  };

  auto item_units = [&](const schedule::Request& request) {
    return parts::item_units(parts::make_cut(request, shape), shape);
  };
  int64_t units = 0;  // of all items, if each request had one
  for (int i = thread; i < lengths.num_requests; i += kPlanThreads) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    units += item_units(request);
    atomicMax(&max_row_blocks, request.row_blocks);
  }
  units = block_sum(units, of_warps);
  const int32_t group_size =
      choose_group_size(lengths, shape, max_row_blocks, num_workers, units, units_of_group_size, item_units);
  const int32_t num_groups = num_workers / group_size;

  // Where each request's parts begin on the lines, and behind these its partial results. Requests whose query tokens overlap can have
  // more than there is room for: from the first of these on, all are left out.
#pragma unroll 1
  for (int line = 0; line <= parts::kNumLines; ++line) {
    const int64_t limit = line < parts::kNumLines ? max_pieces : max_partials;
    int64_t units_before = 0, parts_before = 0;
    for (int first = 0; first <= lengths.num_requests; first += kPlanThreads) {
      const int i = first + thread;
      schedule::Request request{};
      parts::Cut cut{};
      if (i < lengths.num_requests) cut = cut_of(i, request);
      const parts::Run run = parts::run_of(cut, line);
      const int64_t items = schedule::bundles(request.row_blocks, group_size);
      const int64_t own_units = items * parts::units_of(run, shape);
      const int64_t own_parts =
          line < parts::kNumLines ? items * run.parts : int64_t{request.row_blocks} * parts::partials_of(cut);
      int64_t before[2] = {own_units, own_parts}, all[2];
      __syncthreads();  // the scratch of the sums before has been read
      block_prefix(before, all, before_warps);
      const int64_t unit = units_before + before[0], part = parts_before + before[1];
      units_before += all[0];
      parts_before += all[1];
      if (i > lengths.num_requests) continue;
      if (line < parts::kNumLines) memory.first_unit(line)[i] = unit;
      memory.first_part(line)[i] = static_cast<int32_t>(min(part, limit));
      const int64_t longs = line == parts::kShort ? memory.first_part(parts::kLong)[i] + items * cut.long_parts : 0;
      if (longs + part + own_parts > limit) atomicMin(&num_requests, i);
    }
  }
  __syncthreads();  // the lines are complete

  // The long parts of each group.
  auto place_of = [&](int line, int64_t unit) {
    return parts::place_of(lengths, shape, memory, num_requests, line, unit);
  };
  const int64_t long_units = memory.first_unit(parts::kLong)[num_requests],
                short_units = memory.first_unit(parts::kShort)[num_requests];
  for (int g = thread; g <= num_groups; g += kPlanThreads) {
    const parts::Place place = place_of(parts::kLong, parts::range_begin(long_units, num_groups, g));
    memory.first_of_group(parts::kLong)[g] = place.parts;
    memory.load[g] = place.units;
  }
  __syncthreads();  // the loads are complete

  // The short ones: up to the least level that takes them all.
  auto missing = [&](int g, int64_t level) {
    return g < num_groups ? max(level - (memory.load[g + 1] - memory.load[g]), int64_t{0}) : int64_t{0};
  };
  int64_t level = 0;
  for (int64_t high = schedule::ceil_div<int64_t>(long_units + short_units, num_groups); level < high;) {
    const int64_t middle = level + (high - level) / 2;
    int64_t room = 0;
    for (int g = thread; g < num_groups; g += kPlanThreads) room += missing(g, middle);
    if (block_sum(room, of_warps) >= short_units) high = middle;
    else level = middle + 1;
  }
  int64_t room_before = 0;
  for (int first = 0; first <= num_groups; first += kPlanThreads) {
    const int g = first + thread;
    int64_t before[2] = {missing(g, level)}, all[2];
    __syncthreads();  // the scratch of the sums before has been read
    block_prefix(before, all, before_warps);
    if (g <= num_groups)
      memory.first_of_group(parts::kShort)[g] =
          place_of(parts::kShort, g < num_groups ? room_before + before[0] : short_units).parts;
    room_before += all[0];
  }
  __syncthreads();  // the groups' parts are known

  const int32_t *longs = memory.first_of_group(parts::kLong), *shorts = memory.first_of_group(parts::kShort);
  for (int worker = thread; worker < num_workers; worker += kPlanThreads) {
    const int g = worker / group_size;
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g < num_groups) {
      range.first_piece = longs[g] + shorts[g];
      range.end_piece = longs[g + 1] + shorts[g + 1];
    }
    plan.workers[worker] = range;
  }
  // In a group the long ones come first.
#pragma unroll 1
  for (int line = 0; line < parts::kNumLines; ++line) {
    for (int number = thread; number < memory.first_part(line)[num_requests]; number += kPlanThreads) {
      const parts::Part part = parts::part_at(lengths, shape, memory, num_requests, line, number);
      const int g = schedule::last_not_above(memory.first_of_group(line), num_groups, number);
      plan.pieces[number + (line == parts::kLong ? shorts[g] : longs[g + 1])] =
          parts::make_piece(part, memory, shape, group_size);
      if (part.number > 0 || part.cut.parts() == 1) continue;
      // In any order: it changes which CTA combines an item, not what it computes.
      const int split = atomicAdd(&num_splits, 1);
      if (split < max_items) memory.splits[split] = parts::make_split(part, memory, shape, group_size);
    }
  }
  __syncthreads();  // num_splits and the pieces are complete
  for (int worker = thread; worker < num_workers; worker += kPlanThreads) {
    PlanWorker& range = plan.workers[worker];
    if (range.first_piece < range.end_piece) range.last = plan.pieces[range.end_piece - 1];
  }
  if (thread == 0) {
    PlanHeader header{};
    header.splits_at = schedule::splits_at(max_pieces, num_workers);
    header.num_groups = num_groups;
    header.group_size = group_size;
    header.num_splits = static_cast<int32_t>(min(int64_t{num_splits}, max_items));
    header.batch_invariant = 1;
    *plan.header = header;
  }
}
