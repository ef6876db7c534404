#include "bind_params.h"

#include <cstdint>

#include "params.h"

namespace nb = nanobind;

namespace mla {
namespace {

// A pointer is an integer in Python.
template <class T>
T to_python(T value) {
  return value;
}
template <class T>
uintptr_t to_python(T* value) {
  return reinterpret_cast<uintptr_t>(value);
}
template <class T>
T from_python(T value, T) {
  return value;
}
template <class T>
T* from_python(uintptr_t value, T*) {
  return reinterpret_cast<T*>(value);
}

// Python's name and the field of DecodeParams, for every leaf that the caller gives.
// clang-format off
#define MLA_PARAMS(X)                                                                                               \
  X(seq_lens, lengths.seq_lens) X(cu_seqlens_q, lengths.cu_seqlens_q) X(num_requests, lengths.num_requests)         \
  X(s_q, lengths.s_q) X(total_q, lengths.total_q) X(h_q, lengths.h_q) X(max_len, lengths.max_len)                   \
  X(q_nope, q_nope) X(q_rope, q_rope)                                                                               \
  X(q_nope_batch, q_nope_strides.batch) X(q_nope_token, q_nope_strides.token) X(q_nope_head, q_nope_strides.head)   \
  X(q_rope_batch, q_rope_strides.batch) X(q_rope_token, q_rope_strides.token) X(q_rope_head, q_rope_strides.head)   \
  X(latent, latent) X(rope, rope)                                                                                   \
  X(latent_page, latent_strides.page) X(latent_token, latent_strides.token)                                         \
  X(rope_page, rope_strides.page) X(rope_token, rope_strides.token)                                                 \
  X(block_table, block_table) X(block_table_stride, block_table_stride)                                             \
  X(num_pages, num_pages) X(page_size, page_size)                                                                   \
  X(out, out) X(out_batch, out_strides.batch) X(out_token, out_strides.token) X(out_head, out_strides.head)         \
  X(lse, lse) X(lse_batch, lse_strides.batch) X(lse_token, lse_strides.token) X(lse_head, lse_strides.head)         \
  X(scale_log2, scale_log2) X(causal, causal) X(plan, plan) X(num_workers, num_workers)                             \
  X(batch_invariant, batch_invariant)                                                                               \
  X(o_partial, o_partial) X(lse2_partial, lse2_partial)
// clang-format on

#define X(name, field) +sizeof(DecodeParams::field)
constexpr size_t kFilledByLaunch = 2 * sizeof(FastDivisor) + sizeof(DecodeParams::box_rows) + 2 * sizeof(TensorMap);
constexpr size_t kPaddingBeforeMaps = 20;
static_assert(0 MLA_PARAMS(X) + kFilledByLaunch + kPaddingBeforeMaps == sizeof(DecodeParams),
              "a field of params.h has no attribute");
#undef X

}  // namespace

void bind_params(nb::module_& m) {
  nb::class_<DecodeParams> params(m, "DecodeParams",
                                  "The parameters of a launch. Pointers are integers; strides count elements.");
  params.def("__init__", [](DecodeParams* self) { new (self) DecodeParams{}; });
#define X(name, field)                                                          \
  params.def_prop_rw(                                                           \
      #name, [](const DecodeParams& self) { return to_python(self.field); },    \
      [](DecodeParams& self, decltype(to_python(DecodeParams{}.field)) value) { \
        self.field = from_python(value, decltype(DecodeParams{}.field){});      \
      });
  MLA_PARAMS(X)
#undef X
  m.attr("PARAMS_BYTES") = sizeof(DecodeParams);
}

}  // namespace mla
