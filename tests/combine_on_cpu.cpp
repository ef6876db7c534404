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

template <class T>
T __ldcg(const T* from) {
  return *from;
}
// Of an 8 x 8 tile of 16-bit elements lane 4 g + q has columns 2 q and 2 q + 1 of row g.
uint32_t transposed(uint32_t words) {
  const int lane = cta::current % 32, shift = lane / 4 % 2 * 16;
  const uint32_t left = __shfl_sync(cta::kAllLanes, words, lane % 4 * 8 + lane / 8);
  const uint32_t right = __shfl_sync(cta::kAllLanes, words, lane % 4 * 8 + 4 + lane / 8);
  return (left >> shift & 0xffff) | (right >> shift & 0xffff) << 16;
}
// What functions call that nobody calls here.
size_t __cvta_generic_to_shared(const void*);
void __syncwarp();
bool __any_sync(uint32_t, bool);
float __fadd_rn(float, float);
float __fmul_rn(float, float);

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
#include "sm90/transposed.cuh"

namespace {

// Of the problem. O of each item and part, [num_items][num_parts][rows][d_v] float32, and the log-sum-exps, without d_v, follow.
struct Sizes {
  int32_t num_items, num_parts, rows, d_v, block_rows, fp16, few, grid, backward;
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

// Of the partial result to be stored: [num_rows][d_v], and the log-sum-exps.
struct Part {
  int slot, num_rows;
  const float *o, *lse2;
};
std::vector<Part> parts;

// As the Hopper pipelines do, whose accumulators are not normalised yet: `scale` is.
constexpr float kScale = 0.25f;
float accumulator(const Part& part, int row, int column) {
  return row < part.num_rows ? part.o[row * sizes.d_v + column] / kScale : std::nanf("");
}
template <int DV, int BlockRows>
struct Tile {
  static constexpr int d_v = DV, block_rows = BlockRows;
};
// A warp for 16 rows and half of the columns.
template <class C>
void store_part(const Part& part) {
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i / 2 * mla::kFragmentRows < part.num_rows; i += cta::kWarps) {
    const int first_row = i / 2 * mla::kFragmentRows + lane / 4, first_column = i % 2 * (C::d_v / 2) + lane % 4 * 2;
    float o[C::d_v / 4], lse2[2];
    for (int n = 0; n < C::d_v / 4; ++n)
      o[n] = accumulator(part, first_row + n / 2 % 2 * 8, first_column + n / 4 * 8 + n % 2);
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8;
      lse2[half] = row < part.num_rows ? part.lse2[row] : std::nanf("");
      if (row < part.num_rows) *mla::partial_lse2(params, C::block_rows, part.slot, row) = lse2[half];
    }
    mla::sm90::store_partial<C>(params, part.slot, i / 2, i % 2, o, {kScale, kScale}, lse2);
  }
}
// Swapped operands, 16 rows: a warp for 16 of each 64 columns of a half.
template <int DV>
void store_transposed(const Part& part) {
  constexpr int chunks = DV / 128;
  const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
  float o[chunks][8], scale[4], none[4];
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2 * 8 + pair + i % 2;
    float sum = 0.f;
    for (int column = 0; column < DV; ++column) sum += std::fabs(accumulator(part, row, column));
    const int exponent = mla::run_exponent(sum * kScale);
    scale[i] = kScale * mla::exp2_of(-exponent);
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (int upper = 0; upper < 2; ++upper)
        o[chunk][i / 2 * 4 + upper * 2 + i % 2] =
            accumulator(part, row, (warp / 4 * chunks + chunk) * 64 + warp % 4 * 16 + quad + upper * 8);
    if (row >= part.num_rows) continue;
    *mla::partial_lse2(params, 16, part.slot, row) = part.lse2[row];
    *mla::run_lse2(params, 16, part.slot, row, warp) = part.lse2[row] + static_cast<float>(exponent);
  }
  mla::sm90::RowBlock block{};
  block.partial_slot = part.slot;
  block.num_rows = part.num_rows;
  const auto to =
      mla::sm90::result_places<Tile<DV, 16>>(params, block, part.slot, -1, warp / 4 * chunks * 4 + warp % 4);
  mla::sm90::store_transposed<mla::bf16>(to, o, scale, none);
}
template <int DV>
void store() {
  for (const Part& part : parts) {
    if (sizes.block_rows == 16) store_transposed<DV>(part);
    else if (sizes.block_rows == 32) store_part<Tile<DV, 32>>(part);
    else store_part<Tile<DV, 64>>(part);
  }
}

void combine() {
  const mla::CombineParams combined = mla::combine_params(params);
  const auto run = [&](auto few, auto many) { (sizes.few ? few : many)(combined, shape); };
  if (sizes.fp16 && sizes.d_v == 512) run(mla_combine_fp16_v512_few, mla_combine_fp16_v512_many);
  else if (sizes.fp16) run(mla_combine_fp16_v256_few, mla_combine_fp16_v256_many);
  else if (sizes.d_v == 512) run(mla_combine_bf16_v512_few, mla_combine_bf16_v512_many);
  else run(mla_combine_bf16_v256_few, mla_combine_bf16_v256_many);
}

}  // namespace

int main() {
  while (read_all(&sizes, 1)) {
    const auto count = [](int a, int b, int c = 1) {
      return static_cast<size_t>(a) * static_cast<size_t>(b) * static_cast<size_t>(c);
    };
    const size_t rows = count(sizes.num_items, sizes.num_parts, sizes.rows);
    std::vector<float> o(rows * static_cast<size_t>(sizes.d_v)), lse2(rows);
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
    parts.clear();
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
          parts.push_back({(part == 0 ? item.first_slot : item.second_slot + (part - 1) * group_size) + member,
                           std::min(sizes.rows - row, sizes.block_rows), o.data() + at * static_cast<size_t>(sizes.d_v),
                           lse2.data() + at});
        }
    }
    cta::run(sizes.d_v == 512 ? store<512> : store<256>, false);
    gridDim.x = static_cast<unsigned>(sizes.grid);
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) cta::run(combine, sizes.backward != 0);
    write_all(out);
    write_all(lse);
    std::fflush(stdout);
  }
}
