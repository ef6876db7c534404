// Stamps the entry points of one row of variants.inc. CMake compiles a pipeline's .cu once per row with MLA_ROW set to that
// row; the pipeline ends with MLA_ENTRIES(its decode function), and the names follow from the columns.
#pragma once

#include "dtype.cuh"

namespace mla {

// A row of the table as a type: what a pipeline needs to know at compile time.
template <class T, int DQk, int DV, int BlockRows, int BlockN, int Stages, int Warps>
struct Config {
  using Element = T;
  static constexpr int d_qk = DQk, d_v = DV, block_rows = BlockRows, block_n = BlockN, stages = Stages, warps = Warps;
  static constexpr int threads = 32 * Warps;
};

}  // namespace mla

#define MLA_EXPAND(macro, ...) macro(__VA_ARGS__)

#define MLA_ENTRY(dtype, pipeline, decode, d_qk, d_v, rows, n, stages, warps, smem)                                  \
  extern "C" __global__ void __launch_bounds__(32 * warps, 1)                                                        \
      mla_##pipeline##_r##rows##_n##n##_s##stages##_d##d_qk##_##dtype(const __grid_constant__ mla::DecodeParams p) { \
    using C = mla::Config<mla::dtype, d_qk, d_v, rows, n, stages, warps>;                                            \
    decode<C, smem>(p);                                                                                              \
  }
#define MLA_ENTRIES_bf16_fp16(...) MLA_ENTRY(bf16, __VA_ARGS__) MLA_ENTRY(fp16, __VA_ARGS__)
#define MLA_ENTRIES_ROW(decode, pipeline, dtypes, d_qk, d_v, rows, n, stages, warps, smem, page, targets) \
  MLA_ENTRIES_##dtypes(pipeline, decode, d_qk, d_v, rows, n, stages, warps, smem)
#define MLA_ENTRIES(decode) MLA_EXPAND(MLA_ENTRIES_ROW, decode, MLA_ROW)
