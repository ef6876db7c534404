#include "queue.h"

#include <utility>

#include "driver.h"

namespace nb = nanobind;

namespace mla {
namespace {

struct Redirection {
  nb::object launch_plan, launch_decode, capturing;
};
Redirection* redirection = nullptr;

nb::str to_str(std::string_view text) { return nb::str(text.data(), text.size()); }

}  // namespace

void redirect(nb::object launch_plan, nb::object launch_decode, nb::object capturing) {
  const bool undo = launch_plan.is_none();
  delete std::exchange(redirection, undo ? nullptr : new Redirection{launch_plan, launch_decode, capturing});
}

void queue_plan(const Variant& variant, const DecodeParams& params, int device, uintptr_t stream) {
  if (redirection) redirection->launch_plan(to_str(variant.name), nb::cast(params), device, stream);
  else launch_plan(variant, params, device, stream);
}

void queue_decode(const Variant& variant, Dtype dtype, const DecodeParams& params, bool plans, int device,
                  uintptr_t stream, bool captured) {
  if (redirection)
    redirection->launch_decode(to_str(variant.name), to_str(name_of(dtype)), nb::cast(params), plans, device, stream);
  else launch_decode(variant, dtype, params, plans, device, stream, captured);
}

bool queue_is_captured(int device, uintptr_t stream) {
  return redirection ? nb::cast<bool>(redirection->capturing(device, stream)) : capturing(device, stream);
}

}  // namespace mla
