#include "bind_choice.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string_view>
#include <tuple>

#include "chooser.h"
#include "cut.h"
#include "model.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mla {
namespace {

// The structs as Python's tuples of their fields.
using CutFields = std::tuple<int32_t, int64_t, int64_t, int32_t, double, double, bool, double, double, double>;
using ModelFields = std::tuple<int32_t, int32_t, double, double, double, double, double, double, double, double, double,
                               double, double, double, double, double>;

template <class Struct, class Fields>
Struct from_fields(const Fields& fields) {
  return std::apply([](const auto&... values) { return Struct{values...}; }, fields);
}

CutFields cut(int64_t b, int64_t rows, int64_t length, int32_t block_rows, int32_t block_n, int32_t num_workers) {
  const EqualCut c = cut_equal(b, rows, length, block_rows, block_n, num_workers);
  return {c.group_size,    c.kv_rows,    c.query_rows,    c.filled_rows,  c.longest,
          c.further_items, c.long_items, c.further_parts, c.partial_rows, c.busy};
}

std::tuple<double, double, double> times(const ModelFields& model, const CutFields& cut) {
  const Times found = times_of(from_fields<Model>(model), from_fields<EqualCut>(cut));
  return {found.memory_us, found.compute_us, found.rest_us};
}

}  // namespace

void bind_choice(nb::module_& m) {
  m.def("cut", &cut, "b"_a, "rows"_a, "length"_a, "block_rows"_a, "block_n"_a, "num_workers"_a,
        "What a schedule is for requests of one length: the fields of EqualCut in src/cut.h.");
  m.def("times", &times, "model"_a, "cut"_a,
        "Microseconds for memory, for tiles, and for the rest, by the fields of Model in src/model.h.");
  m.def("overlapped", &overlapped, "a"_a, "b"_a,
        "The time of two that run side by side: the longer one, and more where they are alike.");
  m.def("likely_len", &likely_len, "max_len"_a, "page_size"_a, "max_seq_len"_a,
        "KV tokens that a request counts with where lengths are not known. A max_seq_len below 0 stands for none.");
  nb::class_<Chooser>(m, "Chooser", "Chooses among the variants that can run a kind of problem.")
      .def(
          "__init__",
          [](Chooser* self, const std::vector<std::string>& names, const std::vector<ModelFields>& models,
             int32_t num_workers) {
            std::vector<Model> read;
            for (const ModelFields& model : models) read.push_back(from_fields<Model>(model));
            new (self) Chooser(names, read, num_workers);
          },
          "names"_a, "models"_a, "num_workers"_a, "Of equals the first is chosen.")
      .def(
          "fastest",
          [](const Chooser& self, int64_t b, int64_t total_q, int64_t h_q, int64_t max_len, int64_t page_size,
             int64_t max_seq_len) { return self.fastest({b, total_q, h_q, max_len, page_size, max_seq_len}).name; },
          "b"_a, "total_q"_a, "h_q"_a, "max_len"_a, "page_size"_a, "max_seq_len"_a,
          "The name of the variant with the least predicted time. A max_seq_len below 0 stands for none.");
}

}  // namespace mla
