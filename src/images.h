// The kernel images that are embedded in this module: fatbins, one per row of kernels/variants.inc, plus those of
// kernels/common.
#pragma once

#include <cstddef>
#include <string_view>

namespace mla {

struct Image {
  std::string_view name;
  const unsigned char* begin;
  const unsigned char* end;

  size_t size() const { return static_cast<size_t>(end - begin); }
};

extern const Image kImages[];
extern const size_t kNumImages;

// Throws std::out_of_range.
const Image& find_image(std::string_view name);

}  // namespace mla
