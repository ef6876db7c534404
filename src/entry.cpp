#include "entry.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <array>
#include <exception>
#include <string_view>
#include <utility>

#include "errors.h"
#include "prepared.h"
#include "settings.h"

namespace nb = nanobind;

namespace mla {
namespace {

// In the order of Arguments.
constexpr const char* kNames[] = {"q",          "kv_cache",        "block_table", "seq_lens", "cu_seqlens_q", "out",
                                  "lse",        "workspace",       "plan",        "scale",    "causal",       "d_v",
                                  "return_lse", "batch_invariant", "max_seq_len", "variant"};
constexpr size_t kNumNames = std::size(kNames);
constexpr Py_ssize_t kMostPositional = 4;
using Values = std::array<PyObject*, kNumNames>;

// Held for the life of the process.
struct Entry {
  nb::object function, context_variant;
  std::string name, doc;
  PyMethodDef method;
  Values names, defaults;  // null where there is none
};
Entry* entry = nullptr;

// False for what is no call of `entry`.
bool read_values(PyObject* const* given, Py_ssize_t num_positional, PyObject* names, Values& values) {
  if (num_positional > kMostPositional) return false;
  values = entry->defaults;
  std::copy_n(given, num_positional, values.begin());
  const auto first = entry->names.begin() + num_positional, last = entry->names.end();
  const Py_ssize_t num_named = names ? PyTuple_Size(names) : 0;
  for (Py_ssize_t i = 0; i < num_named; ++i) {
    PyObject* const name = PyTuple_GetItem(names, i);
    auto found = std::find(first, last, name);  // as names are interned, nearly always
    if (found == last)
      found = std::find_if(first, last, [&](PyObject* known) { return PyUnicode_Compare(known, name) == 0; });
    if (found == last) return false;
    values[found - entry->names.begin()] = given[num_positional + i];
  }
  return std::find(values.begin(), values.end(), nullptr) == values.end();
}

// Text or None; false for anything else.
bool read_name(nb::handle value, std::string_view& name) {
  name = {};
  return value.is_none() || nb::try_cast(value, name);
}

// What was prepared for a call like this, done; null if Python has to look at it.
nb::object decode_prepared(const Values& v) {
  Arguments arguments{v[0], v[1],  v[2],  v[3],  v[4],  v[5],  v[6], v[7],           v[8],
                      v[9], v[10], v[11], v[12], v[13], v[14], {},   read_settings()};
  // The name in force: the argument, then the context's, then the environment's.
  nb::object of_context;
  if (!read_name(v[15], arguments.forced)) return {};
  if (arguments.forced.empty()) {
    of_context = nb::steal(PyObject_CallNoArgs(entry->context_variant.ptr()));
    if (!of_context.is_valid()) throw nb::python_error();
    if (!read_name(of_context, arguments.forced)) return {};
  }
  if (arguments.forced.empty()) arguments.forced = arguments.settings.forced_variant;
  return mla::decode_prepared(arguments);
}

PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t num_positional, PyObject* names) {
  try {
    Values values;
    if (read_values(given, num_positional, names, values))
      if (nb::object done = decode_prepared(values); done.is_valid()) return done.release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
    return nullptr;
  } catch (const std::exception& error) {
    set_error(error);
    return nullptr;
  }
  return nb::detail::vectorcall(entry->function.ptr(), given, static_cast<size_t>(num_positional), names);
}

}  // namespace

nb::object make_entry(nb::object function, nb::object context_variant, const std::string& doc) {
  auto* const made =
      new Entry{function, context_variant, nb::cast<std::string>(function.attr("__name__")), doc, {}, {}, {}};
  made->method = {made->name.c_str(), reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                  METH_FASTCALL | METH_KEYWORDS, made->doc.c_str()};
  const nb::dict defaults = function.attr("__kwdefaults__");
  for (size_t i = 0; i < kNumNames; ++i) {
    made->names[i] = PyUnicode_InternFromString(kNames[i]);
    made->defaults[i] = nb::handle(PyDict_GetItem(defaults.ptr(), made->names[i])).inc_ref().ptr();
  }
  entry = made;
  return nb::steal(PyCFunction_NewEx(&made->method, nullptr, nb::object(function.attr("__module__")).ptr()));
}

}  // namespace mla
