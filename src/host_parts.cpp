#include <algorithm>
#include <array>
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

  // What the requests before each have.
  const size_t requests = static_cast<size_t>(lengths.num_requests), groups = static_cast<size_t>(num_groups);
  std::vector<int64_t> units(requests + 1), load(groups + 1);
  std::vector<int32_t> parts(3 * (requests + 1) + kNumClasses * (static_cast<size_t>(num_workers) + 1));
  const Memory<int64_t> memory{lengths.num_requests, num_workers, units.data(), load.data(), parts.data()};
  std::vector<Cut> cuts;
  int32_t largest = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    cuts.push_back(make_cut(schedule::request_at(lengths, shape, i), shape));
    largest = std::max(largest, part_units(cuts.back(), shape));
  }
  int64_t pieces = 0, partials = 0;
  std::array<int32_t, kNumClasses> parts_of_class{}, size_of_class{};
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Cut& cut = cuts[static_cast<size_t>(i)];
    const int32_t row_blocks = schedule::request_at(lengths, shape, i).row_blocks;
    const int32_t size = part_units(cut, shape);
    const size_t size_class = static_cast<size_t>(class_of(size, largest));
    const int64_t number = int64_t{schedule::bundles(row_blocks, group_size)} * cut.parts;
    memory.first_of_class()[i] = parts_of_class[size_class];
    memory.first_unit[i + 1] = memory.first_unit[i] + (size_class == kRest ? number * size : 0);
    pieces += number;
    partials += int64_t{row_blocks} * partials_of(cut);
    if (pieces > max_pieces(lengths, shape) || partials > max_partials(lengths, shape))
      throw std::invalid_argument("cu_seqlens_q makes too many pieces");
    memory.first_part()[i + 1] = static_cast<int32_t>(pieces);
    memory.first_slot()[i + 1] = static_cast<int32_t>(partials);
    parts_of_class[size_class] += static_cast<int32_t>(number);
    if (number > 0) size_of_class[size_class] = std::max(size_of_class[size_class], size);
  }

  // The parts of each group, class by class: as many as have room below the least level with room for all.
  auto least_level = [&](int64_t number, auto room) {
    auto all_room = [&](int64_t level) {
      int64_t sum = 0;
      for (size_t g = 0; g < groups; ++g) sum += room(g, level);
      return sum;
    };
    int64_t low = 0, high = 1;
    while (all_room(high) < number) high *= 2;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (all_room(middle) >= number) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  for (size_t size_class = 0; size_class < kRest; ++size_class) {
    const int32_t number = parts_of_class[size_class], size = size_of_class[size_class];
    int32_t* first_of_group = memory.first_of_group(static_cast<int32_t>(size_class));
    auto slots = [&](size_t g, int64_t level) { return level > load[g] ? (level - load[g]) / size : 0; };
    const int64_t level = number > 0 ? least_level(number, slots) : 0;
    for (size_t g = 0; g < groups; ++g) {
      const int64_t taken = std::min<int64_t>(slots(g, level), number - first_of_group[g]);
      load[g] += taken * size;
      first_of_group[g + 1] = first_of_group[g] + static_cast<int32_t>(taken);
    }
  }
  auto missing = [&](size_t g, int64_t level) { return std::max<int64_t>(level - load[g], 0); };
  const int64_t level = least_level(memory.first_unit[requests], missing);
  int64_t begin = 0;
  for (size_t g = 0; g < groups; ++g) {
    memory.first_of_group(kRest)[g] = parts_ahead(lengths, shape, memory, begin, parts_of_class[kRest]);
    begin += missing(g, level);
  }
  memory.first_of_group(kRest)[groups] = parts_of_class[kRest];

  plan.pieces.resize(static_cast<size_t>(pieces));
  for (int32_t number = 0; number < pieces; ++number) {
    const Part part = part_at(lengths, shape, memory, number);
    const int32_t size_class = class_of(part_units(part.cut, shape), largest);
    const int32_t group =
        schedule::last_not_above(memory.first_of_group(size_class), num_groups, part.number_of_class);
    plan.pieces[static_cast<size_t>(piece_index(memory, size_class, part.number_of_class, group))] =
        make_piece(part, memory, shape, group_size);
    if (part.number == 0 && part.cut.parts > 1) plan.splits.push_back(make_split(part, memory, shape, group_size));
  }
  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const int32_t g = worker / group_size;
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g < num_groups) {
      range.first_piece = pieces_before(memory, g);
      range.end_piece = pieces_before(memory, g + 1);
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
