#include "bind_calls.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "driver.h"
#include "entry.h"
#include "planned.h"
#include "prepared.h"
#include "queue.h"
#include "settings.h"
#include "workspace.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mla {
namespace {

using Any = nb::typed<nb::object, nb::any>;

}  // namespace

void bind_calls(nb::module_& m) {
  m.attr("VARIANT_VARIABLE") = kVariantVariable;
  m.attr("LOG_VARIABLE") = kLogVariable;
  m.attr("VALIDATE_VARIABLE") = kValidateVariable;
  m.def("forced_variant", [] { return read_settings().forced_variant; }, "MLA_VARIANT; empty when it is not set.");
  m.def("logs_dispatch", [] { return read_settings().logs_dispatch; }, "Whether MLA_LOG asks for it.");
  m.def("validates", [] { return read_settings().validates; }, "Whether MLA_VALIDATE asks for it.");

  nb::class_<PlannedSchedule>(m, "Schedule", "A schedule in device memory: what launches need to know of a plan.")
      .def(
          "__init__",
          [](PlannedSchedule* self, std::string_view variant, std::string_view dtype, int32_t page_size,
             const DecodeParams& sizes, int device) {
            new (self) PlannedSchedule(find_variant(variant), find_dtype(dtype), page_size, sizes, device);
          },
          "variant"_a, "dtype"_a, "page_size"_a, "sizes"_a, "device"_a,
          "`sizes` has what a schedule depends on but the lengths, and the address of the schedule.")
      .def("update", &PlannedSchedule::update, "seq_lens"_a.none(), "cu_seqlens_q"_a.none(),
           "Queues the schedule of other lengths if the tensors are like those that were checked last.")
      .def("update_checked", &PlannedSchedule::update_checked, "seq_lens"_a, "cu_seqlens_q"_a.none(),
           "The same with tensors that were checked.");

  m.def("make_entry", &make_entry, "function"_a, "context_variant"_a, "doc"_a,
        "mla.decode in C: what was prepared is done at once, and `function` is called for all else. `context_variant` "
        "returns the name in force or None; `doc` begins with the signature.");
  m.def(
      "decode_first",
      [](nb::handle q, nb::handle kv_cache, nb::handle block_table, nb::handle seq_lens, nb::handle cu_seqlens_q,
         nb::handle out, nb::handle lse, nb::handle workspace, nb::handle plan, nb::handle scale, nb::handle causal,
         nb::handle d_v, nb::handle return_lse, nb::handle batch_invariant, nb::handle max_seq_len,
         std::string_view forced, std::string_view variant, std::string_view dtype, int device,
         const DecodeParams& sizes, nb::handle chooser) -> Any {
        const Arguments arguments{q,          kv_cache,        block_table, seq_lens, cu_seqlens_q,   out,
                                  lse,        workspace,       plan,        scale,    causal,         d_v,
                                  return_lse, batch_invariant, max_seq_len, forced,   read_settings()};
        return Any(decode_first(arguments, find_variant(variant), find_dtype(dtype), device, sizes, chooser));
      },
      "q"_a.none(), "kv_cache"_a.none(), "block_table"_a.none(), "seq_lens"_a.none(), "cu_seqlens_q"_a.none(),
      "out"_a.none(), "lse"_a.none(), "workspace"_a.none(), "plan"_a.none(), "scale"_a.none(), "causal"_a.none(),
      "d_v"_a.none(), "return_lse"_a.none(), "batch_invariant"_a.none(), "max_seq_len"_a.none(), "forced"_a,
      "variant"_a, "dtype"_a, "device"_a, "sizes"_a, "chooser"_a.none(),
      "Does a call that was checked, and prepares for others like it; what mla.decode returns.");

  m.def(
      "address_range",
      [](nb::handle tensor) {
        TensorView view;
        int64_t words[kMaxTensorWords];
        torch::read_any(tensor, view, words);
        return std::make_pair(view.data, view.data + reach_of(view));
      },
      "tensor"_a, "The addresses of its first byte and behind its last; the same where it has none.");
  m.def("rounded_length", &rounded_length, "length"_a, "What the choice of a variant goes by for a length at most.");
  m.def("capturing", &capturing, "device"_a, "stream"_a, "Whether a stream is being captured into a graph.");
  m.def("workspaces", &kept_workspaces, "(device, stream, bytes) of each workspace that is kept.");
  m.def("num_prepared", &num_prepared, "How many calls are prepared.");
  m.def(
      "forget",
      [] {
        forget_calls();
        drop_workspaces();
      },
      "Drops what was prepared and what is kept.");
  m.def("redirect", &redirect, "launch_plan"_a.none(), "launch_decode"_a.none(), "capturing"_a.none(),
        "For tests: prepared calls and schedules call these in place of the functions of the same names, until it is "
        "given None.");
  m.def("has_exchange_api", &torch::has_exchange_api, "Whether torch describes tensors in C, as recent ones do.");
  m.def("use_exchange_api", &torch::use_exchange_api, "wanted"_a,
        "False: tensors are described by their Python attributes instead.");
}

}  // namespace mla
