#include "chooser.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "common/schedule.h"

namespace mla {

int64_t likely_len(int64_t max_len, int64_t page_size, int64_t max_seq_len) {
  if (max_seq_len >= 0) return std::min(max_len, max_seq_len);
  if (max_len <= page_size) return schedule::ceil_div<int64_t>(max_len, 4);
  return max_len - page_size / 2;
}

Chooser::Chooser(const std::vector<std::string>& names, const std::vector<Model>& models, int32_t num_workers)
    : num_workers_(num_workers) {
  if (names.empty() || names.size() != models.size() || num_workers < 1)
    throw std::invalid_argument("got no rivals, not a model of each, or no workers");
  for (size_t i = 0; i < names.size(); ++i) rivals_.push_back({&find_variant(names[i]), models[i]});
}

const Variant& Chooser::fastest(const Sizes& sizes) const {
  const int64_t rows = schedule::ceil_div<int64_t>(sizes.total_q * sizes.h_q, std::max<int64_t>(sizes.b, 1));
  const int64_t length = likely_len(sizes.max_len, sizes.page_size, sizes.max_seq_len);
  const Variant* best = nullptr;
  double best_us = std::numeric_limits<double>::infinity();
  for (const Rival& rival : rivals_) {
    const Model& model = rival.model;
    const double us =
        times_of(model, cut_equal(sizes.b, rows, length, model.block_rows, model.block_n, num_workers_)).total_us();
    if (us < best_us) best = rival.variant, best_us = us;
  }
  return best ? *best : *rivals_.front().variant;
}

}  // namespace mla
