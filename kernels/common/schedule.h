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

#include "requests.h"

namespace mla::schedule {

// Starting and finishing an item (Q, first KV latency, output) costs about as much as this many KV tokens. On an H200 27 ragged batches
// take 1.5 % less than with 64, in the mean (75.0 -> 70.6 us at 16 requests of 8,192 tokens and 128 heads), and 0.7 % less than with 192.
constexpr int kItemOverheadTokens = 128;
// A group has at least so many tokens, by the longest item (least_tiles()): below it, combining more splits costs more than they save
// (measured: DESIGN.md, decision 8).
constexpr int kShortTokens = 2048, kMinGroupTokensOfShort = 64, kLowRows = 32;
constexpr int kMediumTokens = 8192, kMinGroupTokens = 128, kMinGroupTokensOfLong = 192;
// Cuts fall on the ends of equally long items if that makes the busiest group's range longer by at most one part in this.
constexpr int kAlignmentShare = 64;

MLA_HD int32_t overhead_units(Shape shape) { return blocks_of(kItemOverheadTokens, shape.block_n); }

// Of one item. A request without KV still has one unit of work: writing its zeros.
MLA_HD int32_t item_tiles(int32_t len, Shape shape) { return len > 0 ? blocks_of(len, shape.block_n) : 1; }
MLA_HD int32_t item_units(int32_t len, Shape shape) { return overhead_units(shape) + item_tiles(len, shape); }
MLA_HD int32_t item_units(const Request& r, Shape shape) { return item_units(r.len, shape); }

// Of a batch whose longest item has so many units.
MLA_HD int32_t least_tiles(int32_t most_units, Shape shape) {
  const int32_t tiles = most_units - overhead_units(shape);
  const bool is_long = tiles > blocks_of(kMediumTokens, shape.block_n);
  const bool is_short = tiles <= blocks_of(kShortTokens, shape.block_n);
  const bool is_one_part = tiles <= blocks_of(kMinGroupTokens, shape.block_n);  // what need not be combined is not
  const int32_t least = is_long                                                    ? kMinGroupTokensOfLong
                        : is_short && !is_one_part && shape.block_rows <= kLowRows ? kMinGroupTokensOfShort
                                                                                   : kMinGroupTokens;
  return blocks_of(least, shape.block_n);
}
// Its range, which may hold an item's overhead, is at least this long: no range is overhead alone.
MLA_HD int32_t least_range(int32_t least_tiles, int32_t overhead) {
  return least_tiles > overhead ? least_tiles : overhead + 1;
}

// Of a batch.
template <class Unit>
struct Items {
  Unit number, units;
  int32_t least_units, most_units;  // of one item
};

// How the line of all items is cut: the fields of PlanHeader.
template <class Unit>
struct Cuts {
  Unit units_per_group, item_span;
  int32_t num_groups, group_size, overhead;
};

// Into equal ranges, or, where all items are equally long and it makes the ranges hardly longer, so that cuts and items fall together:
// a group then computes whole items, or one part of an item, and no group pays for two partial results. Parts are equal without the
// overhead, which every group has once. Items that are all shorter than the least range, and no more than groups, are not cut: each
// group has one.
template <class Unit>
MLA_HD Cuts<Unit> make_cuts(const Items<Unit>& items, Shape shape, int32_t group_size, int32_t num_workers) {
  Cuts<Unit> cuts{};
  cuts.group_size = group_size;
  cuts.overhead = overhead_units(shape);
  const Unit groups = groups_of(num_workers, group_size);
  const int32_t least_of_group = least_tiles(items.most_units, shape);
  const Unit least = least_range(least_of_group, cuts.overhead);
  if (items.most_units <= least && items.number > 0 && items.number <= groups) {
    cuts.units_per_group = cuts.item_span = items.most_units;
    cuts.num_groups = static_cast<int32_t>(items.number);
    return cuts;
  }
  const Unit even = ceil_div_of_units(items.units, groups);
  cuts.units_per_group = even > least ? even : least;
  if (items.least_units == items.most_units) {
    const Unit tiles = items.most_units - cuts.overhead;
    const Unit of_group = ceil_div_of_units(items.number, groups);  // whole items
    const Unit wanted =
        clamp<Unit>(quotient_of_units(groups, items.number), 1, ceil_div_of_units<Unit>(tiles, least_of_group));
    const Unit part = ceil_div_of_units(tiles, wanted);
    const Unit longest = wanted > 1 ? part + cuts.overhead : of_group * items.most_units;
    if (longest <= cuts.units_per_group + cuts.units_per_group / kAlignmentShare + cuts.overhead) {
      if (wanted > 1) {
        const Unit parts = ceil_div_of_units(tiles, part);
        cuts.overhead = 0;
        cuts.units_per_group = part;
        cuts.item_span = parts * part;
        cuts.num_groups = static_cast<int32_t>(items.number * parts);
      } else {
        cuts.units_per_group = longest;
        cuts.item_span = items.most_units;
        cuts.num_groups = static_cast<int32_t>(ceil_div_of_units(items.number, of_group));
      }
      return cuts;
    }
  }
  cuts.num_groups = static_cast<int32_t>(ceil_div_of_units(items.units, cuts.units_per_group));
  return cuts;
}
template <class Unit>
MLA_HD PlanHeader make_header(const Cuts<Unit>& cuts, int64_t splits_at, int32_t num_splits) {
  PlanHeader header{};
  header.units_per_group = cuts.units_per_group;
  header.item_span = cuts.item_span;
  header.splits_at = splits_at;
  header.num_groups = cuts.num_groups;
  header.group_size = cuts.group_size;
  header.num_splits = num_splits;
  header.overhead = cuts.overhead;
  return header;
}

// The last index i < n with values[i] <= x, where values[0] <= x and values do not fall. Three comparisons at a time: none of them waits
// for the others.
template <class Values, class T>
MLA_HD int32_t last_not_above(const Values& values, int32_t n, T x) {
  int32_t found = 0;
  MLA_ROLLED
  for (int32_t step = n > 1 ? 1 << (log2_of(n - 1) & ~1) : 0; step > 0; step /= 4) {
    int32_t steps = 0;
    for (int32_t at = found + step, i = 0; i < 3; ++i, at += step) steps += at < n && values[at] <= x;
    found += steps * step;
  }
  return found;
}

// Groups have whole items then: none is split.
template <class Unit>
MLA_HD bool are_whole(const Cuts<Unit>& cuts) {
  return cuts.item_span > 0 && cuts.item_span <= cuts.units_per_group;
}

// Of uniform queries, whose requests have so many bundles each: where request `request` begins if all items are equally long, and which
// holds a unit.
template <class Unit>
MLA_HD Unit first_unit_of_equal(const Cuts<Unit>& cuts, int32_t bundles, int32_t request) {
  return Unit{request} * bundles * cuts.item_span;
}
template <class Unit>
MLA_HD int32_t request_of_equal(const Cuts<Unit>& cuts, int32_t bundles, Unit unit) {
  const Unit item = quotient_of_units(unit, cuts.item_span);
  return static_cast<int32_t>(bundles > 1 ? quotient_of_units<Unit>(item, bundles) : item);
}

// One bundle of one request, and where it lies on the line of all items.
template <class Unit>
struct Item {
  Unit begin;     // units before it
  int32_t units;  // its own; behind them, up to the next item, nothing is computed
  int32_t request, bundle;
  Request info;
};

// `first_unit`: where the request begins on the line.
template <class Unit>
MLA_HD Item<Unit> make_item(const Request& info, Shape shape, const Cuts<Unit>& cuts, Unit first_unit, int32_t request,
                            Unit bundle) {
  Item<Unit> item;
  item.request = request;
  item.bundle = static_cast<int32_t>(bundle);
  item.info = info;
  item.units = item_tiles(info.len, shape) + cuts.overhead;
  item.begin = first_unit + bundle * (cuts.item_span > 0 ? cuts.item_span : item.units);
  return item;
}
// The item of the request that holds a unit.
template <class Unit>
MLA_HD Item<Unit> item_at(const Lengths& lengths, Shape shape, const Cuts<Unit>& cuts, Unit first_unit, int32_t request,
                          Unit unit) {
  const Request info = request_at(lengths, shape, request);
  const Unit span = cuts.item_span > 0 ? cuts.item_span : item_units(info, shape);
  const Unit bundle = info.row_blocks <= cuts.group_size ? 0 : quotient_of_units<Unit>(unit - first_unit, span);
  return make_item(info, shape, cuts, first_unit, request, bundle);
}

// The units that carry an item's tokens, without the overhead before them.
template <class Unit>
MLA_HD Unit first_token_unit(const Item<Unit>& item, const Cuts<Unit>& cuts) {
  return item.begin + cuts.overhead;
}
template <class Unit>
MLA_HD Unit end_unit(const Item<Unit>& item) {
  return item.begin + item.units;
}
template <class Unit>
MLA_HD bool begins_in(const Item<Unit>& item, const Cuts<Unit>& cuts, int32_t g) {
  const Unit from = first_token_unit(item, cuts), begin = g * cuts.units_per_group;
  return (begin <= from) & (from < begin + cuts.units_per_group);
}
template <class Unit>
MLA_HD bool goes_beyond(const Item<Unit>& item, const Cuts<Unit>& cuts, int32_t g) {
  return end_unit(item) > (g + 1) * cuts.units_per_group;
}

// Where partial results go: a group has at most one piece that continues an item and one that begins one.
MLA_HD int32_t partial_slot(int32_t group, int32_t group_size, bool begins_item) {
  return (2 * group + (begins_item ? 1 : 0)) * group_size;
}

// What group `g` computes of an item; no tiles if only its overhead falls to the group.
template <class Unit>
MLA_HD Piece make_piece(const Item<Unit>& item, Shape shape, const Cuts<Unit>& cuts, int32_t g) {
  const Unit from = first_token_unit(item, cuts), to = end_unit(item);
  const Unit low = clamp<Unit>(g * cuts.units_per_group, from, to);
  const Unit high = clamp<Unit>((g + 1) * cuts.units_per_group, from, to);
  Piece piece;
  piece.request = item.request;
  piece.first_token = item.info.first_token;
  piece.num_tokens = item.info.num_tokens;
  piece.len = item.info.len;
  piece.first_row = item.bundle * cuts.group_size * shape.block_rows;
  piece.first_tile = static_cast<int32_t>(low - from);
  piece.end_tile = static_cast<int32_t>(high - from);
  piece.partial_slot = low == from && high == to ? -1 : partial_slot(g, cuts.group_size, low == from);
  return piece;
}

// An end of a group's range: its first unit or its last one.
enum End { kFirstUnit, kLastUnit };
// WorkerRange::pairs, as far as it follows from the item that has this end of group `g`. Without branches.
template <class Unit>
MLA_HD int32_t pairs_of(const Item<Unit>& item, int32_t end, Shape shape, const Cuts<Unit>& cuts, int32_t g) {
  const int32_t from = end == kFirstUnit ? g - 1 : g;
  const bool is_pair = begins_in(item, cuts, from) & goes_beyond(item, cuts, from) & !goes_beyond(item, cuts, from + 1);
  return is_pair & (shape.merges_pairs != 0) ? (end == kFirstUnit ? kMergesFirst : kLeavesLast) : 0;
}

// An item for the combine kernel, if its tokens begin in group `g` and go on past its end; false otherwise. No other than the one that
// holds the first unit behind the group can.
template <class Unit>
MLA_HD bool make_split(const Item<Unit>& item, Shape shape, const Cuts<Unit>& cuts, int32_t g, SplitItem& split) {
  if (!begins_in(item, cuts, g) || !goes_beyond(item, cuts, g)) return false;
  if (shape.merges_pairs && !goes_beyond(item, cuts, g + 1)) return false;
  const int32_t last_group = static_cast<int32_t>(quotient_of_units<Unit>(end_unit(item) - 1, cuts.units_per_group));
  split = {item.request,
           item.info.first_token,
           item.info.num_tokens,
           item.bundle * cuts.group_size * shape.block_rows,
           last_group - g + 1,
           partial_slot(g, cuts.group_size, true),
           partial_slot(g + 1, cuts.group_size, false),
           2 * cuts.group_size};
  return true;
}

}  // namespace mla::schedule
