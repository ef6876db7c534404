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

  // The lines.
  const size_t requests = static_cast<size_t>(lengths.num_requests);
  std::vector<int64_t> units((requests + 1) * kNumLines);
  std::vector<int32_t> parts((requests + 1) * (kNumLines + 1));
  const Memory<int64_t> memory{lengths.num_requests, num_workers, units.data(), nullptr, parts.data()};
  int64_t partials = 0;
  for (int32_t i = 0; i < lengths.num_requests; ++i) {
    const Request request = schedule::request_at(lengths, shape, i);
    const Cut cut = make_cut(request, shape);
    const int64_t items = schedule::bundles(request.row_blocks, group_size);
    int64_t pieces = 0;
    for (int line = 0; line < kNumLines; ++line) {
      const Run run = run_of(cut, line);
      memory.first_unit(line)[i + 1] = memory.first_unit(line)[i] + items * units_of(run, shape);
      const int64_t end_part = memory.first_part(line)[i] + items * run.parts;
      memory.first_part(line)[i + 1] = static_cast<int32_t>(end_part);
      pieces += end_part;
    }
    partials += int64_t{request.row_blocks} * partials_of(cut);
    memory.first_slot()[i + 1] = static_cast<int32_t>(partials);
    if (pieces > max_pieces(lengths, shape) || partials > max_partials(lengths, shape))
      throw std::invalid_argument("cu_seqlens_q makes too many pieces");
  }
  std::vector<int64_t> load;
  std::vector<int32_t> first_of_group[kNumLines];
  auto place = [&](int line, int64_t unit) {
    return place_of(lengths, shape, memory, lengths.num_requests, line, unit);
  };

  // The long parts of each group, then the short ones.
  const int64_t long_units = memory.first_unit(kLong)[requests], short_units = memory.first_unit(kShort)[requests];
  for (int32_t g = 0; g <= num_groups; ++g) {
    const Place<int64_t> begin = place(kLong, range_begin(long_units, num_groups, g));
    first_of_group[kLong].push_back(begin.parts);
    load.push_back(begin.units);
  }
  auto missing = [&](size_t g, int64_t level) { return std::max<int64_t>(level - (load[g + 1] - load[g]), 0); };
  auto room = [&](int64_t level) {
    int64_t sum = 0;
    for (size_t g = 0; g + 1 < load.size(); ++g) sum += missing(g, level);
    return sum;
  };
  int64_t level = 0;
  for (int64_t high = schedule::ceil_div<int64_t>(long_units + short_units, num_groups); level < high;) {
    const int64_t middle = level + (high - level) / 2;
    if (room(middle) >= short_units) high = middle;
    else level = middle + 1;
  }
  int64_t begin = 0;
  for (size_t g = 0; g + 1 < load.size(); ++g) {
    first_of_group[kShort].push_back(place(kShort, begin).parts);
    begin += missing(g, level);
  }
  first_of_group[kShort].push_back(memory.first_part(kShort)[requests]);

  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const size_t g = static_cast<size_t>(worker / group_size);
    PlanWorker range{};
    range.member = worker % group_size;
    range.group_size = group_size;
    if (g + 1 < load.size()) {
      range.first_piece = static_cast<int32_t>(plan.pieces.size());
      if (range.member > 0) range.first_piece = plan.workers.back().first_piece;
      for (int line = 0; range.member == 0 && line < kNumLines; ++line) {
        for (int32_t number = first_of_group[line][g]; number < first_of_group[line][g + 1]; ++number) {
          const Part part = part_at(lengths, shape, memory, lengths.num_requests, line, number);
          plan.pieces.push_back(make_piece(part, memory, shape, group_size));
          if (part.number == 0 && part.cut.parts() > 1)
            plan.splits.push_back(make_split(part, memory, shape, group_size));
        }
      }
      range.end_piece = static_cast<int32_t>(plan.pieces.size());
      if (range.first_piece < range.end_piece) range.last = plan.pieces.back();
    }
    plan.workers.push_back(range);
  }
  if (static_cast<int64_t>(plan.splits.size()) > schedule::max_items(lengths, shape))
    throw std::invalid_argument("cu_seqlens_q makes too many pieces");
  plan.header.num_splits = static_cast<int32_t>(plan.splits.size());
  return plan;
}

}  // namespace mla
