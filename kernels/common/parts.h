// The schedule of the batch-invariant mode: which KV tokens are added up together, and in which order the sums are merged, follows from
// the length and the rows of a request alone.
//
// The tiles of an item (schedule.h) are cut into parts, long ones and at the end one or two short ones. A part is a piece with a partial
// result of its own; an item of one part is final. Parts are not cut further, so that groups cannot get equal shares: they are dealt, the
// largest first, one to each group in turn and then back, so that who got the least of a round gets the most of the next.
//
// The arithmetic is here, for the host and the device alike; plan_parts.cu runs it on the device, the tests on the host.
#pragma once

#include "plan_sizes.h"

namespace mla::parts {

using schedule::blocks_of;
using schedule::clamp;
using schedule::log2_of;
using schedule::quotient;
using schedule::quotient_of_units;
using schedule::Request;
using schedule::Shape;

// Long parts have this many tokens, or 8 sqrt(len) if that is more: longer requests can do with fewer of them, and each costs an overhead
// and a partial result. As many times more as the request has row blocks, which are as many parts again; but an eighth of the request is
// enough, down to half of that and half of kPartTokens.
constexpr int kPartTokens = 1024, kPartTokensSquaredPerToken = 64;
constexpr int kPartsOfShort = 8;
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

// Of a long part.
MLA_HD int64_t part_tokens(int32_t len, int32_t row_blocks) {
  int32_t tokens = kPartTokens;  // for each row block
  MLA_ROLLED
  while (int64_t{tokens} * tokens < int64_t{kPartTokensSquaredPerToken} * len)
    tokens += tokens / 4 / kPartGranularity * kPartGranularity;
  const int32_t least = blocks_of(len, kMaxParts);
  if (tokens < least) tokens = blocks_of(least, kPartGranularity) * kPartGranularity;
  const int64_t most = int64_t{tokens} * row_blocks;
  if (row_blocks == 1 || tokens > kPartTokens) return most;
  const int64_t share = blocks_of(int64_t{len} * row_blocks, kPartsOfShort * kPartGranularity) * kPartGranularity;
  return clamp<int64_t>(share, kPartTokens / 2 * (int64_t{row_blocks} + 1), most);
}

MLA_HD Cut make_cut(const Request& r, Shape shape) {
  Cut cut{};
  if (r.row_blocks == 0) return cut;
  cut.tiles = r.len > 0 ? blocks_of(r.len, 2 * shape.block_n) * 2 : 2;
  const int64_t tokens = part_tokens(r.len, r.row_blocks);
  if (r.len <= tokens) {
    cut.long_parts = 1;
    cut.long_tiles = cut.tiles;
    return cut;
  }
  cut.long_tiles = static_cast<int32_t>(tokens >> log2_of(shape.block_n));
  cut.long_parts = quotient_of_units(cut.tiles - cut.long_tiles * 3 / 8, cut.long_tiles);  // a few
  const int32_t rest = cut.tiles - cut.long_parts * cut.long_tiles;  // from 3/8 of a long part up to 11/8
  cut.short_parts = rest > cut.long_tiles ? 2 : 1;
  cut.short_tiles = blocks_of(rest, 2 * cut.short_parts) * 2;
  return cut;
}

// Of partial results, for all requests of a batch, whatever their lengths: of a row block each. A request has at most as many as long
// parts fit into its longest possible length, and one more for each row block.
inline int64_t max_partials(const Lengths& lengths, Shape shape) {
  const int32_t len = schedule::max_len_of(lengths);
  const int64_t row_blocks = schedule::max_items(lengths, shape);
  const bool ragged = lengths.cu_seqlens_q != nullptr;
  const int32_t of_each = ragged || row_blocks == 0 ? 1 : schedule::row_blocks_of(lengths, shape, lengths.s_q);
  if (len <= (of_each < kPartsOfShort ? kPartTokens / 2 * (of_each + 1) : int64_t{kPartTokens} * of_each)) return 0;
  int64_t parts = clamp<int64_t>(blocks_of(len, kPartTokens), 1, kMaxParts);
  while (kPartTokensSquaredPerToken * (parts - 1) * (parts - 1) >= len) --parts;
  const int64_t of_several = clamp(blocks_of(len, kPartTokens / 2), 0, kPartsOfShort);  // row blocks
  if ((ragged || of_each > 1) && parts < of_several) parts = of_several;
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

enum Kind { kLong, kShort, kNumKinds };
MLA_HD int32_t count_of(const Cut& cut, int kind) { return kind == kLong ? cut.long_parts : cut.short_parts; }
MLA_HD int32_t tiles_of(const Cut& cut, int kind) { return kind == kLong ? cut.long_tiles : cut.short_tiles; }

// Tiles of an item's largest part.
MLA_HD int32_t largest_of(const Cut& cut) { return cut.long_parts > 0 ? cut.long_tiles : cut.short_tiles; }

// Parts are dealt by classes of size: those that are as large as the largest of the batch, then the others, a seventh of it each. In a class
// they come as requests do.
constexpr int kNumClasses = 8;
MLA_HD int32_t class_of(int32_t tiles, int32_t largest) {
  return tiles == largest ? 0 : 1 + quotient_of_units((largest - tiles) * (kNumClasses - 1), largest);
}

// What the group size is chosen by.
MLA_HD int32_t item_units(const Cut& cut, Shape shape) {
  return cut.tiles + cut.parts() * blocks_of(kPartOverheadTokens, shape.block_n);
}

// Of so many parts, of which `top` are of the first class. A round is one part for each group: in even rounds from the first group to the
// last, in odd ones back. Only parts of the first class, which are equal, change places: each group gets as many of them as in the rounds,
// but neighbours, which are parts of one item and share Q.
struct Deal {
  int32_t parts, top, num_groups;

  struct Place {
    int32_t group, index;  // of the group's parts
  };
  MLA_HD int32_t group_of_column(int32_t round, int32_t column) const {
    return round % 2 == 0 ? column : num_groups - 1 - column;
  }
  // Of the part that is number `position` by size.
  MLA_HD Place place_of(int32_t position) const {
    const bool is_top = position < top;
    const int32_t of_each = quotient(is_top ? top : position, num_groups);
    if (!is_top) return {group_of_column(of_each, position - of_each * num_groups), of_each};
    const int32_t with_more = top - of_each * num_groups, in_these = with_more * (of_each + 1);
    const bool has_more = position < in_these;
    const int32_t from = has_more ? position : position - in_these, share = has_more ? of_each + 1 : of_each;
    const int32_t column = quotient(from, share);
    return {group_of_column(of_each, has_more ? column : with_more + column), from - column * share};
  }
  // Of group `g`, in a list of all groups' parts.
  MLA_HD int32_t first_of_group(int32_t g) const {
    const int32_t rounds = quotient(parts, num_groups), rest = parts - rounds * num_groups;
    const int32_t with_more = rounds % 2 == 0 ? g : g - (num_groups - rest);
    return g * rounds + clamp(with_more, 0, rest);
  }
};

// As schedule::is_small. What is small here keeps the planner's own in shared memory, too.
constexpr int kSmallBatch = 2048;
inline bool is_small(const Lengths& lengths, Shape shape, int32_t num_workers) {
  const int64_t overheads = (kMaxParts + 1) * blocks_of(kPartOverheadTokens, shape.block_n);
  return lengths.num_requests <= kSmallBatch && schedule::units_are_few(lengths, shape, num_workers, overheads);
}

// What the planner keeps of each request, in shared memory or behind the splits; [num_requests] each.
enum Kept { kFirstPart, kFirstSlot, kFirstPosition, kNumKept = kFirstPosition + kNumKinds };  // positions: of each kind
struct Memory {
  int32_t num_requests;
  int32_t* kept;
  MLA_HD int32_t* of(int which) const { return kept + int64_t{which} * num_requests; }
};
inline int64_t plan_bytes(const Lengths& lengths, Shape shape, int32_t num_workers) {
  return schedule::splits_at(max_pieces(lengths, shape), num_workers) +
         schedule::max_items(lengths, shape) * static_cast<int64_t>(sizeof(SplitItem)) +
         int64_t{lengths.num_requests} * kNumKept * static_cast<int64_t>(sizeof(int32_t));
}
MLA_HD SplitItem* splits_of(const schedule::PlanView& plan, const Limits& limits) {  // [limits.items]
  return reinterpret_cast<SplitItem*>(plan.pieces + limits.pieces);
}

// ---- pieces ----

struct Part {
  int32_t request, bundle;
  int32_t number;  // of the item's parts
  Request info;
  Cut cut;
};
// In the order of requests, bundles and tokens.
MLA_HD Part part_at(const Lengths& lengths, Shape shape, const Memory& m, int32_t part_number) {
  Part part;
  part.request = schedule::last_not_above(m.of(kFirstPart), m.num_requests, part_number);
  part.info = schedule::request_at(lengths, shape, part.request);
  part.cut = make_cut(part.info, shape);
  const int32_t before = part_number - m.of(kFirstPart)[part.request];
  part.bundle = quotient(before, part.cut.parts());
  part.number = before - part.bundle * part.cut.parts();
  return part;
}
MLA_HD int32_t position_of(const Part& part, const Memory& m) {
  const int32_t of_short = part.number - part.cut.long_parts;
  const int kind = of_short < 0 ? kLong : kShort;
  return m.of(kFirstPosition + kind)[part.request] + part.bundle * count_of(part.cut, kind) +
         (of_short < 0 ? part.number : of_short);
}
MLA_HD int32_t members_of(const Part& part, int32_t group_size) {
  const int32_t left = part.info.row_blocks - part.bundle * group_size;
  return left < group_size ? left : group_size;
}
// The first slot of the part's item; those of a part are neighbours, and so are the parts of an item.
MLA_HD int32_t slot_of_item(const Part& part, const Memory& m, int32_t group_size) {
  return m.of(kFirstSlot)[part.request] + part.cut.parts() * part.bundle * group_size;
}
MLA_HD Piece make_piece(const Part& part, const Memory& m, Shape shape, int32_t group_size) {
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
MLA_HD SplitItem make_split(const Part& part, const Memory& m, Shape shape, int32_t group_size) {
  const int32_t slot = slot_of_item(part, m, group_size), step = members_of(part, group_size);
  return {part.request,         part.info.first_token,
          part.info.num_tokens, part.bundle * group_size * shape.block_rows,
          part.cut.parts(),     slot,
          slot + step,          step};
}

}  // namespace mla::parts
