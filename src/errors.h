// C++ exceptions as Python's.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>

namespace mla {

// Makes _mla.CudaError, and has functions of the module raise it.
void bind_errors(nanobind::module_& m);

// For functions that nanobind does not call: makes it the error that Python is told.
void set_error(const std::exception& error);

}  // namespace mla
