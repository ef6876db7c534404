// KV tiles and Q in shared memory: layout, descriptors for wgmma, and the ways by which KV gets there.
//
// Everything is in chunks of 64 columns: [64 rows][128 bytes], 8 KB, aligned to 1024, the eight 16-byte units of row r permuted by
// XOR with r % 8 (TMA's 128-byte swizzle). A tile of 64 tokens is d_v / 64 such chunks of the latent, and one of the RoPE columns if
// there are any. P[64 rows][64 tokens] is one chunk in the same layout.
#pragma once

#include "../common/math.cuh"
#include "ptx.cuh"

namespace mla::sm90 {

constexpr int kTileTokens = 64, kChunkColumns = 64;
constexpr int kRowBytes = 2 * kChunkColumns, kChunkBytes = kTileTokens * kRowBytes;
constexpr int kSwizzleRows = 8;  // after which the permutation repeats: 1024 bytes

template <class C>
struct TileLayout {
  static constexpr int rope = C::d_qk - C::d_v;                   // columns: 64, 32 or none
  static constexpr int v_chunks = C::d_v / kChunkColumns;         // of the latent
  static constexpr int half_chunks = v_chunks / 2;                // of the half of O's columns that a warpgroup owns
  static constexpr int k_chunks = v_chunks + (rope > 0 ? 1 : 0);  // that are loaded, and of Q
  static constexpr int last_chunk = v_chunks;                     // RoPE
  static constexpr int bytes = k_chunks * kChunkBytes;            // of a tile
  static constexpr int q_chunk_bytes = C::block_rows * kRowBytes, q_bytes = k_chunks * q_chunk_bytes;
  static constexpr int o_registers = C::d_v * C::block_rows / 256;  // of a thread, for half of the columns

  __host__ __device__ static constexpr int columns(int chunk) { return chunk < v_chunks ? kChunkColumns : rope; }
  __host__ __device__ static constexpr int k_steps(int chunk) { return columns(chunk) / 16; }
  static_assert(C::block_rows % 16 == 0 && C::block_rows <= 64 && C::block_n == kTileTokens &&
                C::d_v % (2 * kChunkColumns) == 0 && rope >= 0 && rope <= kChunkColumns && rope % 16 == 0);
};

// Where a chunk may begin, from `address` on.
constexpr uint32_t kChunkAlignment = kSwizzleRows * kRowBytes;
__device__ __forceinline__ uint32_t aligned(uint32_t address) {
  return (address + kChunkAlignment - 1) / kChunkAlignment * kChunkAlignment;
}

// Byte of 16-byte unit `unit` of row `row` in a chunk.
__device__ __forceinline__ int swizzled(int row, int unit) {
  return row * kRowBytes + ((unit ^ row % kSwizzleRows) << 4);
}

// ---- descriptors: 16-byte units throughout, so that offsets are added to the whole ----

__host__ __device__ constexpr uint64_t descriptor_step(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

// Address, distance of neighbouring 64-column chunks (MN-major operands only), distance of neighbouring groups of 8 rows; 128-byte
// swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int chunk_stride) {
  return descriptor_step(address & 0x3ffff) | descriptor_step(chunk_stride) << 16 |
         descriptor_step(kSwizzleRows * kRowBytes) << 32 | uint64_t{1} << 62;
}
// K-major: Q, K and P, a k-step being 16 columns of a row.
__device__ __forceinline__ uint64_t k_major(uint32_t chunk) { return descriptor(chunk, 16); }
constexpr uint64_t kColumnStep = descriptor_step(16 * 2);
// MN-major: V, a k-step being 16 tokens.
__device__ __forceinline__ uint64_t mn_major(uint32_t chunk) { return descriptor(chunk, kChunkBytes); }
constexpr uint64_t kTokenStep = descriptor_step(16 * kRowBytes);
constexpr uint64_t kChunkStep = descriptor_step(kChunkBytes);

// ---- where tokens are ----

// How many of a tile's tokens the request has.
__device__ __forceinline__ int tokens_of_tile(int tile, int len) {
  // The bound is unsigned because of a fault of ptxas: it makes one instruction, VIMNMX.RELU with a predicate, of max(0, min(x, 64))
  // and its comparison with 64. By it x = 0, 1, 63 and 64 all are "== 64", while 65 and 1000 are not (measured: a probe on an H200,
  // nvcc 13.0; ptxas 12.9 makes the same of this function). test_sass.py looks for it.
  return static_cast<int>(
      min(static_cast<uint32_t>(max(len - tile * kTileTokens, 0)), static_cast<uint32_t>(kTileTokens)));
}

struct Slot {
  int page, index;  // row of the cache, the page as the block table has it; index -1: behind the request's end
};
// Entries of the block table behind the request's end are not read, but the plan's first word instead. So there is no branch (ptxas
// makes one of a predicated load as well), and all lanes of a producer's warp come to its first barrier together.
__device__ __forceinline__ Slot slot_of(const DecodeParams& p, int request, int token, int len) {
  const bool exists = token < len;
  const int entry = divide(token, p.by_page_size);
  const int* from = p.block_table + request * p.block_table_stride + entry;
  return {*(exists ? from : reinterpret_cast<const int*>(p.plan)), exists ? token - entry * p.page_size : -1};
}
// Whatever the block table says, the page is in the pool. Clamped where it is used, as a look-up is waited for there and not before.
__device__ __forceinline__ int pool_page(const DecodeParams& p, Slot slot) {
  return min(max(slot.page, 0), p.num_pages - 1);
}

// ---- loading by TMA, in boxes of `box_rows` tokens of a chunk ----

constexpr int kMaxBoxes = kTileTokens / kMinBoxRows;
__device__ __forceinline__ bool has_boxes(const DecodeParams& p) { return p.box_rows >= kMinBoxRows; }

// Fetches the descriptors ahead of their first use.
template <class C>
__device__ __forceinline__ void prefetch_tensor_maps(const DecodeParams& p) {
  prefetch_tensor_map(&p.latent_map);
  if (TileLayout<C>::rope > 0) prefetch_tensor_map(&p.rope_map);
}

// A warp looks up this many tiles at once: lane kMaxBoxes * i + k has box k of the i-th, from `tile` on. Boxes that begin behind the
// request's end do not exist.
constexpr int kLookupTiles = 32 / kMaxBoxes;
__device__ __forceinline__ Slot box_slot(const DecodeParams& p, int request, int tile, int len) {
  const int lane = threadIdx.x % 32, first = lane % kMaxBoxes * p.box_rows;
  return slot_of(p, request, first < kTileTokens ? (tile + lane / kMaxBoxes) * kTileTokens + first : len, len);
}
// Bytes that arrive of a chunk whose request has `tokens` of the tile: whole boxes.
__device__ __forceinline__ int box_bytes(const DecodeParams& p, int tokens) {
  return ((tokens + p.box_rows - 1) & -p.box_rows) * kRowBytes;
}
// All boxes are issued by an elected lane: a TMA instruction is given uniform registers, and ptxas makes a loop of one that each lane
// gives its own.
template <int Most>
struct Boxes {
  int page[Most], index[Most];
};
// Of tile number `tile` of those that box_slot() looked up, by a whole warp; at most `Most`, where it has no more.
template <int Most>
__device__ __forceinline__ Boxes<Most> boxes_of_tile(const DecodeParams& p, Slot slot, int tile) {
  Boxes<Most> boxes;
#pragma unroll
  for (int i = 0; i < Most; ++i) {
    boxes.page[i] = __shfl_sync(0xffffffffu, pool_page(p, slot), tile * kMaxBoxes + i);
    boxes.index[i] = __shfl_sync(0xffffffffu, slot.index, tile * kMaxBoxes + i);
  }
  return boxes;
}
// The boxes of a chunk that begin in the tile's first `tokens`. The bytes count on `barrier`, which must expect box_bytes().
template <class C, int Most, class L2 = KeptInL2>
__device__ __forceinline__ void load_chunk(const DecodeParams& p, uint32_t tile_at, int chunk, const Boxes<Most>& boxes,
                                           int tokens, uint32_t barrier, L2 l2 = {}) {
  const bool latent = chunk < TileLayout<C>::v_chunks;
#pragma unroll
  for (int i = 0; i < Most; ++i) {
    if (i * p.box_rows >= tokens) break;
    tma_load_3d(tile_at + chunk * kChunkBytes + i * p.box_rows * kRowBytes, latent ? &p.latent_map : &p.rope_map,
                latent ? chunk * kChunkColumns : 0, boxes.index[i], boxes.page[i], barrier, l2);
  }
}

// ---- loading by address, row by row: a warp copies 32 rows, of which its lanes have an address each ----

struct RowAddress {
  const uint16_t *latent, *rope;
  bool exists;
};
__device__ __forceinline__ RowAddress row_address(const DecodeParams& p, Slot slot) {
  RowAddress row{static_cast<const uint16_t*>(p.latent), static_cast<const uint16_t*>(p.rope), slot.index >= 0};
  if (row.exists) {
    const int page = pool_page(p, slot);
    row.latent += page * p.latent_strides.page + slot.index * p.latent_strides.token;
    row.rope += page * p.rope_strides.page + slot.index * p.rope_strides.token;
  }
  return row;
}
// What a lane copies of them: unit lane % 8 of the rows lane / 8, lane / 8 + 4, .. Addresses go from lane to lane here, and not for each
// of the chunks that are copied of the same rows.
struct RowUnits {
  const uint16_t* from[8];
  uint32_t exist;  // bit 4 i: the i-th row does
};
// By a whole warp, `row` and `exists` of the lane's own row.
__device__ __forceinline__ RowUnits row_units(const uint16_t* row, bool exists) {
  const int lane = threadIdx.x % 32;
  RowUnits units;
  units.exist = __ballot_sync(0xffffffffu, exists) >> lane / 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint64_t from = __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(row), i * 4 + lane / 8);
    units.from[i] = reinterpret_cast<const uint16_t*>(from) + lane % 8 * 8;
  }
  return units;
}
// By a whole warp: `columns` of the chunk's 64, from column `first` of the rows on, to rows [first_row, first_row + 32) of the chunk, by
// cp.async; zeros for rows that do not exist. To be waited for, and fenced for wgmma, by every lane.
__device__ __forceinline__ void copy_rows(uint32_t chunk_at, int first_row, const RowUnits& units, int first,
                                          int columns = kChunkColumns) {
  const int lane = threadIdx.x % 32;
  if (lane % 8 * 8 >= columns) return;
  const uint32_t to = chunk_at + swizzled(first_row + lane / 8, lane % 8);
#pragma unroll
  for (int i = 0; i < 8; ++i)  // four rows on, bit 2 of the unit's place changes
    cp_async_16((i % 2 == 0 ? to : to ^ 4 << 4) + i * 4 * kRowBytes, units.from[i] + first, units.exist >> 4 * i & 1);
}

// ---- the end of a request ----

// Zeroes the rows from `first_row` on in `num_chunks` chunks, by `num_threads` threads: 0 * NaN would reach O. They have to have
// landed; fence_proxy_async and a barrier go between this and wgmma.
__device__ __forceinline__ void zero_rows(uint32_t first_chunk, int num_chunks, int first_row, int thread,
                                          int num_threads) {
  for (int chunk = 0; chunk < num_chunks; ++chunk)
    for (int at = first_row * kRowBytes + thread * 16; at < kChunkBytes; at += num_threads * 16)
      store_shared_zeros_16(first_chunk + chunk * kChunkBytes + at);
}

}  // namespace mla::sm90
