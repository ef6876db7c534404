// MLA decode for sm_80 and later: cp.async, ldmatrix, mma.sync. One persistent CTA of eight warps per SM.
//
// A CTA walks the pieces that the schedule gives it. A piece is a block of packed query rows and a range of KV tiles; the result is
// final (the piece is the whole item) or partial (combine.cu merges it). The KV tile is read from memory once and used twice,
// as K (all d_qk columns) and as V (the first d_v), for every query row of the block.
//
// The warps form two groups of four that never wait for one another but for KV: while one computes, the other waits, and the
// reverse. With 32 and 64 rows, each group has half of the rows and both walk the same tiles; with 16 rows, the groups take tiles
// in turn and their results are merged at the end of the piece. For one tile, a group computes
//
//   logits   S[rows, block_n] = Q K^T. Each warp has a quarter of the columns of d_qk; it keeps its part of Q in registers for the
//            whole piece, so K is the only operand read from shared memory. It leaves its partial logits in shared memory.
//   softmax  128 / rows neighbouring threads own a row: they add the partial logits, mask, keep the running max and sum, and
//            leave P in shared memory in 16 bits.
//   values   O[rows, d_v] += P V. Each warp owns a quarter of the columns, in registers.
//
// Between the steps of the logits or the values, the group's share of a later tile is copied to the stage that was left last.
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

  // Of k-steps warp, warp + 4, ..., so that all warps turn from the latent to RoPE at once.
  uint32_t q[S::row_tiles][S::warp_k_steps][4];
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
        const int step = ((k + quad_lane / 2) * S::group_warps + me.warp()) * 16, column = step + quad_lane % 2 * 8;
        if (block_row < work.num_rows_of(piece) && step < C::d_qk)
          load_global(words[k / 2], step < C::d_v ? nope + column : rope + column - C::d_v);
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

  constexpr int logit_steps = C::block_n / S::pass_tokens * S::warp_k_steps;
  auto compute_logits = [&](int stage, auto beside) {
    const uint32_t k_tile =
        at.kv(stage, me.thread % 8 + me.thread / 16 % 2 * 8, me.warp() * 16 + me.thread / 8 % 2 * 8);
    const uint32_t to = at.logits(me.warp(), me.quad(), me.pair());
    unrolled<C::block_n / S::pass_tokens>([&](auto pass) {
      constexpr int first_token = pass.value * S::pass_tokens;
      float s[S::logit_chains][S::row_tiles][S::pass_tokens / 8][4] = {};
      unrolled<S::warp_k_steps>([&](auto k) {
        if (has_k_step(k.value)) {
          auto& chain = s[k.value % S::logit_chains];
#pragma unroll
          for (int n = 0; n < S::pass_tokens / 16; ++n) {
            uint32_t b[4];
            ldmatrix_x4(b, k_tile + (first_token + n * 16) * kv_row + k.value * S::group_warps * 32);
#pragma unroll
            for (int m = 0; m < S::row_tiles; ++m) {
              mma_16x8x16<T>(chain[m][2 * n], q[m][k.value], b[0], b[1]);
              mma_16x8x16<T>(chain[m][2 * n + 1], q[m][k.value], b[2], b[3]);
            }
          }
        }
        beside(Index<pass.value * S::warp_k_steps + k.value>{});
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
  auto add_values = [&](int stage, auto beside) {
    const uint32_t p_tile = at.p(me.thread % 16, me.thread / 16 % 2 * 8);
    const uint32_t v_tile = at.kv(stage, me.thread % 16, me.warp() * S::warp_v + me.thread / 16 % 2 * 8);
    unrolled<C::block_n / 16>([&](auto k) {
      uint32_t a[S::row_tiles][4];
#pragma unroll
      for (int m = 0; m < S::row_tiles; ++m) ldmatrix_x4(a[m], p_tile + m * 16 * p_row + k.value * 32);
      unrolled<columns_steps>([&](auto n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_tile + k.value * 16 * kv_row + n.value * 32);
#pragma unroll
        for (int m = 0; m < S::row_tiles; ++m) {
          mma_16x8x16<T>(o[m][2 * n.value], a[m], b[0], b[1]);
          mma_16x8x16<T>(o[m][2 * n.value + 1], a[m], b[2], b[3]);
        }
        beside(Index<k.value * columns_steps + n.value>{});
      });
    });
  };

  // ---- start: an empty ring, then all but one of its stages in flight ----

  int index = work.next_piece_at(work.worker().first_piece, 0);
  if (index == work.worker().end_piece) return;
  if (me.thread < static_cast<unsigned>(C::stages)) {
    mbarrier_init(at.full(me.thread), 32 * S::ring_warps);
    mbarrier_init(at.empty(me.thread), 32 * S::ring_warps);
  }
  __syncthreads();  // the mbarriers are there
  if (me.warp() == 0) loads.move_cursor(index);
  group_barrier(me);  // the cursor is there
  loads.look_up_at_once();
#pragma unroll 1
  for (int stage = 0; stage < S::ring_stages - 1; ++stage) {
    loads.copy_tile(stage);
    if (loads.addressed == 0) loads.look_up_at_once();
  }

  // ---- the loop ----

  int stage = 0, parity = 0;  // of the ring: which stage, in an even or odd round
  bool landed = false;        // the stage's tile is known to have landed
  while (index < work.worker().end_piece) {
    if (me.lane() == 0) store_shared(at.index(), __int_as_float(index));
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
      if constexpr (S::tight && C::block_n > 16)
        asm volatile("" : "+r"(me.thread));  // what follows from it is not worth the registers that two passes need
      const int free_stage = stage == 0 ? S::ring_stages - 1 : stage - 1,
                free_parity = stage == 0 ? parity ^ 1 : parity;
      const int next_stage = stage + 1 == S::ring_stages ? 0 : stage + 1,
                next_parity = next_stage == 0 ? parity ^ 1 : parity;
      typename Loads<C>::Copy copy;
      // Step 0 prepares, the others copy their share.
      auto copy_step = [&](auto step, auto steps) {
        if constexpr (step.value == 0) {
          if constexpr (!S::copies_beside_logits) copy = loads.begin_copy(free_stage);
          mbarrier_wait(at.empty(free_stage), free_parity);
        } else {
          constexpr int from = (step.value - 1) * Loads<C>::copy_parts / (steps.value - 1),
                        to = step.value * Loads<C>::copy_parts / (steps.value - 1);
          unrolled<to, from>([&](auto part) { loads.copy_part(copy, part); });
        }
      };
      if constexpr (S::copies_beside_logits) copy = loads.begin_copy(free_stage);
      const bool address = loads.addressed == 0;
      typename Loads<C>::Lookup lookup;
      if (address) lookup = loads.look_up();  // in flight during the logits
      if (!landed) mbarrier_wait(at.full(stage), parity);
      compute_logits(stage, [&](auto step) {
        if constexpr (S::copies_beside_logits) copy_step(step, Index<logit_steps>{});
      });
      if constexpr (S::copies_beside_logits) loads.end_copy(free_stage);
      group_barrier(me);  // all partial logits are there; the former P, addresses and cursor have been read
      if (address) loads.write_address(lookup);
      softmax.add_tile(p.scale_log2, tiles);
      group_barrier(me);  // P, factors, addresses and cursor are there
      if (__float_as_int(load_shared(at.rescale_tile())) == tiles) rescale_o();
      add_values(stage, [&](auto step) {
        if constexpr (!S::copies_beside_logits) copy_step(step, Index<value_steps>{});
        if constexpr (step.value == value_steps - 2) landed = mbarrier_ended(at.full(next_stage), next_parity);
      });
      if constexpr (!S::copies_beside_logits) loads.end_copy(free_stage);
      // Each thread for itself: compute-sanitizer does not follow one that speaks for its warp.
      mbarrier_arrive(at.empty(stage));
      stage = next_stage, parity = next_parity;
    }
    const Piece& done = work.pieces()[__float_as_int(load_shared(at.index()))];
    Results<C>{p, me, at, work, o}.finish_piece(done, softmax.end(), stage == 0 ? S::ring_stages - 1 : stage - 1,
                                                stage == 0 ? parity ^ 1 : parity);
    __syncwarp();
    index = work.next_piece_at(__float_as_int(load_shared(at.index())) + 1, 0);
  }
  cp_async_wait_all();
}

}  // namespace mla::sm80

MLA_ENTRIES(mla::sm80::decode)
