// MLA decode for sm_90 and few rows: operands swapped, so that KV tokens, and V's columns, fill the 64 rows of a wgmma instead of query rows.
// One persistent CTA per SM: two warpgroups compute, a third one loads.
//
// A CTA walks the pieces that the schedule gives it: a block of 16 packed query rows and a range of 64-token KV tiles each. Q stays
// in shared memory for a piece. KV goes round a ring of 8 KB chunks, 64 columns of a tile each, that runs on from piece to piece.
//
//   loads    A warp of the third warpgroup fetches chunk behind chunk, as soon as there is room, by TMA; or two warps copy half of its
//            rows each by cp.async, where pages have no usable boxes. Two more fetch Q of the next piece, and say what it is.
//   logits   The two warpgroups have every other tile each: S^T[64 tokens, rows] = K Q^T.
//   softmax  Each has a running max of its own; P^T goes to shared memory.
//   values   O^T[64 columns, rows] += V^T P^T, for 64 columns of a chunk at a time, all of them.
//
// Nothing of this waits for the other warpgroup. At the end of a piece they exchange half of their O^T, scaled by the max of both. Where
// things lie in shared memory: sm90_swap_memory.cuh. Schedule, budgets, barriers: sm90_swap.md.

#include "../common/dependent.cuh"
#include "../common/entry.cuh"
#include "sm90_swap_memory.cuh"
#include "transposed.cuh"

namespace mla::sm90 {

constexpr int kConsumerThreads = kConsumers * kWarpgroupThreads;
constexpr int kCopiesAhead = 6;  // chunks by cp.async that are in flight

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kMaxReady = 1,  // + warpgroup: maxima of its tile are there; nobody reads the P, or the tile, before. Its own threads
  kPReady = 3,    // + warpgroup: its P is there. Its own threads
  kResult = 5,    // what they exchange, and another group's partial result, is there; or all of one is stored. Both
  kBegun = 6,     // the mbarriers are there. The producer waits, the others arrive
  kInputs = 7,    // so is what the kernel before wrote. The producer arrives, the others wait
};

template <class C, int SmemBytes>
__device__ __forceinline__ void decode_swap(const DecodeParams& p) {
  using T = typename C::Element;
  using L = TileLayout<C>;
  constexpr int rows = C::block_rows, columns = rows / 8;  // n-tiles of 8 query rows
  static_assert(C::threads == (kConsumers + 1) * kWarpgroupThreads && C::stages >= 2 * L::k_chunks);
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
    Slot slot{};
    if (warp < kCopyWarps) slot = has_boxes(p) ? walk.box_slot_at(0) : walk.row_slot_at(0, warp * 32 + lane);
    named_barrier_arrive(kInputs, C::threads);  // pairs with the consumers' wait
    named_barrier_sync(kBegun, C::threads);     // pairs with the consumers' arrival
    let_next_kernel_start();

    // Where a tile would begin whose chunk `chunk` is here.
    auto tile_at = [&](RingPlace<C> place, int chunk) { return at.chunk(place.slot) - chunk * kChunkBytes; };

    auto load_boxes_of_pieces = [&] {
      RingPlace<C> place;
      int landed_parity = 0;
      while (walk.more()) {
        const int len = warp_uniform(walk.block.len);
        const int first_tile = warp_uniform(walk.block.first_tile), num_tiles = warp_uniform(walk.block.num_tiles);
        for (int tile = 0; tile < num_tiles; ++tile) {
          const int tokens = tokens_of_tile(first_tile + tile, len);
          const Boxes boxes = all_boxes(p, slot, tile % kLookupTiles);
          if ((tile + 1) % kLookupTiles == 0) slot = walk.box_slot_at(tile + 1);
          if (tokens == kTileTokens) {
#pragma unroll 1
            for (int chunk = 0; chunk < L::k_chunks; ++chunk, place.advance(1)) {
              mbarrier_wait(at.free(place.slot), place.parity ^ 1);  // pairs with release(), a round before
              if (elect_lane()) {
                mbarrier_arrive_expect(at.full(place.slot), kChunkBytes);
                load_chunk<C>(p, tile_at(place, chunk), chunk, boxes, kTileTokens, at.full(place.slot));
              }
            }
          } else {  // the end of the request: the values behind it become zeros before anybody sees the tile
            RingPlace<C> of = place;
            for (int chunk = 0; chunk < L::k_chunks; ++chunk, of.advance(1))
              mbarrier_wait(at.free(of.slot), of.parity ^ 1);
            of = place;
            if (tokens > 0) {
              if (elect_lane()) {
                mbarrier_arrive_expect(at.landed(), L::k_chunks * box_bytes(p, tokens));
#pragma unroll 1
                for (int chunk = 0; chunk < L::k_chunks; ++chunk, of.advance(1))
                  load_chunk<C>(p, tile_at(of, chunk), chunk, boxes, tokens, at.landed());
              }
              mbarrier_wait(at.landed(), landed_parity);
              landed_parity ^= 1;
            }
            of = place;
            for (int chunk = 0; chunk < L::k_chunks; ++chunk, of.advance(1))
              if (chunk < L::v_chunks) zero_rows(at.chunk(of.slot), 1, tokens, lane, 32);
            fence_proxy_async();
            __syncwarp();  // all lanes have fenced their zeros
            if (lane < L::k_chunks) mbarrier_arrive(at.full(place.after(lane).slot));
            place.advance(L::k_chunks);
          }
        }
        walk.advance();
        slot = walk.box_slot_at(0);
      }
    };

    auto copy_rows_of_pieces = [&] {
      RingPlace<C> place, announced;
      int ahead = 0;  // chunks from the one to be announced next to the one to be copied next
      auto announce = [&] {
        fence_proxy_async();
        __syncwarp();  // all lanes have fenced their copies
        if (lane == 0) mbarrier_arrive(at.full(announced.slot));
        announced.advance(1);
        --ahead;
      };
      while (walk.more()) {
        for (int tile = 0; tile < walk.block.num_tiles; ++tile) {
          const RowAddress row = row_address(p, slot);
          const RowUnits latent = row_units(row.latent, row.exists);
          if (tile + 1 < walk.block.num_tiles) slot = walk.row_slot_at(tile + 1, warp * 32 + lane);
          for (int chunk = 0; chunk < L::k_chunks; ++chunk, place.advance(1)) {
            if (!__all_sync(0xffffffffu, mbarrier_test(at.free(place.slot), place.parity ^ 1))) {
              cp_async_wait<0>();  // who frees this chunk may first need what is in flight
              while (ahead > 0) announce();
              mbarrier_wait(at.free(place.slot), place.parity ^ 1);  // pairs with release(), a round before
            }
            if (chunk < L::v_chunks) copy_rows(at.chunk(place.slot), warp * 32, latent, chunk * kChunkColumns);
            else copy_rows(at.chunk(place.slot), warp * 32, row_units(row.rope, row.exists), 0, L::rope);
            cp_async_commit();
            if (++ahead > kCopiesAhead) {
              cp_async_wait<kCopiesAhead>();
              announce();
            }
          }
        }
        walk.advance();
        slot = walk.row_slot_at(0, warp * 32 + lane);
      }
      cp_async_wait<0>();
      while (ahead > 0) announce();
    };

    if (warp >= kCopyWarps) copy_q_of_pieces<C>(p, walk, at.q(), at.block(0), at.q_full(), at.q_free());
    else if (!has_boxes(p)) copy_rows_of_pieces();
    else if (warp == 0) load_boxes_of_pieces();
  } else {
    if (threadIdx.x == 0) at.init_mbarriers(has_boxes(p));
    named_barrier_arrive(kBegun, C::threads);  // pairs with the producer's wait
    named_barrier_sync(kInputs, C::threads);   // pairs with the producer's arrival
    let_next_kernel_start();
    // Of accumulators: tokens, or columns, quad and quad + 8; query rows pair and pair + 1.
    const int quad = lane / 4, pair = lane % 4 * 2;
    const uint64_t q_operand = k_major(at.q()), k_operand = k_major(at.chunk(0)), v_operand = mn_major(at.chunk(0));
    const uint64_t p_operand = k_major(at.p());
    constexpr uint64_t q_chunk_step = descriptor_step(L::q_chunk_bytes), p_step = descriptor_step(rows * kRowBytes);
    auto in_slot = [](uint64_t operand, int slot) {
      return pinned(operand + static_cast<uint64_t>(slot) * kChunkStep);
    };

    // O^T of the columns that the warpgroup stores, and of those that the other does.
    float s[rows / 2], o[2][L::half_chunks][rows / 2];
    float max[columns * 2], sum[columns * 2];  // of query row 8 n + pair + j: number 2 n + j
    auto for_o = [&](auto halves, auto&& visit) {
#pragma unroll
      for (int half = 0; half < halves.value; ++half)
#pragma unroll
        for (int chunk = 0; chunk < L::half_chunks; ++chunk) visit(o[half][chunk]);
    };
    constexpr Index<1> own_half{};
    constexpr Index<2> both_halves{};
    int first_own = warpgroup;  // of the piece's tiles; the warpgroups take the ring's in turn
    RingPlace<C> place = RingPlace<C>{}.after(warpgroup * L::k_chunks);  // of the first chunk of the next one

    auto compute_logits = [&](RingPlace<C> tile) {
      pin(s);
      unrolled<L::k_chunks>([&](auto i) {
        constexpr int chunk = i.value;
        const RingPlace<C> from = tile.after(chunk);
        mbarrier_wait(at.full(from.slot), from.parity);  // pairs with the producer's loads and arrivals
        wgmma_fence();
        const uint64_t a = in_slot(k_operand, from.slot), b = pinned(q_operand + chunk * q_chunk_step);
#pragma unroll
        for (int k = 0; k < L::k_steps(chunk); ++k) {
          if (chunk == 0 && k == 0) wgmma_kq<T, false>(s, a, b);
          else wgmma_kq<T, true>(s, a + k * kColumnStep, b + k * kColumnStep);
        }
      });
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);
    };
    // Of the own half of the columns, or of both, by the P of warpgroup `of`.
    auto multiply_values = [&](int tile_slot, int of, auto halves) {
      for_o(halves, [](float (&x)[rows / 2]) { pin(x); });
      wgmma_fence();
      const uint64_t b = pinned(p_operand + of * p_step);
      unrolled<halves.value * L::half_chunks>([&](auto i) {
        constexpr int half = i.value / L::half_chunks, chunk = i.value % L::half_chunks;
        const uint64_t a = in_slot(v_operand, slot_behind<C>(tile_slot, (warpgroup ^ half) * L::half_chunks + chunk));
#pragma unroll
        for (int k = 0; k < 4; ++k) wgmma_vp<T>(o[half][chunk], a + k * kTokenStep, b + k * kColumnStep);
      });
      wgmma_commit();
      wgmma_wait<0>();
      for_o(halves, [](float (&x)[rows / 2]) { pin(x); });
    };
    // By the maxima of warpgroup `of`'s tile, once they are there. What is relative to the max before is to be multiplied by `factor`.
    auto raise_max = [&](int of, float (&factor)[columns* 2]) {
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        float all[2] = {kNegInf, kNegInf};
#pragma unroll
        for (int i = 0; i < kWarpgroupWarps; ++i) {
          float x[2];
          load_shared(x, at.tile_max(of * kWarpgroupWarps + i, n * 8 + pair));
          all[0] = fmaxf(all[0], x[0]), all[1] = fmaxf(all[1], x[1]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = n * 2 + j;
          const float raised = all[j] > max[i] + kMaxGrowth ? all[j] : max[i];
          factor[i] = exp2_fast(max[i] - raised);
          max[i] = raised;
          sum[i] *= factor[i];
        }
      }
    };

#pragma unroll 1
    for (int parity = 0;; parity ^= 1) {   // of the piece
      mbarrier_wait(at.q_full(), parity);  // pairs with copy_q_of_pieces
      int num_tiles, unmasked_tiles, visible[columns * 2];
      {
        RowBlock block;
        load_shared_struct(block, at.block(parity));
        num_tiles = warp_uniform(block.num_tiles);
        unmasked_tiles = warp_uniform(block.unmasked_tiles);
#pragma unroll
        for (int i = 0; i < columns * 2; ++i)
          visible[i] =
              visible_tokens(p, block, i / 2 * 8 + pair + i % 2) - block.first_tile * kTileTokens - warp * 16 - quad;
      }
      if (num_tiles == 0) break;
      for_o(both_halves, [&](float (&x)[rows / 2]) {
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) x[i] = 0.f;
      });
#pragma unroll
      for (int i = 0; i < columns * 2; ++i) max[i] = kNoMax, sum[i] = 0.f;

      const bool has_tile = first_own < num_tiles, is_single = num_tiles == 1;
      int last_slot = 0;
      if (!has_tile) mbarrier_arrive(at.q_free());  // pairs with copy_q_of_pieces
#pragma unroll 1
      for (int tile = first_own; tile < num_tiles; tile += 2, place.advance(2 * L::k_chunks)) {
        const bool is_last = tile + 2 >= num_tiles;
        last_slot = place.slot;
        float tile_max[columns * 2], factor[columns * 2];
        compute_logits(place);
        if (L::rope > 0 && lane == 0)  // pairs with the producer's wait, a round later
          mbarrier_arrive(at.free(place.after(L::last_chunk).slot));
        if (is_last) mbarrier_arrive(at.q_free());  // who has read the description itself; pairs with copy_q_of_pieces
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) s[i] *= p.scale_log2;
        if (tile >= unmasked_tiles)
#pragma unroll
          for (int i = 0; i < rows / 2; ++i)
            if (i / 2 % 2 * 8 >= visible[i / 4 * 2 + i % 2] - tile * kTileTokens) s[i] = kNegInf;
#pragma unroll
        for (int i = 0; i < columns * 2; ++i)
          tile_max[i] = quads_max(fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]));
        if (quad == 0)
#pragma unroll
          for (int n = 0; n < columns; ++n)
            store_shared(at.tile_max(warpgroup * kWarpgroupWarps + warp, n * 8 + pair), tile_max[n * 2],
                         tile_max[n * 2 + 1]);
        named_barrier_sync(kMaxReady + warpgroup, kWarpgroupThreads);  // with itself
        raise_max(warpgroup, factor);
        uint32_t packed[rows / 4];  // tokens quad and quad + 8 apart: an 8 x 8 tile of P a register
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) {
          s[i] = exp2_fast(s[i] - max[i / 4 * 2 + i % 2]);
          sum[i / 4 * 2 + i % 2] += s[i];
        }
#pragma unroll
        for (int i = 0; i < rows / 4; ++i) packed[i] = pack2<T>(s[i * 2], s[i * 2 + 1]);
        const uint32_t to = at.p() + warpgroup * rows * kRowBytes;
        // 16 query rows and the warp's 16 tokens at a time: lane i addresses row i % 8 of tile i / 8.
#pragma unroll
        for (int n = 0; n < columns; n += 2) {
          const uint32_t four[4] = {packed[n * 2], packed[n * 2 + 1], packed[n * 2 + 2], packed[n * 2 + 3]};
          stmatrix_x4_trans(to + swizzled(n * 8 + lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2), four);
        }
        fence_proxy_async();
        if (is_single) continue;
        named_barrier_sync(kPReady + warpgroup, kWarpgroupThreads);  // with itself

        bool grew = false;
#pragma unroll
        for (int i = 0; i < columns * 2; ++i) grew |= factor[i] != 1.f;
        if (__any_sync(0xffffffffu, grew))
          for_o(both_halves, [&](float (&x)[rows / 2]) {
#pragma unroll
            for (int i = 0; i < rows / 2; ++i) x[i] *= factor[i / 4 * 2 + i % 2];
          });
        multiply_values(place.slot, warpgroup, both_halves);
        // Pairs with the producer's wait, a round later. What is kept of the last tile is the other warpgroup's to release.
        if (lane < L::v_chunks && (!is_last || lane >= at.exchange_chunks))
          mbarrier_arrive(at.free(place.after(lane).slot));
      }
      if (is_single) {                                  // both multiply its values, half of the columns each
        named_barrier_sync(kResult, kConsumerThreads);  // with itself: P is there
        float factor[columns * 2];
        if (!has_tile) {
          raise_max(warpgroup ^ 1, factor);
          last_slot = slot_behind<C>(place.slot, C::stages - L::k_chunks);
        }
        multiply_values(last_slot, has_tile ? warpgroup : warpgroup ^ 1, own_half);
        if (lane < L::half_chunks)  // pairs with the producer's wait, a round later
          mbarrier_arrive(at.free(slot_behind<C>(last_slot, warpgroup * L::half_chunks + lane)));
      }
      first_own ^= num_tiles & 1;

      // ---- the results: the thread has four rows of O^T ----

      static_assert(rows == kFragmentRows);
      RowBlock block;
      load_shared_struct(block, at.block(parity));
      const bool merges = warp_uniform(block.pairs) & kMergesFirst;
      const bool leaves = warp_uniform(block.partial_slot) >= 0 && !merges;
      const int other_slot = block.partial_slot - block.group_size;  // of the group before
      float size[columns * 2] = {};
#pragma unroll
      for (int i = 0; i < columns * 2; ++i) sum[i] = quads_sum(sum[i]);
      if (leaves) {
        for_o(both_halves, [&](const float (&x)[rows / 2]) {
#pragma unroll
          for (int i = 0; i < columns * 2; ++i)
            size[i] += fabsf(x[i / 2 * 4 + i % 2]) + fabsf(x[i / 2 * 4 + 2 + i % 2]);
        });
#pragma unroll
        for (int i = 0; i < columns * 2; ++i) size[i] = quads_sum(size[i]);
      }
      if (quad == 0)
#pragma unroll
        for (int n = 0; n < columns; ++n) {
          store_shared_quad(at.row_sums(parity, warpgroup * kWarpgroupWarps + warp, n * 8 + pair),
                            {sum[n * 2], size[n * 2], sum[n * 2 + 1], size[n * 2 + 1]});
          if (warp == 0) store_shared(at.row_max(parity, warpgroup, n * 8 + pair), max[n * 2], max[n * 2 + 1]);
        }
      if (!is_single) {
        if (threadIdx.x % kWarpgroupThreads == 0)
          store_shared(at.last_slot(parity, warpgroup), __int_as_float(last_slot));
        // With itself: no warp multiplies the tile any more.
        named_barrier_sync(kMaxReady + warpgroup, kWarpgroupThreads);
#pragma unroll
        for (int chunk = 0; chunk < L::half_chunks; ++chunk)
#pragma unroll
          for (int i = 0; i < rows / 8; ++i)
            store_shared_quad(at.half_of_o(last_slot, chunk, i), {o[1][chunk][i * 4], o[1][chunk][i * 4 + 1],
                                                                  o[1][chunk][i * 4 + 2], o[1][chunk][i * 4 + 3]});
      }
      if (merges && threadIdx.x == 0) wait_for_partial(p, rows, C::d_v, other_slot);
      named_barrier_sync(kResult, kConsumerThreads);  // with itself
      float weight[2][columns * 2];                   // of the own sums and of the other warpgroup's
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        float of_other[2];
        load_shared(of_other, at.row_max(parity, warpgroup ^ 1, n * 8 + pair));
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = n * 2 + j;
          const float both = fmaxf(max[i], of_other[j]);
          weight[0][i] = exp2_fast(max[i] - both), weight[1][i] = exp2_fast(of_other[j] - both);
          max[i] = both;
        }
      }
      if (!is_single) {
        const int slot = __float_as_int(load_shared(at.last_slot(parity, warpgroup ^ 1)));
#pragma unroll
        for (int chunk = 0; chunk < L::half_chunks; ++chunk)
#pragma unroll
          for (int i = 0; i < rows / 8; ++i) {
            float x[4];
            load_shared(x, at.half_of_o(slot, chunk, i));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int row = i * 2 + j % 2;
              o[0][chunk][i * 4 + j] = sum_of_both(o[0][chunk][i * 4 + j], weight[0][row], x[j], weight[1][row]);
            }
          }
        fence_proxy_async();
        __syncwarp();                   // all lanes have fenced their reads
        if (lane < at.exchange_chunks)  // pairs with the producer's wait, a round later
          mbarrier_arrive(at.free(slot_behind<C>(slot, lane)));
      }
      float scale[columns * 2], other[columns * 2] = {};
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        float total[4] = {}, sums[2][4] = {};  // of two rows, as in shared memory; `sums`: own, other warpgroup's
#pragma unroll
        for (int i = 0; i < kConsumers * kWarpgroupWarps; ++i) {
          const int from = i / kWarpgroupWarps;
          float x[4];
          load_shared(x, at.row_sums(parity, (warpgroup ^ from) * kWarpgroupWarps + i % kWarpgroupWarps, n * 8 + pair));
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[from][j] += x[j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
          total[j] = sum_of_both(sums[0][j], weight[0][n * 2 + j / 2], sums[1][j], weight[1][n * 2 + j / 2]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int i = n * 2 + j, row = n * 8 + pair + j, run = warpgroup * kWarpgroupWarps + warp;
          scale[i] = total[j * 2] == 0.f ? 0.f : 1.f / total[j * 2];
          float lse2 = lse2_of(max[i], total[j * 2]);
          if (merges) {
            float of_other[2] = {kNegInf, kNegInf};
            if (row < block.num_rows) {
              of_other[0] = __ldcg(partial_lse2(p, rows, other_slot, row));
              of_other[1] = __ldcg(run_lse2(p, rows, other_slot, row, run));
            }
            const PairWeights weights = pair_weights(lse2, of_other[0], of_other[1]);
            scale[i] *= weights.own, other[i] = weights.other, lse2 = weights.lse2;
          }
          if (leaves) {
            const int exponent = run_exponent(total[j * 2 + 1] * scale[i]);
            scale[i] *= exp2_of(-exponent);
            if (quad == 0) *run_lse2(p, rows, block.partial_slot, row, run) = lse2 + exponent;
          }
          if (warpgroup == 0 && warp == 0 && quad == 0 && row < block.num_rows)
            store_lse<C>(p, block, row, lse2, leaves);
        }
      }
      static_assert(kChunkFragments == kWarpgroupWarps);
      store_transposed<T>(p, block, warpgroup * L::half_chunks * kChunkFragments + warp, o[0], scale, leaves,
                          merges ? other_slot : -1, other);
      if (warp_uniform(block.pairs) & kLeavesLast) {
        named_barrier_sync(kResult, kConsumerThreads);  // with itself: all of it is stored
        if (threadIdx.x == 0) announce_partial(p, rows, C::d_v, block.partial_slot);
      }
    }
  }
}

}  // namespace mla::sm90

MLA_ENTRIES(mla::sm90::decode_swap)
