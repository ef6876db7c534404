// The parts of a plan in memory, for those who follow it.
#pragma once

#include "../params.h"

#ifdef __CUDACC__
#define MLA_HD __host__ __device__ __forceinline__
#else
#define MLA_HD inline
#endif

namespace mla::schedule {

struct PlanView {
  PlanHeader* header;
  PlanWorker* workers;  // [num_workers]
  int32_t*
      left;  // [flags_of(num_workers)], by slot: 1 from when a pair's first partial result is there until it was read
  Piece* pieces;  // [max_pieces]
};
MLA_HD int64_t flags_of(int64_t num_workers) {  // as many as partial results, in whole 16 bytes
  return (2 * num_workers + 3) / 4 * 4;
}
MLA_HD PlanView view(const PlanHeader* plan, int32_t num_workers) {
  PlanHeader* header = const_cast<PlanHeader*>(plan);
  PlanWorker* workers = reinterpret_cast<PlanWorker*>(header + 1);
  int32_t* left = reinterpret_cast<int32_t*>(workers + num_workers);
  return {header, workers, left, reinterpret_cast<Piece*>(left + flags_of(num_workers))};
}
MLA_HD const SplitItem* splits_of(const PlanHeader* plan) {  // [num_splits], behind the pieces
  return reinterpret_cast<const SplitItem*>(reinterpret_cast<uintptr_t>(plan) + plan->splits_at);
}
MLA_HD int64_t splits_at(int64_t max_pieces, int32_t num_workers) {
  return static_cast<int64_t>(sizeof(PlanHeader)) + num_workers * static_cast<int64_t>(sizeof(PlanWorker)) +
         flags_of(num_workers) * static_cast<int64_t>(sizeof(int32_t)) +
         max_pieces * static_cast<int64_t>(sizeof(Piece));
}

}  // namespace mla::schedule
