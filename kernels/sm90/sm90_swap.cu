// MLA decode for sm_90 and few rows: operands swapped, so that KV tokens, and V's columns, fill the 64 rows of a wgmma instead of query rows.
// One persistent CTA per SM: two warpgroups compute, a third one loads.
//
// A CTA walks the pieces that the schedule gives it: a block of 16 packed query rows and a range of 64-token KV tiles each. Q stays
// in shared memory for a piece. KV goes round a ring of 8 KB chunks, 64 columns of a tile each, that runs on from piece to piece.
//
//   loads    A warp of the third warpgroup fetches chunk behind chunk, as soon as there is room, by TMA, or two those of a single tile; or
//            two warps copy half of its rows each by cp.async, where pages have no usable boxes. Two more fetch Q of the next piece, and
//            say what it is.
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
  // What they exchange, P included, is there or was read; another group's partial result is there; all of one is stored. Both
  kResult = 5,
  kBegun = 6,    // the mbarriers are there. The producer waits, the others arrive
  kInputs = 7,   // so is what the kernel before wrote. The producer arrives, the others wait
  kLoaders = 8,  // both warps that load by boxes have come to this piece. These
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

    auto load_boxes_of_pieces = [&](auto l2) {
      RingPlace<C> place;
      int landed_parity = 0;
      while (walk.more()) {
        // With itself: the second one, which has nothing to do in a longer piece, must be no round of the ring ahead or behind, as
        // `free` is waited for by parity.
        named_barrier_sync(kLoaders, kCopyWarps * 32);
        const int len = warp_uniform(walk.block.len);
        const int first_tile = warp_uniform(walk.block.first_tile), num_tiles = warp_uniform(walk.block.num_tiles);
        const int loaders = num_tiles == 1 ? kCopyWarps : 1;
        for (int tile = 0; tile < num_tiles; ++tile) {
          const int tokens = tokens_of_tile(first_tile + tile, len);
          const auto boxes = boxes_of_tile<kMaxBoxes>(p, slot, tile % kLookupTiles);
          if ((tile + 1) % kLookupTiles == 0) slot = walk.box_slot_at(tile + 1);
          if (tokens == kTileTokens) {
            RingPlace<C> of = place.after(warp);
#pragma unroll 1
            for (int chunk = warp; chunk < L::k_chunks && warp < loaders; chunk += loaders, of.advance(loaders)) {
              mbarrier_wait(at.free(of.slot), of.parity ^ 1);  // pairs with release(), a round before
              if (elect_lane()) {
                mbarrier_arrive_expect(at.full(of.slot), kChunkBytes);
                load_chunk<C>(p, tile_at(of, chunk), chunk, boxes, kTileTokens, at.full(of.slot), l2);
              }
            }
          } else if (warp == 0) {
            // The end of the request: the values behind it become zeros before anybody sees the tile.
            RingPlace<C> of = place;
            for (int chunk = 0; chunk < L::k_chunks; ++chunk, of.advance(1))
              mbarrier_wait(at.free(of.slot), of.parity ^ 1);
            of = place;
            if (tokens > 0) {
              if (elect_lane()) {
                mbarrier_arrive_expect(at.landed(), L::k_chunks * box_bytes(p, tokens));
#pragma unroll 1
                for (int chunk = 0; chunk < L::k_chunks; ++chunk, of.advance(1))
                  load_chunk<C>(p, tile_at(of, chunk), chunk, boxes, tokens, at.landed(), l2);
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
          }
          place.advance(L::k_chunks);
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
    else if (walk.reads_once()) load_boxes_of_pieces(evicted_first());
    else load_boxes_of_pieces(KeptInL2{});
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
    bool was_single = false;    // the piece before: both multiplied the P of one
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
    // Of the own half of the columns, or of both, by the P of warpgroup `of`; to be waited for.
    auto issue_values = [&](int tile_slot, int of, auto halves) {
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
    };
    auto wait_for_values = [&](auto halves) {
      wgmma_wait<0>();
      for_o(halves, [](float (&x)[rows / 2]) { pin(x); });
    };
    // By the maxima of its tile, once they are there. What is relative to the max before is to be multiplied by `factor`.
    auto raise_max = [&](float (&factor)[columns* 2]) {
#pragma unroll
      for (int n = 0; n < columns; ++n) {
        float all[2] = {kNegInf, kNegInf};
#pragma unroll
        for (int i = 0; i < kWarpgroupWarps; ++i) {
          float x[2];
          load_shared(x, at.tile_max(warpgroup * kWarpgroupWarps + i, n * 8 + pair));
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
      int num_tiles, unmasked_tiles;
      {
        RowBlock block;
        load_shared_struct(block, at.block(parity));
        num_tiles = warp_uniform(block.num_tiles);
        unmasked_tiles = warp_uniform(block.unmasked_tiles);
      }
      if (num_tiles == 0) break;
      for_o(both_halves, [&](float (&x)[rows / 2]) {
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) x[i] = 0.f;
      });
#pragma unroll
      for (int i = 0; i < columns * 2; ++i) max[i] = kNoMax, sum[i] = 0.f;

      const bool has_tile = first_own < num_tiles, is_single = num_tiles == 1;
      // With itself: the other has multiplied that P. Where this piece is one tile, too, its P is in the other place.
      if (was_single && !is_single) named_barrier_sync(kResult, kConsumerThreads);
      was_single = is_single;
      int last_slot = 0;
      if (!has_tile) mbarrier_arrive(at.q_free());  // pairs with copy_q_of_pieces
#pragma unroll 1
      for (int tile = first_own; tile < num_tiles; tile += 2, place.advance(2 * L::k_chunks)) {
        const bool is_last = tile + 2 >= num_tiles;
        last_slot = place.slot;
        float tile_max[columns * 2], factor[columns * 2];
        at.wait_for_room(place);
        compute_logits(place);
        if (L::rope > 0 && lane == 0)  // pairs with the producer's wait, a round later
          mbarrier_arrive(at.free(place.after(L::last_chunk).slot));
        if (is_last) mbarrier_arrive(at.q_free());  // who has read the description itself; pairs with copy_q_of_pieces
#pragma unroll
        for (int i = 0; i < rows / 2; ++i) s[i] *= p.scale_log2;
        if (tile >= unmasked_tiles) {
          RowBlock block;
          load_shared_struct(block, at.block(parity));
          const int token = (block.first_tile + tile) * kTileTokens + warp * 16 + quad;
#pragma unroll
          for (int i = 0; i < columns * 2; ++i) {
            const int visible = visible_tokens(p, block, i / 2 * 8 + pair + i % 2);
#pragma unroll
            for (int j = 0; j < 2; ++j)
              if (token + j * 8 >= visible) s[i / 2 * 4 + j * 2 + i % 2] = kNegInf;
          }
        }
#pragma unroll
        for (int i = 0; i < columns * 2; ++i)
          tile_max[i] = quads_max(fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]));
        if (quad == 0)
#pragma unroll
          for (int n = 0; n < columns; ++n)
            store_shared(at.tile_max(warpgroup * kWarpgroupWarps + warp, n * 8 + pair), tile_max[n * 2],
                         tile_max[n * 2 + 1]);
        named_barrier_sync(kMaxReady + warpgroup, kWarpgroupThreads);  // with itself
        raise_max(factor);
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
        issue_values(place.slot, warpgroup, both_halves);
        wait_for_values(both_halves);
        // Pairs with the producer's wait, a round later. What is kept of the last tile is the other warpgroup's to release.
        if (lane < L::v_chunks && (!is_last || lane >= at.exchange_chunks))
          mbarrier_arrive(at.free(place.after(lane).slot));
      }
      first_own ^= num_tiles & 1;

      // ---- the results: the thread has four rows of O^T ----

      RowBlock block;
      load_shared_struct(block, at.block(parity));
      const bool merges = warp_uniform(block.pairs) & kMergesFirst;
      const bool leaves = warp_uniform(block.partial_slot) >= 0 && !merges;
      const int other_slot = block.partial_slot - block.group_size;  // of the group before
      static_assert(rows == kFragmentRows && kChunkFragments == kWarpgroupWarps);
      const int first_fragment = warpgroup * L::half_chunks * kChunkFragments + warp;
#pragma unroll
      for (int i = 0; i < columns * 2; ++i) sum[i] = quads_sum(sum[i]);
      const int run = warpgroup * kWarpgroupWarps + warp;
      if (quad == 0)
#pragma unroll
        for (int n = 0; n < columns; ++n) {
          store_shared(at.row_sums(parity, run, n * 8 + pair), sum[n * 2], sum[n * 2 + 1]);
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
      if (is_single) {                                // both multiply its values, half of the columns each
        if (!has_tile) last_slot = slot_behind<C>(place.slot, C::stages - L::k_chunks);
        issue_values(last_slot, has_tile ? warpgroup : warpgroup ^ 1, own_half);
      }

      // What is said of a row is reckoned by one lane: these are fewer instructions, each of which all wait for.
      const int row = lane % rows;
      const float own_max = load_shared(at.row_max(parity, warpgroup, row));
      const float other_max = load_shared(at.row_max(parity, warpgroup ^ 1, row)), both_max = fmaxf(own_max, other_max);
      const float own_weight = exp2_fast(own_max - both_max), other_weight = exp2_fast(other_max - both_max);
      float sums[2] = {};  // of the own warps and of the other warpgroup's
#pragma unroll
      for (int i = 0; i < kConsumers * kWarpgroupWarps; ++i)
        sums[i / kWarpgroupWarps] += load_shared(
            at.row_sums(parity, (warpgroup ^ i / kWarpgroupWarps) * kWarpgroupWarps + i % kWarpgroupWarps, row));
      const float total = sum_of_both(sums[0], own_weight, sums[1], other_weight);
      float row_scale = inverse_fast(total), row_other = 0.f;
      float lse2 = lse2_of(both_max, total);
      wait_for_values(own_half);               // if there are any in flight
      if (is_single && lane < L::half_chunks)  // pairs with the producer's wait, a round later
        mbarrier_arrive(at.free(slot_behind<C>(last_slot, warpgroup * L::half_chunks + lane)));
      if (merges) {
        float of_other[2] = {kNegInf, kNegInf};
        if (row < block.num_rows) {
          of_other[0] = __ldcg(partial_lse2(p, rows, other_slot, row));
          of_other[1] = __ldcg(run_lse2(p, rows, other_slot, row, run));
        }
        const PairWeights weights = pair_weights(lse2, of_other[0], of_other[1]);
        row_scale *= weights.own, row_other = weights.other, lse2 = weights.lse2;
      }
      if (run == 0 && lane < rows && row < block.num_rows) store_lse<C>(p, block, row, lse2, leaves);
      auto of_rows = [&](float x, float (&to)[columns* 2]) {  // from the lane that has them
#pragma unroll
        for (int i = 0; i < columns * 2; ++i) to[i] = __shfl_sync(0xffffffffu, x, i / 2 * 8 + pair + i % 2);
      };
      if (!is_single) {
        const int slot = __float_as_int(load_shared(at.last_slot(parity, warpgroup ^ 1)));
        float weight[2][columns * 2];
        of_rows(own_weight, weight[0]), of_rows(other_weight, weight[1]);
#pragma unroll
        for (int chunk = 0; chunk < L::half_chunks; ++chunk)
#pragma unroll
          for (int i = 0; i < rows / 8; ++i) {
            float x[4];
            load_shared(x, at.half_of_o(slot, chunk, i));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int of = i * 2 + j % 2;
              o[0][chunk][i * 4 + j] = sum_of_both(o[0][chunk][i * 4 + j], weight[0][of], x[j], weight[1][of]);
            }
          }
        fence_proxy_async();
        __syncwarp();                   // all lanes have fenced their reads
        if (lane < at.exchange_chunks)  // pairs with the producer's wait, a round later
          mbarrier_arrive(at.free(slot_behind<C>(slot, lane)));
      }
      if (leaves) {  // divided by a power of two, which the absolute values of the warpgroup's columns tell
        float size[columns * 2] = {};
#pragma unroll
        for (int chunk = 0; chunk < L::half_chunks; ++chunk)
#pragma unroll
          for (int i = 0; i < rows / 2; ++i) size[i / 4 * 2 + i % 2] += fabsf(o[0][chunk][i]);
#pragma unroll
        for (int i = 0; i < columns * 2; ++i) size[i] = quads_sum(size[i]);
        if (quad == 0)
#pragma unroll
          for (int n = 0; n < columns; ++n)
            store_shared(at.row_sizes(parity, run, n * 8 + pair), size[n * 2], size[n * 2 + 1]);
        named_barrier_sync(kMaxReady + warpgroup, kWarpgroupThreads);  // with itself: they are there
        float all = 0.f;
#pragma unroll
        for (int i = 0; i < kWarpgroupWarps; ++i)
          all += load_shared(at.row_sizes(parity, warpgroup * kWarpgroupWarps + i, row));
        const int exponent = run_exponent(all * row_scale);
        row_scale *= exp2_of(-exponent);
        if (lane < rows) *run_lse2(p, rows, block.partial_slot, row, run) = lse2 + exponent;
      }
      const auto to =
          result_places<C>(p, block, leaves ? block.partial_slot : -1, merges ? other_slot : -1, first_fragment);
      float scale[columns * 2], other[columns * 2];
      of_rows(row_scale, scale), of_rows(row_other, other);
      store_transposed<T>(to, o[0], scale, other);
      if (warp_uniform(block.pairs) & kLeavesLast) {
        named_barrier_sync(kResult, kConsumerThreads);  // with itself: all of it is stored
        if (threadIdx.x == 0) announce_partial(p, rows, C::d_v, block.partial_slot);
      }
    }
  }
}

}  // namespace mla::sm90

MLA_ENTRIES(mla::sm90::decode_swap)
