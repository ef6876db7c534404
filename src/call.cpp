#include "call.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace nb = nanobind;

namespace mla {
namespace {

using Read = bool (*)(nb::handle, TensorView&, int64_t*);

bool read_any(nb::handle tensor, TensorView& view, int64_t* words) {
  torch::read_any(tensor, view, words);
  return true;
}

bool read_one(Read read, nb::handle tensor, Call& call, int slot) {
  TensorView& view = call.tensors[slot];
  view.words = call.key.room();
  if (tensor.is_none()) call.key.add(0);
  else if (read(tensor, view, call.key.room())) call.key.take(view.num_words());
  else return false;
  return true;
}

// A tensor or a pair of them, for two slots.
bool read_parts(Read read, nb::handle value, Call& call, int slot) {
  if (!PyTuple_Check(value.ptr()) && !PyList_Check(value.ptr()))
    return read_one(read, value, call, slot) && read_one(read, nb::none(), call, slot + 1);
  if (nb::len(value) != 2) return false;
  const nb::object first = value[0], second = value[1];
  return read_one(read, first, call, slot) && read_one(read, second, call, slot + 1);
}

bool read_tensors(Read read, const Arguments& arguments, Call& call) {
  return read_parts(read, arguments.q, call, kQ) && read_parts(read, arguments.kv_cache, call, kKv) &&
         read_one(read, arguments.block_table, call, kBlockTable) &&
         read_one(read, arguments.seq_lens, call, kSeqLens) &&
         read_one(read, arguments.cu_seqlens_q, call, kCuSeqlensQ) && read_one(read, arguments.out, call, kOut) &&
         read_one(read, arguments.lse, call, kLse) && read_one(read, arguments.workspace, call, kWorkspace);
}

bool read_flag(nb::handle value, bool& flag) {
  flag = value.is(Py_True);
  return flag || value.is(Py_False);
}

bool read_scale(nb::handle value, double& scale) {
  if (!PyFloat_Check(value.ptr()) && !PyLong_CheckExact(value.ptr())) return false;
  scale = PyFloat_AsDouble(value.ptr());
  if (scale == -1 && PyErr_Occurred()) PyErr_Clear(), scale = NAN;
  return std::isfinite(scale);
}

// -1 for None.
bool read_size(nb::handle value, int32_t& size) {
  size = -1;
  return value.is_none() || (PyLong_CheckExact(value.ptr()) && nb::try_cast(value, size) && size >= 0);
}

bool read_plan(nb::handle plan, Call& call) {
  if (plan.is_none()) return true;
  static PyObject* const name = PyUnicode_InternFromString("_schedule");
  const nb::object schedule = nb::steal(PyObject_GetAttr(plan.ptr(), name));  // which the plan keeps
  if (!schedule.is_valid()) PyErr_Clear();
  return schedule.is_valid() && nb::try_cast(schedule, call.plan) && call.plan;
}

bool needs_backward(nb::handle value) {
  if (value.is_none()) return false;
  if (!PyTuple_Check(value.ptr()) && !PyList_Check(value.ptr())) return torch::requires_grad(value);
  return torch::requires_grad(value[0]) || torch::requires_grad(value[1]);
}

bool read(Read read_tensor, const Arguments& arguments, Call& call) {
  int32_t d_v, max_seq_len;
  if (!read_tensors(read_tensor, arguments, call) || !read_flag(arguments.causal, call.causal) ||
      !read_flag(arguments.return_lse, call.return_lse) ||
      !read_flag(arguments.batch_invariant, call.batch_invariant) || !read_scale(arguments.scale, call.scale) ||
      !read_size(arguments.d_v, d_v) || !read_size(arguments.max_seq_len, max_seq_len) ||
      !read_plan(arguments.plan, call) || !call.key.add_text(arguments.forced))
    return false;
  if (call.plan)
    for (const int64_t word : call.plan->words()) call.key.add(word);
  // What was logged once is another call than what was not.
  call.options = call.causal | call.return_lse << 1 | arguments.settings.logs_dispatch << 2 | !!call.plan << 3 |
                 call.batch_invariant << 4 | int64_t{d_v} << 32;
  call.key.add(call.options);
  if (!call.plan) call.max_seq_len = rounded_length(max_seq_len);
  call.key.add(call.max_seq_len);
  call.out = arguments.out;
  call.lse = arguments.lse;
  return true;
}

}  // namespace

int32_t rounded_length(int32_t length) {
  int64_t step = 1;
  while (length >= step * 16) step *= 2;
  return static_cast<int32_t>(std::min<int64_t>((length + step - 1) / step * step, INT32_MAX));
}

bool Key::add_text(std::string_view text) {
  if (text.size() > kMaxTextBytes) return false;
  for (size_t at = 0; at < text.size(); at += 8) {
    int64_t word = 0;
    std::memcpy(&word, text.data() + at, std::min<size_t>(8, text.size() - at));
    add(word);
  }
  add(static_cast<int64_t>(text.size()));
  return true;
}

bool Key::operator==(const Key& other) const {
  return size_ == other.size_ && std::equal(words_.data(), words_.data() + size_, other.words_.data());
}

// Four sums side by side, as each multiplication waits for the one before it in its sum.
size_t Key::hash() const {
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15;
  uint64_t sums[4] = {1, 2, 3, 4};
  const auto add = [&](int i, int sum) { sums[sum] = (sums[sum] ^ static_cast<uint64_t>(words_[i])) * kFactor; };
  int done = 0;
  for (; done + 4 <= size_; done += 4)
    for (int sum = 0; sum < 4; ++sum) add(done + sum, sum);  // which stay in registers
  for (; done < size_; ++done) add(done, done % 4);
  uint64_t all = static_cast<uint64_t>(size_);
  for (const uint64_t sum : sums) all = (all ^ sum ^ sum >> 32) * kFactor;
  return all ^ all >> 32;
}

bool recognise(const Arguments& arguments, Call& call) {
  if (arguments.settings.validates || !read(torch::read, arguments, call)) return false;
  if (!torch::grad_enabled()) return true;
  for (const nb::handle value : {arguments.q, arguments.kv_cache, arguments.out, arguments.lse})
    if (needs_backward(value)) return false;
  return true;
}

void read_checked(const Arguments& arguments, Call& call) {
  if (!read(read_any, arguments, call)) throw nb::value_error("a call that was not checked");
}

}  // namespace mla
