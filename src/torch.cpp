#include "torch.h"

#include <stdexcept>

namespace nb = nanobind;

namespace mla {
namespace {

enum DlDevice { kCpu = 1, kCuda = 2 };  // DLPack's

}  // namespace

bool is_cuda(int64_t place) { return (place & 0xff) == kCuda; }

uintptr_t reach_of(const TensorView& tensor) {
  if (!tensor.exists()) return 0;
  int64_t elements = 1;
  for (int i = 0; i < tensor.ndim(); ++i) {
    if (tensor.size(i) == 0) return 0;
    elements += (tensor.size(i) - 1) * tensor.stride(i);
  }
  return static_cast<uintptr_t>(elements * tensor.item_bytes());
}

namespace torch {
namespace {

// ---- The part of DLPack's exchange API, version 1, that is used ----

struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchangeApi {
  uint32_t major_version, minor_version;
  DlExchangeApi* of_older_version;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*describe)(void* tensor, DlTensor* described);  // borrows; -1 with a Python error
};
enum DlCode { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4 };

// ---- torch ----

// Held for the life of the process.
struct Torch {
  PyObject *tensor, *parameter, *is_grad_enabled, *empty, *empty_strided, *zeros, *c_module;
  PyObject *current_stream, *requires_grad, *dtype, *shape, *stride, *data_ptr, *is_cuda, *get_device;
  struct {
    PyObject* dtype;
    DlCode code;
    int bits;
  } dtypes[5];
  const DlExchangeApi* exchange = nullptr;
  bool use_exchange = true;
};

PyObject* get(nb::handle from, const char* name) { return nb::object(from.attr(name)).release().ptr(); }

const DlExchangeApi* find_exchange(nb::handle tensor_type) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type.ptr(), "__dlpack_c_exchange_api__");
  void* found = capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")
                    ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
                    : nullptr;
  Py_XDECREF(capsule);
  PyErr_Clear();
  const auto* api = static_cast<const DlExchangeApi*>(found);
  while (api && api->major_version > 1) api = api->of_older_version;
  return api && api->major_version == 1 && api->describe ? api : nullptr;
}

// At the first call that has a tensor. No lock: the GIL is held, and who comes second only does it again.
Torch& torch() {
  static Torch* found = nullptr;
  if (found) return *found;
  const nb::object module = nb::module_::import_("torch");
  auto* made = new Torch{};
  made->tensor = get(module, "Tensor");
  made->parameter = get(module.attr("nn"), "Parameter");
  made->is_grad_enabled = get(module, "is_grad_enabled");
  made->empty = get(module, "empty");
  made->empty_strided = get(module, "empty_strided");
  made->zeros = get(module, "zeros");
  made->c_module = get(module, "_C");
  made->current_stream = PyUnicode_InternFromString("_cuda_getCurrentRawStream");
  made->requires_grad = PyUnicode_InternFromString("requires_grad");
  made->dtype = PyUnicode_InternFromString("dtype");
  made->shape = PyUnicode_InternFromString("shape");
  made->stride = PyUnicode_InternFromString("stride");
  made->data_ptr = PyUnicode_InternFromString("data_ptr");
  made->is_cuda = PyUnicode_InternFromString("is_cuda");
  made->get_device = PyUnicode_InternFromString("get_device");
  made->dtypes[0] = {get(module, "bfloat16"), kBfloat, 16};
  made->dtypes[1] = {get(module, "float16"), kFloat, 16};
  made->dtypes[2] = {get(module, "int32"), kInt, 32};
  made->dtypes[3] = {get(module, "float32"), kFloat, 32};
  made->dtypes[4] = {get(module, "uint8"), kUint, 8};
  made->exchange = find_exchange(made->tensor);
  found = made;
  return *found;
}

nb::object checked(PyObject* result) {
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

int64_t first_word(int ndim, int code, int bits, int lanes, int device_type, int device_index) {
  return ndim | int64_t{code} << 8 | int64_t{bits} << 16 | int64_t{lanes} << 24 | int64_t{device_type} << 40 |
         int64_t{device_index} << 48;
}

bool read_exchange(const DlExchangeApi& api, PyObject* tensor, TensorView& view, int64_t* words) {
  DlTensor described;
  if (api.describe(tensor, &described) != 0) {
    PyErr_Clear();
    return false;
  }
  const int ndim = described.ndim;
  if (ndim > kMaxDims || (ndim > 0 && !described.strides)) return false;
  view.data = reinterpret_cast<uintptr_t>(described.data) + described.byte_offset;
  view.words = words;
  words[0] = first_word(ndim, described.dtype_code, described.dtype_bits, described.dtype_lanes, described.device_type,
                        described.device_index);
  for (int i = 0; i < ndim; ++i) {
    words[1 + i] = described.sizes[i];
    words[1 + ndim + i] = described.strides[i];
  }
  return true;
}

void read_attributes(nb::handle tensor, TensorView& view, int64_t* words) {
  const Torch& names = torch();
  const auto attribute = [&](PyObject* name) { return checked(PyObject_GetAttr(tensor.ptr(), name)); };
  const auto call = [&](PyObject* name) {
    return checked(PyObject_CallMethodObjArgs(tensor.ptr(), name, static_cast<PyObject*>(nullptr)));
  };
  const nb::object dtype = attribute(names.dtype), sizes = attribute(names.shape), strides = call(names.stride);
  const int ndim = static_cast<int>(nb::len(sizes));
  const auto* known = names.dtypes;
  while (known != std::end(names.dtypes) && !dtype.is(known->dtype)) ++known;
  if (ndim > kMaxDims || known == std::end(names.dtypes)) throw std::invalid_argument("not a tensor that a call has");
  const bool cuda = nb::cast<bool>(attribute(names.is_cuda));
  view.data = nb::cast<uintptr_t>(call(names.data_ptr));
  view.words = words;
  words[0] = first_word(ndim, known->code, known->bits, 1, cuda ? kCuda : kCpu,
                        cuda ? nb::cast<int>(call(names.get_device)) : 0);
  for (int i = 0; i < ndim; ++i) {
    words[1 + i] = nb::cast<int64_t>(sizes[i]);
    words[1 + ndim + i] = nb::cast<int64_t>(strides[i]);
  }
  if (view.data == 0 && reach_of(view) > 0)  // a FakeTensor says so
    throw std::invalid_argument("got a tensor with elements at address 0, expected one with memory");
}

}  // namespace

bool read(nb::handle tensor, TensorView& view, int64_t* words) {
  const Torch& known = torch();
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (type != known.tensor && type != known.parameter) return false;
  if (known.exchange && known.use_exchange) return read_exchange(*known.exchange, tensor.ptr(), view, words);
  try {
    read_attributes(tensor, view, words);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void read_any(nb::handle tensor, TensorView& view, int64_t* words) {
  if (!read(tensor, view, words)) read_attributes(tensor, view, words);
}

uintptr_t address_of(nb::handle tensor) {
  TensorView view;
  int64_t words[kMaxTensorWords];
  read_any(tensor, view, words);
  return view.data;
}

bool has_exchange_api() { return torch().exchange; }
void use_exchange_api(bool wanted) { torch().use_exchange = wanted; }

uintptr_t current_stream(int device) {
  const Torch& known = torch();
  const nb::object index = nb::int_(device);
  // Looked up at each call: it is there only where torch is built with CUDA. In the module's dict, as that takes less than an attribute.
  PyObject* const found = PyDict_GetItemWithError(PyModule_GetDict(known.c_module), known.current_stream);
  const nb::object function =
      found ? nb::borrow(found) : checked(PyObject_GetAttr(known.c_module, known.current_stream));
  return nb::cast<uintptr_t>(
      checked(PyObject_CallFunctionObjArgs(function.ptr(), index.ptr(), static_cast<PyObject*>(nullptr))));
}

bool grad_enabled() { return checked(PyObject_CallNoArgs(torch().is_grad_enabled)).is(Py_True); }

bool requires_grad(nb::handle tensor) {
  return !checked(PyObject_GetAttr(tensor.ptr(), torch().requires_grad)).is(Py_False);
}

nb::object empty(nb::handle arguments, nb::handle options) {
  return checked(PyObject_Call(torch().empty, arguments.ptr(), options.ptr()));
}

nb::object empty_strided(nb::handle arguments, nb::handle options) {
  return checked(PyObject_Call(torch().empty_strided, arguments.ptr(), options.ptr()));
}

nb::object zeros(nb::handle arguments, nb::handle options) {
  return checked(PyObject_Call(torch().zeros, arguments.ptr(), options.ptr()));
}

}  // namespace torch
}  // namespace mla
