// What the extension uses of torch, which it does not link: objects and functions that it finds in the imported package.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace mla {

constexpr int kMaxDims = 4;
constexpr int kMaxTensorWords = 1 + 2 * kMaxDims;

// A tensor without its contents. All but the address is in words, so that tensors can be compared by them: one for dtype, device
// and number of dimensions (0: no tensor), then the sizes, then the strides in elements. Who has it read owns the words.
struct TensorView {
  uintptr_t data = 0;
  const int64_t* words = nullptr;

  bool exists() const { return words[0] != 0; }
  int ndim() const { return static_cast<int>(words[0] & 0xff); }
  int item_bytes() const { return static_cast<int>(words[0] >> 16 & 0xff) / 8; }
  int64_t place() const { return words[0] >> 40; }  // of is_cuda() and index_of()
  int num_words() const { return 1 + 2 * ndim(); }
  int64_t size(int dim) const { return words[1 + dim]; }
  int64_t stride(int dim) const { return words[1 + ndim() + dim]; }
};

// Of the device that a place says.
bool is_cuda(int64_t place);
constexpr int index_of(int64_t place) { return static_cast<int>(place >> 8); }

// Bytes from its first to behind its last; 0 of no tensor and of one without elements.
uintptr_t reach_of(const TensorView& tensor);

namespace torch {

// False, and no error, for what is not exactly a torch.Tensor or Parameter, or cannot be described in kMaxTensorWords.
bool read(nanobind::handle tensor, TensorView& view, int64_t* words);
// Of any object with the attributes of a tensor. Throws what these raise, and std::invalid_argument for a tensor that no call has.
void read_any(nanobind::handle tensor, TensorView& view, int64_t* words);

uintptr_t address_of(nanobind::handle tensor);

// Whether torch has DLPack's exchange API, as recent ones do. Attributes are read otherwise.
bool has_exchange_api();
// For tests: whether to read by it where torch has it.
void use_exchange_api(bool wanted);

uintptr_t current_stream(int device);
bool grad_enabled();
bool requires_grad(nanobind::handle tensor);

// Of torch's functions of these names, called with *arguments and **options.
nanobind::object empty(nanobind::handle arguments, nanobind::handle options);
nanobind::object empty_strided(nanobind::handle arguments, nanobind::handle options);
nanobind::object zeros(nanobind::handle arguments, nanobind::handle options);

}  // namespace torch
}  // namespace mla
