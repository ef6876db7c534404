#include "kind.h"

#include <algorithm>
#include <array>
#include <utility>

#include "common/schedule.h"

namespace mla {
namespace {

constexpr int64_t kMostCounted = int64_t{1} << 30;  // requests, query rows, pages; more are unusual
constexpr int64_t kStrideMultiple = 8;              // elements of two bytes: rows begin at multiples of 16 bytes
constexpr Slot kRows[] = {kQ, kQRope, kKv, kKvRope, kOut};

bool counted(int64_t size) { return size >= 1 && size <= kMostCounted; }

// How many dimensions of a tensor have sizes that the kind leaves open.
int open_dims(Slot slot, bool ragged) {
  switch (slot) {
    case kKv:
    case kKvRope:
      return 1;  // pages
    case kQ:
    case kQRope:
    case kOut:
    case kLse:
      return ragged ? 1 : 2;  // tokens, or b and s_q
    case kSeqLens:
    case kCuSeqlensQ:
    case kWorkspace:
      return 1;
    default:
      return 2;  // b and pages of the block table
  }
}

bool same_leading(const TensorView& tensor, const TensorView& q, int dims) {
  for (int i = 0; i < dims; ++i)
    if (tensor.size(i) != q.size(i)) return false;
  return true;
}

bool rows_in_order(const TensorView& tensor) {
  for (int i = 0; i + 1 < tensor.ndim(); ++i)
    if (tensor.stride(i) % kStrideMultiple != 0) return false;
  return tensor.stride(tensor.ndim() - 1) == 1;
}

bool last_is_dense(const TensorView& tensor) {
  const int last = tensor.ndim() - 1;
  return tensor.size(last) == 1 || tensor.stride(last) == 1;
}

// From the smallest stride up, each steps over all that lies below it.
bool elements_apart(const TensorView& tensor) {
  std::array<std::pair<int64_t, int64_t>, kMaxDims> dims;  // stride, size
  for (int i = 0; i < tensor.ndim(); ++i) dims[i] = {tensor.stride(i), tensor.size(i)};
  std::sort(dims.begin(), dims.begin() + tensor.ndim());
  int64_t reach = 0;
  for (int i = 0; i < tensor.ndim(); ++i) {
    const auto [stride, size] = dims[i];
    if (size == 1) continue;
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

}  // namespace

Key kind_of(const Arguments& arguments, const Call& call) {
  Key key;
  const bool ragged = call.tensors[kCuSeqlensQ].exists();
  for (int slot = 0; slot < kNumSlots; ++slot) {
    const TensorView& tensor = call.tensors[slot];
    key.add(tensor.words[0]);
    for (int i = open_dims(static_cast<Slot>(slot), ragged); i < tensor.ndim(); ++i) key.add(tensor.size(i));
  }
  if (call.plan)
    for (const int64_t word : call.plan->kind()) key.add(word);
  key.add_text(arguments.forced);
  key.add(call.options);
  return key;
}

bool read_sizes(const Call& call, DecodeParams& sizes) {
  const auto& tensors = call.tensors;
  const TensorView &q = tensors[kQ], &kv = tensors[kKv], &table = tensors[kBlockTable];
  const bool ragged = tensors[kCuSeqlensQ].exists();
  const int64_t b = tensors[kSeqLens].size(0), s_q = ragged ? 0 : q.size(1), h_q = q.size(q.ndim() - 2);
  if (!counted(b) || !counted(q.size(0)) || !counted(ragged ? 1 : s_q) || !counted(kv.size(0)) ||
      !counted(table.size(1)))
    return false;
  const int64_t total_q = ragged ? q.size(0) : b * s_q;
  if (!counted(total_q) || !counted(h_q) || !counted(total_q * h_q)) return false;

  if (ragged ? tensors[kCuSeqlensQ].size(0) != b + 1 : q.size(0) != b) return false;
  if (table.size(0) != b) return false;
  for (const Slot slot : {kQRope, kOut, kLse})
    if (tensors[slot].exists() && !same_leading(tensors[slot], q, open_dims(slot, ragged))) return false;
  if (tensors[kKvRope].exists() && tensors[kKvRope].size(0) != kv.size(0)) return false;

  for (const Slot slot : kRows)
    if (tensors[slot].exists() && !rows_in_order(tensors[slot])) return false;
  for (const Slot slot : {kBlockTable, kSeqLens, kCuSeqlensQ, kWorkspace})
    if (tensors[slot].exists() && !last_is_dense(tensors[slot])) return false;
  for (const Slot slot : {kOut, kLse})
    if (tensors[slot].exists() && !elements_apart(tensors[slot])) return false;

  Lengths& lengths = sizes.lengths;
  lengths.num_requests = static_cast<int32_t>(b);
  lengths.s_q = static_cast<int32_t>(s_q);
  lengths.total_q = static_cast<int32_t>(total_q);
  lengths.max_len = std::min(table.size(1) * kv.size(1), schedule::kMaxLen);
  if (!call.plan) return true;
  const Lengths& planned = call.plan->lengths();
  lengths.max_len = planned.max_len;
  return planned.max_len > 0 && planned.num_requests == lengths.num_requests && planned.s_q == lengths.s_q &&
         planned.total_q == lengths.total_q && planned.h_q == lengths.h_q;
}

}  // namespace mla
