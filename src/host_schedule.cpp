#include "host_schedule.h"

#include <algorithm>
#include <stdexcept>

#include "host_plan.h"

namespace mla {

using namespace schedule;

namespace {

PlanHeader choose_cuts(const Lengths& lengths, Shape shape, int32_t num_workers) {
  int64_t units[kMaxGroupSize] = {}, least_units = INT64_MAX, most_units = 0;
  int32_t max_row_blocks = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Request request = request_at(lengths, shape, i);
    if (request.row_blocks == 0) continue;
    max_row_blocks = std::max(max_row_blocks, request.row_blocks);
    least_units = std::min(least_units, item_units(request, shape));
    most_units = std::max(most_units, item_units(request, shape));
    for (int32_t g = 1; g <= kMaxGroupSize; ++g) units[g - 1] += request_units(request, shape, g, 0);
  }
  const int32_t group_size = best_group_size(units, max_row_blocks, num_workers);
  const int64_t common_units = least_units == most_units ? most_units : 0;
  int64_t num_items = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) num_items += bundles(request_at(lengths, shape, i), group_size);
  if (0 < num_items && num_items <= num_workers / group_size && most_units <= least_range(units[group_size - 1], shape))
    return make_uncut_header(most_units, num_items, shape, group_size);
  return make_header(units[group_size - 1], common_units, shape, group_size, num_workers);
}

HostPlan make_plan(const Lengths& lengths, Shape shape, int32_t num_workers) {
  HostPlan plan;
  plan.header = choose_cuts(lengths, shape, num_workers);
  const int32_t group_size = plan.header.group_size;
  std::vector<int64_t> first_unit{0};
  std::vector<int32_t> first_item{0};
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Request request = request_at(lengths, shape, i);
    first_unit.push_back(first_unit.back() + request_units(request, shape, group_size, plan.header.item_span));
    first_item.push_back(first_item.back() + bundles(request, group_size));
  }
  const int64_t num_units = first_unit.back();
  plan.pieces.resize(static_cast<size_t>(max_pieces(lengths, shape, num_workers)));

  auto item_of_unit = [&](int64_t unit) { return item_at(lengths, shape, plan.header, first_unit.data(), unit); };
  auto write_piece = [&](const Item& item, int32_t g) {
    const int64_t number = item_number(item, first_item.data()) + g;
    if (number >= static_cast<int64_t>(plan.pieces.size()))
      throw std::invalid_argument("cu_seqlens_q makes too many pieces");
    plan.pieces[static_cast<size_t>(number)] = make_piece(item, shape, plan.header, g);
    return static_cast<int32_t>(number);
  };
  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const int32_t g = worker / group_size;
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g < plan.header.num_groups) {
      const int64_t begin = g * plan.header.units_per_group,
                    end = std::min(begin + plan.header.units_per_group, num_units);
      const Item first = item_of_unit(begin), last = item_of_unit(end - 1);
      range.first_piece = write_piece(first, g);
      range.end_piece = write_piece(last, g) + 1;
      range.pairs = pairs_of(first, last, shape, plan.header, g);
      range.last = plan.pieces[static_cast<size_t>(range.end_piece) - 1];
      SplitItem split;
      if (range.member == 0 && end < num_units && make_split(item_of_unit(end), shape, plan.header, g, split))
        plan.splits.push_back(split);
    }
    plan.workers.push_back(range);
  }
  for (int32_t number = 0; number < first_item.back(); ++number) {
    const Item item = numbered_item(lengths, shape, plan.header, first_unit.data(), first_item.data(), number);
    write_piece(item, static_cast<int32_t>(item.begin / plan.header.units_per_group));
  }
  plan.header.num_splits = static_cast<int32_t>(plan.splits.size());
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
