// The online softmax of a group's rows: neighbouring threads own a row. Base 2.
#pragma once

#include "../common/math.cuh"
#include "memory.cuh"

namespace mla::sm80 {

template <class C>
struct Softmax {
  using S = Shape<C>;
  const Memory<C>& at;
  int visible;     // KV tokens that the row sees from the group's next tile on
  float max, sum;  // what P is relative to; the sum of P over this thread's tokens

  // Between tiles, where registers are short.
  __device__ __forceinline__ void park() const {
    if constexpr (S::tight) {
      store_shared(at.parked(0), __int_as_float(visible));
      store_shared(at.parked(1), max);
      store_shared(at.parked(2), sum);
    }
  }
  __device__ __forceinline__ void unpark() {
    if constexpr (S::tight) {
      visible = __float_as_int(load_shared(at.parked(0)));
      max = load_shared(at.parked(1));
      sum = load_shared(at.parked(2));
    }
  }

  __device__ __forceinline__ void begin(int tokens) {
    visible = tokens;
    max = kNegInf;
    sum = 0.f;
    park();
  }
  // Leaves P and the rescale factors of a tile.
  __device__ __forceinline__ void add_tile(float scale_log2, int tiles) {
    unpark();
    constexpr int width = S::row_tokens < 4 ? S::row_tokens : 4, stride = S::row_threads * width;
    const int first_token =
        at.me.soft_lane() * width;  // of a thread's tokens; every `stride` tokens it has `width` more
    float x[S::row_tokens / width][width];
#pragma unroll
    for (int w = 0; w < S::group_warps; ++w) {
#pragma unroll
      for (int j = 0; j < S::row_tokens / width; ++j) {
        float part[width];
        load_shared(part, at.logits(w, at.me.soft_row(), first_token) ^ j * stride * 4);
#pragma unroll
        for (int i = 0; i < width; ++i) x[j][i] = w == 0 ? part[i] : x[j][i] + part[i];
      }
    }
    const int seen = visible - first_token;  // of the tokens from the thread's first on
    visible -= S::tile_groups * C::block_n;
    float tile_max = kNegInf;
#pragma unroll
    for (int j = 0; j < S::row_tokens / width; ++j)
#pragma unroll
      for (int i = 0; i < width; ++i) {
        x[j][i] = j * stride + i < seen ? x[j][i] * scale_log2 : kNegInf;
        tile_max = fmaxf(tile_max, x[j][i]);
      }
    tile_max = lanes_max<S::row_threads>(tile_max);

    // P may exceed 1 by up to 2^8: the sum undoes it exactly, and O is seldom rescaled.
    const bool grew = tile_max > (max == kNegInf ? kNegInf : max + 8.f);
    const float factor = grew ? exp2_fast(max - tile_max) : 1.f;
    if (grew) max = tile_max;
    const float base = max == kNegInf ? 0.f : max;  // a row that sees nothing yet: P = 0
    sum *= factor;
#pragma unroll
    for (int j = 0; j < S::row_tokens / width; ++j) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        x[j][i] = exp2_fast(x[j][i] - base);
        sum += x[j][i];
      }
      store_shared_as<typename C::Element>(at.p(at.me.soft_row(), j * stride + first_token), x[j]);
    }
    if (at.me.soft_lane() == 0) store_shared(at.rescale(at.me.soft_row()), factor);
    if (factor != 1.f) store_shared(at.rescale_tile(), __int_as_float(tiles));
    park();
  }
  // Of the whole row.
  __device__ __forceinline__ RowState end() {
    unpark();
    return {max, lanes_sum<S::row_threads>(sum)};
  }
};

}  // namespace mla::sm80
