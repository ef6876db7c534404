// Writes a schedule (schedule.h) for the lengths as they are in memory: one CTA, no host involved, so that it can be replayed
// in a graph with other lengths.
//
// Threads that do everything once spend their time on instructions that wait for one another, fetched for the first time. So there are
// few: one read of the lengths, one barrier for all sums, one for what is searched, one for the number of splits; what is independent is
// done by different warps; and there is an entry point for each case of `is_few`, `is_small` and of uniform or ragged queries, without
// what that case does not need.

#include "plan_few.cuh"

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

template <bool Small, bool Ragged>
__device__ __forceinline__ void make_plan(const Lengths& given, schedule::Shape shape, int32_t num_workers,
                                          PlanHeader* out) {
  using Unit = std::conditional_t<Small, int32_t, int64_t>;
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
  const int32_t bundles =
      schedule::bundles<Unit>(all.row_blocks, group_size);  // of each request, if the query is uniform
  Line<Unit> before, total;
  auto add_request = [&](int32_t i, Line<Unit>& to) {
    const schedule::Request request = schedule::request_at(lengths, shape, i);
    const Unit items = schedule::bundles<Unit>(request.row_blocks, group_size);
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
  const auto write_plan = [&](auto first_unit, auto first_item) {
    MLA_ROLLED
    for (int32_t i = first; i < end; ++i) {
      if (i > first) add_request(i - 1, before);
      first_unit.set(i, cuts.item_span > 0 ? before.items * cuts.item_span : before.units);
      if (Ragged) first_item.set(i, static_cast<int32_t>(min(before.items, Unit{max_pieces})));
    }
    __syncthreads();  // first_unit and first_item are complete
    const Tasks<Unit, Ragged, decltype(first_unit), decltype(first_item)> tasks{
        lengths, shape, num_workers, cuts, total.items, total.units, bundles, max_pieces, plan, first_unit, first_item};
    tasks.write(thread, kPlanThreads, [&](const schedule::Item<Unit>& item, int32_t g) {
      SplitItem split;
      // In any order: it changes which CTA combines an item, not what it computes.
      if (schedule::make_split(item, shape, cuts, g - 1, split)) tasks.splits()[atomicAdd(&num_splits, 1)] = split;
    });
    __syncthreads();  // num_splits is complete
    if (thread == 0) tasks.write_header(num_splits);
  };
  if constexpr (Small) {
    __shared__ int32_t units_near[schedule::kSmallBatch], items_near[Ragged ? schedule::kSmallBatch : 1];
    write_plan(SharedNumbers{units_near}, SharedNumbers{items_near});
  } else {
    SplitItem* splits = reinterpret_cast<SplitItem*>(plan.pieces + max_pieces);
    write_plan(Numbers<Unit>{schedule::first_unit_of(splits, num_workers)},
               Numbers<int32_t>{schedule::first_item_of(splits, num_workers, num_requests)});
  }
}

}  // namespace mla

#define MLA_PLAN(name, threads, make_plan)                                                                   \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                                   \
      name(const __grid_constant__ mla::Lengths lengths, const __grid_constant__ mla::schedule::Shape shape, \
           int32_t num_workers, mla::PlanHeader* out) {                                                      \
    make_plan(lengths, shape, num_workers, out);                                                             \
  }
MLA_PLAN(mla_plan_few, mla::kPlanThreadsOfFew, mla::make_plan_of_few<false>)
MLA_PLAN(mla_plan_few_ragged, mla::kPlanThreadsOfFew, mla::make_plan_of_few<true>)
MLA_PLAN(mla_plan_small, mla::kPlanThreads, (mla::make_plan<true, false>))
MLA_PLAN(mla_plan_small_ragged, mla::kPlanThreads, (mla::make_plan<true, true>))
MLA_PLAN(mla_plan_large, mla::kPlanThreads, (mla::make_plan<false, false>))
MLA_PLAN(mla_plan_large_ragged, mla::kPlanThreads, (mla::make_plan<false, true>))
