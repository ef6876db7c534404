#include "launch.h"

#include <stdexcept>

#include "common/parts.h"
#include "launch_kernel.h"
#include "tensor_map.h"

namespace mla {
namespace {

const Kernel& plan_kernel(bool batch_invariant, int device) {
  return batch_invariant ? get_kernel("plan_parts", kPlanPartsEntry, device, Occupancy::any)
                         : get_kernel("plan", kPlanEntry, device, Occupancy::any);
}

const Kernel& decode_kernel(const Variant& variant, Dtype dtype, int device) {
  return get_kernel(variant.name, decode_entry(variant, dtype), device, Occupancy::one_block_per_sm,
                    variant.smem_bytes);
}

// Programmatic dependent launch: a kernel may start while the one before still runs, and waits for its results by itself.
bool overlaps_launches(int device) { return compute_capability(device) >= 90; }

const Kernel& combine_kernel(const Variant& variant, Dtype dtype, int device, bool overlaps) {
  return get_kernel(overlaps ? "combine_sm90" : "combine_sm80", combine_entry(variant, dtype), device, Occupancy::any);
}

}  // namespace

void launch_plan(const Variant& variant, const DecodeParams& params, int device, uintptr_t stream) {
  const ContextGuard guard(device);
  launch_kernel(plan_kernel(params.batch_invariant, device), 1, kPlanThreads, stream, Start::after_kernel_before,
                params.lengths, shape_of(variant), params.num_workers, const_cast<PlanHeader*>(params.plan));
}

void launch_decode(const Variant& variant, Dtype dtype, const DecodeParams& given, int device, uintptr_t stream) {
  if (given.page_size < 1 || given.lengths.h_q < 1) throw std::invalid_argument("page_size and h_q must be positive");
  const ContextGuard guard(device);
  DecodeParams params = given;
  params.by_page_size = make_fast_divisor(params.page_size);
  params.by_h_q = make_fast_divisor(params.lengths.h_q);
  if (fetches_boxes(variant)) add_tensor_maps(variant, dtype, params);
  const unsigned workers = static_cast<unsigned>(params.num_workers);
  launch_kernel(decode_kernel(variant, dtype, device), workers, 32 * static_cast<unsigned>(variant.warps), stream,
                Start::after_kernel_before, params);
  const bool overlaps = overlaps_launches(device);
  launch_kernel(combine_kernel(variant, dtype, device, overlaps), kCombineCtasPerWorker * workers, kCombineThreads,
                stream, overlaps ? Start::beside_kernel_before : Start::after_kernel_before, params, shape_of(variant));
}

void preload(const Variant& variant, int device) {
  const ContextGuard guard(device);
  for (const bool batch_invariant : {false, true}) load_now(plan_kernel(batch_invariant, device));
  for (const Dtype dtype : kDtypes) {
    if (!(dtype == Dtype::bf16 ? variant.bf16 : variant.fp16)) continue;
    load_now(decode_kernel(variant, dtype, device));
    load_now(combine_kernel(variant, dtype, device, overlaps_launches(device)));
  }
}

int64_t plan_bytes(const Variant& variant, const DecodeParams& params) {
  return params.batch_invariant ? parts::plan_bytes(params.lengths, shape_of(variant), params.num_workers)
                                : schedule::plan_bytes(params.lengths, shape_of(variant), params.num_workers);
}

int64_t partial_slots(const Variant& variant, const DecodeParams& params) {
  return params.batch_invariant ? parts::max_partials(params.lengths, shape_of(variant))
                                : schedule::partial_slots(params.num_workers);
}

}  // namespace mla
