// How long a variant should take: what python/mla/estimate.py puts into a model, reckoned with what the schedule makes of the sizes.
#pragma once

#include <cstdint>

#include "cut.h"

namespace mla {

// A variant on one GPU for one kind of problem: microseconds.
struct Model {
  int32_t block_rows, block_n;
  double start_us;
  double busy_us;        // where all workers have work, else less
  double each_us;        // an item, whatever it has
  double row_us;         // a query row of an item
  double tiles_us;       // an item of more than one tile
  double item_us;        // a further item of a worker
  double split_us;       // where items are split
  double pair_us;        // where items have two parts
  double part_us;        // a further part of an item
  double merge_us;       // a partial row
  double read_us;        // a KV row from memory
  double query_us;       // a query row, in and out
  double tile_row_us;    // a KV row in one worker, with one row block
  double shared_row_us;  // the same where row blocks share KV
};

struct Times {
  double memory_us, compute_us, rest_us;

  double total_us() const;
};

Times times_of(const Model& model, const EqualCut& cut);

// The time of two that run side by side: the longer one, and more where they are alike.
double overlapped(double a, double b);

}  // namespace mla
