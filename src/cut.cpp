#include "cut.h"

#include <algorithm>
#include <numeric>

#include "common/schedule.h"

namespace mla {
namespace {

// Of cuts that are `range` units apart, those between two tiles of an item and not before its first one. They are at multiples of what
// range and span have in common, at each as often.
double share_between_tiles(int64_t range, int64_t span, int64_t overhead) {
  const int64_t step = std::gcd(range, span);
  return static_cast<double>(((span - 1) / step - overhead / step) * step) / static_cast<double>(span);
}

}  // namespace

EqualCut cut_equal(int64_t num_requests, int64_t rows, int64_t length, int32_t block_rows, int32_t block_n,
                   int32_t num_workers) {
  const schedule::Shape shape{block_rows, block_n, 0};
  const int64_t row_blocks = schedule::ceil_div<int64_t>(rows, block_rows);
  if (num_requests == 0 || row_blocks == 0) return {1, 0, 0, 0, 0, 0, false, 0, 0, 0};
  const int64_t tiles = std::max<int64_t>(schedule::ceil_div<int64_t>(length, block_n), 1);
  const int64_t overhead = schedule::overhead_units(shape), span = tiles + overhead;
  int64_t units_by_size[schedule::kMaxGroupSize];
  for (int64_t size = 1; size <= schedule::kMaxGroupSize; ++size)
    units_by_size[size - 1] = num_requests * span * schedule::ceil_div(row_blocks, size);
  const int32_t most_blocks = static_cast<int32_t>(std::min<int64_t>(row_blocks, schedule::kMaxGroupSize));
  const int32_t size = schedule::best_group_size(units_by_size, most_blocks, num_workers);
  const int64_t units = units_by_size[size - 1], items = units / span;
  const int32_t item_units = static_cast<int32_t>(span);
  const auto cuts =
      schedule::make_cuts(schedule::Items<int64_t>{items, units, item_units, item_units}, shape, size, num_workers);

  EqualCut cut{};
  cut.group_size = size;
  cut.kv_rows = items * length;
  cut.query_rows = num_requests * rows;
  cut.filled_rows = static_cast<int32_t>(std::min<int64_t>(rows, block_rows));
  cut.long_items = tiles > 1;
  cut.busy = static_cast<double>(cuts.num_groups) * size / num_workers;
  double pieces = 0;          // of items that are split
  if (cuts.item_span == 0) {  // cuts fall anywhere
    const double range = static_cast<double>(cuts.units_per_group), all = static_cast<double>(items);
    const double busy = static_cast<double>(units) / range;
    const double share = share_between_tiles(cuts.units_per_group, span, overhead), inside = share * (busy - 1);
    cut.longest = range * static_cast<double>(tiles) / static_cast<double>(span);
    cut.further_items = std::max(range / static_cast<double>(span) + share - 1, 0.0);
    cut.further_parts = std::max(busy / all, 1.0);
    pieces = inside + std::min(all, inside);
  } else if (cuts.overhead == 0) {  // on the ends of equal parts
    const int64_t parts = cuts.item_span / cuts.units_per_group;
    cut.longest = static_cast<double>(cuts.units_per_group);
    cut.further_parts = static_cast<double>(parts - 1);
    pieces = static_cast<double>(items * parts);
  } else {  // on the ends of items
    const int64_t whole = cuts.units_per_group / span;
    cut.longest = static_cast<double>(whole * tiles);
    cut.further_items = static_cast<double>(whole - 1);
  }
  cut.longest *= block_n;
  cut.partial_rows = pieces * static_cast<double>(std::min<int64_t>(rows, int64_t{size} * block_rows));
  return cut;
}

}  // namespace mla
