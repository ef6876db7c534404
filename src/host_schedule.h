// The schedules of kernels/common/schedule.h and parts.h, made on the host as kernels/common/plan.cu and plan_parts.cu
// make them on the device: what the tests check, and what explains a plan to a person.
#pragma once

#include <cstdint>
#include <vector>

#include "common/schedule.h"

namespace mla {

// What one worker computes of one row block: KV tokens [first_token, last_token).
struct WorkerPiece {
  int32_t worker, request, row_block;
  int32_t first_token, last_token;
  bool starts, ends;  // it holds the row block's first token, its last token
  int32_t slot;       // of its partial result; -1 when it both starts and ends, and is final
};

// An item in several pieces, and the slots of their partial results, of member 0, in the order of the tokens.
struct Split {
  int32_t request, bundle;
  std::vector<int32_t> slots;
};

struct HostSchedule {
  PlanHeader header;
  std::vector<WorkerPiece> pieces;  // worker by worker, in the order of the work
  std::vector<Split> splits;        // that the combine kernel merges
  std::vector<int32_t> pairs;       // PlanWorker::pairs of each worker
};

// The pointers of `lengths` are to host memory. num_workers, h_q and the shape are positive. Throws
// std::invalid_argument when cu_seqlens_q makes more pieces than a plan has room for, as values that fall can.
HostSchedule make_host_schedule(const Lengths& lengths, schedule::Shape shape, int32_t num_workers,
                                bool batch_invariant);

}  // namespace mla
