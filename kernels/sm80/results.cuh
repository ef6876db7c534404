// The end of a piece: what groups hold of the same rows is merged, and O and lse go to memory.
#pragma once

#include "../common/partials.cuh"
#include "memory.cuh"
#include "softmax.cuh"
#include "work.cuh"

namespace mla::sm80 {

template <class C>
struct Results {
  using S = Shape<C>;
  // Two groups that take tiles in turn keep half of their columns of O each, and give the other half away; more give all, in halves.
  static constexpr int column_tiles = S::warp_v / 8,
                       kept_tiles = column_tiles / (S::tile_groups > 1 ? 2 : 1);  // of 8, per warp
  static constexpr int run_tiles = C::d_v / 8 / kColumnRuns;
  static_assert(S::tile_groups <= 2 || (C::warps == kColumnRuns && kept_tiles % run_tiles == 0), "a warp takes a run");

  const DecodeParams& p;
  const Place<C>& me;
  const Memory<C>& at;
  const Work<C>& work;
  float (&o)[S::row_tiles][column_tiles][4];

  __device__ __forceinline__ RowState state_of(int group, int row) const {
    return {load_shared(at.row_max(group, row)), load_shared(at.row_sum(group, row))};
  }
  // Relative to the largest max: what the sums, and O of each group, must be multiplied by.
  struct Merged {
    RowState state;
    float factor[S::groups];  // by group
  };
  __device__ __forceinline__ Merged merge_states(int row) const {
    RowState of[S::groups];
    Merged merged{{kNegInf, 0.f}, {}};
#pragma unroll
    for (int group = 0; group < S::groups; ++group) {
      of[group] = state_of(group, row);
      merged.state.max = fmaxf(merged.state.max, of[group].max);
    }
#pragma unroll
    for (int group = 0; group < S::groups; ++group) {
      merged.factor[group] = of[group].max == kNegInf ? 0.f : exp2_fast(of[group].max - merged.state.max);
      merged.state.sum += of[group].sum * merged.factor[group];
    }
    return merged;
  }

  // ---- O of groups that take tiles in turn, given in the stage of each one's last tile, lane by lane. `first`: of the column tiles.
  // Of two groups, the warp of the other one that has the same columns takes it. ----

  template <class First>
  __device__ __forceinline__ void give_o(int stage, First) const {
#pragma unroll
    for (int n = 0; n < kept_tiles; ++n)
      store_shared_quad(at.given(me.group(), stage, me.member()) + n * 16 * S::group_threads, o[0][First::value + n]);
  }
  // `merged`: of the thread's two rows.
  template <class First>
  __device__ __forceinline__ void take_o(const Merged (&merged)[2], int giver, First) const {
    const int stage = __float_as_int(load_shared(at.given_stage(giver)));
    const uint32_t from = at.given(giver, stage, me.member());
#pragma unroll
    for (int n = 0; n < kept_tiles; ++n) {
      float x[4] = {};
      if (stage >= 0) load_shared(x, from + n * 16 * S::group_threads);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& factor = merged[i / 2].factor;
        float& y = o[0][First::value + n][i];
        y = y * (me.group() == 0 ? factor[0] : factor[1]) + x[i] * factor[giver];
      }
    }
  }

  // Of more groups, warp number i of the CTA takes run i of the columns from all.
  __device__ __forceinline__ int run() const { return me.thread / 32; }
  __device__ __forceinline__ int run_half() const { return run() * run_tiles % column_tiles / kept_tiles; }
  __device__ __forceinline__ void take_run(float (&x)[run_tiles][4], const Merged (&merged)[2]) const {
    const int of_warp = run() * run_tiles / column_tiles, tile = run() * run_tiles % kept_tiles;
#pragma unroll
    for (int giver = 0; giver < S::groups; ++giver) {
      const int stage = __float_as_int(load_shared(at.given_stage(giver)));
      if (stage < 0) continue;
      const uint32_t from = at.given(giver, stage, of_warp * 32 + me.lane()) + tile * 16 * S::group_threads;
#pragma unroll
      for (int n = 0; n < run_tiles; ++n) {
        float y[4];
        load_shared(y, from + n * 16 * S::group_threads);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] += y[i] * merged[i / 2].factor[giver];
      }
    }
  }

  // ---- to memory: rows that exist, and of the column tiles from `tile` on those from First on. `x(m, n)`: what the thread has of row tile
  // m and column tile tile + n. `states`: of a row of the group. ----

  __device__ __forceinline__ void store_lse(const Piece& piece, const RowState& state) const {
    const int block_row = me.row_group() * S::group_rows + me.soft_row();
    if (me.soft_lane() != 0 || block_row >= work.num_rows_of(piece)) return;
    const float lse2 = lse2_of(state.max, state.sum);
    if (piece.partial_slot >= 0) {
      *partial_lse2(p, C::block_rows, work.slot_of(piece), block_row) = lse2;
    } else if (p.lse) {
      p.lse[offset_of(work.row_of(piece, block_row), p.lse_strides)] = lse2 * kLn2;
    }
  }
  __device__ __forceinline__ RowState final_state(int group_row) const {
    return S::tile_groups > 1 ? merge_states(group_row).state : state_of(me.group(), group_row);
  }
  static __device__ __forceinline__ float scale_of(const RowState& state) {
    return state.sum == 0.f ? 0.f : 1.f / state.sum;
  }
  template <int First, int Tiles, class X, class States>
  __device__ __forceinline__ void store_partial(const Piece& piece, const X& x, const States& states, int tile) const {
    constexpr int runs = Tiles / run_tiles;
    static_assert(Tiles % run_tiles == 0 && runs <= 4);
    const int first_tile = tile + First, in_quad = me.thread % 4;
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
      const int row_tile = me.row_group() * S::row_tiles + m;
      if (row_tile * kFragmentRows >= work.num_rows_of(piece)) break;
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const RowState state = states(m * 16 + me.quad() + half * 8);
        float sum = 0.f;
#pragma unroll
        for (int n = First; n < First + Tiles; ++n) sum += fabsf(x(m, n)[half * 2]) + fabsf(x(m, n)[half * 2 + 1]);
        const int exponent = run_exponent(lanes_sum<4>(sum) * scale_of(state));
        factor[half] = scale_of(state) * exp2_of(-exponent);
        if (in_quad < runs)
          *run_lse2(p, C::block_rows, work.slot_of(piece), row_tile * kFragmentRows + me.quad() + half * 8,
                    first_tile / run_tiles + in_quad) = lse2_of(state.max, state.sum) + exponent;
      }
      uint4* to = partial_fragment(p, C::block_rows, C::d_v, work.slot_of(piece), row_tile, first_tile / 2);
#pragma unroll
      for (int n = 0; n < Tiles; n += 2) to[n / 2 * 32] = pack_partial(x(m, First + n), factor);
    }
  }
  template <int First, int Tiles, class X, class States>
  __device__ __forceinline__ void store_output(const Piece& piece, const X& x, const States& states, int tile) const {
#pragma unroll
    for (int half = 0; half < 2 * S::row_tiles; ++half) {
      const int group_row = half * 8 + me.quad(), block_row = me.row_group() * S::group_rows + group_row;
      const auto row = work.row_of(piece, block_row);  // not later: ptxas then loads K late, in the loop (sm80.md)
      const bool exists = block_row < work.num_rows_of(piece);
      const float scale = scale_of(states(group_row));
      auto* to = static_cast<uint16_t*>(p.out) + offset_of(row, p.out_strides) + tile * 8;
      // The four threads of a row exchange words, so that each stores 16 bytes at once.
#pragma unroll
      for (int n = First; n < First + Tiles; n += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* y = x(half / 2, n + i) + half % 2 * 2;
          words[i] = pack2<typename C::Element>(y[0] * scale, y[1] * scale);
        }
        transpose_quad(words);
        if (exists) store_global(to + (n + static_cast<int>(me.thread % 4)) * 8, words);
      }
    }
  }
  template <int First, int Tiles, class X, class States>
  __device__ __forceinline__ void store_tiles(const Piece& piece, const X& x, const States& states, int tile) const {
    if (piece.partial_slot >= 0) store_partial<First, Tiles>(piece, x, states, tile);
    else store_output<First, Tiles>(piece, x, states, tile);
  }
  template <class First>
  __device__ __forceinline__ void store_o(const Piece& piece, First) const {
    store_tiles<First::value, kept_tiles>(
        piece, [&](int m, int n) { return &o[m][n][0]; }, [&](int row) { return final_state(row); },
        me.warp() * column_tiles);
  }

  // ---- all of it. `state`: of the thread's row. `stage`: that of the group's last tile; negative: it had none ----

  __device__ __forceinline__ void finish_piece(const Piece& piece, const RowState& state, int stage) const {
    if (me.soft_lane() == 0) {
      store_shared(at.row_max(me.group(), me.soft_row()), state.max);
      store_shared(at.row_sum(me.group(), me.soft_row()), state.sum);
    }
    if constexpr (S::tile_groups > 2) {
      group_barrier(me);  // all have read the stage
      if (me.member() == 0) store_shared(at.given_stage(me.group()), __int_as_float(stage));
      Merged merged[2];
      float x[run_tiles][4] = {};
      unrolled<2>([&](auto half) {
        if (stage >= 0) give_o(stage, Index<half.value * kept_tiles>{});
        __syncthreads();  // what each group gives is there, and max and sum of all
        if (half.value == 0) merged[0] = merge_states(me.quad()), merged[1] = merge_states(me.quad() + 8);
        if (half.value == 0 && me.group() == 0) store_lse(piece, merge_states(me.soft_row()).state);
        if (run_half() == half.value) take_run(x, merged);
        __syncthreads();  // all of that has been taken
      });
      store_tiles<0, run_tiles>(
          piece, [&](int, int n) { return &x[n][0]; }, [&](int row) { return merged[row / 8].state; },
          run() * run_tiles);
    } else if constexpr (S::tile_groups > 1) {
      const Index<0> lower{};
      const Index<kept_tiles> upper{};
      group_barrier(me);  // all have read the stage
      if (stage >= 0) {
        if (me.group() == 0) give_o(stage, upper);
        else give_o(stage, lower);
      }
      if (me.member() == 0) store_shared(at.given_stage(me.group()), __int_as_float(stage));
      __syncthreads();  // what each group gives is there, and max and sum of all
      Merged merged[2];
      // Both conditions on the group always hold: without them ptxas orders the loop anew.
      if (me.group() < 2) merged[0] = merge_states(me.quad()), merged[1] = merge_states(me.quad() + 8);
      if (me.group() == 0) {
        store_lse(piece, merge_states(me.soft_row()).state);
        take_o(merged, 1, lower);
        store_o(piece, lower);
      } else if (me.group() == 1) {
        take_o(merged, 0, upper);
        store_o(piece, upper);
      }
      __syncthreads();  // all of that has been taken
    } else {
      group_barrier(me);  // the rows' sums are there
      store_lse(piece, state);
      store_o(piece, Index<0>{});
      group_barrier(me);  // they have been read
    }
  }
};

}  // namespace mla::sm80
