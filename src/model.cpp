#include "model.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "common/schedule.h"

namespace mla {
namespace {

// Memory and arithmetic overlap, but not where both take about as long: sums of this power.
constexpr double kOverlapPower = 6;
// L2 serves 9.0 to 9.4 TB/s on the H200, and every row block of a group reads all of its KV there.
constexpr double kL2PerBandwidth = 2;

// Reading from memory and through L2 beside each other takes longer than from memory alone, by row blocks in a group.
double l2_slows(int32_t group_size) {
  static const auto all = [] {
    std::array<double, schedule::kMaxGroupSize + 1> made{};
    for (size_t n = 0; n < made.size(); ++n) made[n] = overlapped(1, static_cast<double>(n) / kL2PerBandwidth);
    return made;
  }();
  return all[static_cast<size_t>(group_size)];
}

}  // namespace

double overlapped(double a, double b) {
  const auto [least, most] = std::minmax(a, b);
  return least == 0 ? most : most * std::pow(1 + std::pow(least / most, kOverlapPower), 1 / kOverlapPower);
}

Times times_of(const Model& model, const EqualCut& cut) {
  const double item_us = model.each_us + model.row_us * cut.filled_rows + (cut.long_items ? model.tiles_us : 0);
  Times times{};
  times.memory_us = static_cast<double>(cut.kv_rows) * model.read_us * l2_slows(cut.group_size) +
                    static_cast<double>(cut.query_rows) * model.query_us;
  times.compute_us = cut.longest * (cut.group_size == 1 ? model.tile_row_us : model.shared_row_us) +
                     cut.further_items * (model.item_us + item_us);
  times.rest_us = model.start_us + model.busy_us * cut.busy + (cut.query_rows > 0 ? item_us : 0);
  if (cut.partial_rows > 0) {
    times.rest_us += model.split_us + cut.further_parts * model.part_us + cut.partial_rows * model.merge_us;
    if (cut.further_parts == 1) times.rest_us += model.pair_us;
  }
  return times;
}

double Times::total_us() const { return rest_us + overlapped(memory_us, compute_us); }

}  // namespace mla
