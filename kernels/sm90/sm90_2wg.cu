// MLA decode for sm_90a without a producer: TMA, wgmma, two warpgroups that take turns. One persistent CTA of 256 threads per SM.
//
// A CTA walks the pieces that the schedule gives it (sm80.cu says what a piece is), always 64 packed query rows and KV tiles of
// 64 tokens. Tiles are numbered through all pieces of the worker; tile t belongs to warpgroup t % 2, which computes
//
//   logits   S[64, 64] = Q K^T, both operands in shared memory,
//   softmax  P(t), which it keeps in registers and leaves in shared memory.
//
//   values   O[64, d_v] += P V. O is split by columns: each warpgroup owns half of them, in registers, and multiplies all tiles: its
//            own P from registers, the other's from shared memory. The running max goes to and fro with P.
//
// The logits of the RoPE columns and of its own half begin before the other's P is waited for; the rest, and the values of the other's
// tile, follow, and run beside the softmax. Each warpgroup also loads what it multiplies last: of every tile its half of the latent
// columns, and of its own tiles the RoPE columns. A part is refilled as soon as it is dead, for the tile `stages` on, be that of this
// piece or of one of the next. Schedule, budgets and what was tried: sm90_2wg.md.

#include <cstddef>

#include "../common/dependent.cuh"
#include "../common/entry.cuh"
#include "rows.cuh"

namespace mla::sm90 {

constexpr int kGroups = 2, kGroupThreads = 128;

// Named barriers; 0 is __syncthreads.
enum Barrier : int {
  kPReady = 1,     // + warpgroup that left P and its max: its threads arrive, the other's wait
  kWarpgroup = 3,  // + warpgroup: its own threads
  kPieceEnd = 5,   // row sums, and Q of the next piece: all threads
};

template <int N>
struct Number {
  static constexpr int value = N;
};

template <class C>
struct Smem2wg {
  using L = TileLayout<C>;
  unsigned char q[L::q_bytes];
  unsigned char kv[C::stages][L::bytes];
  unsigned char p[kChunkBytes];              // of the latest tile; who writes the next one has multiplied it
  float row_max[kGroups][C::block_rows];     // that the P of a warpgroup's latest tile refers to
  float row_sum[2][kGroups][C::block_rows];  // of P over a warpgroup's tiles, by parity of the piece
  uint64_t landed[C::stages][L::k_chunks];   // mbarriers: the chunk of the stage's tile is there
};

// Twice in the kernel, so that the loop by boxes holds no instruction of the copies by address.
template <class C, int SmemBytes, bool ByBoxes>
__device__ __forceinline__ void decode_pieces(const DecodeParams& p) {
  using T = typename C::Element;
  using L = TileLayout<C>;
  using Smem = Smem2wg<C>;
  static_assert(sizeof(Smem) == SmemBytes, "the smem column of variants.inc must be sizeof(Smem2wg)");
  static_assert(C::threads == kGroups * kGroupThreads && C::stages % kGroups == 0);
  constexpr int ahead = C::stages / 2 - 1;  // copies by address are announced this many tiles before they are needed

  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  const uint32_t smem = shared_address(smem_bytes);
  if (smem % (kSwizzleRows * kRowBytes) != 0) __trap();  // never, without static arrays
  auto owner_of = [](int t) { return static_cast<int>(static_cast<uint32_t>(t) % kGroups); };
  auto stage_of = [](int t) { return static_cast<int>(static_cast<uint32_t>(t) % C::stages); };
  auto parity_of = [](int t) { return static_cast<int>(static_cast<uint32_t>(t) / C::stages % 2); };
  auto kv_at = [&](int t) -> uint32_t { return smem + offsetof(Smem, kv) + stage_of(t) * L::bytes; };
  auto landed_at = [&](int t, int chunk) -> uint32_t {
    return smem + offsetof(Smem, landed) + (stage_of(t) * L::k_chunks + chunk) * kMbarrierBytes;
  };
  auto row_max_at = [&](int group, int row) -> uint32_t {
    return smem + offsetof(Smem, row_max) + (group * C::block_rows + row) * 4;
  };
  auto row_sum_at = [&](int parity, int group, int row) -> uint32_t {
    return smem + offsetof(Smem, row_sum) + ((parity * kGroups + group) * C::block_rows + row) * 4;
  };

  const int thread = threadIdx.x % kGroupThreads, lane = threadIdx.x % 32;
  const int group = warp_uniform(threadIdx.x / kGroupThreads), warp = warp_uniform(threadIdx.x / 32 % 4);
  const int row = warp * 16 + lane / 4, pair = lane % 4 * 2;  // accumulators: rows row, row + 8, columns pair, pair + 1
  const int first_chunk = group * L::half_chunks;             // of the half of the columns that is this warpgroup's

  // ---- what needs no plan: barriers ----

  constexpr bool by_boxes = ByBoxes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::stages * L::k_chunks; ++i)
      mbarrier_init(landed_at(0, 0) + i * kMbarrierBytes, by_boxes ? 1 : 2);  // two warps copy half of the rows each
    fence_mbarrier_init();
  }
  if (threadIdx.x == 32 && by_boxes) prefetch_tensor_maps<C>(p);
  wait_for_kernel_before();  // which may have been the planner

  const schedule::PlanView plan = schedule::view(p.plan, p.num_workers);
  const PlanWorker worker = plan.workers[blockIdx.x];
  auto next_piece_at = [&](int index) { return next_piece(p, plan.pieces, worker, index, 1, C::block_rows); };
  auto block_of = [&](int index) { return make_row_block(p, plan.pieces[index], worker.member, C::block_rows); };

  int index = next_piece_at(worker.first_piece);
  if (index == worker.end_piece) return;

  // ---- loading: tiles in turn, a tile per release; every thread knows where this warpgroup's loads stand ----

  struct {
    int index, tile, end_tile;  // to be loaded next
    int request, len;
    Slot slot;               // of the lane's box or row of it, looked up a tile ahead
    Boxes<kMaxBoxes> boxes;  // from the slots of all lanes, once gather() has waited for the look-up
  } loads{};
  auto look_up = [&] {
    loads.slot = by_boxes ? box_slot(p, loads.request, loads.tile, loads.len)
                          : slot_of(p, loads.request, loads.tile * kTileTokens + warp % 2 * 32 + lane, loads.len);
  };
  auto begin_load_piece = [&](int index) {
    loads.index = index;
    if (index == worker.end_piece) return;
    const RowBlock block = block_of(index);
    loads.tile = warp_uniform(block.first_tile);
    loads.end_tile = loads.tile + warp_uniform(block.num_tiles);
    loads.request = warp_uniform(block.request);
    loads.len = warp_uniform(block.len);
    look_up();
  };
  // Ahead of load_tile(), where there is time; without a branch, as wgmmas may be in flight.
  auto gather = [&] {
    if constexpr (by_boxes) loads.boxes = boxes_of_tile<kMaxBoxes>(p, loads.slot, 0);
  };
  // This warpgroup's share of tile t: a chunk per warp by boxes, half of the rows and of the chunks per warp by address.
  auto load_tile = [&](int t) {
    if (loads.index < worker.end_piece) {
      const uint32_t tile_at = kv_at(t);
      const bool with_rope = L::rope > 0 && owner_of(t) == group;
      if constexpr (by_boxes) {
        const int tokens = tokens_of_tile(loads.tile, loads.len);
        auto load = [&](int chunk) {
          mbarrier_arrive_expect(landed_at(t, chunk), box_bytes(p, tokens));
          load_chunk<C>(p, tile_at, chunk, loads.boxes, tokens, landed_at(t, chunk));
        };
        if (warp < L::half_chunks && elect_lane()) load(first_chunk + warp);
        if (with_rope && warp == L::half_chunks % 4 && elect_lane()) load(L::last_chunk);
        __syncwarp();  // what follows is for whole warps
      } else {
        const RowAddress from = row_address(p, loads.slot);
#pragma unroll 1
        for (int i = 0; i < L::half_chunks / 2;
             ++i) {  // their addresses anew for each: no registers are left to keep them
          const int chunk = first_chunk + warp / 2 * (L::half_chunks / 2) + i;
          copy_rows(tile_at + chunk * kChunkBytes, warp % 2 * 32, row_units(from.latent, from.exists),
                    chunk * kChunkColumns);
        }
        if (with_rope && warp / 2 == 1)
          copy_rows(tile_at + L::last_chunk * kChunkBytes, warp % 2 * 32, row_units(from.rope, from.exists), 0,
                    L::rope);
      }
      if (++loads.tile == loads.end_tile) {
        begin_load_piece(next_piece_at(loads.index + 1));
      } else {
        look_up();
      }
    }
    cp_async_commit();  // one group per tile, also when empty: cp_async_wait counts them
  };
  // Announces this warp's copies of tile t, once all but `pending` of the latest groups have landed; boxes announce themselves.
  // Behind the last tile nobody waits for what is announced.
  auto announce = [&](auto pending, int t) {
    if constexpr (!by_boxes) {
      cp_async_wait<decltype(pending)::value>();
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        for (int i = 0; i < L::half_chunks / 2; ++i)
          mbarrier_arrive(landed_at(t, first_chunk + warp / 2 * (L::half_chunks / 2) + i));
        if (L::rope > 0 && owner_of(t) == group && warp / 2 == 1) mbarrier_arrive(landed_at(t, L::last_chunk));
      }
      __syncwarp();
    }
  };
  // This warpgroup has multiplied tile t: what it loads of it is dead.
  auto release = [&](int t) {
    named_barrier_sync(kWarpgroup + group, kGroupThreads);  // pairs with itself: all four warps have
    load_tile(t + C::stages);
  };

  // ---- the first tiles, Q ----

  begin_load_piece(index);
  __syncthreads();  // the mbarriers are there
  let_next_kernel_start();
  for (int t = 0; t < C::stages; ++t) {
    gather();
    load_tile(t);
  }
  copy_q<C>(p, block_of(index), smem + offsetof(Smem, q), threadIdx.x, C::threads);
  cp_async_commit();  // cp_async_wait sees no copies outside a group
  cp_async_wait<0>();
  fence_proxy_async();
  __syncthreads();  // Q is there
  for (int t = 0; t < ahead; ++t) announce(Number<0>{}, t);

  // ---- logits, softmax, values ----

  float s[32], o[L::o_registers];
  uint32_t p_own[4][4];
  float row_max[2] = {}, row_sum[2] = {}, factor[2];  // factor: what O must be multiplied by before the next values
#pragma unroll
  for (int i = 0; i < L::o_registers; ++i) o[i] = 0.f;

  // Of the piece. Tiles are numbered through the worker's pieces; less `base`, through the request.
  int begin_t = 0, end_t = 0, base = 0, first_masked = 0, len = 0, visible[2] = {};

  const uint64_t q_desc = k_major(smem + offsetof(Smem, q)), k_desc = k_major(smem + offsetof(Smem, kv));
  const uint64_t p_desc = k_major(smem + offsetof(Smem, p));
  const uint64_t v_desc = mn_major(smem + offsetof(Smem, kv) + first_chunk * kChunkBytes);
  auto in_stage = [&](uint64_t desc, int t) { return pinned(desc + stage_of(t) * descriptor_step(L::bytes)); };

  // Zeroes what V has behind the request's end, in the half that this warpgroup multiplies. Copies by address have done so.
  auto clear_tail = [&](int t) {
    if constexpr (by_boxes) {
      const int tokens = tokens_of_tile(t - base, len);
      if (tokens == kTileTokens) return;
      for (int i = 0; i < L::half_chunks; ++i) mbarrier_wait(landed_at(t, first_chunk + i), parity_of(t));
      zero_rows(kv_at(t) + first_chunk * kChunkBytes, L::half_chunks, tokens, thread, kGroupThreads);
      fence_proxy_async();
      named_barrier_sync(kWarpgroup + group,
                         kGroupThreads);  // pairs with itself: the zeros of all four warps are there
    }
  };
  // Chunks in the order in which they are refilled: this warpgroup's half, RoPE; the other's half.
  auto compute_logits_of_half = [&](int t, int half) {
    const int parity = parity_of(t), first = (half == 0 ? group : 1 - group) * L::half_chunks;
    const uint64_t q = pinned(q_desc + first * kChunkStep), k = in_stage(k_desc + first * kChunkStep, t);
#pragma unroll
    for (int chunk = 0; chunk < L::half_chunks; ++chunk) {
      mbarrier_wait(landed_at(t, first + chunk), parity);
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < L::k_steps(0); ++step) {
        const uint64_t at = chunk * kChunkStep + step * kColumnStep;
        if (half == 0 && chunk == 0 && step == 0) wgmma_qk<T, false>(s, q + at, k + at);
        else wgmma_qk<T, true>(s, q + at, k + at);
      }
    }
  };
  auto compute_first_logits = [&](int t) {
    compute_logits_of_half(t, 0);
    if constexpr (L::rope > 0) {
      mbarrier_wait(landed_at(t, L::last_chunk), parity_of(t));
      wgmma_fence();
      const uint64_t q = pinned(q_desc + L::last_chunk * kChunkStep),
                     k = in_stage(k_desc + L::last_chunk * kChunkStep, t);
#pragma unroll
      for (int step = 0; step < L::k_steps(L::last_chunk); ++step)
        wgmma_qk<T, true>(s, q + step * kColumnStep, k + step * kColumnStep);
    }
    wgmma_commit();
  };
  auto compute_other_logits = [&](int t) {
    compute_logits_of_half(t, 1);
    wgmma_commit();
  };
  auto max_of_tile = [&](int t, float (&tile_max)[2]) {
    scale_logits(s, p.scale_log2);
    if (t >= first_masked) {
      const int before = (t - base) * kTileTokens + pair;
      const int seen[2] = {visible[0] - before, visible[1] - before};
      mask_tail(s, seen);
    }
    mla::sm90::row_max(s, tile_max);
#pragma unroll
    for (int half = 0; half < 2; ++half)  // nobody reads it: ptxas would move the next wait up, ahead of all this
      if (lane % 4 == 0) store_shared(row_max_at(group, row + half * 8), tile_max[half]);
  };
  // Behind a barrier of the warpgroup, which has multiplied the other's P by then: the own takes its place.
  auto hand_over = [&](const float (&tile_max)[2]) {
    raise_max(row_max, tile_max, factor);
    exp2_rows(s, row_max, factor, row_sum);
    pack_p<T>(s, p_own);
    const uint32_t p_at = smem + offsetof(Smem, p);
#pragma unroll
    for (int k = 0; k < 4; ++k) stmatrix_x4(p_at + swizzled(warp * 16 + lane % 16, k * 2 + lane / 16), p_own[k]);
    if (lane % 4 == 0) {
      store_shared(row_max_at(group, row), row_max[0]);
      store_shared(row_max_at(group, row + 8), row_max[1]);
    }
    fence_proxy_async();                                // P, for the other's wgmma
    named_barrier_arrive(kPReady + group, C::threads);  // pairs with take_max
  };
  // Waits for the P of the other's latest tile, and takes over the max that it refers to.
  auto take_max = [&] {
    named_barrier_sync(kPReady + 1 - group, C::threads);  // pairs with hand_over
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float raised = load_shared(row_max_at(1 - group, row + half * 8));
      factor[half] = exp2_fast(row_max[half] - raised);
      row_sum[half] *= factor[half];
      row_max[half] = raised;
    }
  };
  auto add_own_values = [&](int t) {
    const uint64_t v = in_stage(v_desc, t);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_pv<T>(o, p_own[k], v + k * kTokenStep);
    wgmma_commit();
  };
  auto add_others_values = [&](int t) {
    const uint64_t a = pinned(p_desc), v = in_stage(v_desc, t);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_pv<T>(o, a + k * kColumnStep, v + k * kTokenStep);
    wgmma_commit();
  };

  // ---- the loop over pieces ----

  int parity = 0;
  while (true) {
    const int next_index = next_piece_at(index + 1);
    auto load_next_q = [&] {  // the logits of the piece's last tile are there: nobody reads Q any more
      if (next_index < worker.end_piece)
        copy_q<C>(p, block_of(next_index), smem + offsetof(Smem, q), threadIdx.x, C::threads);
      cp_async_commit();
    };
    {
      const RowBlock block = block_of(index);
      base = begin_t - warp_uniform(block.first_tile);
      end_t = begin_t + warp_uniform(block.num_tiles);
      len = warp_uniform(block.len);
      first_masked = begin_t + warp_uniform(block.unmasked_tiles);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visible[half] = visible_tokens(p, block, row + half * 8);
        row_max[half] = kNoMax;
        row_sum[half] = 0.f;
      }
    }

    float tile_max[2];
    int own = owner_of(begin_t) == group ? begin_t : begin_t + 1;
    if (own == begin_t) {  // the piece's first tile is this warpgroup's: nothing to multiply beside it
      announce(Number<ahead + 1>{}, own + ahead);
      clear_tail(own);
      pin(s);
      compute_first_logits(own);
      compute_other_logits(own);
      wgmma_wait<0>();
      pin(s);
      max_of_tile(own, tile_max);
      hand_over(tile_max);
      if (own + 1 == end_t) load_next_q();
      pin(o);
      add_own_values(own);
      gather();
      wgmma_wait<0>();
      pin(o);
      release(own);
      own += 2;
    }
#pragma unroll 1
    for (; own < end_t; own += 2) {
      announce(Number<ahead + 1>{}, own - 1 + ahead);
      announce(Number<ahead>{}, own + ahead);
      clear_tail(own);
      pin(s);
      compute_first_logits(own);  // of what is there already, while the other's P is not
      gather();
      take_max();
      wgmma_wait<0>();  // O may be touched
      rescale_rows(o, factor);
      clear_tail(own - 1);
      pin(o);
      compute_other_logits(own);
      add_others_values(own - 1);
      wgmma_wait<1>();
      pin(s);
      max_of_tile(own, tile_max);  // beside the values of the other's tile
      wgmma_wait<0>();
      pin(o);
      release(own - 1);
      hand_over(tile_max);
      if (own + 1 == end_t) load_next_q();
      rescale_rows(o, factor);
      pin(o);
      add_own_values(own);
      gather();
      wgmma_wait<0>();
      pin(o);
      release(own);
    }
    if (own == end_t) {  // the piece's last tile is the other's
      announce(Number<ahead + 1>{}, own - 1 + ahead);
      take_max();
      load_next_q();
      rescale_rows(o, factor);
      clear_tail(own - 1);
      pin(o);
      add_others_values(own - 1);
      gather();
      wgmma_wait<0>();
      pin(o);
      release(own - 1);
    }

    // ---- the end of a piece ----

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum[half] = lanes_sum<4>(row_sum[half]);
      if (lane % 4 == 0) store_shared(row_sum_at(parity, group, row + half * 8), row_sum[half]);
    }
    cp_async_wait<1>();  // Q of the next piece has landed: the release behind it committed one more group
    fence_proxy_async();
    named_barrier_sync(kPieceEnd, C::threads);  // pairs with itself: both warpgroups' sums and all of Q are there
    const RowBlock block = block_of(index);
    const bool partial = warp_uniform(block.partial_slot) >= 0;
    float scale[2], lse2[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block_row = row + half * 8;
      const float sum = row_sum[half] + load_shared(row_sum_at(parity, 1 - group, block_row));
      scale[half] = sum == 0.f ? 0.f : 1.f / sum;
      lse2[half] = lse2_of(row_max[half], sum);
      if (!partial) store_output<T>(p, block, block_row, first_chunk * kChunkColumns + pair, o, half, scale[half]);
      if (group == 0 && lane % 4 == 0 && block_row < block.num_rows)
        store_lse<C>(p, block, block_row, lse2[half], partial);
    }
    if (partial && warp * kFragmentRows < block.num_rows)
      store_partial<C>(p, block.partial_slot, warp, group, o, scale, lse2);
    if (next_index == worker.end_piece) return;
#pragma unroll
    for (int i = 0; i < L::o_registers; ++i) o[i] = 0.f;
    index = next_index;
    begin_t = end_t;
    parity ^= 1;
  }
}

template <class C, int SmemBytes>
__device__ __forceinline__ void decode_2wg(const DecodeParams& p) {
  if (has_boxes(p)) decode_pieces<C, SmemBytes, true>(p);
  else decode_pieces<C, SmemBytes, false>(p);
}

}  // namespace mla::sm90

MLA_ENTRIES(mla::sm90::decode_2wg)
