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
// stage is then free sooner. Then come the softmax and the values of its own tile. The running max passes to and fro with P. Schedule,
// budgets, barriers: sm90_3wg.md.

#include <cstddef>

#include "../common/dependent.cuh"
#include "../common/entry.cuh"
#include "walk.cuh"

namespace mla::sm90 {

constexpr int kWarpgroupThreads = 128, kWarpgroupWarps = 4, kConsumers = 2;
// 3 * 128 threads start with 168 each; these add up to as many.
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
constexpr int kCopyWarps = 2;  // of the producer, that load KV; the others copy Q

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kPReady = 1,      // + warpgroup: it left P and the row max of its tile. Both warpgroups: one arrives, the other waits
  kOthersDone = 3,  // + warpgroup: all its warps have multiplied the other's P. Its own threads
  kSumsReady = 5,   // both left their row sums
  kPartialThere = 6,  // both stored their columns of a partial result
  kBegun = 7,         // the mbarriers are there. The producer waits, the others arrive
  kInputs = 8,        // so is what the kernel before wrote. The producer arrives, the others wait
};

template <class C>
struct Smem {
  uint8_t q[TileLayout<C>::q_bytes];
  uint8_t tiles[C::stages][TileLayout<C>::bytes];
  uint8_t p[kChunkBytes];                             // of the latest tile; whoever writes the next has multiplied it
  RowBlock block[2];                                  // by parity of the piece; no tiles: there is no more
  float row_sum[2][kConsumers][C::block_rows];        // by parity of the piece
  float row_max[kConsumers][C::block_rows];           // that the latest P of a warpgroup is relative to
  uint64_t full[C::stages][TileLayout<C>::k_chunks];  // a chunk of the tile is there
  uint64_t free[C::stages][kConsumers];               // a warpgroup is done with its half of the columns
  uint64_t free_rope[C::stages];                      // the tile's owner is done with RoPE
  uint64_t landed[kConsumers];  // a half of the last tile of a request is there, but for its zeros
  uint64_t q_full, q_free;
  uint64_t other_there;  // the other partial result of a pair, in a stage
};

// A place in the ring, and the parity of the round.
template <class C>
struct RingPlace {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == C::stages) stage = 0, parity ^= 1;
  }
};

template <class C, int SmemBytes>
__device__ __forceinline__ void decode_3wg(const DecodeParams& p) {
  using T = typename C::Element;
  using L = TileLayout<C>;
  constexpr uint32_t alignment = kSwizzleRows * kRowBytes;
  static_assert(C::threads == (kConsumers + 1) * kWarpgroupThreads);
  static_assert(sizeof(Smem<C>) + alignment == SmemBytes,
                "the smem column of variants.inc must be sizeof(Smem) + what aligning it may take");
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32_t smem = (shared_address(smem_bytes) + alignment - 1) / alignment * alignment;
  auto tile_at = [&](int stage) { return smem + static_cast<uint32_t>(offsetof(Smem<C>, tiles)) + stage * L::bytes; };
  auto block_at = [&](int parity) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, block) + parity * sizeof(RowBlock));
  };
  auto row_sum_at = [&](int parity, int warpgroup, int row) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, row_sum)) +
           ((parity * kConsumers + warpgroup) * C::block_rows + row) * 4;
  };
  auto row_max_at = [&](int warpgroup, int row) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, row_max)) + (warpgroup * C::block_rows + row) * 4;
  };
  auto full_at = [&](int stage, int chunk) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, full)) + (stage * L::k_chunks + chunk) * kMbarrierBytes;
  };
  auto free_at = [&](int stage, int half) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, free)) + (stage * kConsumers + half) * kMbarrierBytes;
  };
  auto free_rope_at = [&](int stage) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, free_rope)) + stage * kMbarrierBytes;
  };
  auto landed_at = [&](int half) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, landed)) + half * kMbarrierBytes;
  };
  const uint32_t q_full = smem + offsetof(Smem<C>, q_full), q_free = smem + offsetof(Smem<C>, q_free),
                 other_there = smem + offsetof(Smem<C>, other_there);

  const int warpgroup = warp_uniform(threadIdx.x / kWarpgroupThreads);
  const int warp = warp_uniform(threadIdx.x % kWarpgroupThreads / 32), lane = threadIdx.x % 32;
  if (warpgroup == kConsumers) {
    // What the first box needs is looked up at once: a CTA with little to do spends most of its time on these, one behind the other.
    if (warp == 0 && has_boxes(p) && elect_lane()) prefetch_tensor_maps<C>(p);
    wait_for_kernel_before();  // which may have been the planner; all other threads meet this one below
    PieceWalk<C> walk(p);
    Slot slot{};
    if (warp < kCopyWarps) slot = has_boxes(p) ? walk.box_slot_at(0) : walk.row_slot_at(0, warp * 32 + lane);
    named_barrier_arrive(kInputs, C::threads);  // pairs with the consumers' wait
    named_barrier_sync(kBegun, C::threads);     // pairs with the consumers' arrival
    let_next_kernel_start();
    lower_registers<kProducerRegisters>();

    // The chunks of a half of the columns in the order in which they are freed: those of the tile's owner come first, with RoPE.
    auto half_of = [](int tile, int i) { return (tile + i) & 1; };
    auto chunks_of = [](int i) { return L::half_chunks + (i == 0 ? L::k_chunks - L::v_chunks : 0); };
    auto chunk_of = [](int half, int k) { return k < L::half_chunks ? half * L::half_chunks + k : L::last_chunk; };

    // ---- KV by TMA: two warps, half of the columns each, and RoPE to whom the half is freed first ----

    auto load_boxes_of_pieces = [&](int half) {
      RingPlace<C> at;
      int landed_parity = 0;
      while (walk.more()) {
        const int len = warp_uniform(walk.block.len);
        const int first_tile = warp_uniform(walk.block.first_tile), num_tiles = warp_uniform(walk.block.num_tiles);
        for (int tile = 0; tile < num_tiles; ++tile, at.advance()) {
          const int tokens = tokens_of_tile(first_tile + tile, len);
          const Boxes boxes = all_boxes(p, slot, tile % kLookupTiles);
          // Of the next tiles: on its way while the stage of this one becomes free.
          if ((tile + 1) % kLookupTiles == 0) slot = walk.box_slot_at(tile + 1);
          const int first = half * L::half_chunks;
          const bool with_rope = L::rope > 0 && tile % 2 == half;
          auto load = [&](int chunk) {
            mbarrier_arrive_expect(full_at(at.stage, chunk), kChunkBytes);
            load_chunk<C>(p, tile_at(at.stage), chunk, boxes, kTileTokens, full_at(at.stage, chunk));
          };
          if (with_rope)
            mbarrier_wait(free_rope_at(at.stage), at.parity ^ 1);  // pairs with finish_logits, a round before
          if (tokens == kTileTokens) {
            if (with_rope && elect_lane()) load(L::last_chunk);
            mbarrier_wait(free_at(at.stage, half), at.parity ^ 1);  // pairs with release(), a round before
            if (elect_lane()) {
#pragma unroll
              for (int k = 0; k < L::half_chunks; ++k) load(first + k);
            }
          } else {  // the end of the request: the values behind it become zeros before anybody sees the tile
            mbarrier_wait(free_at(at.stage, half), at.parity ^ 1);
            const int chunks = L::half_chunks + with_rope;
            if (tokens > 0) {
              if (elect_lane()) {
                mbarrier_arrive_expect(landed_at(half), chunks * box_bytes(p, tokens));
#pragma unroll 1
                for (int k = 0; k < chunks; ++k)
                  load_chunk<C>(p, tile_at(at.stage), chunk_of(half, k), boxes, tokens, landed_at(half));
              }
              mbarrier_wait(landed_at(half), landed_parity);
              landed_parity ^= 1;
            }
            zero_rows(tile_at(at.stage) + first * kChunkBytes, L::half_chunks, tokens, lane, 32);
            fence_proxy_async();
            __syncwarp();  // all lanes have fenced their zeros
            if (lane < chunks) mbarrier_arrive(full_at(at.stage, chunk_of(half, lane)));
          }
        }
        walk.advance();
        slot = walk.box_slot_at(0);
      }
      return at;
    };

    // ---- KV by address: two warps, 32 rows of a tile each ----

    auto copy_rows_of_pieces = [&] {
      RingPlace<C> at;
      RingPlace<C> copying;  // the half that was issued last and is not announced yet
      int copying_half = 0, copying_chunks = 0;
      // Copies are announced one half late, so that those of two halves overlap.
      auto announce = [&] {
        fence_proxy_async();
        __syncwarp();  // all lanes have fenced their copies
        if (lane < copying_chunks) mbarrier_arrive(full_at(copying.stage, chunk_of(copying_half, lane)));
      };
      while (walk.more()) {
        for (int tile = 0; tile < walk.block.num_tiles; ++tile, at.advance()) {
          const RowAddress row = row_address(p, slot);
          const RowUnits latent = row_units(row.latent, row.exists);
          if (tile + 1 < walk.block.num_tiles) slot = walk.row_slot_at(tile + 1, warp * 32 + lane);
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            const int half = half_of(tile, i);
            if (!__all_sync(0xffffffffu, mbarrier_test(free_at(at.stage, half), at.parity ^ 1))) {
              cp_async_wait<0>();  // who frees this half may first need what is in flight
              announce();
              copying_chunks = 0;
              mbarrier_wait(free_at(at.stage, half), at.parity ^ 1);  // pairs with release(), a round before
            }
            // The half that is freed first comes with RoPE, which was free before it: this never waits, but every phase must be seen.
            if (i == 0 && L::rope > 0) mbarrier_wait(free_rope_at(at.stage), at.parity ^ 1);
#pragma unroll
            for (int k = 0; k < L::half_chunks; ++k)
              copy_rows(tile_at(at.stage) + chunk_of(half, k) * kChunkBytes, warp * 32, latent,
                        chunk_of(half, k) * kChunkColumns);
            if (i == 0 && L::rope > 0)
              copy_rows(tile_at(at.stage) + L::last_chunk * kChunkBytes, warp * 32, row_units(row.rope, row.exists), 0,
                        L::rope);
            cp_async_commit();
            cp_async_wait<1>();
            announce();
            copying = at, copying_half = half, copying_chunks = chunks_of(i);
          }
        }
        walk.advance();
        slot = walk.row_slot_at(0, warp * 32 + lane);
      }
      cp_async_wait<0>();
      announce();
      return at;
    };

    // ---- behind the last piece: what another worker left of it. Into a stage, while the last tiles are computed ----

    auto load_other_partial = [&](RingPlace<C> at) {
      const RowBlock block = walk.first_block();
      if (!has_work(block)) return;
      constexpr int row_tile_bytes = kFragmentRows * C::d_v * kPartialBytes;
      static_assert(C::block_rows / kFragmentRows * row_tile_bytes <= L::bytes);
      const int slot = block.partial_slot - walk.worker.group_size;  // of the group before
      if (lane == 0) {
        wait_for_partial(p, C::block_rows, C::d_v, slot);
        fence_proxy_async_global();  // it was written by ordinary stores
      }
      if (L::rope > 0) mbarrier_wait(free_rope_at(at.stage), at.parity ^ 1);
      for (int half = 0; half < kConsumers; ++half) mbarrier_wait(free_at(at.stage, half), at.parity ^ 1);
      if (lane == 0) {
        const int bytes = (min(block.num_rows, C::block_rows) + kFragmentRows - 1) / kFragmentRows * row_tile_bytes;
        mbarrier_arrive_expect(other_there, bytes);
        bulk_load(tile_at(at.stage), partial_fragment(p, C::block_rows, C::d_v, slot, 0, 0), bytes, other_there);
      }
    };

    if (warp >= kCopyWarps) {
      copy_q_of_pieces<C>(p, walk, smem, block_at(0), q_full, q_free);
    } else {
      const RingPlace<C> end = has_boxes(p) ? load_boxes_of_pieces(warp) : copy_rows_of_pieces();
      if (warp == 0 && walk.worker.pairs & kMergesFirst) load_other_partial(end);
    }
  } else {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < C::stages; ++stage) {
        for (int chunk = 0; chunk < L::k_chunks; ++chunk)
          mbarrier_init(full_at(stage, chunk), has_boxes(p) ? 1 : kCopyWarps);
        for (int half = 0; half < kConsumers; ++half) mbarrier_init(free_at(stage, half), kWarpgroupWarps);
        mbarrier_init(free_rope_at(stage), kWarpgroupWarps);
      }
      for (int half = 0; half < kConsumers; ++half) mbarrier_init(landed_at(half), 1);
      mbarrier_init(q_full, kQWarps);
      mbarrier_init(q_free, kConsumers * kWarpgroupWarps);
      mbarrier_init(other_there, 1);
      fence_mbarrier_init();
    }
    named_barrier_arrive(kBegun, C::threads);  // pairs with the producer's wait
    named_barrier_sync(kInputs, C::threads);   // pairs with the producer's arrival
    let_next_kernel_start();
    raise_registers<kConsumerRegisters>();
    const int quad = lane / 4, pair = lane % 4 * 2, row = warp * 16 + quad;  // rows `row` and `row` + 8
    const uint64_t q_operand = k_major(smem), k_operand = k_major(tile_at(0));
    const uint64_t p_operand = k_major(smem + static_cast<uint32_t>(offsetof(Smem<C>, p)));
    const uint64_t v_operand = mn_major(tile_at(0) + warpgroup * L::half_chunks * kChunkBytes);
    auto stage_step = [](int stage) { return static_cast<uint64_t>(stage * (L::bytes >> 4)); };

    float s[32], o[L::o_registers];
    uint32_t own_p[4][4];
    float max[2], sum[2], factor[2];
    RingPlace<C> at;  // of the tile whose values are next

    // Parts of the logits: RoPE, own half of the columns, other half; in the order in which they were freed.
    auto issue_logits_part = [&](RingPlace<C> of, int part) {
      const int first = part == 0 ? L::last_chunk : (warpgroup ^ (part - 1)) * L::half_chunks;
      const uint64_t a = pinned(q_operand + static_cast<uint64_t>(first * (kChunkBytes >> 4)));
      const uint64_t b = pinned(k_operand + stage_step(of.stage) + static_cast<uint64_t>(first * (kChunkBytes >> 4)));
#pragma unroll
      for (int chunk = 0; chunk < (part == 0 ? 1 : L::half_chunks); ++chunk) {
        mbarrier_wait(full_at(of.stage, first + chunk), of.parity);  // pairs with the producer's loads and arrivals
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
    auto release = [&](int stage) {
      arrive(free_at(stage, warpgroup));
    };  // pairs with the producer's wait, a round later
    // Waits for the other's P; the sums and O are relative to its max from here on.
    auto take_max = [&] {
      named_barrier_sync(kPReady + (warpgroup ^ 1),
                         kConsumers * kWarpgroupThreads);  // pairs with the arrival in hand_over
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = load_shared(row_max_at(warpgroup ^ 1, row + half * 8));
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
      const uint32_t to = smem + static_cast<uint32_t>(offsetof(Smem<C>, p));
#pragma unroll
      for (int k = 0; k < 4; ++k) stmatrix_x4(to + swizzled(warp * 16 + lane % 16, k * 2 + lane / 16), own_p[k]);
      if (lane % 4 == 0) {
        store_shared(row_max_at(warpgroup, row), max[0]);
        store_shared(row_max_at(warpgroup, row + 8), max[1]);
      }
      fence_proxy_async();
      named_barrier_arrive(kPReady + warpgroup, kConsumers * kWarpgroupThreads);  // pairs with the other's take_max
    };

#pragma unroll 1
    for (int parity = 0;; parity ^= 1) {  // of the piece
      mbarrier_wait(q_full, parity);      // pairs with copy_q_of_pieces
      int num_tiles, unmasked_tiles, visible[2];
      bool alone;
      {
        RowBlock block;
        load_shared_struct(block, block_at(parity));
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
        if (L::rope > 0) arrive(free_rope_at(stage));  // pairs with load_boxes_of_pieces, a round later
        if (tile + 2 >= num_tiles) arrive(q_free);     // pairs with copy_q_of_pieces
        scale_logits(s, p.scale_log2);
        if (tile >= unmasked_tiles) {
          const int seen[2] = {visible[0] - tile * kTileTokens, visible[1] - tile * kTileTokens};
          mask_tail(s, seen);
        }
        row_max(s, tile_max);
#pragma unroll
        for (int half = 0; half < 2; ++half)  // nobody reads it: ptxas would move the next wait up, ahead of all this
          if (lane % 4 == 0) store_shared(row_max_at(warpgroup, row + half * 8), tile_max[half]);
      };
      auto add_own_values = [&](int stage) {
        rescale_rows(o, factor);
        pin(o);
        issue_own_values(stage);
        wgmma_wait<0>();
        pin(o);
        release(stage);
      };

      int tile = warpgroup;
      float tile_max[2];
      if (warpgroup == 0) {  // the first tile has none before it
        pin(s);
        issue_first_logits(at);
        issue_other_logits(at);
        wgmma_wait<0>();
        pin(s);
        finish_logits(0, at.stage, tile_max);
        hand_over(tile_max);
        add_own_values(at.stage);
        at.advance();
        tile = 2;
      } else if (num_tiles == 1) {
        arrive(q_free);
      }
      // The other's values come before the second half of the logits where memory is the limit, because nobody else reads this KV:
      // their stage is freed sooner, at the price of a softmax that only the other warpgroup's products hide. Measured: sm90_3wg.md.
      auto walk = [&](auto values_first) {
#pragma unroll 1
        for (; tile < num_tiles; tile += 2) {
          const int other_stage = at.stage;
          at.advance();
          pin(s);
          issue_first_logits(at);  // of what is there already, while the other's P is not
          take_max();
          wgmma_wait<0>();  // O may be touched
          rescale_rows(o, factor);
          pin(o);
          if constexpr (values_first.value) {
            issue_values_of_other(other_stage);
            wgmma_wait<0>();
            pin(o);
            release(other_stage);  // whether the rest of the tile is there or not
            issue_other_logits(at);
            wgmma_wait<0>();
            pin(s);
            finish_logits(tile, at.stage, tile_max);
          } else {
            issue_other_logits(at);
            issue_values_of_other(other_stage);
            wgmma_wait<1>();  // the logits
            pin(s);
            finish_logits(tile, at.stage, tile_max);
            wgmma_wait<0>();  // the values
            pin(o);
            release(other_stage);
          }
          named_barrier_sync(
              kOthersDone + warpgroup,
              kWarpgroupThreads);  // with itself: all warps have read the other's P, the own takes its place
          hand_over(tile_max);
          add_own_values(at.stage);
          at.advance();
        }
      };
      if (alone) walk(Index<1>{});
      else walk(Index<0>{});
      if (tile - 1 < num_tiles) {  // the last tile is the other's
        take_max();
        rescale_rows(o, factor);
        pin(o);
        issue_values_of_other(at.stage);
        wgmma_wait<0>();
        pin(o);
        release(at.stage);
        at.advance();
      }

      // ---- the results; both warpgroups hold the last max ----

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] = lanes_sum<4>(sum[half]);
        if (lane % 4 == 0) store_shared(row_sum_at(parity, warpgroup, row + half * 8), sum[half]);
      }
      named_barrier_sync(kSumsReady, kConsumers * kWarpgroupThreads);  // with the other
      RowBlock block;
      load_shared_struct(block, block_at(parity));
      float scale[2], lse2[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = sum[half] + load_shared(row_sum_at(parity, warpgroup ^ 1, row + half * 8));
        scale[half] = total == 0.f ? 0.f : 1.f / total;
        lse2[half] = lse2_of(max[half], total);
      }
      const bool has_rows = warp * kFragmentRows < block.num_rows;
      const bool merges = warp_uniform(block.pairs) & kMergesFirst;
      if (merges) {
        mbarrier_wait(other_there, 0);  // pairs with load_other_partial
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
          merge_partial(tile_at(at.stage) + (fragment * 32 + lane) * 16, other_lse2, other_run, o, scale, lse2);
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
