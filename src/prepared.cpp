#include "prepared.h"

#include <cmath>
#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>

#include "chooser.h"
#include "kind.h"
#include "prepare.h"
#include "queue.h"
#include "workspace.h"

namespace nb = nanobind;

namespace mla {
namespace {

// More than this are dropped, all at once. Each takes 2 KB.
constexpr size_t kMaxPrepared = 4096;

// Calls that differ in sizes only: what Python decided for the last of them that it saw.
struct Kind {
  Decision decision;
  std::optional<Chooser> chooser;  // none if the variant is the same for all
};

struct HashKey {
  size_t operator()(const Key& key) const { return key.hash(); }
};
template <class Value>
using Table = std::unordered_map<Key, std::shared_ptr<const Value>, HashKey>;
struct Tables {
  Table<Prepared> prepared;
  Table<Kind> kinds;
  const Table<Prepared>::value_type* last = nullptr;  // of `prepared`, as it was found last
};

// Never destroyed: when the process ends, there may be no Python to give objects back to.
Tables& tables() {
  static auto* all = new Tables;
  return *all;
}

// What was prepared for a key, null if nothing was. Layers of a model have the same key, so the last one is looked at first.
std::shared_ptr<const Prepared> find(const Key& key) {
  auto& [prepared, kinds, last] = tables();
  if (!last || !(last->first == key)) {
    const auto found = prepared.find(key);
    if (found == prepared.end()) return {};
    last = &*found;
  }
  return last->second;
}

void keep(const Call& call, const std::shared_ptr<const Prepared>& made) {
  if (tables().prepared.size() >= kMaxPrepared) forget_calls();
  tables().prepared[call.key] = made;
}

template <class T>
void set(T*& field, uintptr_t address) {
  field = reinterpret_cast<T*>(address);
}

// An output that the caller gave, or one that is made.
Made output(nb::handle given, const TensorView& view, const Allocation& otherwise) {
  return given.is_none() ? allocate(otherwise) : Made{nb::borrow(given), view.data};
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

  const Made out = output(call.out, tensors[kOut], prepared.out);
  set(p.out, out.data);
  Made lse{nb::none(), 0};
  if (call.return_lse || !call.lse.is_none()) lse = output(call.lse, tensors[kLse], prepared.lse);
  set(p.lse, lse.data);

  const uintptr_t stream = torch::current_stream(prepared.device);
  const bool captured = queue_is_captured(prepared.device, stream);
  Scratch scratch;
  if (tensors[kWorkspace].exists()) scratch.data = tensors[kWorkspace].data;
  else if (captured)  // the graph keeps it, in torch's pool of that graph
    scratch = new_workspace(prepared.workspace_bytes, prepared.torch_device);
  else scratch = reserve_workspace(prepared.device, stream, prepared.workspace_bytes, prepared.torch_device);
  // The GIL is held from here to the end: calls of two threads on one stream share its workspace, so their launches must not mix.
  if (prepared.partials_bytes > 0) {
    set(p.o_partial, scratch.data + prepared.schedule_bytes);
    set(p.lse2_partial, scratch.data + prepared.schedule_bytes + prepared.partials_bytes);
  }
  if (call.plan) p.plan = call.plan->address();
  else set(p.plan, scratch.data);
  queue_decode(*prepared.variant, prepared.dtype, p, !call.plan, prepared.device, stream, captured);
  return call.return_lse ? nb::make_tuple(out.tensor, lse.tensor) : out.tensor;
}

// A call that is like one that Python saw but for its sizes, if they are clearly right.
std::shared_ptr<const Prepared> prepare_alike(const Arguments& arguments, const Call& call) {
  if (arguments.settings.logs_dispatch) return {};
  const auto found = tables().kinds.find(kind_of(arguments, call));
  if (found == tables().kinds.end()) return {};
  const std::shared_ptr<const Kind> kind = found->second;
  Decision decision = kind->decision;
  if (!read_sizes(call, decision.sizes)) return {};
  if (kind->chooser) {
    const Lengths& l = decision.sizes.lengths;
    decision.variant = &kind->chooser->fastest(
        {l.num_requests, l.total_q, l.h_q, l.max_len, call.tensors[kKv].size(1), call.max_seq_len});
  }
  const auto made = std::make_shared<Prepared>();
  prepare(decision, arguments, call, *made);
  const TensorView& workspace = call.tensors[kWorkspace];
  if (workspace.exists() && workspace.size(0) < static_cast<int64_t>(made->workspace_bytes)) return {};
  if (!aligned(*made, call) || !apart(*made, call)) return {};
  keep(call, made);
  return made;
}

}  // namespace

nb::object decode_prepared(const Arguments& arguments) {
  Call call;
  if (!recognise(arguments, call)) return {};
  // A copy, as the table may drop it when the GIL is released.
  std::shared_ptr<const Prepared> prepared = find(call.key);
  if (!prepared) prepared = prepare_alike(arguments, call);
  else if (!aligned(*prepared, call) || !apart_as_before(*prepared, call)) return {};
  return prepared ? queue(*prepared, call) : nb::object();
}

nb::object decode_first(const Arguments& arguments, const Variant& variant, Dtype dtype, int device,
                        const DecodeParams& sizes, nb::handle chooser) {
  Call call;
  read_checked(arguments, call);
  const Decision decision{&variant, dtype, device, sizes};
  const auto made = std::make_shared<Prepared>();
  prepare(decision, arguments, call, *made);
  keep(call, made);
  auto kind = std::make_shared<Kind>(Kind{decision, {}});
  if (!chooser.is_none()) kind->chooser = nb::cast<const Chooser&>(chooser);
  tables().kinds[kind_of(arguments, call)] = kind;
  return queue(*made, call);
}

size_t num_prepared() { return tables().prepared.size(); }

void forget_calls() {
  const Tables dropped = std::exchange(tables(), {});  // objects are freed when nothing refers to them any more
}

}  // namespace mla
