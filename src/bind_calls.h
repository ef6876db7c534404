// Calls of mla.decode and mla.Plan.update, and what they keep.
#pragma once

#include <nanobind/nanobind.h>

namespace mla {

void bind_calls(nanobind::module_& m);

}  // namespace mla
