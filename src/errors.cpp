#include "errors.h"

#include <nanobind/stl/string.h>

#include <string>

#include "driver.h"

namespace nb = nanobind;

namespace mla {
namespace {

PyObject* cuda_error = nullptr;

void set_cuda_error(const CudaError& error) {
  nb::object raised = nb::handle(cuda_error)(error.what());
  raised.attr("api") = error.api();
  raised.attr("code") = error.code();
  raised.attr("text") = error.text();
  PyErr_SetObject(cuda_error, raised.ptr());
}

}  // namespace

void bind_errors(nb::module_& m) {
  const std::string name = nb::cast<std::string>(m.attr("__name__")) + ".CudaError";
  cuda_error = PyErr_NewExceptionWithDoc(
      name.c_str(),
      "A call of the CUDA driver failed: its name `api`, its result `code` and what it means, "
      "`text`. `code` is -1 when there is no driver that can be used.",
      PyExc_RuntimeError, nullptr);
  m.attr("CudaError") = nb::handle(cuda_error);
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const CudaError& error) {
      set_cuda_error(error);
    }
  });
}

void set_error(const std::exception& error) {
  if (const auto* of_driver = dynamic_cast<const CudaError*>(&error)) set_cuda_error(*of_driver);
  else PyErr_SetString(PyExc_RuntimeError, error.what());
}

}  // namespace mla
