#include "host_schedule.h"

#include <algorithm>
#include <stdexcept>

#include "host_plan.h"

namespace mla {

using namespace schedule;

namespace {

Cuts<int64_t> choose_cuts(const Lengths& lengths, Shape shape, int32_t num_workers) {
  Items<int64_t> items{0, 0, INT32_MAX, 0};
  int64_t units[kMaxGroupSize] = {};
  int32_t max_row_blocks = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Request request = request_at(lengths, shape, i);
    if (request.row_blocks == 0) continue;
    max_row_blocks = std::max(max_row_blocks, request.row_blocks);
    items.least_units = std::min(items.least_units, item_units(request, shape));
    items.most_units = std::max(items.most_units, item_units(request, shape));
    for (int32_t g = 1; g <= kMaxGroupSize; ++g)
      units[g - 1] += int64_t{bundles(request.row_blocks, g)} * item_units(request, shape);
  }
  const int32_t group_size = best_group_size(units, max_row_blocks, num_workers);
  items.units = units[group_size - 1];
  for (int32_t i = 0; i < lengths.num_requests; ++i)
    items.number += bundles(request_at(lengths, shape, i).row_blocks, group_size);
  return make_cuts(items, shape, group_size, num_workers);
}

HostPlan make_plan(const Lengths& lengths, Shape shape, int32_t num_workers) {
  const Cuts<int64_t> cuts = choose_cuts(lengths, shape, num_workers);
  const int32_t group_size = cuts.group_size;
  std::vector<int64_t> first_unit{0};
  std::vector<int32_t> first_item{0};
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Request request = request_at(lengths, shape, i);
    const int32_t items = bundles(request.row_blocks, group_size);
    first_unit.push_back(first_unit.back() +
                         items * (cuts.item_span > 0 ? cuts.item_span : item_units(request, shape)));
    first_item.push_back(first_item.back() + items);
  }
  const int64_t num_units = first_unit.back();
  HostPlan plan;
  plan.pieces.resize(static_cast<size_t>(max_pieces(lengths, shape, num_workers)));

  auto item_of_unit = [&](int64_t unit) {
    const int32_t request = last_not_above(first_unit.data(), lengths.num_requests, unit);
    return item_at(lengths, shape, cuts, first_unit[static_cast<size_t>(request)], request, unit);
  };
  auto write_piece = [&](const Item<int64_t>& item, int32_t g) {
    const int64_t number = int64_t{first_item[static_cast<size_t>(item.request)]} + item.bundle + g;
    if (number >= static_cast<int64_t>(plan.pieces.size()))
      throw std::invalid_argument("cu_seqlens_q makes too many pieces");
    plan.pieces[static_cast<size_t>(number)] = make_piece(item, shape, cuts, g);
    return static_cast<int32_t>(number);
  };
  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const int32_t g = worker / group_size;
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g < cuts.num_groups) {
      const int64_t begin = g * cuts.units_per_group, end = std::min(begin + cuts.units_per_group, num_units);
      const Item<int64_t> first = item_of_unit(begin), last = item_of_unit(end - 1);
      range.first_piece = write_piece(first, g);
      range.end_piece = write_piece(last, g) + 1;
      range.pairs = pairs_of(first, kFirstUnit, shape, cuts, g) | pairs_of(last, kLastUnit, shape, cuts, g);
      range.last = plan.pieces[static_cast<size_t>(range.end_piece) - 1];
      SplitItem split;
      if (range.member == 0 && make_split(last, shape, cuts, g, split)) plan.splits.push_back(split);
    }
    plan.workers.push_back(range);
  }
  for (int32_t request = 0; request < lengths.num_requests; ++request) {
    const Request info = request_at(lengths, shape, request);
    for (int64_t bundle = 0; bundle < bundles(info.row_blocks, group_size); ++bundle) {
      const Item<int64_t> item =
          make_item(info, shape, cuts, first_unit[static_cast<size_t>(request)], request, bundle);
      write_piece(item, static_cast<int32_t>(item.begin / cuts.units_per_group));
    }
  }
  plan.header = make_header(cuts, 0, static_cast<int32_t>(plan.splits.size()));
  return plan;
}

}  // namespace

HostSchedule make_host_schedule(const Lengths& lengths, Shape shape, int32_t num_workers, bool batch_invariant) {
  const HostPlan plan =
      batch_invariant ? make_plan_of_parts(lengths, shape, num_workers) : make_plan(lengths, shape, num_workers);
  HostSchedule result{plan.header, {}, {}, {}};
  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const PlanWorker& range = plan.workers[static_cast<size_t>(worker)];
    result.pairs.push_back(range.pairs);
    for (int32_t index = range.first_piece; index < range.end_piece; ++index) {
      // The test of the decode kernels: a bundle may have no row block for this member, a group no tile of an item.
      const Piece& piece = plan.pieces[static_cast<size_t>(index)];
      const int32_t first_row = piece.first_row + range.member * shape.block_rows;
      if (first_row >= piece.num_tokens * lengths.h_q || piece.first_tile >= piece.end_tile) continue;
      const bool whole = piece.partial_slot < 0;
      const int32_t last_token =
          static_cast<int32_t>(std::min<int64_t>(int64_t{piece.end_tile} * shape.block_n, piece.len));
      result.pieces.push_back({worker, piece.request, first_row / shape.block_rows, piece.first_tile * shape.block_n,
                               last_token, piece.first_tile == 0, last_token == piece.len,
                               whole ? -1 : piece.partial_slot + range.member});
    }
  }
  for (const SplitItem& split : plan.splits) {
    Split slots{split.request, split.first_row / (shape.block_rows * plan.header.group_size), {split.first_slot}};
    for (int32_t i = 1; i < split.num_pieces; ++i) slots.slots.push_back(split.second_slot + (i - 1) * split.slot_step);
    result.splits.push_back(slots);
  }
  return result;
}

}  // namespace mla
