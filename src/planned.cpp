#include "planned.h"

#include <cstring>

#include "queue.h"

namespace nb = nanobind;

namespace mla {

PlannedSchedule::PlannedSchedule(const Variant& variant, Dtype dtype, int32_t page_size, const DecodeParams& sizes,
                                 int device)
    : variant_(variant), params_(sizes), device_(device) {
  std::memcpy(words_.data(), &params_.lengths, sizeof(Lengths));
  words_[kPlanWords - 2] = reinterpret_cast<intptr_t>(&variant);
  words_[kPlanWords - 1] = int64_t{page_size} | int64_t{dtype == Dtype::bf16} << 32 |
                           int64_t{params_.batch_invariant != 0} << 33 | int64_t{device} << 40;
}

bool PlannedSchedule::update(nb::handle seq_lens, nb::handle cu_seqlens_q) {
  Tensors tensors;
  int64_t* const words = tensors.words.data();
  if (!torch::read(seq_lens, tensors.seq_lens, words)) return false;
  if (!cu_seqlens_q.is_none() && !torch::read(cu_seqlens_q, tensors.cu_seqlens_q, words + kMaxTensorWords))
    return false;
  if (tensors.words != checked_) return false;
  queue(tensors);
  return true;
}

void PlannedSchedule::update_checked(nb::handle seq_lens, nb::handle cu_seqlens_q) {
  Tensors tensors;
  int64_t* const words = tensors.words.data();
  torch::read_any(seq_lens, tensors.seq_lens, words);
  if (!cu_seqlens_q.is_none()) torch::read_any(cu_seqlens_q, tensors.cu_seqlens_q, words + kMaxTensorWords);
  checked_ = tensors.words;
  queue(tensors);
}

void PlannedSchedule::queue(const Tensors& tensors) {
  DecodeParams params = params_;
  params.lengths.seq_lens = reinterpret_cast<const int32_t*>(tensors.seq_lens.data);
  params.lengths.cu_seqlens_q = reinterpret_cast<const int32_t*>(tensors.cu_seqlens_q.data);
  queue_plan(variant_, params, device_, torch::current_stream(device_));
}

}  // namespace mla
