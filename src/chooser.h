// The choice among the variants that can run a kind of problem.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model.h"
#include "registry.h"

namespace mla {

// What a choice depends on beside the kind.
struct Sizes {
  int64_t b, total_q, h_q;
  int64_t max_len, page_size;
  int64_t max_seq_len;  // as the caller says, rounded; below 0: not said
};

// KV tokens that a request counts with where lengths are not known. No more than the caller says; or all that a row of the block table
// reaches, but for half a page, as requests end anywhere in their last one. Of a single page a quarter: where it is hardly begun variants
// differ by more than where it is nearly full. As the fields of Sizes.
int64_t likely_len(int64_t max_len, int64_t page_size, int64_t max_seq_len);

class Chooser {
 public:
  // Of equals the first is chosen. Throws std::out_of_range for names that are none, std::invalid_argument if there is none, or
  // not as many models.
  Chooser(const std::vector<std::string>& names, const std::vector<Model>& models, int32_t num_workers);

  // What should take the least time if all requests have the average of the query rows, and likely_len() KV tokens.
  const Variant& fastest(const Sizes& sizes) const;

 private:
  struct Rival {
    const Variant* variant;
    Model model;
  };
  std::vector<Rival> rivals_;
  int32_t num_workers_;
};

}  // namespace mla
