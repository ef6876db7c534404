#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/parts.h"
#include "host_plan.h"

namespace mla {

using namespace parts;

namespace {

int32_t choose_group_size(const Lengths& lengths, Shape shape, int32_t num_workers) {
  int64_t units[schedule::kMaxGroupSize] = {};
  int32_t max_row_blocks = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Request request = schedule::request_at(lengths, shape, i);
    max_row_blocks = std::max(max_row_blocks, request.row_blocks);
    for (int32_t g = 1; g <= schedule::kMaxGroupSize; ++g)
      units[g - 1] += schedule::bundles(request.row_blocks, g) * item_units(make_cut(request, shape), shape);
  }
  return schedule::best_group_size(units, max_row_blocks, num_workers);
}

}  // namespace

HostPlan make_plan_of_parts(const Lengths& lengths, Shape shape, int32_t num_workers) {
  HostPlan plan;
  const int32_t group_size = choose_group_size(lengths, shape, num_workers), num_groups = num_workers / group_size;
  plan.header.group_size = group_size;
  plan.header.num_groups = num_groups;
  plan.header.batch_invariant = 1;

  std::vector<Request> requests;
  std::vector<Cut> cuts;
  int32_t largest = 1;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    requests.push_back(schedule::request_at(lengths, shape, i));
    cuts.push_back(make_cut(requests.back(), shape));
    largest = std::max(largest, largest_of(cuts.back()));
  }

  // Where the parts of each request begin, in all and by size.
  std::vector<int32_t> kept(requests.size() * kNumKept);
  const Memory memory{lengths.num_requests, kept.data()};
  int64_t num_parts = 0, num_partials = 0, num_dealt = 0, num_top = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    memory.of(kFirstPart)[i] = static_cast<int32_t>(num_parts);
    memory.of(kFirstSlot)[i] = static_cast<int32_t>(num_partials);
    num_parts += int64_t{schedule::bundles(requests[i].row_blocks, group_size)} * cuts[i].parts();
    num_partials += int64_t{requests[i].row_blocks} * partials_of(cuts[i]);
    if (num_parts > max_pieces(lengths, shape) || num_partials > max_partials(lengths, shape))
      throw std::invalid_argument("cu_seqlens_q makes too many pieces");
  }
  for (int32_t size = 0; size < kNumClasses; ++size) {
    for (size_t i = 0; i < requests.size(); ++i) {
      for (int kind = 0; kind < kNumKinds; ++kind) {
        if (class_of(tiles_of(cuts[i], kind), largest) != size) continue;
        memory.of(kFirstPosition + kind)[i] = static_cast<int32_t>(num_dealt);
        num_dealt += int64_t{schedule::bundles(requests[i].row_blocks, group_size)} * count_of(cuts[i], kind);
      }
    }
    if (size == 0) num_top = num_dealt;
  }

  const Deal deal{static_cast<int32_t>(num_parts), static_cast<int32_t>(num_top), num_groups};
  plan.pieces.resize(static_cast<size_t>(num_parts));
  for (int32_t number = 0; number < num_parts; ++number) {
    const Part part = part_at(lengths, shape, memory, number);
    const Deal::Place place = deal.place_of(position_of(part, memory));
    plan.pieces[static_cast<size_t>(deal.first_of_group(place.group) + place.index)] =
        make_piece(part, memory, shape, group_size);
    if (part.number == 0 && part.cut.parts() > 1) plan.splits.push_back(make_split(part, memory, shape, group_size));
  }
  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const int32_t g = worker / group_size;
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g < num_groups) {
      range.first_piece = deal.first_of_group(g);
      range.end_piece = deal.first_of_group(g + 1);
      if (range.first_piece < range.end_piece) range.last = plan.pieces[static_cast<size_t>(range.end_piece) - 1];
    }
    plan.workers.push_back(range);
  }
  if (static_cast<int64_t>(plan.splits.size()) > schedule::max_items(lengths, shape))
    throw std::invalid_argument("cu_seqlens_q makes too many pieces");
  plan.header.num_splits = static_cast<int32_t>(plan.splits.size());
  return plan;
}

}  // namespace mla
