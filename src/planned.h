// What the extension knows of an mla.Plan.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>

#include "launch.h"
#include "torch.h"

namespace mla {

constexpr int kPlanWords = static_cast<int>(sizeof(Lengths) / sizeof(int64_t)) + 2;

class PlannedSchedule {
 public:
  // `sizes` has what a schedule depends on but the lengths, and where it is; its cu_seqlens_q is null or not.
  PlannedSchedule(const Variant& variant, Dtype dtype, int32_t page_size, const DecodeParams& sizes, int device);

  // Queues the schedule of other lengths, on the current stream, if the tensors are like those that were checked last.
  bool update(nanobind::handle seq_lens, nanobind::handle cu_seqlens_q);
  // The same when Python has checked them.
  void update_checked(nanobind::handle seq_lens, nanobind::handle cu_seqlens_q);

  const PlanHeader* address() const { return params_.plan; }
  // All that a call which fits depends on.
  const std::array<int64_t, kPlanWords>& words() const { return words_; }
  const Lengths& lengths() const { return params_.lengths; }
  // The same for schedules that differ in sizes only.
  std::array<int64_t, 2> kind() const { return {words_[kPlanWords - 2], words_[kPlanWords - 1]}; }

 private:
  struct Tensors {
    TensorView seq_lens, cu_seqlens_q;
    std::array<int64_t, 2 * kMaxTensorWords> words{};
  };
  void queue(const Tensors& tensors);

  const Variant& variant_;
  DecodeParams params_;
  int device_;
  std::array<int64_t, kPlanWords> words_;
  std::array<int64_t, 2 * kMaxTensorWords> checked_{};
};

}  // namespace mla
