// mla.decode as callers have it: a function of C that goes to Python only for calls unlike those before.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

namespace mla {

// `function` in C, under its name and that of its module: calls that were prepared are queued, all others are its own, with
// the arguments as they came. `context_variant` returns the name that is in force where the call says none, or None; `doc` begins with
// the signature, as in a PyMethodDef. For one function of a process: the next takes the place of the one before.
nanobind::object make_entry(nanobind::object function, nanobind::object context_variant, const std::string& doc);

}  // namespace mla
