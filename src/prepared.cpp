#include "prepared.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <unordered_map>
#include <utility>

#include "queue.h"
#include "workspace.h"

namespace nb = nanobind;

namespace mla {
namespace {

constexpr uintptr_t kAlignment = 16;  // of rows; what the calls' own strides are multiples of
constexpr Slot kAligned[] = {kQ, kQRope, kKv, kKvRope, kOut, kWorkspace};
// More than this are dropped, all at once. Each takes 2 KB.
constexpr size_t kMaxPrepared = 4096;

// What torch.empty_strided, which takes less time than torch.empty, is called with for an output.
struct Allocation {
  nb::object arguments, options;
};

struct Prepared {
  const Variant* variant;
  Dtype dtype;
  int device;
  nb::object torch_device;
  DecodeParams params;  // without addresses and scale
  int64_t rope_bytes;   // from a packed row to its rope part
  size_t schedule_bytes, partials_bytes, workspace_bytes;
  Allocation out, lse;
  std::array<uintptr_t, kNumSlots> reach;  // bytes from a tensor's first to behind its last
  // From each output's address to every tensor before it, as Python found them not to overlap.
  std::array<std::array<uintptr_t, kNumSlots>, kNumSlots - kFirstWritten> apart;
};

struct HashKey {
  size_t operator()(const Key& key) const { return key.hash(); }
};
using Table = std::unordered_map<Key, std::shared_ptr<const Prepared>, HashKey>;

// Never destroyed: when the process ends, there may be no Python to give objects back to.
Table& table() {
  static auto* all = new Table;
  return *all;
}

// ---- What depends on addresses ----

bool ranges_overlap(const Prepared& prepared, const Call& call, int a, int b) {
  const uintptr_t first = call.tensors[a].data, second = call.tensors[b].data;
  return prepared.reach[a] > 0 && prepared.reach[b] > 0 && first < second + prepared.reach[b] &&
         second < first + prepared.reach[a];
}

// Whether they are as harmless as those of the prepared call. The strides are the same, so tensors whose ranges of addresses
// overlap are apart if they lie to each other as they did then.
bool addresses_in_order(const Prepared& prepared, const Call& call) {
  for (const Slot slot : kAligned)
    if (prepared.reach[slot] > 0 && call.tensors[slot].data % kAlignment != 0) return false;
  for (int written = kFirstWritten; written < kNumSlots; ++written) {
    if (!call.tensors[written].exists()) continue;
    for (int other = 0; other < written; ++other)
      if (ranges_overlap(prepared, call, written, other) &&
          call.tensors[other].data - call.tensors[written].data != prepared.apart[written - kFirstWritten][other])
        return false;
  }
  return true;
}

// ---- Preparing ----

RowStrides row_strides(const TensorView& tensor, bool ragged) {
  return ragged ? RowStrides{0, tensor.stride(0), tensor.stride(1)}
                : RowStrides{tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// Of a contiguous output for rows of the query.
RowStrides dense_strides(const TensorView& q, bool ragged, int64_t row) {
  const int64_t token = q.size(q.ndim() - 2) * row;
  return {ragged ? 0 : q.size(1) * token, token, row};
}

// Contiguous, with the leading dimensions of q, and `columns` if they are not 0.
Allocation allocation(const TensorView& q, int columns, nb::handle dtype, nb::handle device) {
  nb::list sizes, strides;
  int64_t stride = columns ? columns : 1;
  if (columns) sizes.append(columns), strides.append(1);
  for (int i = q.ndim() - 2; i >= 0; stride *= q.size(i--)) {
    sizes.insert(0, q.size(i));
    strides.insert(0, stride);
  }
  nb::dict options;
  options["dtype"] = dtype;
  options["device"] = device;
  return {nb::make_tuple(sizes, strides), options};
}

void fill(Prepared& prepared, const Arguments& arguments, const Call& call) {
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
  if (!tensors[kOut].exists()) prepared.out = allocation(q, d_v, one.attr("dtype"), prepared.torch_device);
  if (!tensors[kLse].exists() && call.return_lse)
    prepared.lse = allocation(q, 0, nb::module_::import_("torch").attr("float32"), prepared.torch_device);

  const size_t schedule = static_cast<size_t>(plan_bytes(*prepared.variant, p));
  prepared.schedule_bytes =
      call.plan ? 0 : (schedule + kScheduleAlignment - 1) / kScheduleAlignment * kScheduleAlignment;
  const size_t partial_rows = static_cast<size_t>(partial_slots(*prepared.variant, p) * prepared.variant->block_rows);
  prepared.partials_bytes = sizeof(float) * partial_rows * static_cast<size_t>(d_v);
  prepared.workspace_bytes = prepared.schedule_bytes + prepared.partials_bytes + sizeof(float) * partial_rows;
  p.lengths.max_len = std::min(p.lengths.max_len, tensors[kBlockTable].size(1) * p.page_size);

  for (int slot = 0; slot < kNumSlots; ++slot) prepared.reach[slot] = reach_of(tensors[slot]);
  for (int written = kFirstWritten; written < kNumSlots; ++written)
    for (int other = 0; other < written; ++other)
      prepared.apart[written - kFirstWritten][other] = tensors[other].data - tensors[written].data;
}

// ---- Doing ----

template <class T>
void set(T*& field, uintptr_t address) {
  field = reinterpret_cast<T*>(address);
}

nb::object result(nb::handle given, const Allocation& otherwise) {
  return given.is_none() ? torch::empty_strided(otherwise.arguments, otherwise.options) : nb::borrow(given);
}

nb::object queue(const Prepared& prepared, const Call& call) {
  const auto& tensors = call.tensors;
  const auto rope_of = [&](Slot packed, Slot rope) {
    return tensors[rope].exists() ? tensors[rope].data : tensors[packed].data + prepared.rope_bytes;
  };
  DecodeParams p = prepared.params;
  set(p.lengths.seq_lens, tensors[kSeqLens].data);
  set(p.lengths.cu_seqlens_q, tensors[kCuSeqlensQ].data);
  set(p.q_nope, tensors[kQ].data);
  set(p.q_rope, rope_of(kQ, kQRope));
  set(p.latent, tensors[kKv].data);
  set(p.rope, rope_of(kKv, kKvRope));
  set(p.block_table, tensors[kBlockTable].data);
  p.scale_log2 = static_cast<float>(call.scale * M_LOG2E);

  const nb::object out = result(call.out, prepared.out);
  set(p.out, call.out.is_none() ? torch::address_of(out) : tensors[kOut].data);
  nb::object lse = nb::none();
  if (call.return_lse || !call.lse.is_none()) {
    lse = result(call.lse, prepared.lse);
    set(p.lse, call.lse.is_none() ? torch::address_of(lse) : tensors[kLse].data);
  }

  const uintptr_t stream = torch::current_stream(prepared.device);
  Scratch scratch;
  if (tensors[kWorkspace].exists()) scratch.data = tensors[kWorkspace].data;
  else if (queue_is_captured(prepared.device, stream))  // the graph keeps it, in torch's pool of that graph
    scratch = new_workspace(prepared.workspace_bytes, prepared.torch_device);
  else scratch = reserve_workspace(prepared.device, stream, prepared.workspace_bytes, prepared.torch_device);
  // The GIL is held from here to the end: calls of two threads on one stream share its workspace, so their launches must not mix.
  set(p.o_partial, scratch.data + prepared.schedule_bytes);
  set(p.lse2_partial, scratch.data + prepared.schedule_bytes + prepared.partials_bytes);
  if (call.plan) {
    p.plan = call.plan->address();
  } else {
    set(p.plan, scratch.data);
    queue_plan(*prepared.variant, p, prepared.device, stream);
  }
  queue_decode(*prepared.variant, prepared.dtype, p, prepared.device, stream);
  return call.return_lse ? nb::make_tuple(out, lse) : out;
}

}  // namespace

nb::object decode_prepared(const Arguments& arguments) {
  Call call;
  if (!recognise(arguments, call)) return {};
  const auto found = table().find(call.key);
  if (found == table().end()) return {};
  const std::shared_ptr<const Prepared> prepared = found->second;  // the table may drop it when the GIL is released
  return addresses_in_order(*prepared, call) ? queue(*prepared, call) : nb::object();
}

nb::object decode_first(const Arguments& arguments, const Variant& variant, Dtype dtype, int device,
                        const DecodeParams& sizes) {
  Call call;
  read_checked(arguments, call);
  const auto made = std::make_shared<Prepared>();
  made->variant = &variant;
  made->dtype = dtype;
  made->device = device;
  made->params = sizes;
  fill(*made, arguments, call);
  if (table().size() >= kMaxPrepared) forget_calls();
  table()[call.key] = made;
  return queue(*made, call);
}

size_t num_prepared() { return table().size(); }

void forget_calls() {
  const Table dropped = std::exchange(table(), {});  // objects are freed when nothing refers to them any more
}

}  // namespace mla
