// A plan on the host, in the parts that those who follow it read.
#pragma once

#include <vector>

#include "common/plan_sizes.h"

namespace mla {

struct HostPlan {
  PlanHeader header{};
  std::vector<PlanWorker> workers;
  std::vector<SplitItem> splits;
  std::vector<Piece> pieces;  // [max_pieces]
};

// As kernels/common/plan_parts.cu.
HostPlan make_plan_of_parts(const Lengths& lengths, schedule::Shape shape, int32_t num_workers);

}  // namespace mla
