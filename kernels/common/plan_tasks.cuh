// What the threads of the planner (plan.cu) write once the line of all items is cut: each thread something else.
#pragma once

#include "cta_sums.cuh"

namespace mla {

// What lies on the line of all items before a request, or in all.
template <class Unit>
struct Line {
  Unit items, units;
};

// Where the requests begin on the line, and the numbers of their first items: `first_unit[i]` and `first_item[i]`. A uniform query needs no
// `first_item`.
template <class Unit, bool Ragged, class FirstUnits, class FirstItems>
struct Tasks {
  using Item = schedule::Item<Unit>;
  const Lengths& lengths;
  const schedule::Shape shape;
  const int32_t num_workers;
  const schedule::Cuts<Unit> cuts;
  const Unit items, units;  // in all
  const int32_t bundles;    // of each request, if the query is uniform
  const int32_t max_pieces;
  const schedule::PlanView plan;
  const FirstUnits first_unit;
  const FirstItems first_item;

  __device__ __forceinline__ SplitItem* splits() const {
    return reinterpret_cast<SplitItem*>(plan.pieces + max_pieces);
  }
  __device__ __forceinline__ Item item_of(Unit unit) const {
    const int32_t request = find_request(unit);
    return schedule::item_at(lengths, shape, cuts, first_unit_of(request), request, unit);
  }
  __device__ __forceinline__ bool all_equal() const { return !Ragged && cuts.item_span > 0; }
  __device__ __forceinline__ Unit first_unit_of(int32_t request) const {
    return all_equal() ? schedule::first_unit_of_equal(cuts, bundles, request) : first_unit[request];
  }
  __device__ __forceinline__ int32_t find_request(Unit unit) const {
    return all_equal() ? schedule::request_of_equal(cuts, bundles, unit)
                       : schedule::last_not_above(first_unit, lengths.num_requests, unit);
  }
  __device__ __forceinline__ int32_t first_item_of(int32_t request) const {
    if constexpr (Ragged) return first_item[request];
    else return request * bundles;
  }
  __device__ __forceinline__ Item item_of_number(int32_t number) const {
    int32_t request = number;
    if constexpr (Ragged) request = schedule::last_not_above(first_item, lengths.num_requests, number);
    else if (bundles > 1) request = schedule::quotient_of_units(number, bundles);
    return schedule::make_item(schedule::request_at(lengths, shape, request), shape, cuts, first_unit_of(request),
                               request, Unit{number - first_item_of(request)});
  }
  __device__ __forceinline__ Unit number_of(const Item& item, int32_t g) const {
    return Unit{first_item_of(item.request)} + item.bundle + g;
  }
  __device__ __forceinline__ Unit end_of_group(int32_t g) const { return min((g + 1) * cuts.units_per_group, units); }
  // Requests whose query tokens overlap can make more pieces than there is room for: groups with such pieces are left out. Nobody waits
  // for what they would have left, as those behind them are left out too.
  __device__ __forceinline__ bool has_room(Unit number) const { return !Ragged || number < max_pieces; }

  // What follows from an end of a worker's range, by a lane for each: of the first unit the range itself, for which it asks its neighbour,
  // and once for each group the piece with which it continues an item, of which `then(item, g)` is told; of the last unit the last piece.
  template <class Then>
  __device__ __forceinline__ void write_end(int32_t worker, int32_t end, Then then) const {
    const int32_t g = schedule::groups_of(worker, cuts.group_size);
    WorkerRange range{};
    range.member = worker - g * cuts.group_size;
    range.group_size = cuts.group_size;
    const bool has_range = worker < num_workers && g < cuts.num_groups;
    Piece piece{};
    Unit number = 0;
    int32_t pairs = 0;
    if (has_range) {
      const Unit begin = g * cuts.units_per_group;
      const Item item = item_of(end == schedule::kFirstUnit ? begin : end_of_group(g) - 1);
      number = number_of(item, g);
      piece = schedule::make_piece(item, shape, cuts, g);
      pairs = schedule::pairs_of(item, end, shape, cuts, g);
      if (end == schedule::kFirstUnit && range.member == 0 && item.begin != begin) {
        if (has_room(number)) plan.pieces[number] = piece;
        then(item, g);
      }
    }
    __syncwarp();  // all lanes have come to the exchange
    const Unit number_of_other = __shfl_xor_sync(kAllLanes, number, 1);
    const Unit last_number = end == schedule::kLastUnit ? number : number_of_other;
    pairs |= __shfl_xor_sync(kAllLanes, pairs, 1);
    if (worker >= num_workers) return;
    const bool fits = has_range && has_room(last_number);
    if (end == schedule::kLastUnit) {
      plan.workers[worker].last = fits ? piece : Piece{};
      return;
    }
    if (fits) {
      range.first_piece = static_cast<int32_t>(number);
      range.end_piece = static_cast<int32_t>(last_number) + 1;
      range.pairs = pairs;
      // Nothing is left for a group that is left out: its flag would stay up.
      if (Ragged && pairs & kLeavesLast && !has_room(items + cuts.num_groups) &&
          !has_room(number_of(item_of(end_of_group(g + 1) - 1), g + 1)))
        range.pairs &= ~kLeavesLast;
    }
    static_cast<WorkerRange&>(plan.workers[worker]) = range;
  }
  // The first piece of an item.
  __device__ __forceinline__ void write_begun(int32_t number) const {
    const Item item = item_of_number(number);
    const int32_t g = static_cast<int32_t>(schedule::quotient_of_units(item.begin, cuts.units_per_group));
    if (has_room(Unit{number} + g)) plan.pieces[number + g] = schedule::make_piece(item, shape, cuts, g);
  }
  __device__ __forceinline__ int32_t num_items() const {  // whose first piece can have room
    return static_cast<int32_t>(Ragged ? min(items, Unit{max_pieces}) : items);
  }
  __device__ __forceinline__ int32_t first_begun() const { return schedule::blocks_of(2 * num_workers, 32) * 32; }
  // Side by side, by so many threads.
  template <class Then>
  __device__ __forceinline__ void write(int32_t thread, int32_t threads, Then then) const {
    MLA_ROLLED
    for (int32_t task = thread; task < first_begun() + num_items(); task += threads) {
      if (task < first_begun()) write_end(task >> 1, task & 1, then);
      else write_begun(task - first_begun());
    }
  }
  __device__ __forceinline__ void write_header(int32_t num_splits) const {
    *plan.header = schedule::make_header(cuts, schedule::splits_at(max_pieces, num_workers), num_splits);
  }
};

}  // namespace mla
