// kernels/variants.inc as seen by the host.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace mla {

enum class Dtype { bf16, fp16 };
constexpr Dtype kDtypes[] = {Dtype::bf16, Dtype::fp16};

// As torch calls them. Throws std::out_of_range.
Dtype find_dtype(std::string_view name);
constexpr std::string_view name_of(Dtype dtype) { return dtype == Dtype::bf16 ? "bfloat16" : "float16"; }

struct Variant {
  std::string_view name, pipeline;
  bool bf16, fp16;
  int d_qk, d_v;
  int block_rows, block_n, stages, warps;
  int smem_bytes;
  int page_multiple;
  std::string_view targets;
  int smem_limit;  // bytes that a block may have on the smallest GPU that the image is for
  int min_sm;      // of the GPUs that it runs on, as 80
  bool exact_sm;   // it runs on that architecture only
};

// Its kernels fetch boxes of the cache by tensor maps, as all do that no GPU before 9.0 runs.
constexpr bool fetches_boxes(const Variant& variant) { return variant.min_sm >= 90; }

// Its kernels may start beside the planner, as they wait for it by themselves before they read the plan.
constexpr bool waits_for_plan(const Variant& variant) { return variant.min_sm >= 90; }

// Its workers merge pairs (PlanWorker); what others split, the combine kernel merges.
constexpr bool merges_pairs(const Variant& variant) {
  return variant.pipeline == "sm90_3wg" || variant.pipeline == "sm90_swap";
}

// In the table's order; the host variant has zeros for the tile.
extern const Variant kVariants[];
extern const size_t kNumVariants;

// A variant that has an image. Throws std::out_of_range.
const Variant& find_variant(std::string_view name);

// Names of entry points.
const std::string& decode_entry(const Variant& variant, Dtype dtype);
const std::string& combine_entry(const Variant& variant, Dtype dtype, bool few_tasks);
constexpr const char* kPlanEntries[2][2] = {{"mla_plan_large", "mla_plan_large_ragged"},
                                            {"mla_plan_small", "mla_plan_small_ragged"}};  // [is_small][ragged]
constexpr const char* kPlanOfFewEntries[2] = {"mla_plan_few", "mla_plan_few_ragged"};
constexpr const char* kPlanPartsEntries[2] = {"mla_plan_parts_large", "mla_plan_parts_small"};

}  // namespace mla
