// Calls of one kind, which differ in their sizes and strides only: what must be the same, and which sizes are clearly right.
#pragma once

#include "call.h"
#include "params.h"

namespace mla {

// Calls of equal kinds have the same dtypes, devices, ranks, columns, heads, page size, flags and name in force. If they have plans,
// these are for the same variant.
Key kind_of(const Arguments& arguments, const Call& call);

// Puts the call's sizes into `sizes`, those that Python made for a right call of the kind. False if its sizes or strides are wrong,
// or so unusual that Python has to look at them, whose checks allow more. Says nothing of addresses.
bool read_sizes(const Call& call, DecodeParams& sizes);

}  // namespace mla
