// The schedule of the batch-invariant mode: which KV tokens are added up together, and in which order the sums are merged, follows from
// the length and the rows of a request alone.
//
// The tiles of an item (schedule.h) are cut into parts, long ones and at the end one or two short ones. A part is a piece with a partial
// result of its own; an item of one part is final. Parts are not cut further, so that groups cannot get equal shares: the long parts of
// all items are laid on a line, which is cut evenly, and each falls to the group in whose range its middle lies. The short ones, on a
// line of their own, fill all groups to one level.
//
// The arithmetic is here, for the host and the device alike; plan_parts.cu runs it on the device, the tests on the host.
#pragma once

#include "schedule.h"

namespace mla::parts {

using schedule::blocks_of;
using schedule::ceil_div;
using schedule::clamp;
using schedule::log2_of;
using schedule::quotient;
using schedule::Request;
using schedule::Shape;

// Long parts have this many tokens at least, and 8 sqrt(len) at least: longer requests can do with fewer of them, and each costs
// an overhead and a partial result. As many times more as the request has row blocks, which are as many parts again.
constexpr int kPartTokens = 1024, kPartTokensSquaredPerToken = 64;
// A request has at most so many parts over all its row blocks, and one more for each row block.
constexpr int kMaxParts = 64;
// A part costs about as much more as this many tokens: Q, the first KV, the partial result.
constexpr int kPartOverheadTokens = 128;
// Two warpgroups that take tiles in turn must begin every part alike, whatever they did before, so all parts are pairs of tiles; that
// behind an odd end is empty. This divides long parts of every length into pairs of tiles of up to 64 tokens.
constexpr int kPartGranularity = 256;

// How an item is cut. The last part is as long as it comes.
struct Cut {
  int32_t tiles;
  int32_t long_parts, long_tiles;
  int32_t short_parts, short_tiles;
  MLA_HD int32_t parts() const { return long_parts + short_parts; }
};

// Of partial results that an item leaves, of each row block.
MLA_HD int32_t partials_of(const Cut& cut) { return cut.parts() > 1 ? cut.parts() : 0; }

// Of a long part, in each row block.
MLA_HD int32_t part_tokens(int32_t len) {
  int32_t tokens = kPartTokens;
  MLA_ROLLED
  while (int64_t{tokens} * tokens < int64_t{kPartTokensSquaredPerToken} * len)
    tokens += tokens / 4 / kPartGranularity * kPartGranularity;
  const int32_t least = blocks_of(len, kMaxParts);
  return tokens < least ? blocks_of(least, kPartGranularity) * kPartGranularity : tokens;
}

MLA_HD Cut make_cut(const Request& r, Shape shape) {
  Cut cut{};
  if (r.row_blocks == 0) return cut;
  cut.tiles = r.len > 0 ? blocks_of(r.len, 2 * shape.block_n) * 2 : 2;
  const int64_t tokens = int64_t{part_tokens(r.len)} * r.row_blocks;
  if (r.len <= tokens) {
    cut.long_parts = 1;
    cut.long_tiles = cut.tiles;
    return cut;
  }
  cut.long_tiles = static_cast<int32_t>(tokens >> log2_of(shape.block_n));
  cut.long_parts = quotient(cut.tiles - cut.long_tiles / 2, cut.long_tiles);
  const int32_t rest = cut.tiles - cut.long_parts * cut.long_tiles;  // from half of a long part up to one and a half
  cut.short_parts = rest > cut.long_tiles ? 2 : 1;
  cut.short_tiles = ceil_div(rest, 2 * cut.short_parts) * 2;
  return cut;
}

// Of partial results, for all requests of a batch, whatever their lengths: of a row block each. A request has at most as many as long
// parts fit into its longest possible length, and one more for each row block.
inline int64_t max_partials(const Lengths& lengths, Shape shape) {
  const int64_t len = clamp<int64_t>(lengths.max_len, 0, schedule::kMaxLen);
  const int64_t row_blocks = schedule::max_items(lengths, shape);
  const int64_t of_each =
      lengths.cu_seqlens_q || row_blocks == 0 ? 1 : schedule::row_blocks_of(lengths, shape, lengths.s_q);
  if (len <= kPartTokens * of_each) return 0;
  int64_t parts = clamp<int64_t>(blocks_of(len, kPartTokens), 1, kMaxParts);
  while (kPartTokensSquaredPerToken * (parts - 1) * (parts - 1) >= len) --parts;
  return lengths.num_requests * parts + row_blocks;
}
inline int64_t max_pieces(const Lengths& lengths, Shape shape) {
  const int64_t partials = max_partials(lengths, shape), items = schedule::max_items(lengths, shape);
  return partials > items ? partials : items;
}

// How many there is room for in a plan: items that are split, pieces, partial results.
struct Limits {
  int32_t items, pieces, partials;
};
inline Limits limits_of(const Lengths& lengths, Shape shape) {
  return {static_cast<int32_t>(schedule::max_items(lengths, shape)), static_cast<int32_t>(max_pieces(lengths, shape)),
          static_cast<int32_t>(max_partials(lengths, shape))};
}

// ---- the two lines ----

enum Line { kLong, kShort, kNumLines };

// The parts of one item on a line.
struct Run {
  int32_t parts, tiles, last_tiles;
};
MLA_HD Run run_of(const Cut& cut, int line) {
  if (line == kLong) return {cut.long_parts, cut.long_tiles, cut.long_tiles};
  const int32_t before = cut.long_parts * cut.long_tiles + (cut.short_parts - 1) * cut.short_tiles;
  return {cut.short_parts, cut.short_tiles, cut.tiles - before};
}
MLA_HD int32_t part_overhead(Shape shape) { return blocks_of(kPartOverheadTokens, shape.block_n); }
MLA_HD int32_t units_of(const Run& run, Shape shape) {
  if (run.parts == 0) return 0;
  const int32_t overhead = part_overhead(shape);
  return (run.parts - 1) * (run.tiles + overhead) + run.last_tiles + overhead;
}
MLA_HD int32_t item_units(const Cut& cut, Shape shape) {
  return units_of(run_of(cut, kLong), shape) + units_of(run_of(cut, kShort), shape);
}

// As schedule::is_small. What is small here keeps the planner's own in shared memory, too.
constexpr int kSmallBatch = 2048, kSmallWorkers = 255;
inline bool is_small(const Lengths& lengths, Shape shape, int32_t num_workers) {
  const int64_t overheads = (kMaxParts + 1) * part_overhead(shape);
  return lengths.num_requests <= kSmallBatch && num_workers <= kSmallWorkers &&
         schedule::units_are_few(lengths, shape, overheads);
}

// What the planner keeps, in shared memory or behind the splits.
template <class Unit>
struct Memory {
  int32_t num_requests, num_workers;
  Unit* units;                               // of first_unit
  Unit* load;                                // [num_workers + 1]: units before a group's long parts
  int32_t* parts;                            // of first_part and first_of_group
  MLA_HD Unit* first_unit(int line) const {  // [num_requests + 1]: units of the line before a request's
    return units + line * (int64_t{num_requests} + 1);
  }
  MLA_HD int32_t* first_part(int line) const {  // [num_requests + 1]: parts of the line before a request's
    return parts + line * (int64_t{num_requests} + 1);
  }
  MLA_HD int32_t* first_slot() const {
    return first_part(kNumLines);
  }  // [num_requests + 1]: partial results before a request's
  MLA_HD int32_t* first_of_group(int line) const {  // [num_workers + 1]: parts of the line before a group's
    return first_part(kNumLines + 1) + line * (int64_t{num_workers} + 1);
  }
};
constexpr int64_t kBytesPerRequest = kNumLines * (sizeof(int64_t) + sizeof(int32_t)) + sizeof(int32_t);
constexpr int64_t kBytesPerWorker = sizeof(int64_t) + kNumLines * sizeof(int32_t);

inline int64_t plan_bytes(const Lengths& lengths, Shape shape, int32_t num_workers) {
  return schedule::splits_at(max_pieces(lengths, shape), num_workers) +
         schedule::max_items(lengths, shape) * static_cast<int64_t>(sizeof(SplitItem)) +
         (int64_t{lengths.num_requests} + 1) * kBytesPerRequest + (int64_t{num_workers} + 1) * kBytesPerWorker;
}
MLA_HD SplitItem* splits_of(const schedule::PlanView& plan, const Limits& limits) {  // [limits.items]
  return reinterpret_cast<SplitItem*>(plan.pieces + limits.pieces);
}
MLA_HD Memory<int64_t> memory_of(const schedule::PlanView& plan, const Lengths& lengths, const Limits& limits,
                                 int32_t num_workers) {
  Memory<int64_t> m{lengths.num_requests, num_workers, nullptr, nullptr, nullptr};
  m.units = reinterpret_cast<int64_t*>(splits_of(plan, limits) + limits.items);
  m.load = m.first_unit(kNumLines);
  m.parts = reinterpret_cast<int32_t*>(m.load + num_workers + 1);
  return m;
}

// Where group g's range of a line of `units` begins.
template <class Unit>
MLA_HD Unit range_begin(Unit units, int32_t num_groups, int32_t g) {
  const Unit each = quotient<Unit>(units, num_groups);
  return each * g + quotient<Unit>((units - each * num_groups) * g, num_groups);
}

// A place between two parts of a line.
template <class Unit>
struct Place {
  int32_t parts;  // before it
  Unit units;
};
// Ahead of the first part whose middle is at `unit` or behind it. `num_requests`: those that are on the lines.
template <class Unit>
MLA_HD Place<Unit> place_of(const Lengths& lengths, Shape shape, const Memory<Unit>& m, int32_t num_requests, int line,
                            Unit unit) {
  const Unit* first_unit = m.first_unit(line);
  if (unit >= first_unit[num_requests]) return {m.first_part(line)[num_requests], first_unit[num_requests]};
  const int32_t i = schedule::last_not_above(first_unit, num_requests, unit);
  const Run run = run_of(make_cut(schedule::request_at(lengths, shape, i), shape), line);
  const Unit item = units_of(run, shape), bundle = quotient<Unit>(unit - first_unit[i], item);
  const Unit inside = unit - first_unit[i] - bundle * item;
  const Unit size = run.tiles + part_overhead(shape), last = run.last_tiles + part_overhead(shape);
  Unit before = clamp<Unit>(quotient<Unit>(2 * inside + size - 1, 2 * size), 0, run.parts - 1);
  if (before == run.parts - 1 && 2 * before * size + last < 2 * inside) ++before;
  return {static_cast<int32_t>(m.first_part(line)[i] + bundle * run.parts + before),
          first_unit[i] + bundle * item + (before < run.parts ? before * size : item)};
}

// ---- pieces ----

struct Part {
  int32_t request, bundle;
  int32_t number;  // of the item's parts
  Request info;
  Cut cut;
};
template <class Unit>
MLA_HD Part part_at(const Lengths& lengths, Shape shape, const Memory<Unit>& m, int32_t num_requests, int line,
                    int32_t number) {
  Part part;
  part.request = schedule::last_not_above(m.first_part(line), num_requests, number);
  part.info = schedule::request_at(lengths, shape, part.request);
  part.cut = make_cut(part.info, shape);
  const int32_t parts = run_of(part.cut, line).parts, before = number - m.first_part(line)[part.request];
  part.bundle = quotient(before, parts);
  part.number = before - part.bundle * parts + (line == kShort ? part.cut.long_parts : 0);
  return part;
}
MLA_HD int32_t members_of(const Part& part, int32_t group_size) {
  const int32_t left = part.info.row_blocks - part.bundle * group_size;
  return left < group_size ? left : group_size;
}
// The first slot of the part's item; those of a part are neighbours, and so are the parts of an item.
template <class Unit>
MLA_HD int32_t slot_of_item(const Part& part, const Memory<Unit>& m, int32_t group_size) {
  return m.first_slot()[part.request] + part.cut.parts() * part.bundle * group_size;
}
template <class Unit>
MLA_HD Piece make_piece(const Part& part, const Memory<Unit>& m, Shape shape, int32_t group_size) {
  const Cut& cut = part.cut;
  const int32_t of_short = part.number - cut.long_parts;
  const int32_t first =
      of_short < 0 ? part.number * cut.long_tiles : cut.long_parts * cut.long_tiles + of_short * cut.short_tiles;
  const int32_t end = first + (of_short < 0 ? cut.long_tiles : cut.short_tiles);
  Piece piece;
  piece.request = part.request;
  piece.first_token = part.info.first_token;
  piece.num_tokens = part.info.num_tokens;
  piece.len = part.info.len;
  piece.first_row = part.bundle * group_size * shape.block_rows;
  piece.first_tile = first;
  piece.end_tile = end < cut.tiles ? end : cut.tiles;
  piece.partial_slot =
      cut.parts() == 1 ? -1 : slot_of_item(part, m, group_size) + part.number * members_of(part, group_size);
  return piece;
}
template <class Unit>
MLA_HD SplitItem make_split(const Part& part, const Memory<Unit>& m, Shape shape, int32_t group_size) {
  const int32_t slot = slot_of_item(part, m, group_size), step = members_of(part, group_size);
  return {part.request,         part.info.first_token,
          part.info.num_tokens, part.bundle * group_size * shape.block_rows,
          part.cut.parts(),     slot,
          slot + step,          step};
}

}  // namespace mla::parts
