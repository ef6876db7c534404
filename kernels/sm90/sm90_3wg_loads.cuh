// How the producer of sm90_3wg brings KV: two warps, by boxes or by rows, and behind the last piece what another worker left of it.
//
// What a call with few tokens executes lies together, near the kernel's entry: whole tiles of one box each first, then those of several,
// then the end of a request. The order is that of the code, and it counts: sm90_3wg.md, "Code that is cold".
#pragma once

#include "sm90_3wg_memory.cuh"

namespace mla::sm90 {

template <class C>
class Loads {
  using L = TileLayout<C>;

 public:
  // For warp `number` of the producer, of which kCopyWarps load. What the first tile needs is looked up at once.
  __device__ __forceinline__ Loads(const DecodeParams& params, const Memory<C>& memory, PieceWalk<C>& pieces,
                                   int number)
      : p(params), at(memory), walk(pieces), warp(number), lane(threadIdx.x % 32) {
    if (warp < kCopyWarps) slot = has_boxes(p) ? walk.box_slot_at(0) : walk.row_slot_at(0, warp * 32 + lane);
  }

  // By TMA: half of the columns each, and RoPE to whom the half is freed first. Returns the place behind the last tile.
  template <class L2>
  __device__ __forceinline__ RingPlace<C> boxes_of_pieces(L2 l2) {
    const int half = warp, first = half * L::half_chunks;
    RingPlace<C> place;
    int landed_parity = 0;
    while (walk.more()) {
      const int len = warp_uniform(walk.block.len);
      const int first_tile = warp_uniform(walk.block.first_tile), num_tiles = warp_uniform(walk.block.num_tiles);
      int tile = 0;
      auto tokens = [&] { return tokens_of_tile(first_tile + tile, len); };
      auto with_rope = [&] { return L::rope > 0 && tile % 2 == half; };
      auto look_up = [&](auto most) {
        const Boxes<most.value> boxes = boxes_of_tile<most.value>(p, slot, tile % kLookupTiles);
        // Of the next tiles: on its way while the stage of this one becomes free.
        if ((tile + 1) % kLookupTiles == 0) slot = walk.box_slot_at(tile + 1);
        return boxes;
      };
      auto wait_for_rope = [&] {
        mbarrier_wait(at.free_rope(place.stage), place.parity ^ 1);  // pairs with finish_logits, a round before
      };
      auto wait_for_half = [&] {
        mbarrier_wait(at.free(place.stage, half), place.parity ^ 1);  // pairs with release(), a round before
      };
      auto load_whole_tiles = [&](auto most, int end) {
        for (; tile < end && tokens() == kTileTokens; ++tile, place.advance()) {
          const auto boxes = look_up(most);
          auto load = [&](int chunk) {
            mbarrier_arrive_expect(at.full(place.stage, chunk), kChunkBytes);
            load_chunk<C>(p, at.tile(place.stage), chunk, boxes, kTileTokens, at.full(place.stage, chunk), l2);
          };
          if (with_rope()) {
            wait_for_rope();
            if (elect_lane()) load(L::last_chunk);
          }
          wait_for_half();
          if (elect_lane()) {
#pragma unroll
            for (int k = 0; k < L::half_chunks; ++k) load(first + k);
          }
        }
      };
      load_whole_tiles(Index<1>{}, p.box_rows < kTileTokens ? 0 : num_tiles);
      load_whole_tiles(Index<kMaxBoxes>{}, num_tiles);
      // The end of the request: the values behind it become zeros before anybody sees the tile.
      for (; tile < num_tiles; ++tile, place.advance()) {
        const auto boxes = look_up(Index<kMaxBoxes>{});
        if (with_rope()) wait_for_rope();
        wait_for_half();
        const int chunks = L::half_chunks + with_rope();
        if (tokens() > 0) {
          if (elect_lane()) {
            mbarrier_arrive_expect(at.landed(half), chunks * box_bytes(p, tokens()));
#pragma unroll 1
            for (int k = 0; k < chunks; ++k)
              load_chunk<C>(p, at.tile(place.stage), chunk_of(half, k), boxes, tokens(), at.landed(half), l2);
          }
          mbarrier_wait(at.landed(half), landed_parity);
          landed_parity ^= 1;
        }
        zero_rows(at.tile(place.stage) + first * kChunkBytes, L::half_chunks, tokens(), lane, 32);
        fence_proxy_async();
        __syncwarp();  // all lanes have fenced their zeros
        if (lane < chunks) mbarrier_arrive(at.full(place.stage, chunk_of(half, lane)));
      }
      walk.advance();
      slot = walk.box_slot_at(0);
    }
    return place;
  }

  // By address: 32 rows of a tile each. Returns the place behind the last tile.
  __device__ __forceinline__ RingPlace<C> rows_of_pieces() {
    RingPlace<C> place;
    RingPlace<C> copying;  // the half that was issued last and is not announced yet
    int copying_half = 0, copying_chunks = 0;
    // Copies are announced one half late, so that those of two halves overlap.
    auto announce = [&] {
      fence_proxy_async();
      __syncwarp();  // all lanes have fenced their copies
      if (lane < copying_chunks) mbarrier_arrive(at.full(copying.stage, chunk_of(copying_half, lane)));
    };
    while (walk.more()) {
      for (int tile = 0; tile < walk.block.num_tiles; ++tile, place.advance()) {
        const RowAddress row = row_address(p, slot);
        const RowUnits latent = row_units(row.latent, row.exists);
        if (tile + 1 < walk.block.num_tiles) slot = walk.row_slot_at(tile + 1, warp * 32 + lane);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {  // the half that is freed first is the owner's
          const int half = (tile + i) & 1;
          if (!__all_sync(0xffffffffu, mbarrier_test(at.free(place.stage, half), place.parity ^ 1))) {
            cp_async_wait<0>();  // who frees this half may first need what is in flight
            announce();
            copying_chunks = 0;
            mbarrier_wait(at.free(place.stage, half), place.parity ^ 1);  // pairs with release(), a round before
          }
          // The half that is freed first comes with RoPE, which was free before it: this never waits, but every phase must be seen.
          if (i == 0 && L::rope > 0) mbarrier_wait(at.free_rope(place.stage), place.parity ^ 1);
#pragma unroll
          for (int k = 0; k < L::half_chunks; ++k)
            copy_rows(at.tile(place.stage) + chunk_of(half, k) * kChunkBytes, warp * 32, latent,
                      chunk_of(half, k) * kChunkColumns);
          if (i == 0 && L::rope > 0)
            copy_rows(at.tile(place.stage) + L::last_chunk * kChunkBytes, warp * 32, row_units(row.rope, row.exists), 0,
                      L::rope);
          cp_async_commit();
          cp_async_wait<1>();
          announce();
          copying = place, copying_half = half, copying_chunks = L::half_chunks + (i == 0 && L::rope > 0);
        }
      }
      walk.advance();
      slot = walk.row_slot_at(0, warp * 32 + lane);
    }
    cp_async_wait<0>();
    announce();
    return place;
  }

  // By one warp, into a stage, while the last tiles are computed.
  __device__ __forceinline__ void other_partial(RingPlace<C> place) const {
    const RowBlock block = walk.first_block();
    if (!has_work(block)) return;
    constexpr int row_tile_bytes = kFragmentRows * C::d_v * kPartialBytes;
    static_assert(C::block_rows / kFragmentRows * row_tile_bytes <= L::bytes);
    const int of_other = block.partial_slot - walk.worker.group_size;  // of the group before
    if (lane == 0) {
      wait_for_partial(p, C::block_rows, C::d_v, of_other);
      fence_proxy_async_global();  // it was written by ordinary stores
    }
    if (L::rope > 0) mbarrier_wait(at.free_rope(place.stage), place.parity ^ 1);
    for (int half = 0; half < kConsumers; ++half) mbarrier_wait(at.free(place.stage, half), place.parity ^ 1);
    if (lane == 0) {
      const int bytes = (min(block.num_rows, C::block_rows) + kFragmentRows - 1) / kFragmentRows * row_tile_bytes;
      mbarrier_arrive_expect(at.other_there(), bytes);
      bulk_load(at.tile(place.stage), partial_fragment(p, C::block_rows, C::d_v, of_other, 0, 0), bytes,
                at.other_there());
    }
  }

 private:
  // The chunks of a half of the columns, and RoPE behind them.
  __device__ __forceinline__ static int chunk_of(int half, int k) {
    return k < L::half_chunks ? half * L::half_chunks + k : L::last_chunk;
  }

  const DecodeParams& p;
  const Memory<C>& at;
  PieceWalk<C>& walk;
  const int warp, lane;
  Slot slot{};  // of the next tiles
};

}  // namespace mla::sm90
