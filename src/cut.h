// What the schedule makes of requests of one length, in closed form: the choice of a variant reckons with it.
#pragma once

#include <cstdint>

namespace mla {

// Of the worker that has most, or of the mean one where cuts fall anywhere.
struct EqualCut {
  int32_t group_size;    // row blocks that read the same KV side by side
  int64_t kv_rows;       // read by groups
  int64_t query_rows;    // of all requests
  int32_t filled_rows;   // of a row block
  double longest;        // KV tokens of a worker's tiles
  double further_items;  // of a worker
  bool long_items;       // whether an item has more than one tile
  double further_parts;  // of an item
  double partial_rows;   // 0 if nothing is split
  double busy;           // share of the workers that have work
};

// Of requests with `rows` query rows and `length` KV tokens, for num_workers > 0.
EqualCut cut_equal(int64_t num_requests, int64_t rows, int64_t length, int32_t block_rows, int32_t block_n,
                   int32_t num_workers);

}  // namespace mla
