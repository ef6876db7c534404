// Writes a schedule (schedule.h) for the lengths as they are in memory: one CTA, no host involved, so that it can be replayed
// in a graph with other lengths.
//
// Threads that do everything once spend their time on instructions that wait for one another, fetched for the first time. So there are
// few: one read of the lengths, one barrier for all sums, one for what is searched, one for the number of splits; what is independent is
// done by different warps; and there is an entry point for each case of `is_small` and of uniform or ragged queries, without what that
// case does not need.

#include "cta_sums.cuh"
#include "dependent.cuh"

namespace mla {

// Of requests with query tokens.
struct Extremes {
  int32_t row_blocks, least_units, most_units;  // the most of a request; of an item

  __device__ __forceinline__ void add(const Extremes& other) {
    row_blocks = max(row_blocks, other.row_blocks);
    least_units = min(least_units, other.least_units);
    most_units = max(most_units, other.most_units);
  }
};
constexpr Extremes kNoRequests{0, INT32_MAX, 0};

__device__ __forceinline__ Extremes of_warp(const Extremes& x) {
  return {__reduce_max_sync(kAllLanes, x.row_blocks), __reduce_min_sync(kAllLanes, x.least_units),
          __reduce_max_sync(kAllLanes, x.most_units)};
}

// What lies on the line of all items before a request, or in all.
template <class Unit>
struct Line {
  Unit items, units;
};

template <bool Small, bool Ragged>
__device__ __forceinline__ void make_plan(const Lengths& given, schedule::Shape shape, int32_t num_workers,
                                          PlanHeader* out) {
  using Unit = std::conditional_t<Small, int32_t, int64_t>;
  using Item = schedule::Item<Unit>;
  __shared__ Extremes extremes_of_warps[kPlanWarps];
  __shared__ Unit units_of_warps[kPlanWarps][1], line_of_warps[kPlanWarps][2];
  __shared__ Unit units_of_group_size[schedule::kMaxGroupSize];
  __shared__ int32_t num_splits;
  let_next_kernel_start();
  Lengths lengths = given;
  if (!Ragged) lengths.cu_seqlens_q = nullptr;
  const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (thread == 0) num_splits = 0;

  // Each thread has some neighbouring requests.
  const int32_t num_requests = lengths.num_requests, share = schedule::blocks_of(num_requests, kPlanThreads);
  const int32_t first = min(thread * share, num_requests), end = min(first + share, num_requests);
  Extremes all = kNoRequests;
  Unit units[1] = {}, all_units[1];  // of items that have one row block each
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    if (request.row_blocks == 0) continue;
    const int32_t own = schedule::item_units(request, shape);
    all.add({request.row_blocks, own, own});
    units[0] += own;
  }
  all = of_warp(all);
  if (lane == 0) extremes_of_warps[warp] = all;
  block_prefix(units, all_units, units_of_warps);  // its barrier is that of the extremes, too
  all = of_warp(extremes_of_warps[lane % kPlanWarps]);
  if (!Ragged && num_requests > 0) all.row_blocks = schedule::row_blocks_of(lengths, shape, lengths.s_q);

  const int32_t group_size =
      choose_group_size(lengths, shape, all.row_blocks, num_workers, all_units[0], units_of_group_size,
                        [&](const schedule::Request& request) { return schedule::item_units(request, shape); });

  // What lies before the thread's first request.
  const int32_t bundles = schedule::bundles(all.row_blocks, group_size);  // of each request, if the query is uniform
  Line<Unit> before, total;
  auto add_request = [&](int32_t i, Line<Unit>& to) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    const Unit items = schedule::bundles(request.row_blocks, group_size);
    to.items += items;
    to.units += items * schedule::item_units(request, shape);
  };
  if constexpr (Ragged) {
    Line<Unit> own{};
    MLA_ROLLED
    for (int32_t i = first; i < end; ++i) add_request(i, own);
    Unit line[2] = {own.items, own.units}, all_of_line[2];
    block_prefix(line, all_of_line, line_of_warps);
    before = {line[0], line[1]};
    total = {all_of_line[0], all_of_line[1]};
  } else {
    before = {Unit{bundles} * first, bundles * units[0]};
    total = {Unit{bundles} * num_requests, bundles * all_units[0]};
  }
  const schedule::Cuts<Unit> cuts = schedule::make_cuts<Unit>(
      {total.items, total.units, all.least_units, all.most_units}, shape, group_size, num_workers);
  if (cuts.item_span > 0) total.units = total.items * cuts.item_span;

  // Where each request begins on the line, and the number of its first item.
  const schedule::PlanView plan = schedule::view(out, num_workers);
  const int32_t max_pieces = static_cast<int32_t>(schedule::max_pieces(lengths, shape, num_workers));
  SplitItem* splits = reinterpret_cast<SplitItem*>(plan.pieces + max_pieces);
  Unit* first_unit;
  int32_t* first_item;
  if constexpr (Small) {
    __shared__ Unit units_near[schedule::kSmallBatch];
    __shared__ int32_t items_near[Ragged ? schedule::kSmallBatch : 1];
    first_unit = units_near;
    first_item = items_near;
  } else {
    first_unit = schedule::first_unit_of(splits, num_workers);
    first_item = schedule::first_item_of(splits, num_workers, num_requests);
  }
  MLA_ROLLED
  for (int32_t i = first; i < end; ++i) {
    if (i > first) add_request(i - 1, before);
    first_unit[i] = cuts.item_span > 0 ? before.items * cuts.item_span : before.units;
    if (Ragged) first_item[i] = static_cast<int32_t>(min(before.items, Unit{max_pieces}));
  }
  __syncthreads();  // first_unit and first_item are complete

  auto first_item_of = [&](int32_t request) { return Ragged ? first_item[request] : request * bundles; };
  auto item_at = [&](int32_t request, Unit unit) {
    return schedule::item_at(lengths, shape, cuts, first_unit[request], request, unit);
  };
  auto number_of = [&](const Item& item, int32_t g) { return Unit{first_item_of(item.request)} + item.bundle + g; };
  auto end_of_group = [&](int32_t g) { return min((g + 1) * cuts.units_per_group, total.units); };
  // Requests whose query tokens overlap can make more pieces than there is room for: groups with such pieces are left out. Nobody waits
  // for what they would have left, as those behind them are left out too.
  auto has_room = [&](Unit number) { return !Ragged || number < max_pieces; };

  auto write_worker = [&](int32_t worker) {
    const int32_t g = schedule::groups_of(worker, group_size);
    PlanWorker range{};
    range.member = worker - g * group_size;
    range.group_size = group_size;
    if (g < cuts.num_groups) {
      const Unit ends[2] = {g * cuts.units_per_group, end_of_group(g) - 1};
      int32_t requests[2];
      schedule::last_not_above(first_unit, num_requests, ends, requests);
      const Item item = item_at(requests[0], ends[0]), last = item_at(requests[1], ends[1]);
      const Unit first_number = number_of(item, g), last_number = number_of(last, g);
      if (has_room(last_number)) {
        range.first_piece = static_cast<int32_t>(first_number);
        range.end_piece = static_cast<int32_t>(last_number) + 1;
        range.pairs = schedule::pairs_of(item, last, shape, cuts, g);
        if (Ragged && range.pairs & kLeavesLast && !has_room(total.items + cuts.num_groups)) {
          // Nothing is left for a group that is left out: its flag would stay up.
          const Unit unit = end_of_group(g + 1) - 1;
          const int32_t request = schedule::last_not_above(first_unit, num_requests, unit);
          if (!has_room(number_of(item_at(request, unit), g + 1))) range.pairs &= ~kLeavesLast;
        }
        range.last = schedule::make_piece(last, shape, cuts, g);
      }
    }
    plan.workers[worker] = range;
  };
  // The piece with which group `g` continues an item, and the split of an item that began in the group before.
  auto write_continued = [&](int32_t g) {
    const Unit begin = g * cuts.units_per_group;
    const Item item = item_at(schedule::last_not_above(first_unit, num_requests, begin), begin);
    if (item.begin == begin) return;
    const Unit number = number_of(item, g);
    if (has_room(number)) plan.pieces[number] = schedule::make_piece(item, shape, cuts, g);
    SplitItem split;
    // In any order: it changes which CTA combines an item, not what it computes.
    if (schedule::make_split(item, shape, cuts, g - 1, split)) splits[atomicAdd(&num_splits, 1)] = split;
  };
  // The first piece of an item.
  auto write_begun = [&](int32_t number) {
    int32_t request = number;
    if (Ragged) request = schedule::last_not_above(first_item, num_requests, number);
    else if (bundles > 1) request = schedule::quotient(number, bundles);
    const Item item = schedule::make_item(schedule::request_at(lengths, shape, request), shape, cuts,
                                          first_unit[request], request, Unit{number - first_item_of(request)});
    const int32_t g = static_cast<int32_t>(schedule::quotient(item.begin, cuts.units_per_group));
    if (has_room(Unit{number} + g)) plan.pieces[number + g] = schedule::make_piece(item, shape, cuts, g);
  };
  // Side by side, by different warps.
  const int32_t num_items = static_cast<int32_t>(Ragged ? min(total.items, Unit{max_pieces}) : total.items);
  const int32_t first_group = schedule::blocks_of(num_workers, 32) * 32;
  const int32_t first_begun = first_group + schedule::blocks_of(cuts.num_groups, 32) * 32;
  MLA_ROLLED
  for (int32_t task = thread; task < first_begun + num_items; task += kPlanThreads) {
    if (task >= first_begun) write_begun(task - first_begun);
    else if (task >= first_group && task - first_group < cuts.num_groups) write_continued(task - first_group);
    else if (task < num_workers) write_worker(task);
  }
  __syncthreads();  // num_splits is complete
  if (thread == 0) *plan.header = schedule::make_header(cuts, schedule::splits_at(max_pieces, num_workers), num_splits);
}

}  // namespace mla

#define MLA_PLAN(name, Small, Ragged)                                                                        \
  extern "C" __global__ void __launch_bounds__(mla::kPlanThreads, 1)                                         \
      name(const __grid_constant__ mla::Lengths lengths, const __grid_constant__ mla::schedule::Shape shape, \
           int32_t num_workers, mla::PlanHeader* out) {                                                      \
    mla::make_plan<Small, Ragged>(lengths, shape, num_workers, out);                                         \
  }
MLA_PLAN(mla_plan_small, true, false)
MLA_PLAN(mla_plan_small_ragged, true, true)
MLA_PLAN(mla_plan_large, false, false)
MLA_PLAN(mla_plan_large_ragged, false, true)
