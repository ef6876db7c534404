// The launches of one decode call. All are asynchronous, allocate nothing and may be captured in a graph.
#pragma once

#include <cstdint>

#include "common/plan_sizes.h"
#include "registry.h"

namespace mla {

inline schedule::Shape shape_of(const Variant& variant) {
  return {variant.block_rows, variant.block_n, merges_pairs(variant)};
}

// Writes the schedule for params.lengths, params.num_workers and params.batch_invariant to params.plan.
void launch_plan(const Variant& variant, const DecodeParams& params, int device, uintptr_t stream);

// Decodes by the schedule at params.plan, which it writes first if `plans`: the variant's kernel, beside the planner if it can, then
// the combination of what it split, unless there is no room for partial results (o_partial is null, as partial_slots is 0). `captured`:
// whether the stream is, which the caller knows.
void launch_decode(const Variant& variant, Dtype dtype, const DecodeParams& params, bool plans, int device,
                   uintptr_t stream, bool captured);

// Does now what the first launches on this device would do: load the images and move them into the context.
void preload(const Variant& variant, int device);

// Of the plan that launch_plan would write, and of the partial results that it may refer to. No pointer is followed.
int64_t plan_bytes(const Variant& variant, const DecodeParams& params);
int64_t partial_slots(const Variant& variant, const DecodeParams& params);
struct PartialBytes {
  int64_t o, lse2;  // of o_partial and lse2_partial
};
PartialBytes partial_bytes(const Variant& variant, const DecodeParams& params);

}  // namespace mla
