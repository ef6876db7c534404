// The split-KV schedule: which KV tokens of which row block each worker (persistent CTA) computes.
//
// A request's query rows (token, head) are packed and cut into row blocks of `block_rows`. Row blocks that need the same
// KV are bundled, `group_size` at a time: the workers of a group walk the same KV range side by side, one row block each, so
// that all but one of their reads come from L2. An item is one bundle of one request. Its cost in units is a fixed overhead
// plus one unit per `block_n` KV tokens; all items, laid end to end, are cut into equal ranges, one per group.
// A group therefore computes the tail of an item, some whole items, and the head of an item: at most two partial results.
//
// The arithmetic is here, for the host and the device alike; plan.cu runs it on the device, the tests on the host.
#pragma once

#include "plan_view.h"

namespace mla::schedule {

// Starting and finishing an item (Q, first KV latency, output) costs about as much as this many KV tokens.
constexpr int kItemOverheadTokens = 64;
constexpr int kMinGroupTokens = 128;  // of least_range()
// With more tokens than few, combining is dearer: 27.5 us instead of 23.8 for one request of 16,384 tokens in ranges of 128.
constexpr int kFewTokens = 6144, kMinGroupTokensOfMany = 192;
constexpr int kMaxGroupSize = 8;
// Longer requests count as this long, so that the number of a token past the end of the last tile still fits 31 bits.
constexpr int64_t kMaxLen = (int64_t{1} << 31) - 4096;
// Cuts fall on the ends of equally long items if that makes the busiest group's range longer by at most one part in this.
constexpr int kAlignmentShare = 64;

struct Shape {  // of the tile that a variant computes
  int32_t block_rows, block_n;
  int32_t merges_pairs;  // whether the pipeline merges pairs (PlanWorker); if not, the combine kernel does
};

template <class T>
MLA_HD T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
MLA_HD T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

struct Request {
  int32_t first_token;  // of its query tokens, in the whole query
  int32_t num_tokens;
  int32_t len;  // KV tokens
  int32_t row_blocks;
};

// Whatever the caller's lengths say, what comes out lies inside the caller's tensors.
MLA_HD Request request_at(const Lengths& lengths, Shape shape, int32_t i) {
  Request r;
  if (lengths.cu_seqlens_q) {
    r.first_token = clamp(lengths.cu_seqlens_q[i], 0, lengths.total_q);
    r.num_tokens = clamp(lengths.cu_seqlens_q[i + 1], r.first_token, lengths.total_q) - r.first_token;
  } else {
    r.first_token = 0;  // a uniform query is addressed by its batch stride
    r.num_tokens = lengths.s_q;
  }
  r.len = static_cast<int32_t>(
      clamp<int64_t>(lengths.seq_lens[i], 0, lengths.max_len < kMaxLen ? lengths.max_len : kMaxLen));
  r.row_blocks = static_cast<int32_t>(ceil_div<int64_t>(int64_t{r.num_tokens} * lengths.h_q, shape.block_rows));
  return r;
}

MLA_HD int32_t overhead_units(Shape shape) { return ceil_div(kItemOverheadTokens, shape.block_n); }

// Of one item. A request without KV still has one unit of work: writing its zeros.
MLA_HD int64_t item_units(const Request& r, Shape shape) {
  const int64_t tiles = ceil_div<int64_t>(r.len, shape.block_n);
  return overhead_units(shape) + (tiles > 0 ? tiles : 1);
}
MLA_HD int32_t bundles(const Request& r, int32_t group_size) { return ceil_div(r.row_blocks, group_size); }
// Of all items of a request; `item_span` as in PlanHeader.
MLA_HD int64_t request_units(const Request& r, Shape shape, int32_t group_size, int64_t item_span) {
  return bundles(r, group_size) * (item_span > 0 ? item_span : item_units(r, shape));
}

// The group size that leaves the busiest group the least work: `units[g - 1]` is the cost of all items in bundles of g.
// Larger groups win ties, as they read KV from memory fewer times.
MLA_HD int32_t best_group_size(const int64_t* units, int32_t max_row_blocks, int32_t num_workers) {
  const int32_t largest = clamp(max_row_blocks < num_workers ? max_row_blocks : num_workers, 1, kMaxGroupSize);
  int32_t best = 1;
  int64_t best_cost = ceil_div<int64_t>(units[0], num_workers);
  for (int32_t g = 2; g <= largest; ++g) {
    const int64_t cost = ceil_div<int64_t>(units[g - 1], num_workers / g);
    if (cost <= best_cost) best = g, best_cost = cost;
  }
  return best;
}

// A group's range is at least this long: below it, combining more splits costs more than they save.
MLA_HD int64_t least_range(int64_t total_units, Shape shape) {
  const bool few = total_units * shape.block_n <= kFewTokens;
  const int64_t tiles = ceil_div(few ? kMinGroupTokens : kMinGroupTokensOfMany, shape.block_n);
  const int64_t overhead = overhead_units(shape);
  return tiles > overhead ? tiles : overhead + 1;
}

// Items that are all shorter than the least range, and no more than groups: nothing is cut, each group has one.
MLA_HD PlanHeader make_uncut_header(int64_t most_units, int64_t num_items, Shape shape, int32_t group_size) {
  PlanHeader h{};
  h.group_size = group_size;
  h.overhead = overhead_units(shape);
  h.units_per_group = h.item_span = most_units;
  h.num_groups = static_cast<int32_t>(num_items);
  return h;
}

// How the line of all items is cut: into equal ranges, or, where all items are equally long (`common_units` > 0) and it makes the
// ranges hardly longer, so that cuts and items fall together: a group then computes whole items, or one part of an item, and no
// group pays for two partial results. Parts are equal without the overhead, which every group has once.
MLA_HD PlanHeader make_header(int64_t total_units, int64_t common_units, Shape shape, int32_t group_size,
                              int32_t num_workers) {
  PlanHeader h{};
  h.group_size = group_size;
  const int64_t groups = num_workers / group_size;
  h.overhead = overhead_units(shape);
  const int64_t least = least_range(total_units, shape);
  const int64_t even = ceil_div(total_units, groups);
  h.units_per_group = even > least ? even : least;
  if (common_units > 0) {
    const int64_t items = total_units / common_units, tiles = common_units - h.overhead;
    const int64_t parts = clamp<int64_t>(groups / items, 1, ceil_div(tiles, least));
    const int64_t part = ceil_div(tiles, parts);  // of one item
    const int64_t longest = parts > 1 ? part + h.overhead : ceil_div(items, groups) * common_units;
    if (longest <= h.units_per_group + h.units_per_group / kAlignmentShare + h.overhead) {
      if (parts > 1) h.overhead = 0;
      h.units_per_group = parts > 1 ? part : longest;
      h.item_span = parts > 1 ? ceil_div(tiles, part) * part : common_units;
      total_units = items * h.item_span;
    }
  }
  h.num_groups = static_cast<int32_t>(ceil_div(total_units, h.units_per_group));
  return h;
}

// The last index i < n with values[i] <= x, where values[0] <= x and values do not fall.
template <class T>
MLA_HD int32_t last_not_above(const T* values, int32_t n, T x) {
  int32_t low = 0, high = n - 1;
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (values[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

// One bundle of one request, and where it lies on the line of all items.
struct Item {
  int64_t begin;  // units before it
  int64_t units;  // its own; behind them, up to the next item, nothing is computed
  int32_t request, bundle;
  Request info;
};

MLA_HD Item make_item(const Lengths& lengths, Shape shape, const PlanHeader& plan, const int64_t* first_unit,
                      int32_t request, int64_t bundle) {
  Item item;
  item.request = request;
  item.bundle = static_cast<int32_t>(bundle);
  item.info = request_at(lengths, shape, request);
  item.units = item_units(item.info, shape) - overhead_units(shape) + plan.overhead;
  item.begin = first_unit[request] + bundle * (plan.item_span > 0 ? plan.item_span : item.units);
  return item;
}
MLA_HD Item item_at(const Lengths& lengths, Shape shape, const PlanHeader& plan, const int64_t* first_unit,
                    int64_t unit) {
  const int32_t request = last_not_above(first_unit, lengths.num_requests, unit);
  const int64_t span = plan.item_span > 0 ? plan.item_span : item_units(request_at(lengths, shape, request), shape);
  return make_item(lengths, shape, plan, first_unit, request, (unit - first_unit[request]) / span);
}
MLA_HD Item numbered_item(const Lengths& lengths, Shape shape, const PlanHeader& plan, const int64_t* first_unit,
                          const int32_t* first_item, int32_t number) {
  const int32_t request = last_not_above(first_item, lengths.num_requests, number);
  return make_item(lengths, shape, plan, first_unit, request, number - first_item[request]);
}
MLA_HD int64_t item_number(const Item& item, const int32_t* first_item) {
  return int64_t{first_item[item.request]} + item.bundle;
}

// The units that carry an item's tokens, without the overhead before them.
MLA_HD int64_t first_token_unit(const Item& item, const PlanHeader& plan) { return item.begin + plan.overhead; }
MLA_HD int64_t end_unit(const Item& item) { return item.begin + item.units; }

// Where partial results go: a group has at most one piece that continues an item and one that begins one.
MLA_HD int32_t partial_slot(int32_t group, int32_t group_size, bool begins_item) {
  return (2 * group + (begins_item ? 1 : 0)) * group_size;
}

// What group `g` computes of an item; no tiles if only its overhead falls to the group.
MLA_HD Piece make_piece(const Item& item, Shape shape, const PlanHeader& plan, int32_t g) {
  const int64_t from = first_token_unit(item, plan), to = end_unit(item);
  const int64_t low = clamp<int64_t>(g * plan.units_per_group, from, to);
  const int64_t high = clamp<int64_t>((g + 1) * plan.units_per_group, from, to);
  Piece piece;
  piece.request = item.request;
  piece.first_token = item.info.first_token;
  piece.num_tokens = item.info.num_tokens;
  piece.len = item.info.len;
  piece.first_row = item.bundle * plan.group_size * shape.block_rows;
  piece.first_tile = static_cast<int32_t>(low - from);
  piece.end_tile = static_cast<int32_t>(high - from);
  piece.partial_slot = low == from && high == to ? -1 : partial_slot(g, plan.group_size, low == from);
  return piece;
}

// PlanWorker::pairs of the workers of group `g`, whose first and last units are those of these items.
MLA_HD int32_t pairs_of(const Item& first, const Item& last, Shape shape, const PlanHeader& plan, int32_t g) {
  if (!shape.merges_pairs) return 0;
  auto first_group = [&](const Item& item) { return first_token_unit(item, plan) / plan.units_per_group; };
  auto last_group = [&](const Item& item) { return (end_unit(item) - 1) / plan.units_per_group; };
  int32_t pairs = 0;
  if (first_group(first) == g - 1 && last_group(first) == g) pairs |= kMergesFirst;
  if (first_group(last) == g && last_group(last) == g + 1) pairs |= kLeavesLast;
  return pairs;
}

// The item whose tokens begin in group `g` and go on past its end, for the combine kernel; false where there is none. `item` holds
// the unit at which the next group begins: no other item can.
MLA_HD bool make_split(const Item& item, Shape shape, const PlanHeader& plan, int32_t g, SplitItem& split) {
  const int64_t begin = g * plan.units_per_group, end = begin + plan.units_per_group;
  const int64_t from = first_token_unit(item, plan);
  if (from < begin || from >= end || end_unit(item) <= end) return false;
  const int32_t last_group = static_cast<int32_t>((end_unit(item) - 1) / plan.units_per_group);
  if (shape.merges_pairs && last_group == g + 1) return false;
  split = {item.request,
           item.info.first_token,
           item.info.num_tokens,
           item.bundle * plan.group_size * shape.block_rows,
           last_group - g + 1,
           partial_slot(g, plan.group_size, true),
           partial_slot(g + 1, plan.group_size, false),
           2 * plan.group_size};
  return true;
}

// The piece of item i that group g computes has number i + g, so that all pieces can be written independently: an item's first one
// from the item, the others from the groups that begin inside it. Where a group begins with an item, one number is unused.
MLA_HD int64_t max_items(const Lengths& lengths, Shape shape) {
  return lengths.cu_seqlens_q
             ? ceil_div<int64_t>(int64_t{lengths.total_q} * lengths.h_q, shape.block_rows) + lengths.num_requests
             : int64_t{lengths.num_requests} * ceil_div<int64_t>(int64_t{lengths.s_q} * lengths.h_q, shape.block_rows);
}
MLA_HD int64_t max_pieces(const Lengths& lengths, Shape shape, int32_t num_workers) {
  return max_items(lengths, shape) + num_workers;
}

MLA_HD int32_t partial_slots(int32_t num_workers) {
  return 2 * num_workers + 1;
}  // the last holds flags (partials.cuh)

// The planner's own, behind the splits.
MLA_HD int64_t* first_unit_of(SplitItem* splits, int32_t num_workers) {  // [num_requests + 1]
  return reinterpret_cast<int64_t*>(splits + num_workers);
}
MLA_HD int32_t* first_item_of(SplitItem* splits, int32_t num_workers, int32_t num_requests) {  // [num_requests + 1]
  return reinterpret_cast<int32_t*>(first_unit_of(splits, num_workers) + num_requests + 1);
}
MLA_HD int64_t plan_bytes(const Lengths& lengths, Shape shape, int32_t num_workers) {
  return splits_at(max_pieces(lengths, shape, num_workers), num_workers) +
         num_workers * static_cast<int64_t>(sizeof(SplitItem)) +
         (int64_t{lengths.num_requests} + 1) * static_cast<int64_t>(sizeof(int64_t) + sizeof(int32_t));
}

}  // namespace mla::schedule
