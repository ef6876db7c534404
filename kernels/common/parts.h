// The schedule of the batch-invariant mode: which KV tokens are added up together, and in which order the sums are merged, follows from
// the length and the rows of a request alone.
//
// The tiles of an item (schedule.h) are cut into equal parts. A part is a piece with a partial result of its own; an item of one part is
// final. Parts are not cut further, so that groups cannot get equal shares: the largest are dealt first, each to a group that has least.
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

// Parts have this many tokens at most, or 8 sqrt(len) if that is more: longer requests can do with fewer of them, and each costs an
// overhead and a partial result. As many times more as the request has row blocks, which are as many parts again.
constexpr int kPartTokens = 1024, kPartTokensSquaredPerToken = 64;
// A request has at most so many parts over all its row blocks, and one more for each row block.
constexpr int kMaxParts = 64;
// A part costs about as much more as this many tokens: Q, the first KV, the partial result.
constexpr int kPartOverheadTokens = 256;
// Two warpgroups that take tiles in turn must begin every part alike, whatever they did before, so all parts are pairs of tiles; that
// behind an odd end is empty. This divides the most tokens of a part into pairs of tiles of up to 64 tokens.
constexpr int kPartGranularity = 128;

// How an item is cut. The last part is as long as it comes.
struct Cut {
  int32_t tiles;
  int32_t parts, part_tiles;
};

// Of partial results that an item leaves, of each row block.
MLA_HD int32_t partials_of(const Cut& cut) { return cut.parts > 1 ? cut.parts : 0; }

// Of a part at most, in each row block.
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
    cut.parts = 1;
    cut.part_tiles = cut.tiles;
    return cut;
  }
  const int32_t wanted = ceil_div(cut.tiles, static_cast<int32_t>(tokens >> log2_of(shape.block_n)));
  cut.part_tiles = ceil_div(cut.tiles, 2 * wanted) * 2;
  cut.parts = ceil_div(cut.tiles, cut.part_tiles);
  return cut;
}

// Of partial results, for all requests of a batch, whatever their lengths: of a row block each. A request has at most as many as parts
// fit into its longest possible length, and one more for each row block.
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

// ---- dealing ----

MLA_HD int32_t part_overhead(Shape shape) { return blocks_of(kPartOverheadTokens, shape.block_n); }
// Each of an item's parts counts as much as the longest.
MLA_HD int32_t part_units(const Cut& cut, Shape shape) { return cut.part_tiles + part_overhead(shape); }
MLA_HD int32_t item_units(const Cut& cut, Shape shape) { return cut.parts * part_units(cut, shape); }

// Parts are dealt by classes of size, the largest first. In all classes but the last, parts count as much as the largest of the class,
// which is less than a fifth more: each group gets so many that all come up to one level, if it has room for one at all. The rest are so
// small that they can lie on a line that is cut where the groups are full.
constexpr int kRest = 6, kNumClasses = kRest + 1;
constexpr int kClassShare = 6;  // a class ends where a part is smaller by one in so many
MLA_HD int32_t class_of(int32_t units, int32_t largest) {
  int32_t found = 0;
  MLA_ROLLED
  for (int32_t limit = largest - largest / kClassShare; found < kRest && units <= limit; limit -= limit / kClassShare)
    ++found;
  return found;
}

// As schedule::is_small. What is small here keeps the planner's own in shared memory, too.
constexpr int kSmallBatch = 2048, kSmallWorkers = 255;
inline bool is_small(const Lengths& lengths, Shape shape, int32_t num_workers) {
  const int64_t overheads = (kMaxParts + 1) * (part_overhead(shape) + 2);
  return lengths.num_requests <= kSmallBatch && num_workers <= kSmallWorkers &&
         schedule::units_are_few(lengths, shape, overheads);
}

// What the planner keeps, in shared memory or behind the splits.
template <class Unit>
struct Memory {
  int32_t num_requests, num_workers;
  Unit* first_unit;  // [num_requests + 1]: units of the rest before a request's
  Unit* load;        // [num_workers + 1]: units of a group, then those of the rest before a group's
  int32_t* parts;    // of first_part, first_of_class, first_slot and first_of_group
  MLA_HD int32_t* first_part() const { return parts; }  // [num_requests + 1]: before a request's
  MLA_HD int32_t* first_of_class() const {
    return parts + (int64_t{num_requests} + 1);
  }  // [num_requests + 1]: parts of its class before a request's
  MLA_HD int32_t* first_slot() const {
    return parts + 2 * (int64_t{num_requests} + 1);
  }  // [num_requests + 1]: partial results before a request's
  MLA_HD int32_t* first_of_group(int32_t size_class) const {  // [num_workers + 1]: parts of the class before a group's
    return parts + 3 * (int64_t{num_requests} + 1) + size_class * (int64_t{num_workers} + 1);
  }
};
constexpr int64_t kBytesPerRequest = sizeof(int64_t) + 3 * sizeof(int32_t);
constexpr int64_t kBytesPerWorker = sizeof(int64_t) + kNumClasses * sizeof(int32_t);

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
  m.first_unit = reinterpret_cast<int64_t*>(splits_of(plan, limits) + limits.items);
  m.load = m.first_unit + lengths.num_requests + 1;
  m.parts = reinterpret_cast<int32_t*>(m.load + num_workers + 1);
  return m;
}

// Parts of the rest ahead of the first one whose middle is at `unit` or behind it.
template <class Unit>
MLA_HD int32_t parts_ahead(const Lengths& lengths, Shape shape, const Memory<Unit>& m, Unit unit, int32_t all) {
  if (unit >= m.first_unit[m.num_requests]) return all;
  const int32_t i = schedule::last_not_above(m.first_unit, m.num_requests, unit);
  const Unit size = part_units(make_cut(schedule::request_at(lengths, shape, i), shape), shape);
  return m.first_of_class()[i] + static_cast<int32_t>(quotient<Unit>(2 * (unit - m.first_unit[i]) + size - 1, 2 * size));
}

// Pieces lie group by group, and in each by class.
template <class Unit>
MLA_HD int32_t pieces_before(const Memory<Unit>& m, int32_t group) {
  int32_t pieces = 0;
  for (int32_t each = 0; each < kNumClasses; ++each) pieces += m.first_of_group(each)[group];
  return pieces;
}
template <class Unit>
MLA_HD int32_t piece_index(const Memory<Unit>& m, int32_t size_class, int32_t number_of_class, int32_t group) {
  int32_t index = number_of_class;
  for (int32_t other = 0; other < kNumClasses; ++other)
    if (other != size_class) index += m.first_of_group(other)[other < size_class ? group + 1 : group];
  return index;
}

// ---- pieces ----

struct Part {
  int32_t request, bundle;
  int32_t number;  // of the item's parts
  int32_t number_of_class;
  Request info;
  Cut cut;
};
template <class Unit>
MLA_HD Part part_at(const Lengths& lengths, Shape shape, const Memory<Unit>& m, int32_t number) {
  Part part;
  part.request = schedule::last_not_above(m.first_part(), m.num_requests, number);
  part.info = schedule::request_at(lengths, shape, part.request);
  part.cut = make_cut(part.info, shape);
  const int32_t before = number - m.first_part()[part.request];
  part.number_of_class = m.first_of_class()[part.request] + before;
  part.bundle = quotient(before, part.cut.parts);
  part.number = before - part.bundle * part.cut.parts;
  return part;
}
MLA_HD int32_t members_of(const Part& part, int32_t group_size) {
  const int32_t left = part.info.row_blocks - part.bundle * group_size;
  return left < group_size ? left : group_size;
}
// The first slot of the part's item; those of a part are neighbours, and so are the parts of an item.
template <class Unit>
MLA_HD int32_t slot_of_item(const Part& part, const Memory<Unit>& m, int32_t group_size) {
  return m.first_slot()[part.request] + part.cut.parts * part.bundle * group_size;
}
template <class Unit>
MLA_HD Piece make_piece(const Part& part, const Memory<Unit>& m, Shape shape, int32_t group_size) {
  const Cut& cut = part.cut;
  const int32_t first = part.number * cut.part_tiles, end = first + cut.part_tiles;
  Piece piece;
  piece.request = part.request;
  piece.first_token = part.info.first_token;
  piece.num_tokens = part.info.num_tokens;
  piece.len = part.info.len;
  piece.first_row = part.bundle * group_size * shape.block_rows;
  piece.first_tile = first;
  piece.end_tile = end < cut.tiles ? end : cut.tiles;
  piece.partial_slot =
      cut.parts == 1 ? -1 : slot_of_item(part, m, group_size) + part.number * members_of(part, group_size);
  return piece;
}
template <class Unit>
MLA_HD SplitItem make_split(const Part& part, const Memory<Unit>& m, Shape shape, int32_t group_size) {
  const int32_t slot = slot_of_item(part, m, group_size), step = members_of(part, group_size);
  return {part.request,         part.info.first_token,
          part.info.num_tokens, part.bundle * group_size * shape.block_rows,
          part.cut.parts,     slot,
          slot + step,          step};
}

}  // namespace mla::parts
