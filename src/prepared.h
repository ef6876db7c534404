// Calls that Python has checked and chosen a variant for, ready to be launched again.
#pragma once

#include <nanobind/nanobind.h>

#include "call.h"
#include "registry.h"

namespace mla {

// A call like one that was prepared: queues it and returns what mla.decode returns. Null for one that is not, or whose addresses
// are not in order: Python has to look at it.
nanobind::object decode_prepared(const Arguments& arguments);

// Prepares a call that Python has checked, and does it. `sizes` has what the schedule depends on; its cu_seqlens_q is null or not.
// `chooser` is the Chooser among the variants of calls that differ in sizes; None if it is always this one.
nanobind::object decode_first(const Arguments& arguments, const Variant& variant, Dtype dtype, int device,
                              const DecodeParams& sizes, nanobind::handle chooser);

size_t num_prepared();
void forget_calls();

}  // namespace mla
