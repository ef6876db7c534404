// Outputs that a call makes.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "torch.h"

namespace mla {

// What they are made by.
struct Allocation {
  nanobind::object arguments, options;  // of torch.empty_strided, which takes less time than torch.empty
  nanobind::object quick_arguments;     // of what takes less than that
  int64_t place = 0;                    // TensorView::place
};

// Contiguous, on the device of q, with its leading dimensions, and `columns` if they are not 0.
Allocation plan_allocation(const TensorView& q, int columns, nanobind::handle dtype, nanobind::handle device);

struct Made {
  nanobind::object tensor;
  uintptr_t data;
};
Made allocate(const Allocation& allocation);

}  // namespace mla
