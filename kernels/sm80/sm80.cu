// MLA decode for sm_80 and later: cp.async, ldmatrix, mma.sync. One persistent CTA of eight warps per SM.
//
// A CTA walks the pieces that the schedule gives it. A piece is a block of packed query rows and a range of KV tiles; the result is
// final (the piece is the whole item) or partial (combine.cu merges it). The KV tile is read from memory once and used twice,
// as K (all d_qk columns) and as V (the first d_v), for every query row of the block.
//
// The warps form groups that never wait for one another but for KV: while one computes, the others wait, and the reverse. With 32
// and 64 rows there are two of four warps: each has half of the rows and both walk the same tiles; with 16 rows, two of four warps,
// or four of two where rows of KV are short, take tiles in turn and their results are merged at the end of the piece. For one tile, a
// group computes
//
//   logits   S[rows, block_n] = Q K^T. Each warp has its share of the columns of d_qk; it keeps its part of Q in registers for the
//            whole piece, so K is the only operand read from shared memory. It leaves its partial logits in shared memory.
//   softmax  As many neighbouring threads own a row as there are threads: they add the partial logits, mask, keep the running max
//            and sum, and leave P in shared memory in 16 bits.
//   values   O[rows, d_v] += P V. Each warp owns its share of the columns, in registers.
//
// Between the steps of the products a later tile is copied: the group's share of it to the stage that was left last, or, where the
// groups take tiles in turn, by each warp its own columns, behind its reads of them as V. Those columns nobody else reads.
//
// Rows in shared memory are padded by 16 bytes: an odd number of 16-byte chunks puts the eight rows of an ldmatrix in eight
// different bank groups, with no address arithmetic. Schedule, budgets and what was tried: sm80.md.
//
// Here are queries, logits, values and the loop. What the CTA is to do is in work.cuh, KV's way to shared memory in loads.cuh, the
// softmax in softmax.cuh, the end of a piece in results.cuh; who does what, and where things lie, in shape.cuh and memory.cuh.

#include "../common/entry.cuh"
#include "loads.cuh"
#include "results.cuh"
#include "shape.cuh"
#include "softmax.cuh"
#include "work.cuh"

namespace mla::sm80 {

template <class C, int SmemBytes>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  using T = typename C::Element;
  using S = Shape<C>;
  static_assert(sizeof(Smem<C>) == SmemBytes, "the smem column of variants.inc must be sizeof(Smem)");
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  constexpr int kv_row = S::kv_row, p_row = S::p_row, logits_row = S::logits_row;

  Place<C> me{threadIdx.x};
  const Memory<C> at{shared_address(smem_bytes), me};
  const Work<C> work{p};
  Loads<C> loads{p, me, at, work, 0};
  Softmax<C> softmax{at};

  // ---- queries: fragments of the group's rows and this warp's share of d_qk ----

  // Number k of a warp is step warp + group_warps k, so that all warps turn from the latent to RoPE at once; or step k of the warp's own
  // columns, those of the latent first.
  uint32_t q[S::row_tiles][S::warp_k_steps][4];
  constexpr int own_steps = S::own_columns ? S::warp_v / 16 : 0;
  constexpr int rope_steps = own_steps > 0 && S::warp_k_steps > own_steps ? S::warp_k_steps - own_steps : 1;
  static_assert(!S::own_columns || S::rope_chunks == 0 || 2 * rope_steps == S::rope_threads, "the RoPE that it copies");
  auto first_of_round = [](int k) {  // of all warps' steps
    return own_steps > 0 ? own_steps * S::group_warps + k - own_steps : k * S::group_warps;
  };
  auto k_column = [&](int k) {
    return k < own_steps ? me.warp() * S::warp_v + k * 16 : (first_of_round(k) + me.warp() * rope_steps) * 16;
  };
  auto has_k_step = [&](int k) {  // false in the last round if the warps do not divide the steps
    return (k + 1) * S::group_warps <= S::k_steps || k * S::group_warps + me.warp() < S::k_steps;
  };
  auto load_q = [&](const Piece& piece) {
    const int quad_lane = me.thread % 4;
#pragma unroll
    for (int half = 0; half < 2 * S::row_tiles; ++half) {
      const int block_row = me.row_group() * S::group_rows + half * 8 + me.quad();
      const auto row = work.row_of(piece, block_row);
      const auto* nope = static_cast<const uint16_t*>(p.q_nope) + offset_of(row, p.q_nope_strides);
      const auto* rope = static_cast<const uint16_t*>(p.q_rope) + offset_of(row, p.q_rope_strides);
      // A thread loads one half of one of two k-steps, 16 bytes; the four of a row then exchange words.
      uint32_t words[(S::warp_k_steps + 1) / 2][4] = {};
#pragma unroll
      for (int k = 0; k < S::warp_k_steps; k += 2) {
        const int column = k_column(k + quad_lane / 2) + quad_lane % 2 * 8;
        if (block_row < work.num_rows_of(piece) && column < C::d_qk)
          load_global(words[k / 2], column < C::d_v ? nope + column : rope + column - C::d_v);
      }
#pragma unroll
      for (int k = 0; k < S::warp_k_steps; ++k) {
        auto& pair = words[k / 2];
        if (k % 2 == 0) transpose_quad(pair);
        q[half / 2][k][half % 2] = pair[k % 2 * 2];
        q[half / 2][k][half % 2 + 2] = pair[k % 2 * 2 + 1];
      }
    }
  };

  // ---- logits: the group's rows x the tile's tokens, summed over this warp's columns ----

  auto compute_logits = [&](int stage) {
    const int token = me.thread % 8 + me.thread / 16 % 2 * 8, chunk = me.thread / 8 % 2 * 8;
    const uint32_t k_tile = at.kv(stage, token, me.warp() * rope_steps * 16 + chunk),
                   own_tile = at.kv(stage, token, k_column(0) + chunk);
    const uint32_t to = at.logits(me.warp(), me.quad(), me.pair());
    unrolled<C::block_n / S::pass_tokens>([&](auto pass) {
      constexpr int first_token = pass.value * S::pass_tokens;
      float s[S::logit_chains][S::row_tiles][S::pass_tokens / 8][4] = {};
      uint32_t b[2][S::pass_tokens / 16][4];  // this step's and the next one's
      auto load_k = [&](auto k) {
        constexpr int column = (k.value < own_steps ? k.value : first_of_round(k.value)) * 16;
        if (k.value < S::warp_k_steps && has_k_step(k.value)) {
#pragma unroll
          for (int n = 0; n < S::pass_tokens / 16; ++n)
            ldmatrix_x4(b[k.value % 2][n],
                        (k.value < own_steps ? own_tile : k_tile) + (first_token + n * 16) * kv_row + column * 2);
        }
      };
      if constexpr (S::k_ahead) load_k(Index<0>{});
      unrolled<S::warp_k_steps>([&](auto k) {
        load_k(Index<k.value + S::k_ahead>{});
        if (has_k_step(k.value)) {
          auto& chain = s[k.value % S::logit_chains];
#pragma unroll
          for (int n = 0; n < S::pass_tokens / 16; ++n) {
            const auto& x = b[k.value % 2][n];
#pragma unroll
            for (int m = 0; m < S::row_tiles; ++m) {
              mma_16x8x16<T>(chain[m][2 * n], q[m][k.value], x[0], x[1]);
              mma_16x8x16<T>(chain[m][2 * n + 1], q[m][k.value], x[2], x[3]);
            }
          }
        }
      });
#pragma unroll
      for (int m = 0; m < S::row_tiles; ++m)
#pragma unroll
        for (int n = 0; n < S::pass_tokens / 8; ++n) {
#pragma unroll
          for (int c = 1; c < S::logit_chains; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[0][m][n][i] += s[c][m][n][i];
          const uint32_t tile = (to ^ (first_token + n * 8) * 4) + m * 16 * logits_row;
          store_shared(tile, s[0][m][n][0], s[0][m][n][1]);
          store_shared(tile + 8 * logits_row, s[0][m][n][2], s[0][m][n][3]);
        }
    });
  };

  // ---- softmax ----

  auto begin_rows = [&](const Piece& piece) {
    const int number = work.first_row_of(piece) + me.row_group() * S::group_rows + me.soft_row();
    const int token = divide(number, p.by_h_q), len = work.len_of(piece);
    softmax.begin((p.causal ? min(len, len - piece.num_tokens + token + 1) : len) -
                  (piece.first_tile + me.tile_group()) * C::block_n);
  };

  // ---- values: the group's rows x this warp's columns ----

  float o[S::row_tiles][S::warp_v / 8][4];

  auto rescale_o = [&] {
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
      const float upper = load_shared(at.rescale(m * 16 + me.quad()));
      const float lower = load_shared(at.rescale(m * 16 + me.quad() + 8));
#pragma unroll
      for (int n = 0; n < S::warp_v / 8; ++n) {
        o[m][n][0] *= upper, o[m][n][1] *= upper;
        o[m][n][2] *= lower, o[m][n][3] *= lower;
      }
    }
  };
  constexpr int columns_steps = S::warp_v / 16, value_steps = C::block_n / 16 * columns_steps;
  constexpr int first_copy_step = S::late_copies ? value_steps / 2 : 1;
  // The first operands are loaded ahead of what they need not wait for: V of barrier B, P of the rescaling of O.
  struct Values {
    uint32_t p_tile, v_tile, p[S::row_tiles][4], v[2][4];  // v: this step's and the next one's
  };
  auto load_v = [&](Values& x, auto i) {
    if constexpr (i.value < value_steps)
      ldmatrix_x4_trans(x.v[i.value % 2],
                        x.v_tile + i.value / columns_steps * 16 * kv_row + i.value % columns_steps * 32);
  };
  auto load_p = [&](Values& x, int k) {
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) ldmatrix_x4(x.p[m], x.p_tile + m * 16 * p_row + k * 32);
  };
  auto begin_values = [&](int stage) {
    Values x;
    x.p_tile = at.p(me.thread % 16, me.thread / 16 % 2 * 8);
    x.v_tile = at.kv(stage, me.thread % 16, me.warp() * S::warp_v + me.thread / 16 % 2 * 8);
    load_v(x, Index<0>{});
    return x;
  };
  auto add_values = [&](Values& x, auto beside) {
    unrolled<value_steps>([&](auto i) {
      constexpr int k = i.value / columns_steps, n = i.value % columns_steps;
      if constexpr (k > 0 && n == 0) load_p(x, k);
      load_v(x, Index<i.value + 1>{});
      const auto& v = x.v[i.value % 2];
#pragma unroll
      for (int m = 0; m < S::row_tiles; ++m) {
        mma_16x8x16<T>(o[m][2 * n], x.p[m], v[0], v[1]);
        mma_16x8x16<T>(o[m][2 * n + 1], x.p[m], v[2], v[3]);
      }
      beside(i);
    });
  };

  // ---- start: all stages in flight; of a shared ring all but one, as copies go to the stage of the tile before ----

  int index = work.next_piece_at(work.worker().first_piece, 0);
  if (index == work.worker().end_piece) return;
  if constexpr (!S::own_columns) {
    if (me.thread < static_cast<unsigned>(C::stages)) {  // of all rings, by threads of group 0
      mbarrier_init(at.full(me.thread), S::ring_arrivals);
      mbarrier_init(at.empty(me.thread), S::ring_arrivals);
    }
    __syncthreads();  // the mbarriers are there
  }
  if (me.warp() == 0) loads.move_cursor(index);
  group_barrier(me);  // the cursor is there
  loads.look_up_at_once();
#pragma unroll 1
  for (int stage = 0; stage < (S::own_columns ? S::ring_stages : S::ring_stages - 1); ++stage) {
    loads.copy_tile(stage);
    if (loads.addressed == 0) loads.look_up_at_once();
  }

  if constexpr (S::warp_arrivals) {
    cp_async_wait<S::ring_stages - 3>();
    __syncwarp();  // two tiles' copies of the whole warp have landed
    if (me.lane() == 0) {
      mbarrier_arrive(at.full(0));
      mbarrier_arrive(at.full(1));
    }
  }

  // ---- the loop ----

  int stage = 0, parity = 0;  // of the ring: which stage, in an even or odd round
  bool landed = false;        // the stage's tile is known to have landed
  while (index < work.worker().end_piece) {
    if (me.lane() == 0) store_shared(at.index(), __int_as_float(index));
    if constexpr (S::tile_groups > 1) __syncwarp();  // it is there: a group without a tile meets no other barrier
    const Piece& piece = work.pieces()[index];
    load_q(piece);
    begin_rows(piece);
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m)
#pragma unroll
      for (int n = 0; n < S::warp_v / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.f;

    int tiles = piece.end_tile - piece.first_tile - me.tile_group();  // of the group: that many over tile_groups
#pragma unroll 1
    for (tiles = warp_uniform(tiles); tiles > 0; tiles -= S::tile_groups) {
      const int free_stage = stage == 0 ? S::ring_stages - 1 : stage - 1,
                free_parity = stage == 0 ? parity ^ 1 : parity;
      const int next_stage = stage + 1 == S::ring_stages ? 0 : stage + 1,
                next_parity = next_stage == 0 ? parity ^ 1 : parity;
      const bool refill = tiles > S::tile_groups;  // the stage of a piece's last tile is needed for O first
      typename Loads<C>::Copy copy;
      // The group's share of a tile: one or two steps prepare, those behind them copy.
      auto copy_step = [&](auto step) {
        if constexpr (step.value == (S::late_copies ? first_copy_step - 2 : 0)) copy = loads.begin_copy(free_stage);
        if constexpr (step.value == first_copy_step - 1) mbarrier_wait(at.empty(free_stage), free_parity);
        if constexpr (step.value >= first_copy_step) {
          constexpr int number = step.value - first_copy_step, steps = value_steps - first_copy_step;
          constexpr int from = number * S::tile_copies / steps, to = (number + 1) * S::tile_copies / steps;
          unrolled<to, from>([&](auto part) { loads.copy_part(copy, part); });
        }
      };
      // The warp's own columns, in blocks of 16 tokens and 64 columns, four steps of the values after a block was read.
      auto refill_step = [&](auto step) {
        if constexpr (step.value < S::rope_copies) {
          if (refill) loads.copy_part(copy, step);
        }
        if constexpr (step.value % 4 == 3) __syncwarp();  // all lanes have read a block
        if constexpr (step.value >= 4) {
          if (refill) loads.copy_part(copy, Index<S::rope_copies + step.value - 4>{});
        }
      };
      const bool address = loads.addressed == 0;
      typename Loads<C>::Lookup lookup;
      if (address) lookup = loads.look_up();  // in flight during the logits
      if constexpr (S::own_columns) {
        cp_async_wait<S::ring_stages - 1>();
        __syncwarp();  // the whole warp's copies have landed
      } else if (!landed) {
        mbarrier_wait(at.full(stage), parity);
      }
      compute_logits(stage);
      group_barrier(me);  // all partial logits are there; the former P, addresses and cursor have been read
      if (address) loads.write_address(lookup);
      softmax.add_tile(p.scale_log2, tiles);
      Values values = begin_values(stage);
      group_barrier(me);  // P, factors, addresses and cursor are there
      load_p(values, 0);
      if constexpr (S::own_columns) {
        if (refill) copy = loads.begin_copy(stage);
      }
      if (__float_as_int(load_shared(at.rescale_tile())) == tiles) rescale_o();
      if constexpr (S::tight && C::block_n > 16)
        asm volatile("" : "+r"(me.thread));  // what follows from it is not worth the registers that two passes need
      add_values(values, [&](auto step) {
        if constexpr (S::own_columns) refill_step(step);
        else copy_step(step);
        if constexpr (!S::own_columns && step.value == value_steps - 2)
          landed = mbarrier_ended(at.full(next_stage), next_parity);
      });
      if constexpr (S::own_columns) {
        if (refill) {
          unrolled<S::tile_copies, S::tile_copies - 4>([&](auto part) { loads.copy_part(copy, part); });
          loads.end_copy(stage);
        }
      } else {
        loads.end_copy(free_stage);
        if constexpr (S::warp_arrivals) {
          cp_async_wait<S::ring_stages - 3>();
          __syncwarp();  // the whole warp has read the tile, and its copies of the next but one have landed
          if (me.lane() == 0) {
            mbarrier_arrive(at.empty(stage));
            mbarrier_arrive(at.full(stage ^ 2));  // of four
          }
        } else {
          mbarrier_arrive(at.empty(stage));
        }
      }
      stage = next_stage, parity = next_parity;
    }
    const Piece& done = work.pieces()[__float_as_int(load_shared(at.index()))];
    const int last_stage = stage == 0 ? S::ring_stages - 1 : stage - 1;
    const bool any_tiles = S::tile_groups == 1 || done.end_tile - done.first_tile > me.tile_group();
    Results<C>{p, me, at, work, o}.finish_piece(done, softmax.end(), any_tiles ? last_stage : -1);
    if (S::own_columns && any_tiles) loads.copy_tile(last_stage);
    index = work.next_piece_at(__float_as_int(load_shared(at.index())) + 1, 0);
    __syncwarp();  // all lanes have read it
  }
  cp_async_wait_all();
}

}  // namespace mla::sm80

MLA_ENTRIES(mla::sm80::decode)
