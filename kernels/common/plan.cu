// Writes a schedule (schedule.h) for the lengths as they are in memory: one CTA, no host involved, so that it can be replayed
// in a graph with other lengths.

#include "cta_sums.cuh"
#include "schedule.h"

namespace mla {

constexpr int kNearRequests = 1024;  // what is known of so many at most is searched in shared memory

// Of those with query tokens. Units: what an item costs, and what all do that have one row block each.
struct Requests {
  int32_t max_row_blocks;
  int64_t least_units, most_units, units;

  __device__ __forceinline__ void add(const Requests& other) {
    max_row_blocks = max(max_row_blocks, other.max_row_blocks);
    least_units = min(least_units, other.least_units);
    most_units = max(most_units, other.most_units);
    units += other.units;
  }
};
constexpr Requests kNoRequests{0, int64_t{1} << 62, 0, 0};

__device__ __forceinline__ Requests of_block(Requests x, Requests* of_warps) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    x.add({__shfl_xor_sync(0xffffffffu, x.max_row_blocks, step), __shfl_xor_sync(0xffffffffu, x.least_units, step),
           __shfl_xor_sync(0xffffffffu, x.most_units, step), __shfl_xor_sync(0xffffffffu, x.units, step)});
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();  // those of all warps are there
  Requests all = kNoRequests;
#pragma unroll 1
  for (int i = 0; i < kPlanThreads / 32; ++i) all.add(of_warps[i]);
  return all;
}

}  // namespace mla

extern "C" __global__ void __launch_bounds__(mla::kPlanThreads, 1)
    mla_plan(const __grid_constant__ mla::Lengths lengths, mla::schedule::Shape shape, int32_t num_workers,
             mla::PlanHeader* out) {
  using namespace mla;
  __shared__ int64_t scratch[kPlanThreads / 32];
  __shared__ Requests of_warps[kPlanThreads / 32];
  __shared__ int64_t sums[kPlanThreads / 32][schedule::kMaxGroupSize];
  __shared__ int64_t near_units[kNearRequests + 1];
  __shared__ int32_t near_items[kNearRequests + 1];
  __shared__ int32_t num_splits;
  const int thread = threadIdx.x;
  const schedule::PlanView plan = schedule::view(out, num_workers);
  if (thread == 0) num_splits = 0;

  Requests all = kNoRequests;
  for (int i = thread; i < lengths.num_requests; i += kPlanThreads) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    if (request.row_blocks == 0) continue;
    const int64_t own = schedule::item_units(request, shape);
    all.add({request.row_blocks, own, own, schedule::request_units(request, shape, 1, 0)});
  }
  all = of_block(all, of_warps);
  // The group size: what would all requests cost in bundles of 1, 2, ... row blocks?
  int64_t units[schedule::kMaxGroupSize] = {all.units};
  if (all.max_row_blocks > 1) {
    units[0] = 0;
    for (int i = thread; i < lengths.num_requests; i += kPlanThreads) {
      const schedule::Request request = schedule::request_at(lengths, shape, i);
#pragma unroll
      for (int g = 1; g <= schedule::kMaxGroupSize; ++g) units[g - 1] += schedule::request_units(request, shape, g, 0);
    }
    block_sums(units, sums);
  }
  const int32_t group_size = schedule::best_group_size(units, all.max_row_blocks, num_workers);
  int64_t total_units = units[0];
#pragma unroll
  for (int g = 2; g <= schedule::kMaxGroupSize; ++g)
    if (g == group_size) total_units = units[g - 1];
  const int64_t common_units = all.least_units == all.most_units ? all.most_units : 0;
  int64_t num_items = 0;
  if (all.most_units <= schedule::least_range(total_units, shape)) {
    int64_t own = 0;
    for (int i = thread; i < lengths.num_requests; i += kPlanThreads)
      own += schedule::bundles(schedule::request_at(lengths, shape, i), group_size);
    num_items = block_sum(own, scratch);
  }
  PlanHeader header = 0 < num_items && num_items <= num_workers / group_size
                          ? schedule::make_uncut_header(all.most_units, num_items, shape, group_size)
                          : schedule::make_header(total_units, common_units, shape, group_size, num_workers);

  // Where each request begins on the line of all items, and the number of its first item.
  const int64_t max_pieces = schedule::max_pieces(lengths, shape, num_workers);
  header.splits_at = schedule::splits_at(max_pieces, num_workers);
  SplitItem* splits = reinterpret_cast<SplitItem*>(plan.pieces + max_pieces);
  const bool near = lengths.num_requests <= kNearRequests;
  int64_t* first_unit = near ? near_units : schedule::first_unit_of(splits, num_workers);
  int32_t* first_item = near ? near_items : schedule::first_item_of(splits, num_workers, lengths.num_requests);
  int64_t units_before = 0, items_before = 0;
  for (int first = 0; first < lengths.num_requests; first += kPlanThreads) {
    const int i = first + thread;
    int64_t own_units = 0, own_items = 0, chunk_units = 0, chunk_items = 0;
    if (i < lengths.num_requests) {
      const schedule::Request request = schedule::request_at(lengths, shape, i);
      own_units = schedule::request_units(request, shape, group_size, header.item_span);
      own_items = schedule::bundles(request, group_size);
    }
    const int64_t start = units_before + block_prefix(own_units, scratch, chunk_units);
    const int64_t start_item = items_before + block_prefix(own_items, scratch, chunk_items);
    if (i < lengths.num_requests) {
      first_unit[i] = start;
      first_item[i] = static_cast<int32_t>(min(start_item, max_pieces));
    }
    units_before += chunk_units;
    items_before += chunk_items;
  }
  if (thread == 0) {
    first_unit[lengths.num_requests] = units_before;
    first_item[lengths.num_requests] = static_cast<int32_t>(min(items_before, max_pieces));
  }
  __syncthreads();  // first_unit and first_item are complete

  auto item_at = [&](int64_t unit) { return schedule::item_at(lengths, shape, header, first_unit, unit); };
  auto number_of = [&](const schedule::Item& item, int g) { return schedule::item_number(item, first_item) + g; };
  // The first and the last piece of every group; a piece that is both is written twice, with the same words.
  for (int worker = thread; worker < num_workers; worker += kPlanThreads) {
    const int g = worker / group_size;
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g < header.num_groups) {
      const int64_t begin = g * header.units_per_group, end = min(begin + header.units_per_group, units_before);
      const schedule::Item first = item_at(begin), last = item_at(end - 1);
      const int64_t first_number = number_of(first, g), last_number = number_of(last, g);
      // Requests whose query tokens overlap can make more pieces than there is room for: groups with such pieces are left out. Nobody
      // waits for what they would have left, as those behind them are left out too.
      if (last_number < max_pieces) {
        range.first_piece = static_cast<int32_t>(first_number);
        range.end_piece = static_cast<int32_t>(last_number) + 1;
        range.pairs = schedule::pairs_of(first, last, shape, header, g);
        // Nothing is left for a group that is left out: its flag would stay up.
        if (range.pairs & kLeavesLast &&
            number_of(item_at(min(end + header.units_per_group, units_before) - 1), g + 1) >= max_pieces)
          range.pairs &= ~kLeavesLast;
        range.last = schedule::make_piece(last, shape, header, g);
        plan.pieces[first_number] = schedule::make_piece(first, shape, header, g);
        plan.pieces[last_number] = range.last;
      }
      SplitItem split;
      // In any order: it changes which CTA combines an item, not what it computes.
      if (range.member == 0 && end < units_before && schedule::make_split(item_at(end), shape, header, g, split))
        splits[atomicAdd(&num_splits, 1)] = split;
    }
    plan.workers[worker] = range;
  }
  // The first piece of every item: those between a group's first and last.
  for (int64_t number = thread; number < min(items_before, max_pieces); number += kPlanThreads) {
    const schedule::Item item =
        schedule::numbered_item(lengths, shape, header, first_unit, first_item, static_cast<int32_t>(number));
    const int g = static_cast<int>(item.begin / header.units_per_group);
    if (number + g < max_pieces) plan.pieces[number + g] = schedule::make_piece(item, shape, header, g);
  }
  __syncthreads();  // num_splits is complete
  header.num_splits = num_splits;
  if (thread == 0) *plan.header = header;
}
