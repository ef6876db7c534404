// What a call needs that its addresses do not change.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstddef>
#include <cstdint>

#include "allocation.h"
#include "call.h"
#include "registry.h"

namespace mla {

// What Python decides of a call.
struct Decision {
  const Variant* variant;
  Dtype dtype;
  int device;
  DecodeParams sizes;  // what the schedule depends on; its cu_seqlens_q is null or not
};

struct Prepared {
  const Variant* variant;
  Dtype dtype;
  int device;
  nanobind::object torch_device;
  DecodeParams params;  // without addresses and scale
  int64_t rope_bytes;   // from a packed row to its rope part
  size_t schedule_bytes, partials_bytes, workspace_bytes;
  Allocation out, lse;
  std::array<uintptr_t, kNumSlots> reach;  // bytes from a tensor's first to behind its last
  // From each output's address to every tensor before it, as they were found not to overlap.
  std::array<std::array<uintptr_t, kNumSlots>, kNumSlots - kFirstWritten> apart;
};

// Of a call that is right.
void prepare(const Decision& decision, const Arguments& arguments, const Call& call, Prepared& prepared);

// Whether all rows are where kernels can load them.
bool aligned(const Prepared& prepared, const Call& call);
// Whether no output's range of addresses meets that of another tensor.
bool apart(const Prepared& prepared, const Call& call);
// The same, or outputs lie to the tensors that their ranges meet as they did in the prepared call. The strides are the same, so they
// are apart if they were then.
bool apart_as_before(const Prepared& prepared, const Call& call);

}  // namespace mla
