#include "cut.h"

#include <algorithm>

#include "common/schedule.h"

namespace mla {
namespace {

int64_t parts_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The one with which the busiest group has least; `units` of one row block of all requests.
int64_t best_group(int64_t units, int64_t row_blocks, int64_t num_workers) {
  int64_t best = 1, least = parts_of(units * row_blocks, num_workers);
  for (int64_t size = 2; size <= std::min({int64_t{schedule::kMaxGroupSize}, row_blocks, num_workers}); ++size) {
    const int64_t busiest = parts_of(units * parts_of(row_blocks, size), num_workers / size);
    if (busiest <= least) best = size, least = busiest;
  }
  return best;
}

}  // namespace

EqualCut cut_equal(int64_t num_requests, int64_t rows, int64_t length, int32_t block_rows, int32_t block_n,
                   int32_t num_workers) {
  const int64_t row_blocks = parts_of(rows, block_rows);
  if (num_requests == 0 || row_blocks == 0) return {1, 0, 0, 0, 0, 0, false, 0, 0};
  const int64_t tiles = std::max<int64_t>(parts_of(length, block_n), 1);
  const int64_t overhead = parts_of(schedule::kItemOverheadTokens, block_n), span = tiles + overhead;
  const int64_t size = best_group(num_requests * span, row_blocks, num_workers), groups = num_workers / size;
  const int64_t items = num_requests * parts_of(row_blocks, size), units = items * span;
  const bool few = units * block_n <= schedule::kFewTokens;
  const int64_t least =
      std::max(parts_of(few ? schedule::kMinGroupTokens : schedule::kMinGroupTokensOfMany, block_n), overhead + 1);

  EqualCut cut{};
  cut.group_size = static_cast<int32_t>(size);
  cut.kv_rows = items * length;
  cut.query_rows = num_requests * rows;
  cut.filled_rows = static_cast<int32_t>(std::min<int64_t>(rows, block_rows));
  cut.long_items = tiles > 1;
  double pieces = 0;  // of items that are split
  if (items <= groups && span <= least) {
    cut.longest = static_cast<double>(tiles);
  } else {
    const int64_t share = std::max(parts_of(units, groups), least);
    const int64_t wanted = std::clamp<int64_t>(groups / items, 1, parts_of(tiles, least));
    const int64_t part = parts_of(tiles, wanted), parts = parts_of(tiles, part);
    const int64_t whole = parts_of(items, groups);  // items of a worker, if none is split
    const int64_t aligned = wanted > 1 ? part + overhead : whole * span;
    if (aligned > share + share / schedule::kAlignmentShare + overhead) {
      const double busy = static_cast<double>(units) / static_cast<double>(share);
      cut.further_items = static_cast<double>(share) / static_cast<double>(span);
      cut.longest = static_cast<double>(share) - static_cast<double>(overhead) * cut.further_items;
      cut.further_parts = std::max(busy / static_cast<double>(items), 1.0);
      pieces = busy + std::min(static_cast<double>(items), busy);
    } else if (wanted > 1) {
      cut.longest = static_cast<double>(part);
      cut.further_parts = static_cast<double>(parts - 1);
      pieces = static_cast<double>(items * parts);
    } else {
      cut.longest = static_cast<double>(whole * tiles);
      cut.further_items = static_cast<double>(whole - 1);
    }
  }
  cut.longest *= block_n;
  cut.partial_rows = pieces * static_cast<double>(std::min(rows, size * block_rows));
  return cut;
}

}  // namespace mla
