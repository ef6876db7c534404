// The combine kernel (kernels/common/combine.cu) and the packing of partial results (partials.cuh) without a device: a program that reads
// partial results of split items and writes what they merge to. test_combine_on_cpu.py puts C++ in the place of what is PTX there, builds
// it and asks.

#include <cmath>

#include "params.h"
#define CTA_THREADS mla::kCombineThreads
#include "cta_on_cpu.h"

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
float2 make_float2(float x, float y) { return {x, y}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
template <class To, class From>
To bits_of(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
int __float_as_int(float x) { return bits_of<int>(x); }
float __int_as_float(int x) { return bits_of<float>(x); }
float __uint_as_float(uint32_t x) { return bits_of<float>(x); }
float __log2f(float x) { return std::log2(x); }
int __clz(int x) { return __builtin_clz(static_cast<unsigned>(x)); }
template <class T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return cta::shuffle(mask, value, cta::current / 32 * 32 + lane);
}
struct {
  unsigned x;
} blockIdx, gridDim;

// To nearest even, with so many bits of the mantissa stored and this least exponent.
float rounded(float x, int stored_bits, int least_exponent) {
  if (x == 0.f || !std::isfinite(x)) return x;
  const float ulp = std::ldexp(1.f, std::max(std::ilogb(x), least_exponent) - stored_bits);
  return std::nearbyint(x / ulp) * ulp;
}
uint32_t bf16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t bits = bits_of<uint32_t>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
uint32_t fp16_bits(float x) {
  if (std::isnan(x)) return 0x7fff;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const float y = std::fabs(rounded(x, 10, -14));
  if (y >= 65536.f) return sign | 0x7c00;
  if (y < 0x1p-14f) return sign | static_cast<uint32_t>(y * 0x1p24f);
  return sign | ((bits_of<uint32_t>(y) >> 13) - (112 << 10));
}
float of_fp16(uint32_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? std::nanf("") : sign * HUGE_VALF;
  return sign * std::ldexp(exponent ? 1024.f + mantissa : mantissa, std::max(static_cast<int>(exponent), 1) - 25);
}

#include "common/combine.cu"

namespace {

// Of the problem. O of each item and part, [num_items][num_parts][rows][d_v] float32, and the log-sum-exps, without d_v, follow.
struct Sizes {
  int32_t num_items, num_parts, rows, d_v, block_rows, fp16, grid, backward;
};

Sizes sizes;
mla::DecodeParams params;
mla::schedule::Shape shape;

template <class T>
bool read_all(T* words, size_t count) {
  return std::fread(words, sizeof(T), count, stdin) == count;
}
template <class T>
void write_all(const std::vector<T>& words) {
  std::fwrite(words.data(), sizeof(T), words.size(), stdout);
}

// As a pipeline does. `o`: [rows][d_v] of a row block, or what there is of it.
void store_part(int slot, int num_rows, const float* o, const float* lse2) {
  const int run_columns = sizes.d_v / mla::kColumnRuns;
  std::vector<float> factor(static_cast<size_t>(sizes.block_rows) * mla::kColumnRuns, 0.f);
  for (int row = 0; row < num_rows; ++row) {
    *mla::partial_lse2(params, sizes.block_rows, slot, row) = lse2[row];
    for (int run = 0; run < mla::kColumnRuns; ++run) {
      float sum = 0.f;
      for (int i = 0; i < run_columns; ++i) sum += std::fabs(o[row * sizes.d_v + run * run_columns + i]);
      const int exponent = mla::run_exponent(sum);
      factor[static_cast<size_t>(row * mla::kColumnRuns + run)] = mla::exp2_of(-exponent);
      *mla::run_lse2(params, sizes.block_rows, slot, row, run) = lse2[row] + static_cast<float>(exponent);
    }
  }
  for (int row_tile = 0; row_tile * mla::kFragmentRows < num_rows; ++row_tile)
    for (int fragment = 0; fragment < sizes.d_v / mla::kFragmentColumns; ++fragment)
      for (cta::current = 0; cta::current < 32; ++cta::current) {
        const int first_row = row_tile * mla::kFragmentRows + cta::current / 4;
        const int first_column = fragment * mla::kFragmentColumns + cta::current % 4 * 2;
        float of_lane[8], factors[2] = {};
        for (int i = 0; i < 8; ++i) {
          const int row = first_row + i / 2 % 2 * 8, column = first_column + i / 4 * 8 + i % 2;
          of_lane[i] = row < num_rows ? o[row * sizes.d_v + column] : std::nanf("");
          if (row < num_rows)
            factors[i / 2 % 2] = factor[static_cast<size_t>(row * mla::kColumnRuns + column / run_columns)];
        }
        *mla::partial_fragment(params, sizes.block_rows, sizes.d_v, slot, row_tile, fragment) =
            mla::pack_partial(of_lane, factors);
      }
}

void combine() {
  if (sizes.fp16) sizes.d_v == 512 ? mla_combine_fp16_v512(params, shape) : mla_combine_fp16_v256(params, shape);
  else sizes.d_v == 512 ? mla_combine_bf16_v512(params, shape) : mla_combine_bf16_v256(params, shape);
}

}  // namespace

int main() {
  while (read_all(&sizes, 1)) {
    const auto count = [](int a, int b, int c = 1) {
      return static_cast<size_t>(a) * static_cast<size_t>(b) * static_cast<size_t>(c);
    };
    const size_t parts = count(sizes.num_items, sizes.num_parts, sizes.rows);
    std::vector<float> o(parts * static_cast<size_t>(sizes.d_v)), lse2(parts);
    if (!read_all(o.data(), o.size()) || !read_all(lse2.data(), lse2.size())) return 1;
    const int group_size = (sizes.rows + sizes.block_rows - 1) / sizes.block_rows;
    const int slots = sizes.num_items * sizes.num_parts * group_size;
    std::vector<uint4> o_partial(count(slots, sizes.block_rows, sizes.d_v) * mla::kPartialBytes / sizeof(uint4));
    std::vector<float> lse2_partial(count(slots, sizes.block_rows, 1 + mla::kColumnRuns), std::nanf(""));
    std::vector<char> plan(sizeof(mla::PlanHeader) + count(sizes.num_items, sizeof(mla::SplitItem)));
    std::vector<uint16_t> out(count(sizes.num_items, sizes.rows, sizes.d_v), 0x7fff);
    std::vector<float> lse(count(sizes.num_items, sizes.rows), 7.f);

    auto* header = new (plan.data()) mla::PlanHeader{};
    header->splits_at = sizeof(mla::PlanHeader);
    header->group_size = group_size;
    header->num_splits = sizes.num_items;
    params = {};
    params.lengths.s_q = 1;
    params.lengths.h_q = sizes.rows;
    params.lengths.num_requests = sizes.num_items;
    params.by_h_q = mla::make_fast_divisor(sizes.rows);
    params.out = out.data();
    params.out_strides = {int64_t{sizes.rows} * sizes.d_v, 0, sizes.d_v};
    params.lse = lse.data();
    params.lse_strides = {sizes.rows, 0, 1};
    params.plan = header;
    params.o_partial = o_partial.data();
    params.lse2_partial = lse2_partial.data();
    shape = {sizes.block_rows, 64, 1};
    for (int i = 0; i < sizes.num_items; ++i) {
      // The first part is behind the others, as it is in a schedule that is read from its end.
      const int first = i * sizes.num_parts * group_size;
      const mla::SplitItem item{i,     0,         1, 0, sizes.num_parts, first + (sizes.num_parts - 1) * group_size,
                                first, group_size};
      new (plan.data() + sizeof(mla::PlanHeader) + count(i, sizeof(item))) mla::SplitItem(item);
      for (int part = 0; part < sizes.num_parts; ++part)
        for (int member = 0; member < group_size; ++member) {
          const int row = member * sizes.block_rows;
          const size_t at = count(i * sizes.num_parts + part, sizes.rows) + static_cast<size_t>(row);
          store_part((part == 0 ? item.first_slot : item.second_slot + (part - 1) * group_size) + member,
                     std::min(sizes.rows - row, sizes.block_rows), o.data() + at * static_cast<size_t>(sizes.d_v),
                     lse2.data() + at);
        }
    }
    gridDim.x = static_cast<unsigned>(sizes.grid);
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) cta::run(combine, sizes.backward != 0);
    write_all(out);
    write_all(lse);
    std::fflush(stdout);
  }
}
