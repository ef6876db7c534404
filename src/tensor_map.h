// Maps of the cache for the pipelines that fetch boxes of it (cuTensorMapEncodeTiled).
#pragma once

#include "params.h"
#include "registry.h"

namespace mla {

// Fills in params.box_rows and the maps. box_rows is 0, and rows are copied by address, where pages are too small or too odd for
// boxes, or the driver has no map for the cache's strides. Each map is encoded once and kept.
void add_tensor_maps(const Variant& variant, Dtype dtype, DecodeParams& params);

}  // namespace mla
