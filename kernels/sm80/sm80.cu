// MLA decode for sm_80 and later: cp.async, ldmatrix, mma.sync. One persistent CTA of eight warps per SM.
//
// A CTA walks the pieces that the schedule gives it. A piece is a block of packed query rows and a range of KV tiles; the result is
// final (the piece is the whole item) or partial (combine.cu merges it). The KV tile is read from memory once and used twice,
// as K (all d_qk columns) and as V (the first d_v), for every query row of the block.
//
//   logits   S[block_rows, block_n] = Q K^T. Warps share the rows (16 each), the tokens and the columns of d_qk; each keeps its
//            part of Q in registers for the whole piece, so K is the only operand read from shared memory. Warps that hold
//            different columns leave their partial logits in shared memory.
//   softmax  256 / block_rows neighbouring threads own a row: they add the partial logits, mask, keep the running max and sum,
//            and leave P in shared memory in 16 bits.
//   values   O[block_rows, d_v] += P V. Each warp owns d_v / 8 columns of all rows, in registers.
//
// Two barriers a tile: the logits of the next tile are ready, its P is ready. The values of this tile fill the waits of the softmax of
// the next. Rows in shared memory are padded by 16 bytes: an odd number of 16-byte chunks puts the eight rows of an ldmatrix in
// eight different bank groups, with no address arithmetic. Schedule, budgets and what was tried: sm80.md.

#include <cstddef>

#include "../common/entry.cuh"
#include "../common/math.cuh"
#include "../common/schedule.h"
#include "ptx.cuh"

namespace mla::sm80 {

template <class C>
struct Shape {
  static constexpr int row_warps = C::block_rows / 16;              // warps that differ in their rows
  static constexpr int column_warps = C::block_rows == 16 ? 4 : 2;  // in their columns of d_qk
  static constexpr int token_warps = C::warps / (row_warps * column_warps);
  static constexpr int warp_tokens = C::block_n / token_warps;
  static constexpr int k_steps = C::d_qk / 16;  // of 16 columns
  static constexpr int warp_k_steps = (k_steps + column_warps - 1) / column_warps;
  // Independent sums over the columns of d_qk, as an mma waits for the one before; four tiles of 8 tokens need no second.
  static constexpr int logit_chains = warp_tokens <= 16 ? 2 : 1;
  static constexpr int warp_v = C::d_v / C::warps;                    // columns of O that a warp owns
  static constexpr int row_threads = C::threads / C::block_rows;      // softmax threads per row
  static constexpr int row_tokens = C::block_n / row_threads;         // logits per softmax thread
  static constexpr int copy_threads = C::threads / C::block_n;        // threads that copy one KV row
  static constexpr bool tight = C::block_rows == 64 && C::d_v > 256;  // O and Q fill the registers
  // The values of a tile go beside the logits of the next, not beside its softmax: if there are no registers for more, or no
  // stage to spare, as the softmax's way holds a tile's stage for a step longer.
  static constexpr bool values_beside_logits = tight || C::stages == 3;
  static constexpr int address_rows = C::d_v > 256 ? 128 : 256;          // KV rows looked up at once
  static constexpr int row_chunks = C::d_qk / 8, v_chunks = C::d_v / 8;  // of 16 bytes
  static_assert(row_warps * column_warps * token_warps == C::warps && warp_tokens % 8 == 0 && warp_v % 16 == 0);
  static_assert(C::d_v % (16 * column_warps) == 0 && v_chunks % copy_threads == 0 && row_threads <= 32 &&
                C::stages >= 3);
};

// What this thread's index means to each step. Cheap to derive, so with 64 rows and d_v = 512 the loop forgets it
// every round: the derived addresses would not fit beside O and Q.
template <class C>
struct Place {
  using S = Shape<C>;
  int thread;

  __device__ __forceinline__ void forget() {
    if constexpr (S::tight) asm volatile("" : "+r"(thread));
  }
  __device__ __forceinline__ int lane() const { return thread % 32; }
  __device__ __forceinline__ int warp() const { return thread / 32; }
  // mma fragments: rows quad and quad + 8, columns pair and pair + 1
  __device__ __forceinline__ int quad() const { return lane() / 4; }
  __device__ __forceinline__ int pair() const { return lane() % 4 * 2; }
  // logits: which columns, tokens and rows the warp has
  __device__ __forceinline__ int column_warp() const { return warp() % S::column_warps; }
  __device__ __forceinline__ int token_warp() const { return warp() / S::column_warps % S::token_warps; }
  __device__ __forceinline__ int row_warp() const { return warp() / (S::column_warps * S::token_warps); }
  // softmax: the row, and which of its tokens
  __device__ __forceinline__ int soft_row() const { return thread / S::row_threads; }
  __device__ __forceinline__ int soft_lane() const { return thread % S::row_threads; }
  // loads: the KV row of the tile, and which of its chunks
  __device__ __forceinline__ int copy_row() const { return thread / S::copy_threads; }
  __device__ __forceinline__ int copy_chunk() const { return thread % S::copy_threads; }
};

// Where the loop stands, the same in all threads.
struct alignas(16) Progress {
  int index, tile, end_tile;            // piece and tile of the values
  int next_index, next_tile;            // of the logits
  int load_index, load_tile, load_end;  // of the loads
  int stage, next_stage;                // of the values, of the logits
  int free_stage;                       // of the tile before the values': to be filled; -1 before the second tile
  int parity;                           // of the values' tile
  int end_index, member;                // behind the worker's last piece, and which row block of a bundle it has
  int addressed_tile;                   // up to which the loads' row addresses are known
  const Piece* pieces;
};

// Where a KV row lies in memory; latent == nullptr: past the end of the request.
struct alignas(16) RowAddress {
  const uint16_t *latent, *rope;
};

template <class C>
struct Smem {
  uint16_t kv[C::stages][C::block_n][C::d_qk + 8];
  uint16_t p[2][C::block_rows][C::block_n + 8];  // by parity of the tile
  float logits[Shape<C>::column_warps][C::block_rows][C::block_n + 8];
  // Per row, and but for the last per stage of the tile: what O must be multiplied by before P V is added; one over the sum of P,
  // written with the last tile of a piece; the max that P is relative to; how many KV tokens the row sees.
  float rescale[C::stages][C::block_rows], inv_sum[C::stages][C::block_rows], row_max[C::stages][C::block_rows];
  float visible[C::block_rows];
  RowAddress addresses[Shape<C>::address_rows];  // of the tiles to be loaded next
  // While O and Q need all registers: the progress, a copy per warp so that no barrier is needed, and the threads' row sums.
  struct Parked {
    Progress at;
    float row_sum[32];
  } parked[Shape<C>::tight ? C::warps : 0];
};

template <class C, int SmemBytes>
__device__ __forceinline__ void decode(const DecodeParams& p) {
  using T = typename C::Element;
  using S = Shape<C>;
  static_assert(sizeof(Smem<C>) == SmemBytes, "the smem column of variants.inc must be sizeof(Smem)");
  extern __shared__ __align__(16) unsigned char smem_bytes[];
  const uint32_t smem = shared_address(smem_bytes);
  constexpr int kv_row = (C::d_qk + 8) * 2, p_row = (C::block_n + 8) * 2, logits_row = (C::block_n + 8) * 4;  // bytes
  auto kv_at = [&](int stage, int token, int column) {
    return smem + offsetof(Smem<C>, kv) + (stage * C::block_n + token) * kv_row + column * 2;
  };
  auto p_at = [&](int parity, int row, int token) {
    return smem + offsetof(Smem<C>, p) + (parity * C::block_rows + row) * p_row + token * 2;
  };
  auto logits_at = [&](int column_warp, int row, int token) {
    return smem + offsetof(Smem<C>, logits) + (column_warp * C::block_rows + row) * logits_row + token * 4;
  };
  auto row_offset = [](int stage, int row) { return (stage * C::block_rows + row) * 4; };
  auto rescale_at = [&](int stage, int row) { return smem + offsetof(Smem<C>, rescale) + row_offset(stage, row); };
  auto inv_sum_at = [&](int stage, int row) { return smem + offsetof(Smem<C>, inv_sum) + row_offset(stage, row); };
  auto row_max_at = [&](int stage, int row) { return smem + offsetof(Smem<C>, row_max) + row_offset(stage, row); };
  auto visible_at = [&](int row) { return smem + offsetof(Smem<C>, visible) + row * 4; };

  Place<C> me{static_cast<int>(threadIdx.x)};
  const schedule::PlanView plan = schedule::view(p.plan, p.num_workers);
  const PlanWorker worker = plan.workers[blockIdx.x];
  Progress at{};
  at.free_stage = -1;
  at.pieces = plan.pieces;
  at.end_index = worker.end_piece;
  at.member = worker.member;

  auto first_row_of = [&](const Piece& piece) { return piece.first_row + at.member * C::block_rows; };
  auto num_rows_of =
      [&](const Piece& piece) {  // that exist of this worker's block; may be none, or more than the block has
        return piece.num_tokens * p.lengths.h_q - first_row_of(piece);
      };
  auto len_of = [&](const Piece& piece) {  // a plan may have been made for a longer block table
    return static_cast<int>(min(int64_t{piece.len}, p.lengths.max_len));
  };
  // This worker's next piece at or after number `index`, or end_index. Others hold no row block for it, or no tile.
  auto next_piece_at = [&](int index) {
    while (index < at.end_index &&
           (num_rows_of(at.pieces[index]) <= 0 || at.pieces[index].first_tile >= at.pieces[index].end_tile))
      ++index;
    return warp_uniform(index);
  };

  float row_sum = 0.f;  // of P over this thread's tokens
  using Parked = typename Smem<C>::Parked;
  auto parked = [&] { return smem + offsetof(Smem<C>, parked) + me.warp() * sizeof(Parked); };
  auto park = [&] {
    if constexpr (S::tight) {
      if (me.lane() == 0) store_shared_struct(parked(), at);
      __syncwarp();  // all lanes load it back
      store_shared(parked() + offsetof(Parked, row_sum) + me.lane() * 4, row_sum);
    }
  };
  auto unpark = [&] {
    if constexpr (S::tight) {
      load_shared_struct(at, parked());
      row_sum = load_shared(parked() + offsetof(Parked, row_sum) + me.lane() * 4);
    }
  };

  // ---- loading KV. Addresses first: the rows of several tiles at once, a thread each, through the block table ----

  auto address_at = [&](int row) { return smem + offsetof(Smem<C>, addresses) + row * sizeof(RowAddress); };
  auto needs_addresses = [&] { return at.load_index < at.end_index && at.load_tile == at.addressed_tile; };
  auto look_up_page = [&] {  // of the row that this thread is to address
    const Piece& piece = at.pieces[at.load_index];
    const int token = at.load_tile * C::block_n + me.thread;
    if (me.thread >= S::address_rows || token >= len_of(piece)) return -1;
    return max(0, p.block_table[piece.request * p.block_table_stride + divide(token, p.by_page_size)]);
  };
  auto write_address = [&](int page) {
    const int token = at.load_tile * C::block_n + me.thread;
    const int slot = token - divide(token, p.by_page_size) * p.page_size;
    RowAddress row{};
    if (page >= 0) {
      page = min(page, p.num_pages - 1);  // whatever the table says, the read stays inside the pool
      row.latent =
          static_cast<const uint16_t*>(p.latent) + page * p.latent_strides.page + slot * p.latent_strides.token;
      row.rope = static_cast<const uint16_t*>(p.rope) + page * p.rope_strides.page + slot * p.rope_strides.token;
    }
    if (me.thread < S::address_rows) store_shared_struct(address_at(me.thread), row);
    at.addressed_tile = at.load_tile + S::address_rows / C::block_n;
  };
  auto begin_load_piece = [&](int index) {
    at.load_index = index;
    if (index == at.end_index) return;
    at.addressed_tile = at.load_tile = warp_uniform(at.pieces[index].first_tile);
    at.load_end = warp_uniform(at.pieces[index].end_tile);
  };
  // Each thread copies part of one row. Its address registers are returned: reused at once, they would make the warp wait until
  // the load-store unit has taken all copies.
  struct Copy {
    const uint16_t *latent, *rope;
    uint32_t to;
  };
  auto load_tile_into = [&](int stage) {
    Copy copy{};
    if (at.load_index < at.end_index) {
      RowAddress row;
      const int tiles_left = at.addressed_tile - at.load_tile;
      load_shared_struct(row, address_at(S::address_rows - tiles_left * C::block_n + me.copy_row()));
      const bool exists = row.latent != nullptr;  // if not, zeros: whatever lies there, NaN too, must not reach O
      copy.latent = (exists ? row.latent : static_cast<const uint16_t*>(p.latent)) + me.copy_chunk() * 8;
      copy.rope = (exists ? row.rope : static_cast<const uint16_t*>(p.rope)) + me.copy_chunk() * 8;
      copy.to = kv_at(stage, me.copy_row(), me.copy_chunk() * 8);
      constexpr int step = S::copy_threads * 16, rope_chunks = S::row_chunks - S::v_chunks;
      constexpr int rope_copies = rope_chunks / S::copy_threads, rope_rest = rope_chunks % S::copy_threads;
      cp_async_strided<S::v_chunks / S::copy_threads, step>(copy.to, copy.latent, exists);
      cp_async_strided<rope_copies, step>(copy.to + S::v_chunks * 16, copy.rope, exists);
      if (me.copy_chunk() < rope_rest) cp_async_16<rope_copies * step>(copy.to + S::v_chunks * 16, copy.rope, exists);
      if (++at.load_tile == at.load_end) begin_load_piece(next_piece_at(at.load_index + 1));
    }
    cp_async_commit();  // one group per tile, also when empty: cp_async_wait counts them
    return copy;
  };

  // ---- queries: fragments of this warp's 16 rows and its share of d_qk ----

  // Of k-steps column_warp, column_warp + column_warps, ..., so that all warps turn from the latent to RoPE at once.
  uint32_t q[S::warp_k_steps][4];
  auto has_k_step = [&](int k) {  // false in the last round if the warps do not divide the steps
    return (k + 1) * S::column_warps <= S::k_steps || k * S::column_warps + me.column_warp() < S::k_steps;
  };
  auto load_q = [&](const Piece& piece) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block_row = me.row_warp() * 16 + half * 8 + me.quad(), row = first_row_of(piece) + block_row;
      const int token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
      const int column = me.column_warp() * 16 + me.pair();
      const auto* nope = static_cast<const uint16_t*>(p.q_nope) + piece.request * p.q_nope_strides.batch +
                         (piece.first_token + token) * p.q_nope_strides.token + head * p.q_nope_strides.head + column;
      const auto* rope = static_cast<const uint16_t*>(p.q_rope) + piece.request * p.q_rope_strides.batch +
                         (piece.first_token + token) * p.q_rope_strides.token + head * p.q_rope_strides.head + column;
#pragma unroll
      for (int k = 0; k < S::warp_k_steps; ++k) {
        const int step = k * S::column_warps * 16;
        const auto* from = step < C::d_v ? nope + step : rope + step - C::d_v;
        const bool exists = block_row < num_rows_of(piece) && has_k_step(k);
        q[k][half] = exists ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0;
        q[k][half + 2] = exists ? __ldg(reinterpret_cast<const uint32_t*>(from + 8)) : 0;
      }
    }
  };

  // ---- logits: this warp's rows x tokens, summed over its columns ----

  auto compute_logits = [&](int stage) {
    float s[S::logit_chains][S::warp_tokens / 8][4] = {};
    const int token = me.lane() % 8 + (S::warp_tokens >= 16 ? me.lane() / 16 * 8 : 0), column = me.lane() / 8 % 2 * 8;
    const uint32_t k_tile = kv_at(stage, me.token_warp() * S::warp_tokens + token, me.column_warp() * 16 + column);
#pragma unroll
    for (int k = 0; k < S::warp_k_steps; ++k) {
      if (!has_k_step(k)) break;
      auto& chain = s[k % S::logit_chains];
      const uint32_t k_step = k_tile + k * S::column_warps * 32;
      if constexpr (S::warp_tokens == 8) {
        uint32_t b[2];
        ldmatrix_x2(b, k_step);
        mma_16x8x16<T>(chain[0], q[k], b[0], b[1]);
      } else {
#pragma unroll
        for (int n = 0; n < S::warp_tokens / 16; ++n) {
          uint32_t b[4];
          ldmatrix_x4(b, k_step + n * 16 * kv_row);
          mma_16x8x16<T>(chain[2 * n], q[k], b[0], b[1]);
          mma_16x8x16<T>(chain[2 * n + 1], q[k], b[2], b[3]);
        }
      }
    }
    const uint32_t to =
        logits_at(me.column_warp(), me.row_warp() * 16 + me.quad(), me.token_warp() * S::warp_tokens + me.pair());
#pragma unroll
    for (int n = 0; n < S::warp_tokens / 8; ++n) {
#pragma unroll
      for (int c = 1; c < S::logit_chains; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][n][i] += s[c][n][i];
      store_shared(to + n * 32, s[0][n][0], s[0][n][1]);
      store_shared(to + n * 32 + 8 * logits_row, s[0][n][2], s[0][n][3]);
    }
  };

  // ---- softmax: neighbouring threads own a row ----

  auto begin_rows = [&](const Piece& piece, int stage_before) {  // the stage before that of the piece's first tile
    const int token = divide(first_row_of(piece) + me.soft_row(), p.by_h_q), len = len_of(piece);
    const int visible = p.causal ? min(len, len - piece.num_tokens + token + 1) : len;
    __syncwarp();  // the row's threads have read what they needed of the piece before
    if (me.soft_lane() == 0) {
      store_shared(row_max_at(stage_before, me.soft_row()), kNegInf);
      store_shared(visible_at(me.soft_row()), __int_as_float(visible));
    }
    __syncwarp();  // they may read those of this piece
  };
  struct Logits {
    float part[S::column_warps][S::row_tokens];
    float row_max;
    int seen;  // this many of the thread's tokens, or fewer
  };
  auto load_logits = [&](int tile, int stage_before) {
    Logits logits;
#pragma unroll
    for (int c = 0; c < S::column_warps; ++c)
      load_shared(logits.part[c], logits_at(c, me.soft_row(), me.soft_lane() * S::row_tokens));
    logits.row_max = load_shared(row_max_at(stage_before, me.soft_row()));
    logits.seen =
        __float_as_int(load_shared(visible_at(me.soft_row()))) - tile * C::block_n - me.soft_lane() * S::row_tokens;
    return logits;
  };
  // Leaves P and the rescale factors of a tile. Returns the sum of P over the thread's tokens, and by what all before must be
  // multiplied.
  struct Sum {
    float factor, sum;
  };
  auto softmax_tile = [&](const Logits& logits, int stage, int parity) {
    float x[S::row_tokens];
#pragma unroll
    for (int i = 0; i < S::row_tokens; ++i) {
      float sum = logits.part[0][i];
#pragma unroll
      for (int c = 1; c < S::column_warps; ++c) sum += logits.part[c][i];
      x[i] = i < logits.seen ? sum * p.scale_log2 : kNegInf;
    }
    float tile_max = x[0];
#pragma unroll
    for (int i = 1; i < S::row_tokens; ++i) tile_max = fmaxf(tile_max, x[i]);
    tile_max = lanes_max<S::row_threads>(tile_max);

    // P may exceed 1 by up to 2^8: the sum undoes it exactly, and O is seldom rescaled.
    float row_max = logits.row_max;
    const bool grew = tile_max > (row_max == kNegInf ? kNegInf : row_max + 8.f);
    Sum result{grew ? exp2_fast(row_max - tile_max) : 1.f, 0.f};
    if (grew) row_max = tile_max;
    const float base = row_max == kNegInf ? 0.f : row_max;  // a row that sees nothing yet: P = 0
#pragma unroll
    for (int i = 0; i < S::row_tokens; ++i) {
      x[i] = exp2_fast(x[i] - base);
      result.sum += x[i];
    }
    store_shared_as<T>(p_at(parity, me.soft_row(), me.soft_lane() * S::row_tokens), x);
    if (me.soft_lane() == 0) {
      store_shared(rescale_at(stage, me.soft_row()), result.factor);
      store_shared(row_max_at(stage, me.soft_row()), row_max);
    }
    return result;
  };
  auto finish_rows = [&](const Piece& piece, int stage) {
    const float sum = lanes_sum<S::row_threads>(row_sum);
    if (me.soft_lane() != 0) return;
    store_shared(inv_sum_at(stage, me.soft_row()), sum == 0.f ? 0.f : 1.f / sum);
    if (me.soft_row() >= num_rows_of(piece)) return;
    const float lse2 = lse2_of(load_shared(row_max_at(stage, me.soft_row())), sum);
    if (piece.partial_slot >= 0) {
      p.lse2_partial[int64_t{piece.partial_slot + at.member} * C::block_rows + me.soft_row()] = lse2;
    } else if (p.lse) {
      const int row = first_row_of(piece) + me.soft_row(), token = divide(row, p.by_h_q),
                head = row - token * p.lengths.h_q;
      p.lse[piece.request * p.lse_strides.batch + (piece.first_token + token) * p.lse_strides.token +
            head * p.lse_strides.head] = lse2 * kLn2;
    }
  };

  // ---- values: all rows x this warp's columns ----

  float o[S::row_warps][S::warp_v / 8][4] = {};

  auto rescale_o = [&](int stage) {
#pragma unroll
    for (int m = 0; m < S::row_warps; ++m) {
      const float upper = load_shared(rescale_at(stage, m * 16 + me.quad()));
      const float lower = load_shared(rescale_at(stage, m * 16 + me.quad() + 8));
#pragma unroll
      for (int n = 0; n < S::warp_v / 8; ++n) {
        o[m][n][0] *= upper, o[m][n][1] *= upper;
        o[m][n][2] *= lower, o[m][n][3] *= lower;
      }
    }
  };
  auto add_values = [&](int stage, int parity) {
    const uint32_t p_tile = p_at(parity, me.lane() % 16, me.lane() / 16 * 8);
    const uint32_t v_tile = kv_at(stage, me.lane() % 16, me.warp() * S::warp_v + me.lane() / 16 * 8);
#pragma unroll
    for (int k = 0; k < C::block_n / 16; ++k) {
      uint32_t a[S::row_warps][4];
#pragma unroll
      for (int m = 0; m < S::row_warps; ++m) ldmatrix_x4(a[m], p_tile + m * 16 * p_row + k * 32);
#pragma unroll
      for (int n = 0; n < S::warp_v / 16; ++n) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, v_tile + k * 16 * kv_row + n * 32);
#pragma unroll
        for (int m = 0; m < S::row_warps; ++m) {
          mma_16x8x16<T>(o[m][2 * n], a[m], b[0], b[1]);
          mma_16x8x16<T>(o[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  };
  auto store_o = [&](const Piece& piece, int stage) {
#pragma unroll
    for (int half = 0; half < 2 * S::row_warps; ++half) {
      me.forget();
      const int block_row = half * 8 + me.quad(), row = first_row_of(piece) + block_row;
      if (block_row >= num_rows_of(piece)) continue;
      const float scale = load_shared(inv_sum_at(stage, block_row));
      const int token = divide(row, p.by_h_q), head = row - token * p.lengths.h_q;
      const int column = me.warp() * S::warp_v + me.pair();
      float* partial =
          p.o_partial + (int64_t{piece.partial_slot + at.member} * C::block_rows + block_row) * C::d_v + column;
      auto* final = static_cast<uint16_t*>(p.out) + piece.request * p.out_strides.batch +
                    (piece.first_token + token) * p.out_strides.token + head * p.out_strides.head + column;
#pragma unroll
      for (int n = 0; n < S::warp_v / 8; ++n) {
        const float x = o[half / 2][n][half % 2 * 2] * scale, y = o[half / 2][n][half % 2 * 2 + 1] * scale;
        if (piece.partial_slot >= 0) {
          *reinterpret_cast<float2*>(partial + n * 8) = make_float2(x, y);
        } else {
          *reinterpret_cast<uint32_t*>(final + n * 8) = pack2<T>(x, y);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < S::row_warps; ++m)
#pragma unroll
      for (int n = 0; n < S::warp_v / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[m][n][i] = 0.f;
  };

  // ---- prologue: fill the ring, logits and P of the first tile ----

  at.index = next_piece_at(worker.first_piece);
  if (at.index == at.end_index) return;
  begin_load_piece(at.index);
#pragma unroll 1
  for (int i = 0; i < C::stages; ++i) {
    if (needs_addresses()) {
      __syncthreads();  // the addresses before have been read
      write_address(look_up_page());
      __syncthreads();  // the addresses are there
    }
    load_tile_into(i);
  }
  at.tile = warp_uniform(at.pieces[at.index].first_tile);
  at.end_tile = warp_uniform(at.pieces[at.index].end_tile);
  load_q(at.pieces[at.index]);
  begin_rows(at.pieces[at.index], C::stages - 1);
  cp_async_wait<C::stages - 1>();
  __syncthreads();  // the first tile has landed
  compute_logits(0);
  __syncthreads();  // its partial logits are there
  row_sum = softmax_tile(load_logits(at.tile, C::stages - 1), 0, 0).sum;
  if (at.tile + 1 == at.end_tile) finish_rows(at.pieces[at.index], 0);

  // ---- the loop: logits, then softmax of the next tile, and beside the one or the other the values of this tile ----
  // Beside the softmax they fill its waits. Where O and Q fill the registers they go with the logits instead, and the softmax
  // stands alone.

  bool grew = false;
  while (true) {
    me.forget();
    at.next_stage = at.stage + 1 == C::stages ? 0 : at.stage + 1;
    at.next_index = at.index;
    at.next_tile = at.tile + 1;
    bool last = at.next_tile == at.end_tile;  // of its piece
    if (last) {
      at.next_index = next_piece_at(at.index + 1);
      if (at.next_index < at.end_index) {
        const Piece& piece = at.pieces[at.next_index];
        at.next_tile = warp_uniform(piece.first_tile);
        begin_rows(piece, at.stage);
        load_q(piece);  // in flight while the tile is waited for
      }
    }
    const bool address = needs_addresses();
    const int page = address ? look_up_page() : 0;  // in flight likewise
    const int stage = at.stage, next_stage = at.next_stage, parity = at.parity;
    park();
    cp_async_wait<C::stages - (S::values_beside_logits ? 2 : 3)>();
    const bool rescale = __syncthreads_or(grew);  // the next tile has landed; P and the factors of this tile are there
    compute_logits(next_stage);  // after the very last tile of what happens to be there; nobody reads the outcome
    if constexpr (S::values_beside_logits) {
      if (rescale) rescale_o(stage);
      add_values(stage, parity);
    }
    unpark();
    if (address) write_address(page);  // those before were read ahead of the barrier above
    __syncthreads();                   // the next tile's partial logits are there, and the addresses

    const Logits logits = load_logits(at.next_tile, at.stage);
    if constexpr (!S::values_beside_logits) {
      if (rescale) rescale_o(stage);
      add_values(stage, parity);
    }
    const Sum sum = softmax_tile(logits, at.next_stage, at.parity ^ 1);
    const int free_stage = S::values_beside_logits ? at.stage : at.free_stage;  // nobody reads it any more
    Copy copy{};
    if (free_stage >= 0) copy = load_tile_into(free_stage);

    last = at.tile + 1 == at.end_tile;
    row_sum = (last ? 0.f : row_sum * sum.factor) + sum.sum;
    grew = !last && sum.factor != 1.f;
    if (last) {
      store_o(at.pieces[at.index], at.stage);
      if (at.next_index >= at.end_index) break;
      at.index = at.next_index;
      at.end_tile = warp_uniform(at.pieces[at.index].end_tile);
    }
    at.tile = at.next_tile;
    if (at.tile + 1 == at.end_tile) finish_rows(at.pieces[at.index], at.next_stage);
    at.free_stage = at.stage;
    at.stage = at.next_stage;
    at.parity ^= 1;
    if constexpr (!S::tight) asm volatile("" ::"l"(copy.latent), "l"(copy.rope), "r"(copy.to));
  }
}

}  // namespace mla::sm80

MLA_ENTRIES(mla::sm80::decode)
