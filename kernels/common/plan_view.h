// The parts of a plan in memory, for those who follow it.
#pragma once

#include "../params.h"

#ifdef __CUDACC__
#define MLA_HD __host__ __device__ __forceinline__
#define MLA_ROLLED _Pragma("unroll 1")
#else
#define MLA_HD inline
#define MLA_ROLLED
#endif

namespace mla::schedule {

struct PlanView {
  PlanHeader* header;
  PlanWorker* workers;  // [num_workers]
  Piece* pieces;        // [max_pieces]
};
MLA_HD PlanView view(const PlanHeader* plan, int32_t num_workers) {
  PlanHeader* header = const_cast<PlanHeader*>(plan);
  PlanWorker* workers = reinterpret_cast<PlanWorker*>(header + 1);
  return {header, workers, reinterpret_cast<Piece*>(workers + num_workers)};
}
MLA_HD const SplitItem* splits_of(const PlanHeader* plan) {  // [num_splits], behind the pieces
  return reinterpret_cast<const SplitItem*>(reinterpret_cast<const char*>(plan) + plan->splits_at);
}
MLA_HD int64_t splits_at(int64_t max_pieces, int32_t num_workers) {
  return static_cast<int64_t>(sizeof(PlanHeader)) + num_workers * static_cast<int64_t>(sizeof(PlanWorker)) +
         max_pieces * static_cast<int64_t>(sizeof(Piece));
}

}  // namespace mla::schedule
