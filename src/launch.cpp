#include "launch.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "chain.h"
#include "common/parts.h"
#include "tensor_map.h"

namespace mla {
namespace {

// An entry point of the two images that differ in whether they have the instructions for it. Looked up by its name once for a device;
// then by the name's address.
const Kernel& common_kernel(const char* name, const char* entry, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, const char*>, const Kernel*> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const Kernel*& kernel = all[{device, entry}];
  if (!kernel) {
    const std::string image = std::string(name) + (overlaps_launches(device) ? "_sm90" : "_sm80");
    kernel = &get_kernel(image, entry, device, Occupancy::any);
  }
  return *kernel;
}
const Kernel& plan_kernel(bool small, bool ragged, int device) {
  return common_kernel("plan", kPlanEntries[small][ragged], device);
}
const Kernel& plan_kernel_of_few(bool ragged, int device) {
  return common_kernel("plan", kPlanOfFewEntries[ragged], device);
}
const Kernel& plan_parts_kernel(bool small, int device) {
  return common_kernel("plan_parts", kPlanPartsEntries[small], device);
}

struct DecodeKernels {
  const Kernel *decode, *combine[2];  // [few tasks]
  Start decode_start, combine_start;  // the former behind the planner
};

// Looked up by their names once for a device, as each call needs them.
const DecodeKernels& decode_kernels(const Variant& variant, Dtype dtype, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const Variant*, Dtype>, DecodeKernels> all;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key(device, &variant, dtype);
  if (const auto found = all.find(key); found != all.end()) return found->second;
  const bool overlaps = overlaps_launches(device);
  return all
      .emplace(key, DecodeKernels{&get_kernel(variant.name, decode_entry(variant, dtype), device,
                                              Occupancy::one_block_per_sm, variant.smem_bytes),
                                  {&common_kernel("combine", combine_entry(variant, dtype, false).c_str(), device),
                                   &common_kernel("combine", combine_entry(variant, dtype, true).c_str(), device)},
                                  start_of(overlaps && waits_for_plan(variant)),
                                  start_of(overlaps)})
      .first->second;
}

// The form of the combine kernel, and its CTAs: as many as there can be tasks, or as are on the SMs at once.
struct CombineGrid {
  bool few_tasks;
  unsigned ctas;
};
CombineGrid combine_grid(const Variant& variant, const DecodeParams& params) {
  const int64_t row_tiles = schedule::max_items(params.lengths, {kFragmentRows, 0, 0});
  const int64_t tasks = row_tiles * (variant.d_v / kFragmentColumns);
  const int64_t few_ctas = int64_t{kFewCombineCtas} * params.num_workers;
  const bool few_tasks = tasks <= few_ctas * (kCombineThreads / 32);
  const int64_t most = few_tasks ? few_ctas : int64_t{kManyCombineCtas} * params.num_workers;
  return {few_tasks, static_cast<unsigned>(schedule::clamp<int64_t>(tasks, 1, most))};
}

// What the planner is launched with, until it is.
struct PlanArguments {
  schedule::Shape shape;
  parts::Limits limits;  // of a batch-invariant plan
};

// After all that came before, on which a decode kernel that starts beside it relies.
void add_plan(const Variant& variant, const DecodeParams& params, int device, PlanArguments& arguments, Chain& chain) {
  const Lengths& lengths = params.lengths;
  const schedule::Shape shape = arguments.shape = shape_of(variant);
  const auto add = [&](const Kernel& kernel, unsigned threads, const auto&... limits) {
    chain.add(make_launch(kernel, 1, threads, Start::after_kernel_before, lengths, arguments.shape, params.num_workers,
                          params.plan, limits...));
  };
  const bool ragged = lengths.cu_seqlens_q != nullptr;
  if (params.batch_invariant) {
    arguments.limits = parts::limits_of(lengths, shape);
    add(plan_parts_kernel(parts::is_small(lengths, shape, params.num_workers), device), kPlanThreads, arguments.limits);
  } else if (schedule::is_few(lengths, shape, params.num_workers)) {
    add(plan_kernel_of_few(ragged, device), kPlanThreadsOfFew);
  } else {
    add(plan_kernel(schedule::is_small(lengths, shape, params.num_workers), ragged, device), kPlanThreads);
  }
}

}  // namespace

void launch_plan(const Variant& variant, const DecodeParams& params, int device, uintptr_t stream) {
  const ContextGuard guard(device);
  PlanArguments arguments{};
  Chain chain;
  add_plan(variant, params, device, arguments, chain);
  queue_chain(chain, device, stream, captured(stream));
}

void launch_decode(const Variant& variant, Dtype dtype, const DecodeParams& given, bool plans, int device,
                   uintptr_t stream, bool captured) {
  if (given.page_size < 1 || given.lengths.h_q < 1) throw std::invalid_argument("page_size and h_q must be positive");
  const ContextGuard guard(device);
  DecodeParams params = given;
  params.by_page_size = make_fast_divisor(params.page_size);
  params.by_h_q = make_fast_divisor(params.lengths.h_q);
  if (fetches_boxes(variant)) add_tensor_maps(variant, dtype, params);
  PlanArguments arguments{};
  arguments.shape = shape_of(variant);
  Chain chain;
  if (plans) add_plan(variant, params, device, arguments, chain);
  const DecodeKernels& kernels = decode_kernels(variant, dtype, device);
  chain.add(make_launch(*kernels.decode, static_cast<unsigned>(params.num_workers),
                        32 * static_cast<unsigned>(variant.warps),
                        plans ? kernels.decode_start : Start::after_kernel_before, params));
  const CombineParams combined = combine_params(params);
  const CombineGrid grid = combine_grid(variant, params);
  if (params.o_partial)
    chain.add(make_launch(*kernels.combine[grid.few_tasks], grid.ctas, kCombineThreads, kernels.combine_start, combined,
                          arguments.shape));
  queue_chain(chain, device, stream, captured);
}

void preload(const Variant& variant, int device) {
  const ContextGuard guard(device);
  for (const bool ragged : {false, true}) load_now(plan_kernel_of_few(ragged, device));
  for (const bool small : {false, true}) {
    for (const bool ragged : {false, true}) load_now(plan_kernel(small, ragged, device));
    load_now(plan_parts_kernel(small, device));
  }
  for (const Dtype dtype : kDtypes) {
    if (!(dtype == Dtype::bf16 ? variant.bf16 : variant.fp16)) continue;
    const DecodeKernels& kernels = decode_kernels(variant, dtype, device);
    load_now(*kernels.decode);
    for (const Kernel* combine : kernels.combine) load_now(*combine);
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

PartialBytes partial_bytes(const Variant& variant, const DecodeParams& params) {
  const int64_t rows = partial_slots(variant, params) * variant.block_rows;
  return {rows * variant.d_v * kPartialBytes, rows * (1 + kColumnRuns) * static_cast<int64_t>(sizeof(float))};
}

}  // namespace mla
