#include "allocation.h"

#include <array>

#include "driver.h"

namespace nb = nanobind;

namespace mla {
namespace {

// What torch's compiler has its programs allocate by: without torch's dispatcher, on the thread's current device. Null in a torch that
// does not have it, or not in this form.
PyObject* find_quick(bool on_cuda) {
  try {
    const nb::module_ module = nb::module_::import_("torch");
    const nb::object guards = module.attr("_C").attr("_dynamo").attr("guards");
    const nb::object dtype = module.attr("float32"), one = nb::make_tuple(1);
    const nb::object tried = guards.attr("_empty_strided_cpu")(one, one, dtype);
    const nb::object quick = guards.attr(on_cuda ? "_empty_strided_cuda" : "_empty_strided_cpu");
    return tried.attr("dtype").is(dtype) ? quick.inc_ref().ptr() : nullptr;
  } catch (const nb::python_error&) {
    return nullptr;
  }
}

PyObject* quick(bool on_cuda) {
  static const std::array<PyObject*, 2> found{find_quick(false), find_quick(true)};
  return found[on_cuda];
}

}  // namespace

Allocation plan_allocation(const TensorView& q, int columns, nb::handle dtype, nb::handle device) {
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
  const nb::tuple shape(sizes), steps(strides);
  return {nb::make_tuple(shape, steps), options, nb::make_tuple(shape, steps, dtype), q.place()};
}

Made allocate(const Allocation& allocation) {
  const bool on_cuda = is_cuda(allocation.place);
  PyObject* const function = quick(on_cuda);
  if (function && (!on_cuda || is_current(index_of(allocation.place)))) {
    nb::object made = nb::steal(PyObject_Call(function, allocation.quick_arguments.ptr(), nullptr));
    if (!made.is_valid()) throw nb::python_error();
    TensorView view;
    int64_t words[kMaxTensorWords];
    if (torch::read(made, view, words) && view.place() == allocation.place) return {made, view.data};
  }
  nb::object made = torch::empty_strided(allocation.arguments, allocation.options);
  const uintptr_t data = torch::address_of(made);
  return {made, data};
}

}  // namespace mla
