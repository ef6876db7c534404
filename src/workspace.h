// Scratch memory of the launches, kept for each device and stream.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <vector>

namespace mla {

// A schedule takes a multiple of this in a workspace; the partial results lie behind it.
constexpr size_t kScheduleAlignment = 256;

struct Scratch {
  nanobind::object tensor;  // keeps the memory
  uintptr_t data = 0;
};

// The buffer of the stream, grown if it is smaller. Good until the GIL is released: another thread's call on the same stream may
// use it then.
Scratch reserve_workspace(int device, uintptr_t stream, size_t bytes, nanobind::handle torch_device);

// A buffer of its own for one call.
Scratch new_workspace(size_t bytes, nanobind::handle torch_device);

// What is kept: device, stream and bytes of each.
std::vector<std::tuple<int, uintptr_t, size_t>> kept_workspaces();
void drop_workspaces();

}  // namespace mla
