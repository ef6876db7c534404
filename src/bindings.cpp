// The Python module mla._mla. Tensors do not cross: pointers, strides and streams come as integers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include "append.h"
#include "bind_calls.h"
#include "bind_choice.h"
#include "bind_params.h"
#include "driver.h"
#include "errors.h"
#include "host_schedule.h"
#include "images.h"
#include "launch.h"
#include "merge.h"
#include "registry.h"
#include "stream.h"
#include "workspace.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mla {
namespace {

nb::str to_str(std::string_view text) { return nb::str(text.data(), text.size()); }

// ---- What this build is ----

nb::typed<nb::dict, nb::str, nb::str> build_info() {
  nb::dict info;
  info["version"] = MLA_VERSION;
  info["nvcc"] = MLA_NVCC_VERSION;
  info["ptxas"] = MLA_PTXAS_VERSION;
  info["compiler"] = MLA_COMPILER_ORIGIN;
  info["min_driver"] = std::to_string(MLA_MIN_DRIVER);
  return info;
}

// A dict with values of many types.
using Record = nb::typed<nb::dict, nb::str, nb::any>;

Record describe(const Variant& variant) {
  nb::list dtypes;
  if (variant.bf16) dtypes.append(to_str(name_of(Dtype::bf16)));
  if (variant.fp16) dtypes.append(to_str(name_of(Dtype::fp16)));
  nb::dict row;
  row["name"] = to_str(variant.name);
  row["pipeline"] = to_str(variant.pipeline);
  row["dtypes"] = nb::tuple(dtypes);
  row["d_qk"] = variant.d_qk;
  row["d_v"] = variant.d_v;
  row["block_rows"] = variant.block_rows;
  row["block_n"] = variant.block_n;
  row["stages"] = variant.stages;
  row["warps"] = variant.warps;
  row["smem_bytes"] = variant.smem_bytes;
  row["page_multiple"] = variant.page_multiple;
  row["targets"] = to_str(variant.targets);
  row["smem_limit"] = variant.smem_limit;
  row["min_sm"] = variant.min_sm;
  row["exact_sm"] = variant.exact_sm;
  row["merges_pairs"] = merges_pairs(variant);
  return row;
}

nb::typed<nb::list, Record> variants() {
  nb::list rows;
  for (size_t i = 0; i < kNumVariants; ++i) rows.append(describe(kVariants[i]));
  return rows;
}

nb::typed<nb::dict, nb::str, size_t> images() {
  nb::dict sizes;
  for (size_t i = 0; i < kNumImages; ++i) sizes[to_str(kImages[i].name)] = kImages[i].size();
  return sizes;
}

nb::bytes image(std::string_view name) {
  const Image& found = find_image(name);
  return nb::bytes(found.begin, found.size());
}

// ---- The schedule ----

Record host_schedule(const std::vector<int32_t>& seq_lens, const std::optional<std::vector<int32_t>>& cu_seqlens_q,
                     int32_t s_q, int32_t total_q, int32_t h_q, int64_t max_len, int32_t block_rows, int32_t block_n,
                     bool merges_pairs, int32_t num_workers, bool batch_invariant) {
  if (cu_seqlens_q && cu_seqlens_q->size() != seq_lens.size() + 1)
    throw nb::value_error("cu_seqlens_q must have one element more than seq_lens");
  if (h_q < 1 || block_rows < 1 || block_n < 1 || num_workers < 1)
    throw nb::value_error("h_q, block_rows, block_n and num_workers must be positive");
  if (block_rows & (block_rows - 1) || block_n & (block_n - 1))
    throw nb::value_error("block_rows and block_n must be powers of two");
  Lengths lengths{};
  lengths.seq_lens = seq_lens.data();
  lengths.cu_seqlens_q = cu_seqlens_q ? cu_seqlens_q->data() : nullptr;
  lengths.num_requests = static_cast<int32_t>(seq_lens.size());
  lengths.s_q = s_q;
  lengths.total_q = total_q;
  lengths.h_q = h_q;
  lengths.max_len = max_len;
  const HostSchedule made =
      make_host_schedule(lengths, {block_rows, block_n, merges_pairs}, num_workers, batch_invariant);

  nb::list pieces, splits;
  for (const WorkerPiece& p : made.pieces)
    pieces.append(
        nb::make_tuple(p.worker, p.request, p.row_block, p.first_token, p.last_token, p.starts, p.ends, p.slot));
  for (const Split& s : made.splits) splits.append(nb::make_tuple(s.request, s.bundle, s.slots));
  nb::dict result;
  result["units_per_group"] = made.header.units_per_group;
  result["num_groups"] = made.header.num_groups;
  result["group_size"] = made.header.group_size;
  result["pieces"] = pieces;
  result["splits"] = splits;
  result["pairs"] = made.pairs;
  return result;
}

}  // namespace
}  // namespace mla

NB_MODULE(_mla, m) {
  using namespace mla;
  m.doc() = "Kernel images, their launches and the table of variants. Importing it does not touch the driver.";
  bind_errors(m);
  bind_params(m);
  bind_calls(m);
  bind_choice(m);

  m.attr("ITEM_OVERHEAD_TOKENS") = schedule::kItemOverheadTokens;
  m.attr("SHORT_TOKENS") = schedule::kShortTokens;
  m.attr("MEDIUM_TOKENS") = schedule::kMediumTokens;
  m.attr("LOW_ROWS") = schedule::kLowRows;
  m.attr("MIN_GROUP_TOKENS_OF_SHORT") = schedule::kMinGroupTokensOfShort;
  m.attr("MIN_GROUP_TOKENS") = schedule::kMinGroupTokens;
  m.attr("MIN_GROUP_TOKENS_OF_LONG") = schedule::kMinGroupTokensOfLong;
  m.attr("MAX_GROUP_SIZE") = schedule::kMaxGroupSize;
  m.attr("ALIGNMENT_SHARE") = schedule::kAlignmentShare;
  m.attr("MIN_BOX_ROWS") = kMinBoxRows;
  m.attr("MAX_LEN") = schedule::kMaxLen;
  m.attr("SCHEDULE_ALIGNMENT") = kScheduleAlignment;

  m.def("build_info", &build_info,
        "Version of the package, of nvcc and of ptxas, where they came from, and the oldest driver that loads the "
        "images.");
  m.def("variants", &variants, "The rows of kernels/variants.inc, in order.");
  m.def("images", &images, "Names and sizes in bytes of the embedded kernel images.");
  m.def("image", &image, "name"_a,
        "The bytes of an embedded image, a fatbin. IndexError when there is none of that name.");

  m.def("driver_problem", &driver_problem, "Why nothing can be launched here; empty when something can.");
  m.def("driver_version", &driver_version, "The CUDA version that the driver supports, as 12020; 0 without a driver.");

  m.def(
      "plan_bytes",
      [](std::string_view variant, const DecodeParams& params) { return plan_bytes(find_variant(variant), params); },
      "variant"_a, "params"_a, "Size of the plan that launch_plan would write. No pointer is followed.");
  m.def(
      "partial_slots",
      [](std::string_view variant, const DecodeParams& params) { return partial_slots(find_variant(variant), params); },
      "variant"_a, "params"_a, "How many partial results o_partial and lse2_partial must have room for.");
  m.def(
      "partial_bytes",
      [](std::string_view variant, const DecodeParams& params) {
        const PartialBytes bytes = partial_bytes(find_variant(variant), params);
        return std::make_pair(bytes.o, bytes.lse2);
      },
      "variant"_a, "params"_a, "Sizes of o_partial and lse2_partial.");
  m.def("schedule", &host_schedule, "seq_lens"_a, "cu_seqlens_q"_a.none(), "s_q"_a, "total_q"_a, "h_q"_a, "max_len"_a,
        "block_rows"_a, "block_n"_a, "merges_pairs"_a, "num_workers"_a, "batch_invariant"_a = false,
        "The schedule that launch_plan would write, made on the host, with the pieces that it gives each worker.");

  m.def(
      "preload", [](int device, std::string_view variant) { preload(find_variant(variant), device); }, "device"_a,
      "variant"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Loads what this variant launches, which the first launch would do otherwise.");
  m.def(
      "launch_plan",
      [](std::string_view variant, const DecodeParams& params, int device, uintptr_t stream) {
        launch_plan(find_variant(variant), params, device, stream);
      },
      "variant"_a, "params"_a, "device"_a, "stream"_a,
      "Writes the schedule for params' lengths, num_workers and batch_invariant to params.plan.");
  m.def(
      "launch_decode",
      [](std::string_view variant, std::string_view dtype, const DecodeParams& params, bool plans, int device,
         uintptr_t stream) {
        const Variant& row = find_variant(variant);
        const Dtype type = find_dtype(dtype);
        const ContextGuard guard(device);
        launch_decode(row, type, params, plans, device, stream, captured(stream));
      },
      "variant"_a, "dtype"_a, "params"_a, "plans"_a, "device"_a, "stream"_a,
      "Runs the variant's kernel by params.plan, which it writes first if `plans`, then combines what was split.");
  m.def("launch_append", &launch_append, "dtype"_a, "addresses"_a, "strides"_a, "sizes"_a, "interleaved"_a, "device"_a,
        "stream"_a,
        "Writes rows of new tokens into a paged cache. What stands where: AppendAddresses, AppendStrides and "
        "AppendSizes of src/append.h.");
  m.def("launch_stream", &launch_stream, "address"_a, "bytes"_a, "sum"_a, "ctas"_a, "device"_a, "stream"_a,
        "Reads memory once, as benchmarks' floor, and adds its 32-bit words by exclusive or to the one at `sum`.");
  m.def("launch_empty", &launch_empty, "beside"_a, "device"_a, "stream"_a,
        "Launches a kernel that does nothing, beside the kernel before or behind it.");
  m.def("queue_empty", &queue_empty, "launches"_a, "device"_a, "stream"_a,
        "Queues 1 to 3 of them as mla.decode queues its launches, with other parameters than before.");
  m.def("launch_merge", &launch_merge, "dtype"_a, "addresses"_a, "strides"_a, "sizes"_a, "d"_a, "device"_a, "stream"_a,
        "Merges two attention states: o_a, o_b, out, then lse_a, lse_b, lse. Rows of `d` columns in three dimensions.");
}
