#include "prepare.h"

#include <algorithm>

#include "launch.h"
#include "workspace.h"

namespace nb = nanobind;

namespace mla {
namespace {

constexpr uintptr_t kAlignment = 16;  // of rows; what the calls' own strides are multiples of
constexpr Slot kAligned[] = {kQ, kQRope, kKv, kKvRope, kOut, kWorkspace};

bool ranges_overlap(const Prepared& prepared, const Call& call, int a, int b) {
  const uintptr_t first = call.tensors[a].data, second = call.tensors[b].data;
  return prepared.reach[a] > 0 && prepared.reach[b] > 0 && first < second + prepared.reach[b] &&
         second < first + prepared.reach[a];
}

// Whether `harmless` says so of each output and each tensor before it whose ranges of addresses meet.
template <class Harmless>
bool outputs_apart(const Prepared& prepared, const Call& call, Harmless harmless) {
  for (int written = kFirstWritten; written < kNumSlots; ++written) {
    if (!call.tensors[written].exists()) continue;
    for (int other = 0; other < written; ++other)
      if (ranges_overlap(prepared, call, written, other) && !harmless(written, other)) return false;
  }
  return true;
}

RowStrides row_strides(const TensorView& tensor, bool ragged) {
  return ragged ? RowStrides{0, tensor.stride(0), tensor.stride(1)}
                : RowStrides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Of a contiguous output for rows of the query.
RowStrides dense_strides(const TensorView& q, bool ragged, int64_t row) {
  const int64_t token = q.size(q.ndim() - 2) * row;
  return {ragged ? 0 : q.size(1) * token, token, row};
}

}  // namespace

void prepare(const Decision& decision, const Arguments& arguments, const Call& call, Prepared& prepared) {
  prepared.variant = decision.variant;
  prepared.dtype = decision.dtype;
  prepared.device = decision.device;
  prepared.params = decision.sizes;
  const auto& tensors = call.tensors;
  const TensorView &q = tensors[kQ], &kv = tensors[kKv];
  const int d_v = prepared.variant->d_v;
  DecodeParams& p = prepared.params;
  const bool ragged = tensors[kCuSeqlensQ].exists();
  const TensorView &q_rope = tensors[kQRope].exists() ? tensors[kQRope] : q,
                   &kv_rope = tensors[kKvRope].exists() ? tensors[kKvRope] : kv;
  p.q_nope_strides = row_strides(q, ragged);
  p.q_rope_strides = row_strides(q_rope, ragged);
  p.latent_strides = {kv.stride(0), kv.stride(1)};
  p.rope_strides = {kv_rope.stride(0), kv_rope.stride(1)};
  p.block_table_stride = tensors[kBlockTable].stride(0);
  p.num_pages = static_cast<int32_t>(kv.size(0));
  p.page_size = static_cast<int32_t>(kv.size(1));
  p.out_strides = tensors[kOut].exists() ? row_strides(tensors[kOut], ragged) : dense_strides(q, ragged, d_v);
  if (tensors[kLse].exists()) p.lse_strides = row_strides(tensors[kLse], ragged);
  else if (call.return_lse) p.lse_strides = dense_strides(q, ragged, 1);
  p.causal = call.causal;
  prepared.rope_bytes = int64_t{d_v} * q.item_bytes();

  nb::object one = nb::borrow(arguments.q);
  if (PyTuple_Check(one.ptr()) || PyList_Check(one.ptr())) one = one[0];
  prepared.torch_device = one.attr("device");
  if (!tensors[kOut].exists()) prepared.out = plan_allocation(q, d_v, one.attr("dtype"), prepared.torch_device);
  if (!tensors[kLse].exists() && call.return_lse)
    prepared.lse = plan_allocation(q, 0, nb::module_::import_("torch").attr("float32"), prepared.torch_device);

  const size_t schedule = static_cast<size_t>(plan_bytes(*prepared.variant, p));
  prepared.schedule_bytes =
      call.plan ? 0 : (schedule + kScheduleAlignment - 1) / kScheduleAlignment * kScheduleAlignment;
  const PartialBytes partials = partial_bytes(*prepared.variant, p);
  prepared.partials_bytes = static_cast<size_t>(partials.o);
  prepared.workspace_bytes = prepared.schedule_bytes + prepared.partials_bytes + static_cast<size_t>(partials.lse2);
  p.lengths.max_len = std::min(p.lengths.max_len, tensors[kBlockTable].size(1) * p.page_size);

  for (int slot = 0; slot < kNumSlots; ++slot) prepared.reach[slot] = reach_of(tensors[slot]);
  for (int written = kFirstWritten; written < kNumSlots; ++written)
    for (int other = 0; other < written; ++other)
      prepared.apart[written - kFirstWritten][other] = tensors[other].data - tensors[written].data;
}

bool aligned(const Prepared& prepared, const Call& call) {
  return std::all_of(std::begin(kAligned), std::end(kAligned),
                     [&](Slot slot) { return prepared.reach[slot] == 0 || call.tensors[slot].data % kAlignment == 0; });
}

bool apart(const Prepared& prepared, const Call& call) {
  return outputs_apart(prepared, call, [](int, int) { return false; });
}

bool apart_as_before(const Prepared& prepared, const Call& call) {
  return outputs_apart(prepared, call, [&](int written, int other) {
    return call.tensors[other].data - call.tensors[written].data == prepared.apart[written - kFirstWritten][other];
  });
}

}  // namespace mla
