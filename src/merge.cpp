#include "merge.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "chain.h"
#include "common/merge.h"

namespace mla {
namespace {

constexpr int kVectorBytes = 16;

struct Element {
  const char* name;
  int bytes;
};

Element element_of(std::string_view dtype) {
  if (dtype == "bfloat16") return {"bf16", 2};
  if (dtype == "float16") return {"fp16", 2};
  if (dtype == "float32") return {"fp32", 4};
  throw std::out_of_range("no kernel merges " + std::string(dtype));
}

void check(const std::array<int64_t, 3>& sizes, int64_t d) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  int64_t rows = 1;
  for (const int64_t size : sizes) {
    if (size < 1 || size > most / rows) throw std::invalid_argument("rows must be 1 to 2^31 - 1");
    rows *= size;
  }
  if (d < kMergeColumns || d % kMergeColumns || d > most)
    throw std::invalid_argument("d must be a multiple of " + std::to_string(kMergeColumns));
}

}  // namespace

void launch_merge(std::string_view dtype, const std::array<uintptr_t, kMergeTensors>& addresses,
                  const std::array<std::array<int64_t, 3>, kMergeTensors>& strides, const std::array<int64_t, 3>& sizes,
                  int64_t d, int device, uintptr_t stream) {
  check(sizes, d);
  const Element element = element_of(dtype);
  bool aligned = true;
  for (size_t i = 0; i < 3; ++i) {
    aligned &= addresses[i] % kVectorBytes == 0;
    for (size_t dim = 0; dim < 3; ++dim)
      aligned &= sizes[dim] == 1 || strides[i][dim] * element.bytes % kVectorBytes == 0;
  }

  const auto strides_of = [&](size_t i) { return RowStrides{strides[i][0], strides[i][1], strides[i][2]}; };
  MergeParams p{};
  p.o_a = reinterpret_cast<const void*>(addresses[0]);
  p.o_b = reinterpret_cast<const void*>(addresses[1]);
  p.out = reinterpret_cast<void*>(addresses[2]);
  p.lse_a = reinterpret_cast<const float*>(addresses[3]);
  p.lse_b = reinterpret_cast<const float*>(addresses[4]);
  p.lse = reinterpret_cast<float*>(addresses[5]);
  p.o_a_strides = strides_of(0), p.o_b_strides = strides_of(1), p.out_strides = strides_of(2);
  p.lse_a_strides = strides_of(3), p.lse_b_strides = strides_of(4), p.lse_strides = strides_of(5);
  p.num_rows = static_cast<int32_t>(sizes[0] * sizes[1] * sizes[2]);
  p.tokens = static_cast<int32_t>(sizes[1]);
  p.heads = static_cast<int32_t>(sizes[2]);
  p.row_chunks = static_cast<int32_t>(d / kMergeColumns);
  p.row_threads = std::min(p.row_chunks, kMergeThreads);
  p.rows_per_cta = kMergeThreads / p.row_threads;
  p.by_tokens = make_fast_divisor(p.tokens);
  p.by_heads = make_fast_divisor(p.heads);
  p.by_row_threads = make_fast_divisor(p.row_threads);

  const ContextGuard guard(device);
  const std::string entry = std::string("mla_merge_") + element.name + (aligned ? "" : "_unaligned");
  const int64_t ctas = (int64_t{p.num_rows} + p.rows_per_cta - 1) / p.rows_per_cta;
  queue_alone(get_kernel("merge", entry, device, Occupancy::any), static_cast<unsigned>(ctas), kMergeThreads, p, device,
              stream);
}

}  // namespace mla
