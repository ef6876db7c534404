// KV on its way into the ring of stages: row addresses through the block table, and copies.
#pragma once

#include "memory.cuh"
#include "work.cuh"

namespace mla::sm80 {

template <class C>
struct Loads {
  using S = Shape<C>;
  // At most, of one piece; they fill the end of the addresses.
  static constexpr int lookup_tiles = S::address_rows / S::load_rows;

  const DecodeParams& p;
  const Place<C>& me;
  const Memory<C>& at;
  const Work<C>& work;
  int addressed;  // tiles that can be loaded before the next look-up

  // ---- addresses: the rows of several tiles at once, a thread each ----

  __device__ __forceinline__ void move_cursor(int index) const {  // to the beginning of a piece
    Cursor cursor{};
    cursor.index = work.next_piece_at(index, me.tile_group());
    if (cursor.index < work.worker().end_piece) {
      const Piece& piece = work.pieces()[cursor.index];
      cursor.tile = piece.first_tile + me.tile_group();
      cursor.end_tile = piece.end_tile;
      cursor.request = piece.request;
      cursor.len = work.len_of(piece);
    }
    if (me.member() == 0) store_shared_struct(at.cursor(), cursor);
  }
  struct Lookup {
    int token;  // -1: no row is to be loaded
    int page;   // as the table says: looked at only later, so that nobody waits for it
  };
  __device__ __forceinline__ Lookup look_up() {
    Cursor cursor;
    load_shared_struct(cursor, at.cursor());
    const int tiles = min(lookup_tiles, (cursor.end_tile - cursor.tile + S::tile_groups - 1) / S::tile_groups);
    const int tile = cursor.tile + (me.member() / S::load_rows - lookup_tiles + tiles) * S::tile_groups;
    const int token = tile * C::block_n + me.row_group() * S::load_rows + me.member() % S::load_rows;
    addressed = tiles > 0 ? tiles : lookup_tiles;  // behind the last tile: as many times nothing
    if (me.member() >= S::address_rows || tile < cursor.tile || token >= cursor.len) return Lookup{-1, 0};
    return Lookup{token, p.block_table[cursor.request * p.block_table_stride + divide(token, p.by_page_size)]};
  }
  __device__ __forceinline__ void write_address(const Lookup& row) const {
    RowAddress address{};
    int num_pages = p.num_pages;
    asm volatile("" : "+r"(num_pages));  // no register for it in the loop
    if (row.token >= 0) {
      const int page = min(max(row.page, 0), num_pages - 1);  // whatever the table says, inside the pool
      const int slot = row.token - divide(row.token, p.by_page_size) * p.page_size;
      address.latent =
          static_cast<const uint16_t*>(p.latent) + page * p.latent_strides.page + slot * p.latent_strides.token;
      address.rope = static_cast<const uint16_t*>(p.rope) + page * p.rope_strides.page + slot * p.rope_strides.token;
    }
    if (me.member() < S::address_rows) store_shared_struct(at.address(me.member()), address);
    if (me.warp() != 0) return;
    Cursor cursor;
    load_shared_struct(cursor, at.cursor());
    cursor.tile += addressed * S::tile_groups;
    __syncwarp();  // all lanes have read it
    if (cursor.tile < cursor.end_tile) {
      if (me.lane() == 0) store_shared_struct(at.cursor(), cursor);
    } else if (cursor.index < work.worker().end_piece) {
      move_cursor(cursor.index + 1);
    }
  }
  __device__ __forceinline__ void look_up_at_once() {
    const Lookup row = look_up();
    group_barrier(me);  // the addresses and the cursor before have been read
    write_address(row);
    group_barrier(me);  // the addresses and the cursor are there
  }

  // ---- copies: in parts that go between the steps of other work: all at once they would only queue for the load-store unit. Beyond the
  // last tile, zeros are written to a stage that nobody reads. ----

  struct Copy {
    const uint16_t *latent[S::copy_sets], *rope[S::rope_sets];
    uint32_t to, rope_to;
  };
  __device__ __forceinline__ Copy begin_copy(int stage) {
    Copy copy;
    const int first_address = S::address_rows - addressed * S::load_rows, first_row = me.row_group() * S::load_rows;
    --addressed;
#pragma unroll
    for (int i = 0; i < S::copy_sets; ++i) {
      RowAddress row;
      load_shared_struct(row, at.address(first_address + i * S::copy_rows + me.copy_row()));
      copy.latent[i] = row.latent;
      if constexpr (!S::own_columns) copy.rope[i] = row.rope;
    }
    copy.to = at.kv(stage, first_row + me.copy_row(), me.copy_chunk() * 8);
    if constexpr (!S::own_columns) {
      copy.rope_to = copy.to + S::v_chunks * 16;
    } else if constexpr (S::rope_copies > 0) {
#pragma unroll
      for (int i = 0; i < S::rope_sets; ++i) {
        RowAddress row;
        load_shared_struct(row, at.address(first_address + i * S::rope_rows + me.lane() / S::rope_threads));
        copy.rope[i] = row.rope;
      }
      copy.rope_to = at.kv(stage, me.lane() / S::rope_threads, C::d_v + me.rope_chunk() * 8);
    }
    return copy;
  }
  // RoPE, then the latent; with columns of its own, a warp copies blocks of 16 rows and 64 columns in four parts each.
  template <class Part>
  __device__ __forceinline__ void copy_part(const Copy& copy, Part) const {
    constexpr int step = S::copy_threads * 16, i = Part::value - S::rope_copies;
    if constexpr (i >= 0) {
      constexpr int sets = S::copy_sets < 4 ? S::copy_sets : 4, block = i / sets;
      constexpr int set = block / S::copy_lines * sets + i % sets, line = block % S::copy_lines;
      const uint16_t* row = copy.latent[set];
      // If it does not exist, zeros: whatever lies there, NaN too, must not reach O.
      cp_async_16<line * step>(copy.to + set * S::copy_rows * S::kv_row, row + me.copy_chunk() * 8, row != nullptr);
    } else if constexpr (S::own_columns) {
      const uint16_t* row = copy.rope[Part::value];
      cp_async_16<0>(copy.rope_to + Part::value * S::rope_rows * S::kv_row, row + me.rope_chunk() * 8, row != nullptr);
    } else {
      constexpr int left = S::rope_chunks - Part::value * S::copy_threads;
      if (left >= S::copy_threads || me.copy_chunk() < left)
        cp_async_16<Part::value * step>(copy.rope_to, copy.rope[0] + me.copy_chunk() * 8, copy.latent[0] != nullptr);
    }
  }
  __device__ __forceinline__ void end_copy(int stage) const {
    if constexpr (S::own_columns || S::warp_arrivals) cp_async_commit();
    else cp_async_arrive(at.full(stage));
  }
  __device__ __forceinline__ void copy_tile(int stage) {
    const Copy copy = begin_copy(stage);
    unrolled<S::tile_copies>([&](auto part) { copy_part(copy, part); });
    end_copy(stage);
  }
};

}  // namespace mla::sm80
