#include "registry.h"

#include <array>
#include <iterator>
#include <stdexcept>

namespace mla {
namespace {

// The words of the `targets` column.
struct Targets {
  int smem_limit, min_sm;
  bool exact_sm;
};
constexpr Targets ampere_163k{163 * 1024, 80, false};
constexpr Targets ampere_99k{99 * 1024, 80, false};
constexpr Targets hopper{227 * 1024, 90, true};
constexpr Targets host{0, 0, false};

// The words of the `dtypes` column.
struct Dtypes {
  bool bf16, fp16;
};
constexpr Dtypes bf16_fp16{true, true};
constexpr Dtypes none{false, false};

constexpr Variant row(std::string_view name, std::string_view pipeline, Dtypes dtypes, int d_qk, int d_v,
                      int block_rows, int block_n, int stages, int warps, int smem, int page,
                      std::string_view targets_name, Targets targets) {
  return {name,           pipeline,        dtypes.bf16, dtypes.fp16, d_qk, d_v,          block_rows,
          block_n,        stages,          warps,       smem,        page, targets_name, targets.smem_limit,
          targets.min_sm, targets.exact_sm};
}

}  // namespace

#define MLA_VARIANT(pipeline, dtypes, d_qk, d_v, block_rows, block_n, stages, warps, smem, page, targets)         \
  row(#pipeline "_r" #block_rows "_n" #block_n "_s" #stages "_d" #d_qk, #pipeline, dtypes, d_qk, d_v, block_rows, \
      block_n, stages, warps, smem, page, #targets, targets),
#define MLA_HOST_VARIANT(name) row(#name, #name, none, 0, 0, 0, 0, 0, 0, 0, 1, "host", host),
constexpr Variant kVariants[] = {
#include "variants.inc"
};
#undef MLA_VARIANT
#undef MLA_HOST_VARIANT
constexpr size_t kNumVariants = std::size(kVariants);

namespace {

#define MLA_IMAGE(name, path) #name,
constexpr std::string_view kImageNames[] = {
#include "images.inc"
};
#undef MLA_IMAGE

constexpr bool has_image(const Variant& variant) { return variant.warps > 0; }

constexpr bool every_variant_has_its_image() {
  for (const Variant& variant : kVariants) {
    int found = 0;
    for (std::string_view image : kImageNames) found += image == variant.name;
    if (found != (has_image(variant) ? 1 : 0)) return false;
  }
  return true;
}
static_assert(every_variant_has_its_image(),
              "cmake/Variants.cmake and this file must derive the same names from the table");

constexpr bool names_are_unique() {
  for (size_t i = 0; i < kNumVariants; ++i)
    for (size_t j = 0; j < i; ++j)
      if (kVariants[i].name == kVariants[j].name) return false;
  return true;
}
static_assert(names_are_unique());

#define MLA_VARIANT(pipeline, dtypes, d_qk, d_v, block_rows, block_n, stages, warps, smem, page, targets) \
  static_assert((smem) <= targets.smem_limit, "more shared memory than a GPU of `" #targets "` has");     \
  static_assert((d_v) == 512 || (d_v) == 256, "kernels/common/combine.cu has entry points for these");    \
  static_assert((d_qk) >= (d_v) && (warps) > 0 && (warps) <= 32 && (block_rows) > 0 && (block_n) > 0 && (page) > 0);
#define MLA_HOST_VARIANT(name)
#include "variants.inc"
#undef MLA_VARIANT
#undef MLA_HOST_VARIANT

struct Entries {
  std::string decode, combine[2];  // [few_tasks]
};

// Made once, as they are looked up at each launch.
const Entries& entries_of(const Variant& variant, Dtype dtype) {
  using All = std::array<std::array<Entries, std::size(kDtypes)>, kNumVariants>;
  static const All all = [] {
    All made;
    for (size_t i = 0; i < kNumVariants; ++i)
      for (const Dtype of : kDtypes) {
        const std::string suffix = of == Dtype::bf16 ? "_bf16" : "_fp16";
        const std::string combine = "mla_combine" + suffix + "_v" + std::to_string(kVariants[i].d_v);
        made[i][static_cast<size_t>(of)] = {"mla_" + std::string(kVariants[i].name) + suffix,
                                            {combine + "_many", combine + "_few"}};
      }
    return made;
  }();
  return all[static_cast<size_t>(&variant - kVariants)][static_cast<size_t>(dtype)];
}

}  // namespace

Dtype find_dtype(std::string_view name) {
  for (const Dtype dtype : kDtypes)
    if (name_of(dtype) == name) return dtype;
  throw std::out_of_range("no kernel computes in " + std::string(name));
}

const Variant& find_variant(std::string_view name) {
  for (const Variant& variant : kVariants)
    if (variant.name == name && has_image(variant)) return variant;
  throw std::out_of_range("no GPU variant has the name " + std::string(name));
}

const std::string& decode_entry(const Variant& variant, Dtype dtype) { return entries_of(variant, dtype).decode; }

const std::string& combine_entry(const Variant& variant, Dtype dtype, bool few_tasks) {
  return entries_of(variant, dtype).combine[few_tasks];
}

}  // namespace mla
