// What a variant is chosen by.
#pragma once

#include <nanobind/nanobind.h>

namespace mla {

void bind_choice(nanobind::module_& m);

}  // namespace mla
