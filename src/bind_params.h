// DecodeParams as a class of Python.
#pragma once

#include <nanobind/nanobind.h>

namespace mla {

void bind_params(nanobind::module_& m);

}  // namespace mla
