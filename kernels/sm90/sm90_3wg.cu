// MLA decode for sm_90: two warpgroups compute, a third one loads. One persistent CTA per SM.
//
// A CTA walks the pieces that the schedule gives it: a block of 64 packed query rows and a range of 64-token KV tiles each. Q stays in
// shared memory for a piece; the tiles go round a ring that runs on from piece to piece.
//
//   loads    The third warpgroup: two warps fetch half of a tile's columns each, as soon as that half of the stage is free, by TMA;
//            or copy half of its rows by cp.async, where pages have no usable boxes. Two warps fetch Q of the next piece once the
//            last logits of this one are computed, and say what the piece is.
//   logits   Tile j of a piece belongs to warpgroup j % 2, which computes S = Q K^T of all of it, the softmax, and P.
//   values   Warpgroup w owns half w of O's columns, in registers, and adds P V of every tile: of its own tiles with P from registers,
//            of the other's with P from shared memory.
//
// In the loop a warpgroup begins the logits of its tile (RoPE and its own half of the columns) before it waits for the other's P. The rest
// of the logits and the values of the other's tile follow, the former first if other workers read the same KV, and else the latter, whose
// stage is then free sooner. Then come the softmax and the values of its own tile. The running max passes to and fro with P. Where
// things lie in shared memory: sm90_3wg_memory.cuh. Schedule, budgets, barriers: sm90_3wg.md.

#include "../common/dependent.cuh"
#include "../common/entry.cuh"
#include "sm90_3wg_loads.cuh"

namespace mla::sm90 {

// 3 * 128 threads start with 168 each; these add up to as many.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kPReady = 1,      // + warpgroup: it left P and the row max of its tile. Both warpgroups: one arrives, the other waits
  kOthersDone = 3,  // + warpgroup: all its warps have multiplied the other's P. Its own threads
  kSumsReady = 5,   // both left their row sums
  kPartialThere = 6,  // both stored their columns of a partial result
  kBegun = 7,         // the mbarriers are there. The producer waits, the others arrive
  kInputs = 8,        // so is what the kernel before wrote. The producer arrives, the others wait
};

template <class C, int SmemBytes>
__device__ __forceinline__ void decode_3wg(const DecodeParams& p) {
  using T = typename C::Element;
  using L = TileLayout<C>;
  static_assert(C::threads == (kConsumers + 1) * kWarpgroupThreads);
  static_assert(sizeof(Smem<C>) + kChunkAlignment == SmemBytes,
                "the smem column of variants.inc must be sizeof(Smem) + what aligning it may take");
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const Memory<C> at{aligned(shared_address(smem_bytes))};

  const int warpgroup = warp_uniform(threadIdx.x / kWarpgroupThreads);
  const int warp = warp_uniform(threadIdx.x % kWarpgroupThreads / 32), lane = threadIdx.x % 32;
  if (warpgroup == kConsumers) {
    // What the first box needs is looked up at once: a CTA with little to do spends most of its time on these, one behind the other.
    if (warp == 0 && has_boxes(p) && elect_lane()) prefetch_tensor_maps<C>(p);
    wait_for_kernel_before();  // which may have been the planner; all other threads meet this one below
    PieceWalk<C> walk(p);
    Loads<C> loads(p, at, walk, warp);
    named_barrier_arrive(kInputs, C::threads);  // pairs with the consumers' wait
    named_barrier_sync(kBegun, C::threads);     // pairs with the consumers' arrival
    let_next_kernel_start();
    lower_registers<kProducerRegisters>();
    static_assert(kCopyWarps == kQWarps);
    if ((warp & kCopyWarps) != 0) {  // not `>=`: ptxas would take it for unlikely, and put this behind all else
      copy_q_of_pieces<C>(p, walk, at.q(), at.block(0), at.q_full(), at.q_free());
    } else {
      const RingPlace<C> end = !has_boxes(p)        ? loads.rows_of_pieces()
                               : !walk.reads_once() ? loads.boxes_of_pieces(KeptInL2{})
                                                    : loads.boxes_of_pieces(evicted_first());
      if (warp == 0 && walk.worker.pairs & kMergesFirst) loads.other_partial(end);
    }
  } else {
    if (threadIdx.x == 0) at.init_mbarriers(has_boxes(p));
    named_barrier_arrive(kBegun, C::threads);  // pairs with the producer's wait
    named_barrier_sync(kInputs, C::threads);   // pairs with the producer's arrival
    let_next_kernel_start();
    raise_registers<kConsumerRegisters>();
    const int quad = lane / 4, pair = lane % 4 * 2, row = warp * 16 + quad;  // rows `row` and `row` + 8
    const uint64_t q_operand = k_major(at.q()), k_operand = k_major(at.tile(0));
    const uint64_t p_operand = k_major(at.p());
    const uint64_t v_operand = mn_major(at.tile(0) + warpgroup * L::half_chunks * kChunkBytes);
    auto stage_step = [](int stage) { return static_cast<uint64_t>(stage * (L::bytes >> 4)); };

    float s[32], o[L::o_registers];
    uint32_t own_p[4][4];
    float max[2], sum[2], factor[2];
    RingPlace<C> place;  // of the tile whose values are next

    // Parts of the logits: RoPE, own half of the columns, other half; in the order in which they were freed.
    auto issue_logits_part = [&](RingPlace<C> of, int part) {
      const int first = part == 0 ? L::last_chunk : (warpgroup ^ (part - 1)) * L::half_chunks;
      const uint64_t a = pinned(q_operand + static_cast<uint64_t>(first * (kChunkBytes >> 4)));
      const uint64_t b = pinned(k_operand + stage_step(of.stage) + static_cast<uint64_t>(first * (kChunkBytes >> 4)));
#pragma unroll
      for (int chunk = 0; chunk < (part == 0 ? 1 : L::half_chunks); ++chunk) {
        mbarrier_wait(at.full(of.stage, first + chunk), of.parity);  // pairs with the producer's loads and arrivals
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < L::k_steps(part == 0 ? L::last_chunk : 0); ++k) {
          const uint64_t step = chunk * kChunkStep + k * kColumnStep;
          if (part == (L::rope > 0 ? 0 : 1) && chunk == 0 && k == 0) wgmma_qk<T, false>(s, a + step, b + step);
          else wgmma_qk<T, true>(s, a + step, b + step);
        }
      }
    };
    auto issue_first_logits = [&](RingPlace<C> of) {
      if (L::rope > 0) issue_logits_part(of, 0);
      issue_logits_part(of, 1);
      wgmma_commit();
    };
    auto issue_other_logits = [&](RingPlace<C> of) {
      issue_logits_part(of, 2);
      wgmma_commit();
    };
    auto issue_values_of_other = [&](int stage) {
      const uint64_t a = pinned(p_operand), b = pinned(v_operand + stage_step(stage));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_pv<T>(o, a + k * kColumnStep, b + k * kTokenStep);
      wgmma_commit();
    };
    auto issue_own_values = [&](int stage) {
      const uint64_t b = pinned(v_operand + stage_step(stage));
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_pv<T>(o, own_p[k], b + k * kTokenStep);
      wgmma_commit();
    };
    auto arrive = [&](uint32_t mbarrier) {  // of this warp, once its wgmmas are done
      if (lane == 0) mbarrier_arrive(mbarrier);
    };
    // Pairs with the producer's wait, a round later.
    auto release = [&](int stage) { arrive(at.free(stage, warpgroup)); };
    // Waits for the other's P; the sums and O are relative to its max from here on.
    auto take_max = [&] {
      named_barrier_sync(kPReady + (warpgroup ^ 1), kConsumers * kWarpgroupThreads);  // pairs with hand_over
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = load_shared(at.row_max(warpgroup ^ 1, row + half * 8));
        factor[half] = exp2_fast(max[half] - raised);
        max[half] = raised;
        sum[half] *= factor[half];
      }
    };
    // Logits become P, in registers and, with the max, in shared memory for the other.
    auto hand_over = [&](const float (&tile_max)[2]) {
      raise_max(max, tile_max, factor);
      exp2_rows(s, max, factor, sum);
      pack_p<T>(s, own_p);
      const uint32_t to = at.p();
#pragma unroll
      for (int k = 0; k < 4; ++k) stmatrix_x4(to + swizzled(warp * 16 + lane % 16, k * 2 + lane / 16), own_p[k]);
      if (lane % 4 == 0) {
        store_shared(at.row_max(warpgroup, row), max[0]);
        store_shared(at.row_max(warpgroup, row + 8), max[1]);
      }
      fence_proxy_async();
      named_barrier_arrive(kPReady + warpgroup, kConsumers * kWarpgroupThreads);  // pairs with the other's take_max
    };

#pragma unroll 1
    for (int parity = 0;; parity ^= 1) {   // of the piece
      mbarrier_wait(at.q_full(), parity);  // pairs with copy_q_of_pieces
      int num_tiles, unmasked_tiles, visible[2];
      bool alone;
      {
        RowBlock block;
        load_shared_struct(block, at.block(parity));
        __syncwarp();  // all lanes have read it: one of them will say so, to q_free
        num_tiles = warp_uniform(block.num_tiles);
        unmasked_tiles = warp_uniform(block.unmasked_tiles);
        alone = warp_uniform(block.group_size) == 1;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          visible[half] = visible_tokens(p, block, row + half * 8) - block.first_tile * kTileTokens - pair;
      }
      if (num_tiles == 0) break;
#pragma unroll
      for (int i = 0; i < L::o_registers; ++i) o[i] = 0.f;
#pragma unroll
      for (int half = 0; half < 2; ++half) max[half] = kNoMax, sum[half] = 0.f, factor[half] = 1.f;

      auto finish_logits = [&](int tile, int stage, float (&tile_max)[2]) {  // behind the wait for them
        if (L::rope > 0) arrive(at.free_rope(stage));    // pairs with boxes_of_pieces, a round later
        if (tile + 2 >= num_tiles) arrive(at.q_free());  // pairs with copy_q_of_pieces
        scale_logits(s, p.scale_log2);
        if (tile >= unmasked_tiles) {
          const int seen[2] = {visible[0] - tile * kTileTokens, visible[1] - tile * kTileTokens};
          mask_tail(s, seen);
        }
        row_max(s, tile_max);
#pragma unroll
        for (int half = 0; half < 2; ++half)  // nobody reads it: ptxas would move the next wait up, ahead of all this
          if (lane % 4 == 0) store_shared(at.row_max(warpgroup, row + half * 8), tile_max[half]);
      };
      auto add_own_values = [&](int stage) {
        rescale_rows(o, factor);
        pin(o);
        issue_own_values(stage);
        wgmma_wait<0>();
        pin(o);
        release(stage);
      };

      if (warpgroup == 1 && num_tiles == 1) arrive(at.q_free());
      // Rounds: the values of the other's tile, and the own tile behind it. The first round of warpgroup 0 has no other tile, and the last
      // one of a warpgroup may have no own. Both are rounds of the second loop, so that there is less code: sm90_3wg.md, "Code that is cold".
      int tile = warpgroup;
      float tile_max[2];
      auto finish_round = [&] {
        // With itself: all warps have read the other's P, the own takes its place.
        named_barrier_sync(kOthersDone + warpgroup, kWarpgroupThreads);
        hand_over(tile_max);
        if (tile == 0) factor[0] = factor[1] = 1.f;  // there is no O yet to be rescaled
        add_own_values(place.stage);
        place.advance();
        tile += 2;
      };
#pragma unroll 1
      while (tile <= num_tiles) {
        // Others read the same KV: the products of a round beside each other, with both tiles.
#pragma unroll 1
        while (!alone && tile > 0 && tile < num_tiles) {
          const int other_stage = place.stage;
          place.advance();
          pin(s);
          issue_first_logits(place);  // of what is there already, while the other's P is not
          take_max();
          wgmma_wait<0>();  // O may be touched
          rescale_rows(o, factor);
          pin(o);
          issue_other_logits(place);
          issue_values_of_other(other_stage);
          wgmma_wait<1>();  // the logits
          pin(s);
          finish_logits(tile, place.stage, tile_max);
          wgmma_wait<0>();  // the values
          pin(o);
          release(other_stage);
          finish_round();
        }
        if (tile > num_tiles) break;
        // The other's values come before the second half of the logits where memory is the limit, because nobody else reads this KV:
        // their stage is freed sooner, at the price of a softmax that only the other warpgroup's products hide. Measured: sm90_3wg.md.
#pragma unroll 1
        do {
          const bool has_own = tile < num_tiles, has_other = tile > 0;
          const int other_stage = place.stage;
          if (has_other) place.advance();
          pin(s);
          if (has_own) issue_first_logits(place);
          if (has_other) take_max();
          wgmma_wait<0>();  // O may be touched
          if (has_other) {
            rescale_rows(o, factor);
            pin(o);
            issue_values_of_other(other_stage);
            wgmma_wait<0>();
            pin(o);
            release(other_stage);  // whether the rest of the tile is there or not
          }
          if (!has_own) {
            tile += 2;
            break;
          }
          issue_other_logits(place);
          wgmma_wait<0>();
          pin(s);
          finish_logits(tile, place.stage, tile_max);
          finish_round();
        } while (alone && tile <= num_tiles);
      }

      // ---- the results; both warpgroups hold the last max ----

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = lanes_sum<4>(sum[half]);
        if (lane % 4 == 0) store_shared(at.row_sum(parity, warpgroup, row + half * 8), sum[half]);
      }
      named_barrier_sync(kSumsReady, kConsumers * kWarpgroupThreads);  // with the other
      RowBlock block;
      load_shared_struct(block, at.block(parity));
      float scale[2], lse2[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum[half] + load_shared(at.row_sum(parity, warpgroup ^ 1, row + half * 8));
        scale[half] = inverse_fast(total);
        lse2[half] = lse2_of(max[half], total);
      }
      const bool has_rows = warp * kFragmentRows < block.num_rows;
      const bool merges = warp_uniform(block.pairs) & kMergesFirst;
      if (merges) {
        mbarrier_wait(at.other_there(), 0);  // pairs with other_partial
        if (has_rows) {
          const int slot = block.partial_slot - block.group_size;
          float other_lse2[2], other_run[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int block_row = row + half * 8;
            const bool exists = block_row < block.num_rows;
            other_lse2[half] = exists ? __ldcg(partial_lse2(p, C::block_rows, slot, block_row)) : kNegInf;
            other_run[half] =
                exists ? __ldcg(run_lse2(p, C::block_rows, slot, block_row, warpgroup * (kColumnRuns / 2))) : kNegInf;
          }
          const int fragment = (warp * kConsumers + warpgroup) * (C::d_v / 2 / kFragmentColumns);
          merge_partial(at.tile(place.stage) + (fragment * 32 + lane) * 16, other_lse2, other_run, o, scale, lse2);
        }
      }
      const bool leaves = warp_uniform(block.partial_slot) >= 0 && !merges;
      if (leaves && has_rows) store_partial<C>(p, block.partial_slot, warp, warpgroup, o, scale, lse2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int block_row = row + half * 8;
        if (!leaves) store_output<T>(p, block, block_row, warpgroup * (C::d_v / 2) + pair, o, half, scale[half]);
        if (warpgroup == 0 && lane % 4 == 0 && block_row < block.num_rows)
          store_lse<C>(p, block, block_row, lse2[half], leaves);
      }
      if (warp_uniform(block.pairs) & kLeavesLast) {
        named_barrier_sync(kPartialThere, kConsumers * kWarpgroupThreads);  // with the other: all of it is stored
        if (threadIdx.x == 0) announce_partial(p, C::block_rows, C::d_v, block.partial_slot);
      }
    }
  }
}

}  // namespace mla::sm90

MLA_ENTRIES(mla::sm90::decode_3wg)
