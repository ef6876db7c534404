#include "workspace.h"

#include <map>
#include <stdexcept>
#include <utility>

#include "torch.h"

namespace nb = nanobind;

namespace mla {
namespace {

struct Kept : Scratch {
  size_t bytes = 0;
};

// Never destroyed: when the process ends, there may be no Python to give tensors back to.
std::map<std::pair<int, uintptr_t>, Kept>& all_kept() {
  static auto* kept = new std::map<std::pair<int, uintptr_t>, Kept>;
  return *kept;
}

Scratch allocate(nb::object (*make)(nb::handle, nb::handle), size_t bytes, nb::handle torch_device) {
  nb::dict options;
  options["dtype"] = nb::module_::import_("torch").attr("uint8");
  options["device"] = torch_device;
  Scratch made{make(nb::make_tuple(bytes), options)};
  made.data = torch::address_of(made.tensor);
  return made;
}

}  // namespace

Scratch reserve_workspace(int device, uintptr_t stream, size_t bytes, nb::handle torch_device) {
  auto& all = all_kept();
  const std::pair key(device, stream);
  if (const auto found = all.find(key); found != all.end() && found->second.bytes >= bytes) return found->second;
  {
    const auto smaller = all.extract(key);
  }  // lets torch reuse the memory for what comes next
  const Scratch made = allocate(torch::zeros, bytes, torch_device);
  // Allocating may have let another thread in, whose buffer is given back here: torch reuses it in the order of the stream.
  const Kept before = std::exchange(all[key], Kept{made, bytes});
  return made;
}

Scratch new_workspace(size_t bytes, nb::handle torch_device) { return allocate(torch::empty, bytes, torch_device); }

std::vector<std::tuple<int, uintptr_t, size_t>> kept_workspaces() {
  std::vector<std::tuple<int, uintptr_t, size_t>> result;
  for (const auto& [key, kept] : all_kept()) result.emplace_back(key.first, key.second, kept.bytes);
  return result;
}

void drop_workspaces() {
  // Tensors are freed when nothing refers to them any more: other threads may run then.
  const auto dropped = std::exchange(all_kept(), {});
}

}  // namespace mla
