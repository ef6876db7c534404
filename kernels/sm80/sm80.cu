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

#include <cstddef>

#include "../common/entry.cuh"
#include "../common/math.cuh"
#include "../common/partials.cuh"
#include "../common/schedule.h"
#include "ptx.cuh"
#include "shape.cuh"

namespace mla::sm80 {

template <class C, int SmemBytes>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  using T = typename C::Element;
  using S = Shape<C>;
  using Group = typename Smem<C>::Group;
  static_assert(sizeof(Smem<C>) == SmemBytes, "the smem column of variants.inc must be sizeof(Smem)");
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  const uint32_t smem = shared_address(smem_bytes);
  constexpr int kv_row = (C::d_qk + 8) * 2, p_row = (C::block_n + 8) * 2, logits_row = C::block_n * 4;  // bytes

  Place<C> me{threadIdx.x};
  auto kv_at = [&](int stage, int token, int column) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, kv)) +
           ((me.tile_group() * S::ring_stages + stage) * C::block_n + token) * kv_row + column * 2;
  };
  auto group_at = [&](int group, size_t offset) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, groups) + offset) + group * static_cast<int>(sizeof(Group));
  };
  // Neighbouring rows have their 16-byte chunks in different banks: chunk c of a row is stored in place of chunk c ^ f(row).
  auto logits_at = [&](int warp, int row, int token) {
    const int swizzle = C::block_n >= 32 ? row % 2 * 4 + (row & 2) : row & 2;
    return group_at(me.group(), offsetof(Group, logits)) + (warp * S::group_rows + row) * logits_row +
           (token / 4 ^ swizzle) * 16 + token % 4 * 4;
  };
  auto p_at = [&](int row, int token) { return group_at(me.group(), offsetof(Group, p)) + row * p_row + token * 2; };
  auto rescale_at = [&](int row) { return group_at(me.group(), offsetof(Group, rescale)) + row * 4; };
  auto rescale_tile_at = [&] { return group_at(me.group(), offsetof(Group, rescale_tile)); };
  auto given_stage_at = [&](int group) { return group_at(group, offsetof(Group, given_stage)); };
  auto row_max_at = [&](int group, int row) { return group_at(group, offsetof(Group, row_max)) + row * 4; };
  auto row_sum_at = [&](int group, int row) { return group_at(group, offsetof(Group, row_sum)) + row * 4; };
  auto cursor_at = [&] { return group_at(me.group(), offsetof(Group, cursor)); };
  auto address_at = [&](int row) {
    return group_at(me.group(), offsetof(Group, addresses)) + row * static_cast<int>(sizeof(RowAddress));
  };
  auto full_at = [&](int stage) {
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, full)) + (me.tile_group() * S::ring_stages + stage) * 8;
  };
  auto empty_at = [&](int stage) { return full_at(stage) + C::stages * 8; };
  // Among the threads of a group.
  auto group_barrier = [&] { barrier_sync(1 + me.group(), S::group_threads); };

  // The plan is found anew each time: no registers are spent on it in the loop.
  auto plan = [&] {
    int num_workers = p.num_workers;
    asm volatile("" : "+r"(num_workers));
    return schedule::view(p.plan, num_workers);
  };
  auto pieces = [&] { return plan().pieces; };
  auto worker = [&] {
    uint32_t words[4];
    load_global(words, &plan().workers[blockIdx.x]);
    PlanWorker worker{};
    worker.first_piece = static_cast<int>(words[0]);
    worker.end_piece = static_cast<int>(words[1]);
    worker.member = static_cast<int>(words[2]);
    return worker;
  };

  auto first_row_of = [&](const Piece& piece) { return piece.first_row + worker().member * C::block_rows; };
  // That exist of this worker's block; may be none, or more than the block has.
  auto num_rows_of = [&](const Piece& piece) { return piece.num_tokens * p.lengths.h_q - first_row_of(piece); };
  auto len_of = [&](const Piece& piece) {  // a plan may have been made for a longer block table
    return static_cast<int>(min(int64_t{piece.len}, p.lengths.max_len));
  };
  // The worker's next piece at or after number `index` of which tile number `tile` and a row of this block exist, or end_piece.
  auto next_piece_at = [&](int index, int tile) {
    const int end_piece = worker().end_piece;
    while (index < end_piece &&
           (num_rows_of(pieces()[index]) <= 0 || pieces()[index].first_tile + tile >= pieces()[index].end_tile))
      ++index;
    return warp_uniform(index);
  };

  // ---- loading KV. Addresses first: the rows of several tiles at once, a thread each, through the block table ----

  constexpr int lookup_tiles =
      S::address_rows / S::load_rows;  // at most, of one piece; they fill the end of the addresses
  int addressed = 0;                   // tiles that can be loaded before the next look-up
  auto move_cursor = [&](int index) {  // to the beginning of a piece
    Cursor cursor{};
    cursor.index = next_piece_at(index, me.tile_group());
    if (cursor.index < worker().end_piece) {
      const Piece& piece = pieces()[cursor.index];
      cursor.tile = piece.first_tile + me.tile_group();
      cursor.end_tile = piece.end_tile;
      cursor.request = piece.request;
      cursor.len = len_of(piece);
    }
    if (me.member() == 0) store_shared_struct(cursor_at(), cursor);
  };
  struct Lookup {
    int token;  // -1: no row is to be loaded
    int page;   // as the table says: looked at only later, so that nobody waits for it
  };
  auto look_up = [&] {
    Cursor cursor;
    load_shared_struct(cursor, cursor_at());
    const int tiles = min(lookup_tiles, (cursor.end_tile - cursor.tile + S::tile_groups - 1) / S::tile_groups);
    const int tile = cursor.tile + (me.member() / S::load_rows - lookup_tiles + tiles) * S::tile_groups;
    const int token = tile * C::block_n + me.row_group() * S::load_rows + me.member() % S::load_rows;
    addressed = tiles > 0 ? tiles : lookup_tiles;  // behind the last tile: as many times nothing
    if (me.member() >= S::address_rows || tile < cursor.tile || token >= cursor.len) return Lookup{-1, 0};
    return Lookup{token, p.block_table[cursor.request * p.block_table_stride + divide(token, p.by_page_size)]};
  };
  auto write_address = [&](const Lookup& row) {
    RowAddress address{};
    if (row.token >= 0) {
      const int page = min(max(row.page, 0), p.num_pages - 1);  // whatever the table says, inside the pool
      const int slot = row.token - divide(row.token, p.by_page_size) * p.page_size;
      address.latent =
          static_cast<const uint16_t*>(p.latent) + page * p.latent_strides.page + slot * p.latent_strides.token;
      address.rope = static_cast<const uint16_t*>(p.rope) + page * p.rope_strides.page + slot * p.rope_strides.token;
    }
    if (me.member() < S::address_rows) store_shared_struct(address_at(me.member()), address);
    if (me.warp() != 0) return;
    Cursor cursor;
    load_shared_struct(cursor, cursor_at());
    cursor.tile += addressed * S::tile_groups;
    __syncwarp();  // all lanes have read it
    if (cursor.tile < cursor.end_tile) {
      if (me.lane() == 0) store_shared_struct(cursor_at(), cursor);
    } else if (cursor.index < worker().end_piece) {
      move_cursor(cursor.index + 1);
    }
  };
  // Each thread copies part of one row, in parts that go between the steps of other work: all at once they would only queue
  // for the load-store unit. Beyond the last tile, zeros are written to a stage that nobody reads.
  struct Copy {
    RowAddress row;
    uint32_t to;
  };
  auto begin_copy = [&](int stage) {
    Copy copy{};
    load_shared_struct(copy.row, address_at(S::address_rows - addressed * S::load_rows + me.copy_row()));
    --addressed;
    copy.to = kv_at(stage, me.row_group() * S::load_rows + me.copy_row(), me.copy_chunk() * 8);
    return copy;
  };
  auto copy_part = [&](const Copy& copy, auto part) {
    constexpr int step = S::copy_threads * 16, i = part.value - S::rope_copies;
    const bool exists = copy.row.latent != nullptr;  // if not, zeros: whatever lies there, NaN too, must not reach O
    if constexpr (i >= 0) {
      cp_async_16<i * step>(copy.to, copy.row.latent + me.copy_chunk() * 8, exists);
    } else {  // RoPE first, as its address is of no use afterwards
      constexpr int left = S::row_chunks - S::v_chunks - part.value * S::copy_threads;
      if (left >= S::copy_threads || me.copy_chunk() < left)
        cp_async_16<part.value * step>(copy.to + S::v_chunks * 16, copy.row.rope + me.copy_chunk() * 8, exists);
    }
  };
  constexpr int copy_parts = S::latent_copies + S::rope_copies;

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
      const int block_row = me.row_group() * S::group_rows + half * 8 + me.quad(),
                row = first_row_of(piece) + block_row;
      const int token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
      const auto* nope = static_cast<const uint16_t*>(p.q_nope) + piece.request * p.q_nope_strides.batch +
                         (piece.first_token + token) * p.q_nope_strides.token + head * p.q_nope_strides.head;
      const auto* rope = static_cast<const uint16_t*>(p.q_rope) + piece.request * p.q_rope_strides.batch +
                         (piece.first_token + token) * p.q_rope_strides.token + head * p.q_rope_strides.head;
      // A thread loads one half of one of two k-steps, 16 bytes; the four of a row then exchange words.
      uint32_t words[(S::warp_k_steps + 1) / 2][4] = {};
#pragma unroll
      for (int k = 0; k < S::warp_k_steps; k += 2) {
        const int step = ((k + quad_lane / 2) * S::group_warps + me.warp()) * 16, column = step + quad_lane % 2 * 8;
        if (block_row < num_rows_of(piece) && step < C::d_qk)
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
        kv_at(stage, me.thread % 8 + me.thread / 16 % 2 * 8, me.warp() * 16 + me.thread / 8 % 2 * 8);
    const uint32_t to = logits_at(me.warp(), me.quad(), me.pair());
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

  // ---- softmax: neighbouring threads own a row ----

  struct RowProgress {
    int visible;     // KV tokens that the row sees from the group's next tile on
    float max, sum;  // what P is relative to; the sum of P over this thread's tokens
  } row{};
  auto parked_at = [&](int i) {
    return group_at(me.group(), offsetof(Group, parked)) + (i * S::group_threads + me.member()) * 4;
  };
  auto park_row = [&] {
    if constexpr (S::tight) {
      store_shared(parked_at(0), __int_as_float(row.visible));
      store_shared(parked_at(1), row.max);
      store_shared(parked_at(2), row.sum);
    }
  };
  auto unpark_row = [&] {
    if constexpr (S::tight)
      row = {__float_as_int(load_shared(parked_at(0))), load_shared(parked_at(1)), load_shared(parked_at(2))};
  };
  auto begin_rows = [&](const Piece& piece) {
    const int number = first_row_of(piece) + me.row_group() * S::group_rows + me.soft_row();
    const int token = divide(number, p.by_h_q), len = len_of(piece);
    row.visible = (p.causal ? min(len, len - piece.num_tokens + token + 1) : len) -
                  (piece.first_tile + me.tile_group()) * C::block_n;
    row.max = kNegInf;
    row.sum = 0.f;
    park_row();
  };
  // Leaves P and the rescale factors of a tile.
  auto softmax_tile = [&](int tiles) {
    unpark_row();
    constexpr int width = S::row_tokens < 4 ? S::row_tokens : 4, stride = S::row_threads * width;
    const int first_token = me.soft_lane() * width;  // of a thread's tokens; every `stride` tokens it has `width` more
    float x[S::row_tokens / width][width];
#pragma unroll
    for (int w = 0; w < S::group_warps; ++w) {
#pragma unroll
      for (int j = 0; j < S::row_tokens / width; ++j) {
        float part[width];
        load_shared(part, logits_at(w, me.soft_row(), first_token) ^ j * stride * 4);
#pragma unroll
        for (int i = 0; i < width; ++i) x[j][i] = w == 0 ? part[i] : x[j][i] + part[i];
      }
    }
    const int seen = row.visible - first_token;  // of the tokens from the thread's first on
    row.visible -= S::tile_groups * C::block_n;
    float tile_max = kNegInf;
#pragma unroll
    for (int j = 0; j < S::row_tokens / width; ++j)
#pragma unroll
      for (int i = 0; i < width; ++i) {
        x[j][i] = j * stride + i < seen ? x[j][i] * p.scale_log2 : kNegInf;
        tile_max = fmaxf(tile_max, x[j][i]);
      }
    tile_max = lanes_max<S::row_threads>(tile_max);

    // P may exceed 1 by up to 2^8: the sum undoes it exactly, and O is seldom rescaled.
    const bool grew = tile_max > (row.max == kNegInf ? kNegInf : row.max + 8.f);
    const float factor = grew ? exp2_fast(row.max - tile_max) : 1.f;
    if (grew) row.max = tile_max;
    const float base = row.max == kNegInf ? 0.f : row.max;  // a row that sees nothing yet: P = 0
    row.sum *= factor;
#pragma unroll
    for (int j = 0; j < S::row_tokens / width; ++j) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        x[j][i] = exp2_fast(x[j][i] - base);
        row.sum += x[j][i];
      }
      store_shared_as<T>(p_at(me.soft_row(), j * stride + first_token), x[j]);
    }
    if (me.soft_lane() == 0) store_shared(rescale_at(me.soft_row()), factor);
    if (factor != 1.f) store_shared(rescale_tile_at(), __int_as_float(tiles));
    park_row();
  };

  // ---- values: the group's rows x this warp's columns ----

  float o[S::row_tiles][S::warp_v / 8][4];

  auto rescale_o = [&] {
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
      const float upper = load_shared(rescale_at(m * 16 + me.quad()));
      const float lower = load_shared(rescale_at(m * 16 + me.quad() + 8));
#pragma unroll
      for (int n = 0; n < S::warp_v / 8; ++n) {
        o[m][n][0] *= upper, o[m][n][1] *= upper;
        o[m][n][2] *= lower, o[m][n][3] *= lower;
      }
    }
  };
  constexpr int columns_steps = S::warp_v / 16, value_steps = C::block_n / 16 * columns_steps;
  auto add_values = [&](int stage, auto beside) {
    const uint32_t p_tile = p_at(me.thread % 16, me.thread / 16 % 2 * 8);
    const uint32_t v_tile = kv_at(stage, me.thread % 16, me.warp() * S::warp_v + me.thread / 16 % 2 * 8);
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

  // ---- the end of a piece ----

  struct RowState {
    float max, sum;
  };
  auto state_of = [&](int group, int row) {
    return RowState{load_shared(row_max_at(group, row)), load_shared(row_sum_at(group, row))};
  };
  // Relative to the larger max: what the sums, and O of either, must be multiplied by.
  struct Merged {
    RowState state;
    float factor[2];
  };
  auto merge_states = [&](int row) {
    const RowState a = state_of(0, row), b = state_of(1, row);
    Merged merged{{fmaxf(a.max, b.max), 0.f}, {}};
    merged.factor[0] = a.max == kNegInf ? 0.f : exp2_fast(a.max - merged.state.max);
    merged.factor[1] = b.max == kNegInf ? 0.f : exp2_fast(b.max - merged.state.max);
    merged.state.sum = a.sum * merged.factor[0] + b.sum * merged.factor[1];
    return merged;
  };
  // Where groups take tiles in turn, each keeps half of its columns of O and gives the other half away, in its stage that is free
  // between two tiles. What a warp gives, the warp of the other group that has the same columns takes, lane by lane.
  constexpr int column_tiles = S::warp_v / 8, kept_tiles = column_tiles / S::tile_groups;  // of 8 columns, per warp
  auto given_at = [&](int group, int stage) {
    static_assert(S::tile_groups == 1 || kept_tiles * 16 * S::group_threads <= C::block_n * kv_row,
                  "half of O fits into a stage");
    return smem + static_cast<uint32_t>(offsetof(Smem<C>, kv)) +
           (group * S::ring_stages + stage) * static_cast<int>(C::block_n * kv_row) + me.member() * 16;
  };
  auto give_o = [&](int stage, auto first) {
#pragma unroll
    for (int n = 0; n < kept_tiles; ++n)
      store_shared_quad(given_at(me.group(), stage) + n * 16 * S::group_threads, o[0][first.value + n]);
  };
  auto take_o = [&](auto first) {
    const Merged upper = merge_states(me.quad()), lower = merge_states(me.quad() + 8);
    const int own = me.group(), other = own ^ 1;
    const uint32_t from = given_at(other, __float_as_int(load_shared(given_stage_at(other))));
#pragma unroll
    for (int n = 0; n < kept_tiles; ++n) {
      float x[4];
      load_shared(x, from + n * 16 * S::group_threads);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& f = i < 2 ? upper.factor : lower.factor;
        float& y = o[0][first.value + n][i];
        y = y * (own == 0 ? f[0] : f[1]) + x[i] * (own == 0 ? f[1] : f[0]);
      }
    }
  };
  auto store_lse = [&](const Piece& piece, const RowState& state) {
    const int block_row = me.row_group() * S::group_rows + me.soft_row();
    if (me.soft_lane() != 0 || block_row >= num_rows_of(piece)) return;
    const float lse2 = lse2_of(state.max, state.sum);
    if (piece.partial_slot >= 0) {
      *partial_lse2(p, C::block_rows, piece.partial_slot + worker().member, block_row) = lse2;
    } else if (p.lse) {
      const int number = first_row_of(piece) + block_row, token = divide(number, p.by_h_q),
                head = number - token * p.lengths.h_q;
      p.lse[piece.request * p.lse_strides.batch + (piece.first_token + token) * p.lse_strides.token +
            head * p.lse_strides.head] = lse2 * kLn2;
    }
  };
  auto scale_of = [&](int group_row) {
    const float sum = S::tile_groups > 1 ? merge_states(group_row).state.sum : state_of(me.group(), group_row).sum;
    return sum == 0.f ? 0.f : 1.f / sum;
  };
  auto store_partial = [&](const Piece& piece, auto first) {
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
      const int row_tile = me.row_group() * S::row_tiles + m;
      if (row_tile * kFragmentRows >= num_rows_of(piece)) break;
      const float upper = scale_of(m * 16 + me.quad()), lower = scale_of(m * 16 + me.quad() + 8);
      float4* to = partial_fragment(p, C::block_rows, C::d_v, piece.partial_slot + worker().member, row_tile,
                                    me.warp() * column_tiles + first.value);
#pragma unroll
      for (int n = 0; n < kept_tiles; ++n) {
        const auto& x = o[m][first.value + n];
        to[n * 32] = make_float4(x[0] * upper, x[1] * upper, x[2] * lower, x[3] * lower);
      }
    }
  };
  auto store_output = [&](const Piece& piece, auto first) {
#pragma unroll
    for (int half = 0; half < 2 * S::row_tiles; ++half) {
      const int group_row = half * 8 + me.quad(), block_row = me.row_group() * S::group_rows + group_row;
      const int number = first_row_of(piece) + block_row;
      const bool exists = block_row < num_rows_of(piece);
      const float scale = scale_of(group_row);
      const int token = divide(number, p.by_h_q), head = number - token * p.lengths.h_q;
      auto* to = static_cast<uint16_t*>(p.out) + piece.request * p.out_strides.batch +
                 (piece.first_token + token) * p.out_strides.token + head * p.out_strides.head + me.warp() * S::warp_v;
      // The four threads of a row exchange words, so that each stores 16 bytes at once.
#pragma unroll
      for (int n = first.value; n < first.value + kept_tiles; n += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = o[half / 2][n + i] + half % 2 * 2;
          words[i] = pack2<T>(x[0] * scale, x[1] * scale);
        }
        transpose_quad(words);
        if (exists) store_global(to + (n + static_cast<int>(me.thread % 4)) * 8, words);
      }
    }
  };
  auto store_o = [&](const Piece& piece, auto first) {  // the columns that the group keeps, from tile number `first` on
    if (piece.partial_slot >= 0) store_partial(piece, first);
    else store_output(piece, first);
  };
  // `free_stage`: that of the group's last tile; `parity`: of the round in which it was filled.
  auto finish_piece = [&](const Piece& piece, int free_stage, int parity) {
    unpark_row();
    const float sum = lanes_sum<S::row_threads>(row.sum);
    if (me.soft_lane() == 0) {
      store_shared(row_max_at(me.group(), me.soft_row()), row.max);
      store_shared(row_sum_at(me.group(), me.soft_row()), sum);
    }
    if constexpr (S::tile_groups > 1) {
      const Index<0> lower{};
      const Index<kept_tiles> upper{};
      mbarrier_wait(empty_at(free_stage), parity);
      if (me.group() == 0) give_o(free_stage, upper);
      else give_o(free_stage, lower);
      if (me.member() == 0) store_shared(given_stage_at(me.group()), __int_as_float(free_stage));
      __syncthreads();  // what each group gives is there, and max and sum of both
      if (me.group() == 0) {
        store_lse(piece, merge_states(me.soft_row()).state);
        take_o(lower);
        store_o(piece, lower);
      } else {
        take_o(upper);
        store_o(piece, upper);
      }
      __syncthreads();  // all has been taken
    } else {
      group_barrier();  // the rows' sums are there
      store_lse(piece, {row.max, sum});
      store_o(piece, Index<0>{});
      group_barrier();  // they have been read
    }
  };

  // ---- start: an empty ring, then all but one of its stages in flight ----

  int index = next_piece_at(worker().first_piece, 0);
  if (index == worker().end_piece) return;
  if (me.thread < static_cast<unsigned>(C::stages)) {
    mbarrier_init(smem + static_cast<uint32_t>(offsetof(Smem<C>, full)) + me.thread * 8, 32 * S::ring_warps);
    mbarrier_init(smem + static_cast<uint32_t>(offsetof(Smem<C>, empty)) + me.thread * 8, 32 * S::ring_warps);
  }
  __syncthreads();  // the mbarriers are there
  if (me.warp() == 0) move_cursor(index);
  group_barrier();  // the cursor is there
  auto look_up_at_once = [&] {
    const Lookup row = look_up();
    group_barrier();  // the addresses and the cursor before have been read
    write_address(row);
    group_barrier();  // the addresses and the cursor are there
  };
  look_up_at_once();
#pragma unroll 1
  for (int stage = 0; stage < S::ring_stages - 1; ++stage) {
    const Copy copy = begin_copy(stage);
    unrolled<copy_parts>([&](auto part) { copy_part(copy, part); });
    cp_async_arrive(full_at(stage));
    if (addressed == 0) look_up_at_once();
  }

  // ---- the loop ----

  int stage = 0, parity = 0;  // of the ring: which stage, in an even or odd round
  bool landed = false;        // the stage's tile is known to have landed
  auto index_at = [&] { return group_at(me.group(), offsetof(Group, piece_index)) + me.warp() * 4; };
  while (index < worker().end_piece) {
    if (me.lane() == 0) store_shared(index_at(), __int_as_float(index));
    const Piece& piece = pieces()[index];
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
      Copy copy;
      // Step 0 prepares, the others copy their share.
      auto copy_step = [&](auto step, auto steps) {
        if constexpr (step.value == 0) {
          if constexpr (!S::copies_beside_logits) copy = begin_copy(free_stage);
          mbarrier_wait(empty_at(free_stage), free_parity);
        } else {
          constexpr int from = (step.value - 1) * copy_parts / (steps.value - 1),
                        to = step.value * copy_parts / (steps.value - 1);
          unrolled<to, from>([&](auto part) { copy_part(copy, part); });
        }
      };
      if constexpr (S::copies_beside_logits) copy = begin_copy(free_stage);
      const bool address = addressed == 0;
      Lookup lookup;
      if (address) lookup = look_up();  // in flight during the logits
      if (!landed) mbarrier_wait(full_at(stage), parity);
      compute_logits(stage, [&](auto step) {
        if constexpr (S::copies_beside_logits) copy_step(step, Index<logit_steps>{});
      });
      if constexpr (S::copies_beside_logits) cp_async_arrive(full_at(free_stage));
      group_barrier();  // all partial logits are there; the former P, addresses and cursor have been read
      if (address) write_address(lookup);
      softmax_tile(tiles);
      group_barrier();  // P, factors, addresses and cursor are there
      if (__float_as_int(load_shared(rescale_tile_at())) == tiles) rescale_o();
      add_values(stage, [&](auto step) {
        if constexpr (!S::copies_beside_logits) copy_step(step, Index<value_steps>{});
        if constexpr (step.value == value_steps - 2) landed = mbarrier_ended(full_at(next_stage), next_parity);
      });
      if constexpr (!S::copies_beside_logits) cp_async_arrive(full_at(free_stage));
      // Each thread for itself: compute-sanitizer does not follow one that speaks for its warp.
      mbarrier_arrive(empty_at(stage));
      stage = next_stage, parity = next_parity;
    }
    const Piece& done = pieces()[__float_as_int(load_shared(index_at()))];
    finish_piece(done, stage == 0 ? S::ring_stages - 1 : stage - 1, stage == 0 ? parity ^ 1 : parity);
    __syncwarp();
    index = next_piece_at(__float_as_int(load_shared(index_at())) + 1, 0);
  }
  cp_async_wait_all();
}

}  // namespace mla::sm80

MLA_ENTRIES(mla::sm80::decode)
