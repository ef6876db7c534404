// The planner (plan.cu) of a few requests. Each warp finds all sums by itself, so that none waits for another one.
#pragma once

#include "dependent.cuh"
#include "plan_tasks.cuh"
#include "shared_numbers.cuh"

namespace mla {

constexpr int kFewWarps = kPlanThreadsOfFew / 32, kSplitsWarp = kFewWarps - 1;
constexpr int kFewShare = schedule::kFewRequests / 32;

template <bool Ragged>
__device__ __forceinline__ void make_plan_of_few(const Lengths& given, schedule::Shape shape, int32_t num_workers,
                                                 PlanHeader* out) {
  constexpr int32_t room = schedule::kFewRequests, warps_if_ragged = Ragged ? kFewWarps : 1;
  __shared__ int32_t lens_of_warps[kFewWarps][room], cuts_of_warps[warps_if_ragged][room + 1];
  __shared__ int32_t units_of_warps[kFewWarps][room], items_of_warps[warps_if_ragged][room];
  let_next_kernel_start();
  const int warp = kept(threadIdx.x / 32), lane = threadIdx.x % 32, warp_if_ragged = Ragged ? warp : 0;

  // Each lane has some neighbouring requests.
  const int32_t num_requests = given.num_requests, share = schedule::blocks_of(num_requests, 32);
  const int32_t first = min(lane * share, num_requests), end = min(first + share, num_requests);
  int32_t lens[kFewShare], query_cuts[kFewShare + 1];
#pragma unroll
  for (int k = 0; k < kFewShare; ++k) {
    lens[k] = 0;
    if (first + k < end) lens[k] = given.seq_lens[first + k];
  }
#pragma unroll
  for (int k = 0; k <= kFewShare; ++k) {
    query_cuts[k] = 0;
    if (Ragged && first + k <= end) query_cuts[k] = given.cu_seqlens_q[first + k];
  }

  // While these are on their way, what does not depend on them. From here on the warp reads what it has of them.
  Lengths lengths = given;
  lengths.seq_lens = lens_of_warps[warp];
  lengths.cu_seqlens_q = Ragged ? cuts_of_warps[warp_if_ragged] : nullptr;
  const SharedNumbers lens_near{lens_of_warps[warp]}, cuts_near{cuts_of_warps[warp_if_ragged]};
  const SharedNumbers first_unit{units_of_warps[warp]}, first_item{items_of_warps[warp_if_ragged]};
  const int32_t max_pieces = static_cast<int32_t>(schedule::max_pieces(lengths, shape, num_workers));
  int32_t row_blocks = Ragged ? 0 : schedule::row_blocks_of(lengths, shape, lengths.s_q);  // the most of a request
  int32_t bundles = 1, groups = num_workers, group_size = 1;
  if (!Ragged && row_blocks > 1) bundles = schedule::bundles<int32_t>(row_blocks, size_of_lane());
  if (Ragged || row_blocks > 1) groups = schedule::groups_of(num_workers, size_of_lane());

  int32_t units[kFewShare] = {}, blocks[kFewShare] = {};  // of an item; of rows
  int32_t least_units = INT32_MAX, most_units = 0;
#pragma unroll
  for (int k = 0; k < kFewShare; ++k) {
    if (k >= share) break;
    if (first + k >= end) continue;
    lens_near.set(first + k, lens[k]);
    if constexpr (Ragged) {
      cuts_near.set(first + k, query_cuts[k]);
      cuts_near.set(first + k + 1, query_cuts[k + 1]);
      const int32_t tokens = schedule::query_tokens_of(lengths, query_cuts[k], query_cuts[k + 1]).number;
      blocks[k] = schedule::row_blocks_of(lengths, shape, tokens);
      row_blocks = max(row_blocks, blocks[k]);
      if (blocks[k] == 0) continue;
    }
    units[k] = schedule::item_units(schedule::len_of(lengths, lens[k]), shape);
    least_units = min(least_units, units[k]);
    most_units = max(most_units, units[k]);
  }
  least_units = __reduce_min_sync(kAllLanes, least_units);
  most_units = __reduce_max_sync(kAllLanes, most_units);
  if (Ragged) row_blocks = __reduce_max_sync(kAllLanes, row_blocks);

  // What the lane's requests have on the line, in bundles of a size; for all: `bundles` of each request.
  const auto items_of = [&](int k, int32_t size) {
    return Ragged ? schedule::bundles<int32_t>(blocks[k], size) : bundles;
  };
  const auto line_of = [&](int32_t size) {
    Line<int32_t> line{};
#pragma unroll
    for (int k = 0; k < kFewShare; ++k) {
      if (k >= share) break;
      if (first + k >= end) continue;
      line.items += items_of(k, size);
      line.units += items_of(k, size) * units[k];
    }
    return line;
  };
  if (row_blocks > 1) {
    int32_t of_size = 0;  // units in bundles of the lane's size
    if constexpr (Ragged) {
      MLA_ROLLED
      for (int32_t size = 1; size <= schedule::largest_group_size(row_blocks, num_workers); ++size) {
        const int32_t of_this = warp_sum(line_of(size).units);
        if (size == size_of_lane()) of_size = of_this;
      }
    } else {
      int32_t sum = 0;
#pragma unroll
      for (int k = 0; k < kFewShare; ++k) sum += units[k];
      of_size = warp_sum(sum) * bundles;
    }
    group_size = best_group_size(of_size, groups, row_blocks, num_workers);
    bundles = __shfl_sync(kAllLanes, bundles, group_size - 1);
  }
  const Line<int32_t> own = line_of(group_size), all{warp_sum(own.items), warp_sum(own.units)};
  const schedule::Cuts<int32_t> cuts =
      schedule::make_cuts<int32_t>({all.items, all.units, least_units, most_units}, shape, group_size, num_workers);
  if (Ragged || cuts.item_span == 0) {
    Line<int32_t> before{Ragged ? warp_prefix(own.items) : 0, warp_prefix(own.units)};
#pragma unroll
    for (int k = 0; k < kFewShare; ++k) {
      if (k >= share) break;
      if (first + k >= end) continue;
      first_unit.set(first + k, cuts.item_span > 0 ? before.items * cuts.item_span : before.units);
      if (Ragged) first_item.set(first + k, min(before.items, max_pieces));
      before.items += items_of(k, group_size);
      before.units += items_of(k, group_size) * units[k];
    }
  }
  __syncwarp();  // what the warp has in shared memory is complete

  const Tasks<int32_t, Ragged, SharedNumbers, SharedNumbers> tasks{
      lengths,    shape,      num_workers,
      cuts,       all.items,  cuts.item_span > 0 ? all.items * cuts.item_span : all.units,
      bundles,    max_pieces, schedule::view(out, num_workers),
      first_unit, first_item};
  if (warp != kSplitsWarp)
    return tasks.write(threadIdx.x, kSplitsWarp * 32, [](const schedule::Item<int32_t>&, int32_t) {});
  // One warp has all splits, and so knows how many there are.
  const int32_t candidates = schedule::are_whole(cuts) ? 0 : tasks.num_items();
  int32_t num_splits = 0;
  MLA_ROLLED
  for (int32_t number = lane; number - lane < candidates; number += 32) {
    SplitItem split;
    bool is_split = false;
    if (number < candidates) {
      const schedule::Item<int32_t> item = tasks.item_of_number(number);
      const int32_t g = schedule::quotient_of_units(schedule::first_token_unit(item, cuts), cuts.units_per_group);
      is_split = schedule::make_split(item, shape, cuts, g, split);
    }
    const uint32_t of_lanes = __ballot_sync(kAllLanes, is_split);
    if (is_split) tasks.splits()[num_splits + __popc(of_lanes & ((1u << lane) - 1))] = split;
    num_splits += __popc(of_lanes);
  }
  if (lane == 0) tasks.write_header(num_splits);
}

}  // namespace mla
