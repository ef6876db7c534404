// Where prepared calls go: to the driver, or to what stands in for it.
#pragma once

#include <nanobind/nanobind.h>

#include "launch.h"

namespace mla {

// launch_plan and launch_decode of launch.h and capturing of driver.h, or what redirect has put in their place. The GIL is held.
void queue_plan(const Variant& variant, const DecodeParams& params, int device, uintptr_t stream);
void queue_decode(const Variant& variant, Dtype dtype, const DecodeParams& params, bool plans, int device,
                  uintptr_t stream, bool captured);
bool queue_is_captured(int device, uintptr_t stream);

// Callables with the arguments of the functions of the same names that Python has; all None to undo it.
void redirect(nanobind::object launch_plan, nanobind::object launch_decode, nanobind::object capturing);

}  // namespace mla
