// What follows from a batch's sizes alone: how much room its plan takes, and which planner of the device makes it.
#pragma once

#include "schedule.h"

namespace mla::schedule {

// The piece of item i that group g computes has number i + g, so that all pieces can be written independently: an item's first one
// from the item, the others from the groups that begin inside it. Where a group begins with an item, one number is unused.
MLA_HD int64_t max_items(const Lengths& lengths, Shape shape) {
  return lengths.cu_seqlens_q
             ? blocks_of(int64_t{lengths.total_q} * lengths.h_q, shape.block_rows) + lengths.num_requests
             : int64_t{lengths.num_requests} * blocks_of(int64_t{lengths.s_q} * lengths.h_q, shape.block_rows);
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

// The device plans small batches with units of 32 bits, as it has no 64-bit division, and searches them in shared memory. Of a few requests
// each of its warps finds all sums by itself.
constexpr int kSmallBatch = 4096, kFewRequests = 128;
// Whether 32 bits hold them, and quotient_of_units() their quotients, if an item has `overhead` of them beside its tiles: whatever is
// divided are items, the tiles of one, or all units among the groups.
inline bool units_are_few(const Lengths& lengths, Shape shape, int32_t num_workers, int64_t overhead) {
  const int32_t tokens = lengths.cu_seqlens_q ? lengths.total_q : lengths.s_q;
  const int64_t items = int64_t{lengths.num_requests} * row_blocks_of(lengths, shape, tokens);
  const int64_t units = overhead + item_tiles(max_len_of(lengths), shape);  // of an item
  const int64_t groups = clamp(num_workers / kMaxGroupSize, 1, 128);
  return items <= kMaxQuotient && units <= kMaxQuotient && items * units <= kMaxQuotient * groups;
}
inline bool is_small(const Lengths& lengths, Shape shape, int32_t num_workers) {
  return lengths.num_requests <= kSmallBatch && units_are_few(lengths, shape, num_workers, overhead_units(shape));
}
inline bool is_few(const Lengths& lengths, Shape shape, int32_t num_workers) {
  return lengths.num_requests <= kFewRequests && max_items(lengths, shape) > 0 && is_small(lengths, shape, num_workers);
}

}  // namespace mla::schedule
